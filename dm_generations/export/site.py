"""A folder for any static host: the page as `index.html`, its manifest, and images as WebP with thumbnails.

Several archives are shown side by side: each is exported into a folder of its own, and one manifest lists them all.
"""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dm_generations.archive.selection import Selection
from dm_generations.errors import UserError
from dm_generations.export.exporter import ExportOptions
from dm_generations.export.manifest import MANIFEST_VERSION, write_manifest
from dm_generations.export.output_file import Encoding
from dm_generations.export.plan import Layout

INDEX = "index.html"


def site_options(
    out_dir: Path, selection: Selection, codec: str | None, quality: int | None, overwrite: bool
) -> ExportOptions:
    """Return how an archive is exported into its folder.

    Args:
        out_dir: The folder.
        selection: Which images.
        codec: See ExportOptions.
        quality: 1 to 100; None is lossless.
        overwrite: Write images that are there, too.
    """
    return ExportOptions(
        out_dir=out_dir,
        layout=Layout("images", 1, 1),
        selection=selection,
        codec=codec,
        overwrite=overwrite,
        encoding=Encoding("webp", quality),
        has_thumbnails=True,
        page=INDEX,
    )


def write_joint_page(out_dir: Path, manifests: Mapping[str, dict[str, Any]], names: Sequence[str]) -> Path:
    """Write the page of several archives; return its path.

    Args:
        out_dir: Their common folder.
        manifests: By folder in it, in the order of the archives.
        names: Of the archives.

    Raises:
        UserError: It cannot be written.
    """
    try:
        return write_manifest(out_dir, join_manifests(manifests, names), INDEX)
    except OSError as error:
        raise UserError(f"cannot write the page into {out_dir}: {error.strerror}") from error


_KEPT_COLUMNS = ("name", "position", "score", "tokenized_score", "log_prob")


class _Union:
    """Lists of several manifests as one, without repeats."""

    def __init__(self, values: Sequence[Hashable] = ()):
        self.positions: dict[Hashable, int] = {}
        self.add(values)

    def add(self, values: Sequence[Hashable]) -> list[int]:
        """Add values; return the position of each."""
        return [self.positions.setdefault(value, len(self.positions)) for value in values]


def join_manifests(manifests: Mapping[str, dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Return one manifest of several. Equal prompts of different archives are one, so prompts have new ids.

    Args:
        manifests: See `manifest`; of mode "images", with thumbnails of one size or none, by folder.
        names: Of the archives.
    """
    prompts, sc_prompts, seeds, provenances = _Union(), _Union(), _Union(), _Union()
    groups: dict[str, list] = {}
    images: dict[str, list] = {}
    md5s, times = [], []
    for number, (folder, manifest) in enumerate(manifests.items()):
        columns, count = manifest["images"], sum(manifest["groups"]["count"])
        own_prompts = prompts.add([text for _, text in manifest["prompts"]])
        own_sc_prompts = sc_prompts.add([text for _, text in manifest["sc_prompts"]])
        own = dict(manifest["groups"])
        own["prompt"] = [own_prompts[position] for position in own["prompt"]]
        own["sc_prompt"] = [own_sc_prompts[position] for position in own["sc_prompt"]]
        own["prefix"] = [f"{folder}/{prefix}" for prefix in own["prefix"]]
        own["archive"] = [number] * len(own["count"])
        own_images = {name: _expand(columns[name], count) for name in _KEPT_COLUMNS}
        for name, union in (("seed", seeds), ("provenance", provenances)):
            positions = union.add([tuple(value) for value in manifest[f"{name}s"]])
            own_images[name] = [positions[position] for position in _expand(columns[name], count)]
        for target, source in ((groups, own), (images, own_images)):
            for name, values in source.items():
                target.setdefault(name, []).extend(values)
        md5s.append(columns["md5"])
        start = columns["time"]["start"]
        seconds = _expand(columns["time"]["seconds"], count)
        times += [None if second is None else start + second for second in seconds]
    thumbnails = [manifest.get("thumbnails") for manifest in manifests.values()]
    is_one_size = all(one == thumbnails[0] for one in thumbnails) and thumbnails[0]
    first_time = min((time for time in times if time is not None), default=0)
    seconds = [None if time is None else time - first_time for time in times]
    return {
        "version": MANIFEST_VERSION,
        "mode": "images",
        "archives": list(names),
        **({"thumbnails": thumbnails[0]} if is_one_size else {}),
        "prompts": _numbered(prompts),
        "sc_prompts": _numbered(sc_prompts),
        "seeds": list(seeds.positions),
        "provenances": list(provenances.positions),
        "groups": groups,
        "images": {
            **images,
            "md5": None if None in md5s else "".join(md5s),
            "time": {"start": first_time, "seconds": seconds},
        },
    }


def _numbered(union: _Union) -> list[list]:
    return [[number, text] for number, text in enumerate(union.positions, 1)]


def _expand(column: Any, count: int) -> list:
    """Return a column of a manifest, which may be one value for all, as a list."""
    return column if isinstance(column, list) else [column] * count
