"""`manifest.js`: which images a folder holds, for `samplebrowser.html` next to it.

A page opened from disk may load scripts and images but not JSON, so the manifest is a script of one
statement, `window.DM_MANIFEST = {...};`, in ASCII:

    version      2
    mode         "images" (a file holds one image) or "gallery" (a file holds many)
    archives     [names of the archives that the images come from, without their folders]
    prompts      [[prompt_id, prompt or null], ...]            each listed once
    sc_prompts   [[sc_prompt_id, sc_prompt or null], ...]      null: the model's own empty prompt
    seeds        [[key0, key1], ...]                           each listed once, in the order of sampling
    provenances  [[model, sampler_version, init_count, dtype, codec, codec_name], ...]    each listed once: the name of
                 the model that sampled an image, "" for the one that ships and null for one that is not known; which
                 noise it sampled with; the number of initial tokens; the dtype of its activations; and the first 16
                 hex digits of the sha256 of the codec that its tokens are of, and its name, as that of the model
    thumbnails   if there are any {"folder": beside the images, "side": their pixels a side}; they have the same names
    groups       columns: prompt, sc_prompt, top_k, top_p, temperature, cond_scale, prefix, suffix, count; of several
                 archives also archive, a position in `archives`
    images       columns: name, position, score, and of mode "images" seed, provenance, md5, time, tokenized_score,
                 log_prob; group after group

A column is a list, or one value where all are equal. `prompt`, `sc_prompt`, `seed` and `provenance` are positions in
the lists above; `count` is the number of files of a group, best first. The path of a file, relative to the manifest and
with "/" between its parts, is prefix + name + suffix: they only save repeating what paths share.

    position     rank of the image in its group, or page of the gallery, from 0
    score        CLIP logits of image and prompt as typed, or null; of a gallery a list of them, best first
    tokenized_score    the same for the prompt as the model read it, or null; log_prob: of the tokens, or null
    md5          of the tokens: all digests in base 64, 22 characters each, as one text. Null: not known.
    time         when sampling ended: {"start": UTC Unix seconds, "seconds": column of whole seconds since, or null}

Of images by a diffusion decoder there is also `decoder`, an object with its name, sha256, steps, eta, clip_denoised and
seed, and in mode "images" a column `decoding`, the number of an image among those of its row, from 0.

top_k 0 and top_p 1.0 mean "off"; numbers that JSON has no form for (NaN, infinities) are null. The page also opens
version 1, which listed rows in place of columns, without md5, time and what is on this list since.
"""

import base64
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any

from dm_generations.archive import ImageRow, ModelInfo
from dm_generations.archive.records import quantvec_md5
from dm_generations.atomic_io import write_atomic
from dm_generations.export.plan import GroupPlan, Layout, Target
from dm_generations.export.writers import fingerprint
from dm_generations.models.loading import is_other_embedded
from dm_generations.paths import PAGE, model_label, shipped

MANIFEST_VERSION = 2
MANIFEST = "manifest.js"
THUMBNAILS = "thumbs"
HASH_DIGITS = 16  # of a codec's sha256
MANIFEST_START = "window.DM_MANIFEST = "

_USUAL = ("", 1, 0, "float32")


@dataclass(frozen=True, slots=True)
class _File:
    """A file of images of one group. `file` is relative to the output folder, with "/" between parts."""

    file: str
    prompt_id: int
    prompt: str | None
    sc_prompt_id: int
    sc_prompt: str | None
    top_k: int
    top_p: float
    temperature: float
    cond_scale: float


@dataclass(frozen=True, slots=True)
class ImageEntry(_File):
    """One image in a file of its own.

    Attributes:
        model: The name of the one that sampled it; None: not known.
        row_id: In the archive; seeds are listed in this order.
        md5: Hex, of its tokens.
        time: When its sampling ended, in UTC Unix seconds.
        decoder: What decoded it in place of its codec's own decoder, see `describe_decoder`.
        decoding: Which of its row's decodings it is, from 0.
        codec: The first hex digits of the sha256 of the codec that the tokens are of.
        codec_name: Its name.
        tokenized_score: CLIP logits of the image and the prompt as the model read it.
        log_prob: Of the tokens.
    """

    rank: int
    score: float | None
    key0: int
    key1: int
    model: str | None
    sampler_version: int | None = None
    init_count: int = 0
    dtype: str | None = None
    row_id: int = 0
    md5: str | None = None
    time: float | None = None
    decoder: str | None = None
    decoding: int = 0
    codec: str | None = None
    codec_name: str | None = None
    tokenized_score: float | None = None
    log_prob: float | None = None

    @property
    def position(self) -> int:
        """Among the files of its group."""
        return self.rank

    def facts(self) -> list[Any]:
        """Return what tells it from another image; the journals of output folders have digests of it."""
        decoded = [] if self.decoder is None else [self.decoder, self.decoding]
        return [round_score(self.score), self.key0, self.key1, *self._provenance(), *decoded]

    def _provenance(self) -> list[int | str | None]:
        """Return what sampling it again needs apart from settings and key; for the shipped model mostly nothing."""
        if self.model is None or self.sampler_version is None:
            return [None]
        values: list[int | str | None] = [
            model_label(self.model),
            self.sampler_version,
            self.init_count,
            self.dtype or "float32",
        ]
        while values and values[-1] == _USUAL[len(values) - 1]:
            values.pop()
        return values


@dataclass(frozen=True, slots=True)
class GalleryEntry(_File):
    """One file of several images; `scores` has one value for each, best first."""

    scores: tuple[float | None, ...]
    page: int = 0
    identity: str | None = None  # tells these images from others, where there are no scores
    decoder: str | None = None

    @property
    def position(self) -> int:
        """Among the files of its group."""
        return self.page

    def facts(self) -> list[Any]:
        """Return what tells it from another file; the journals of output folders have digests of it."""
        return [list(map(round_score, self.scores)), *filter(None, [self.identity, self.decoder])]


Entry = ImageEntry | GalleryEntry


def describe_decoder(decoder: Mapping[str, Any]) -> str:
    """Return 8 hex digits that differ for decoders whose images differ; the name of one does not matter."""
    return fingerprint([*sorted(item for item in decoder.items() if item[0] != "name")])


def make_entry(
    plan: GroupPlan,
    target: Target,
    path: str,
    members: list[ImageRow],
    models: Mapping[int, ModelInfo],
    layout: Layout,
    decoder: Mapping[str, Any] | None = None,
) -> Entry:
    """Return what the page says of a file.

    Args:
        plan: The group of its images.
        target: The file.
        path: Where the file is: the target's path, or its incomplete one.
        members: The rows of the target's ranks.
        models: Those of the archive, by id.
        layout: Of all files.
        decoder: What decodes in place of the codec's own decoder.
    """
    key, params = plan.key, plan.key.params
    decoded_by = None if decoder is None else describe_decoder(decoder)
    settings = (params.top_k, params.top_p, params.temperature, params.cond_scale)
    shared = (path, key.prompt_id, plan.prompt, key.sc_prompt_id, plan.sc_prompt, *settings)
    if target.incomplete_path:
        identity = fingerprint((row.key0, row.key1, row.quantvec_md5) for row in members)
        scores = tuple(map(finite_score, members))
        return GalleryEntry(*shared, scores=scores, page=target.page, identity=identity, decoder=decoded_by)
    (row,) = members
    names = ("key0", "key1", "sampler_version", "init_count", "dtype")
    provenance: dict[str, Any] = {name: json_value(getattr(row, name)) for name in names}
    generator = None if row.generator_id is None else models.get(row.generator_id)
    model = _find_generator_name(generator)
    codec = None if row.codec_id is None else models.get(row.codec_id)
    return ImageEntry(
        *shared,
        rank=layout.rank(target.ranks.start),
        score=finite_score(row),
        model=model,
        row_id=row.id,
        md5=quantvec_md5(row.quantvec),
        time=_finite(row.time_end),
        decoder=decoded_by,
        decoding=layout.decoding(target.ranks.start),
        codec=None if codec is None else codec.sha256[:HASH_DIGITS],
        codec_name=None if codec is None else codec.name,
        tokenized_score=_finite(row.clip_score_tokenized),
        log_prob=_finite(row.log_prob),
        **provenance,
    )


def finite_score(row: ImageRow) -> float | None:
    """Return the score by the prompt as typed; None if there is none, or it is not a finite number."""
    score = row.clip_score_input
    return score if isinstance(score, float) and math.isfinite(score) else None


def json_value(value: object) -> str | int | float | None:
    """Return what JSON has for a value of a 2022 archive, which may be of any type that SQLite stores."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value  # type: ignore[return-value]


def _find_generator_name(model: ModelInfo | None) -> str | None:
    """Return the `--model` that generates an image again; None if it is not known, or its weights have changed."""
    if model is None or is_other_embedded(model.name, model.sha256, "generator"):
        return None
    return model.name


def build_manifest(
    mode: str, archive_name: str, entries: Iterable[Entry], decoder: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the manifest described above.

    Args:
        mode: "images" or "gallery".
        archive_name: Without its folder.
        entries: Files that exist. Groups keep the order in which they first appear; files of one are sorted here.
        decoder: What decoded them in place of the codec's own decoder.
    """
    if mode not in ("images", "gallery"):
        raise ValueError(f"mode is {mode!r}, expected 'images' or 'gallery'")
    prompts: dict[int, str | None] = {}
    sc_prompts: dict[int, str | None] = {}
    entries_by_group: dict[tuple, list[Entry]] = {}
    for entry in entries:
        prompts.setdefault(entry.prompt_id, entry.prompt)
        sc_prompts.setdefault(entry.sc_prompt_id, entry.sc_prompt)
        settings = (entry.top_k, entry.top_p, entry.temperature, entry.cond_scale)
        key = (entry.prompt_id, entry.sc_prompt_id, *settings)
        entries_by_group.setdefault(key, []).append(entry)

    prompt_positions = {prompt_id: position for position, prompt_id in enumerate(prompts)}
    sc_prompt_positions = {sc_prompt_id: position for position, sc_prompt_id in enumerate(sc_prompts)}
    groups, names, files = [], [], []
    for (prompt_id, sc_prompt_id, *numbers), members in entries_by_group.items():
        members.sort(key=lambda entry: entry.position)
        prefix, suffix, middles = _split_paths([entry.file for entry in members])
        positions = (prompt_positions[prompt_id], sc_prompt_positions[sc_prompt_id])
        groups.append((*positions, *map(_finite, numbers), prefix, suffix, len(members)))
        names += middles
        files += members
    images = {"name": _column(names), "position": _column([entry.position for entry in files])}
    lists: dict[str, Any] = {"seeds": [], "provenances": []}
    if mode == "gallery":
        images["score"] = [list(map(round_score, entry.scores)) for entry in files]  # type: ignore[union-attr]
    else:
        lists, columns = _image_columns(files)  # type: ignore[arg-type]
        images |= columns
        if decoder is not None:
            images["decoding"] = _column([entry.decoding for entry in files])  # type: ignore[union-attr]
    return {
        "version": MANIFEST_VERSION,
        "mode": mode,
        "archives": [archive_name],
        **({} if decoder is None else {"decoder": dict(decoder)}),
        "prompts": [[prompt_id, text] for prompt_id, text in prompts.items()],
        "sc_prompts": [[sc_prompt_id, text] for sc_prompt_id, text in sc_prompts.items()],
        **lists,
        "groups": {name: [group[i] for group in groups] for i, name in enumerate(_GROUP_COLUMNS)},
        "images": images,
    }


_GROUP_COLUMNS = ("prompt", "sc_prompt", "top_k", "top_p", "temperature", "cond_scale", "prefix", "suffix", "count")


def _image_columns(entries: list[ImageEntry]) -> tuple[dict[str, list], dict[str, Any]]:
    """Return the lists of keys and provenances, and the columns of single images."""
    in_order = sorted(entries, key=lambda entry: entry.row_id)
    keys = list(dict.fromkeys((entry.key0, entry.key1) for entry in in_order))
    provenances = [
        (one.model, one.sampler_version, one.init_count, one.dtype, one.codec, one.codec_name) for one in entries
    ]
    known = list(dict.fromkeys(provenances))
    key_positions = {key: position for position, key in enumerate(keys)}
    known_positions = {provenance: position for position, provenance in enumerate(known)}
    digests = [entry.md5 for entry in entries]
    times = [entry.time for entry in entries]
    start = math.floor(min((time for time in times if time is not None), default=0))
    columns = {
        "score": [round_score(entry.score) for entry in entries],
        "seed": _column([key_positions[entry.key0, entry.key1] for entry in entries]),
        "provenance": _column([known_positions[provenance] for provenance in provenances]),
        "md5": None if None in digests else "".join(map(_base64, digests)),
        "time": {"start": start, "seconds": _column([None if time is None else int(time - start) for time in times])},
        "tokenized_score": _column([round_score(entry.tokenized_score) for entry in entries]),
        "log_prob": _column([round_score(entry.log_prob) for entry in entries]),
    }
    named = [[model_label(model), *rest, model_label(codec_name)] for model, *rest, codec_name in known]
    return {"seeds": [list(key) for key in keys], "provenances": named}, columns


def _base64(digest: str | None) -> str:
    """Return the 22 characters of an MD5 in hex."""
    return base64.b64encode(bytes.fromhex(digest or "")).decode("ascii").rstrip("=")


def _column(values: list) -> Any:
    """Return a column: one value where all are equal."""
    return values[0] if values and values.count(values[0]) == len(values) else values


def write_manifest(out_dir: Path, manifest: dict[str, Any], page: str = PAGE) -> Path:
    """Write `manifest.js` and the page into an existing folder; return the path of the page to open.

    Args:
        out_dir: The folder.
        manifest: See above.
        page: The name of the page.

    Raises:
        OSError: They cannot be written.
        UserError: The page is missing from the installation.
    """
    for name, content in manifest_files(manifest, page).items():
        write_atomic(out_dir / name, content)
    return out_dir / page


def manifest_files(manifest: dict[str, Any], page: str = PAGE) -> dict[str, bytes]:
    """Return `manifest.js` and the page, content by name. Raises UserError if the page is not installed."""
    text = f"{MANIFEST_START}{_script_json(manifest)};\n"
    return {MANIFEST: text.encode("ascii"), page: shipped(PAGE).read_bytes()}


def thumbnail_path(path: str) -> str:
    """Return where the thumbnail of an image is, in a folder beside it."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/{THUMBNAILS}/{name}"


def _split_paths(paths: list[str]) -> tuple[str, str, list[str]]:
    """Return prefix and suffix of paths, and what is between them."""
    prefix = commonprefix(paths)
    rests = [path[len(prefix) :] for path in paths]
    suffix = commonprefix([rest[::-1] for rest in rests])[::-1]
    return prefix, suffix, [rest[: len(rest) - len(suffix)] for rest in rests]


def _finite(value: object) -> float | None:
    """Return a value, which may be of any type in a damaged file, if it is a finite number."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def round_score(score: float | None) -> float | None:
    """Return a score rounded to one digit more than the page shows: the page reads the whole manifest."""
    finite = _finite(score)
    return None if finite is None else round(finite, 3)


def _script_json(value: Any) -> str:
    """Return JSON that is safe as a script: all but ASCII is escaped (U+2028 and lone surrogates too), and `<`."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
