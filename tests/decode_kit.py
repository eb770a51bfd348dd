"""Small archives to decode, and what a decode left behind."""

import hashlib
import json
import sqlite3
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flax.serialization import msgpack_serialize
from flax.traverse_util import unflatten_dict
from PIL import Image

from dm_generations.archive import GroupKey
from dm_generations.export.manifest import MANIFEST_START, Entry
from dm_generations.models.registry import parameter_shapes
from dm_generations.models.vqgan.network import VQGANConfig
from dm_generations.sampling.params import SamplingParams

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_DECODE = GOLDEN / "original_script"  # what the 2022 script read and wrote
GOLDEN_CODEC = min((GOLDEN / "vqgan_jax").glob("*/golden.npz")).parent
SETTINGS = GroupKey(1, 1, SamplingParams(50, cond_scale=10.0))
LAYOUT_2022 = """
CREATE TABLE prompts (id INTEGER PRIMARY KEY, desc TEXT);
CREATE TABLE sc_prompts (id INTEGER PRIMARY KEY, desc TEXT);
CREATE TABLE images (id INTEGER PRIMARY KEY, prompt_id INTEGER, sc_prompt_id INTEGER, top_k INTEGER,
    top_p REAL, temperature REAL, cond_scale REAL, key0 INTEGER, key1 INTEGER, quantvec BLOB,
    quantvec_md5 TEXT, clip_score_input REAL, clip_score_tokenized REAL, time_start REAL, time_end REAL);
INSERT INTO sc_prompts VALUES (1, NULL), (2, 'blurry');
"""


def random_tokens(count: int, length: int, codebook_size: int) -> np.ndarray:
    """(count, length) uint16."""
    return np.random.default_rng(0).integers(codebook_size, size=(count, length), dtype=np.uint16)


def write_archive_2022(path: Path, tokens: np.ndarray, prompts: tuple[str, ...] = ("a boat",)) -> Path:
    """An archive in the 2022 layout: for each prompt the same `tokens`, the best first, ids from 1 on."""
    connection = sqlite3.connect(path)
    connection.executescript(LAYOUT_2022)
    connection.executemany("INSERT INTO prompts VALUES (?, ?)", list(enumerate(prompts, 1)))
    for prompt_id in range(1, len(prompts) + 1):
        for rank, vector in enumerate(tokens):
            blob = vector.astype("<u2").tobytes()
            md5 = hashlib.md5(blob).hexdigest()
            connection.execute(
                "INSERT INTO images VALUES (NULL, ?, 1, 50, 1.0, 1.0, 10.0, 0, ?, ?, ?, ?, 0.0, 0.0, 1.0)",
                (prompt_id, rank, blob, md5, 30.0 - rank),
            )
    connection.commit()
    connection.close()
    return path


def write_codec_2022(folder: Path) -> Path:
    """The VQGAN that the 2022 script was given, in the format of vqgan-jax (tests/golden/original_script/README.md).

    Its weights are made as those of vqgan_jax/a were, one after another from the same seed; it has one residual block
    more a level, so that nearly all come out otherwise.
    """
    values = json.loads((GOLDEN_CODEC / "config.json").read_text()) | {"num_res_blocks": 2}
    normal, weights = np.random.default_rng(101).standard_normal, {}
    for name, shape in parameter_shapes("vqgan", VQGANConfig.from_dict(values)).items():
        weight, leaf = normal(shape), name.rsplit("/", 1)[1]
        if leaf == "kernel":
            is_attention, is_last = "/attn_" in name, name == "decoder/conv_out/kernel"
            gain = (2.0 if "/q/" in name or "/k/" in name else 1.6) if is_attention else 0.625 if is_last else 1.25
            weight *= gain / np.prod(shape[:-1]) ** 0.5
        elif leaf == "bias":
            weight = 0.2 * weight + 0.5 * (name == "decoder/conv_out/bias")
        elif leaf == "scale":
            weight = 1 + 0.3 * weight
        weights[name] = weight.astype(np.float32)
    weights["quantize/embedding/embedding"] = np.load(GOLDEN_DECODE / "codebook.npy")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "flax_model.msgpack").write_bytes(msgpack_serialize(unflatten_dict(weights, sep="/")))
    return folder


def change(path: Path, statement: str, *values: object) -> None:
    """Run one SQL statement on an archive."""
    connection = sqlite3.connect(path)
    connection.execute(statement, values)
    connection.commit()
    connection.close()


def read_images(folder: Path) -> dict[str, np.ndarray]:
    """(H, W, 3) uint8 of each PNG under `folder`, by path with "/"."""
    return {
        path.relative_to(folder).as_posix(): np.asarray(Image.open(path))
        for path in sorted(folder.rglob("*"))
        if path.suffix == ".png"
    }


def all_files(folder: Path) -> dict[str, bytes]:
    """Content of each file under `folder`, hidden ones too, by path with "/"."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def golden_images(folder: str) -> dict[str, np.ndarray]:
    """What the 2022 script wrote into `folder` of the golden archive: (H, W, 3) uint8 by path."""
    found = {}
    with zipfile.ZipFile(GOLDEN_DECODE / "expected.zip") as archive:
        for info in archive.infolist():
            # The zip lacks the flag that says UTF-8, so zipfile takes its names for code page 437.
            name = info.filename if info.flag_bits & 0x800 else info.filename.encode("cp437").decode()
            if name.startswith(f"{folder}/") and name.endswith(".png"):
                with archive.open(info) as file:
                    found[name.removeprefix(f"{folder}/")] = np.asarray(Image.open(file))
    return found


def build_manifest_1(mode: str, archive_name: str, entries: Iterable[Entry]) -> dict[str, Any]:
    """The manifest of version 1, which the journal and the page still read: rows, and no MD5 and time."""
    groups: dict[tuple, list] = {}
    prompts: dict[int, str | None] = {}
    sc_prompts: dict[int, str | None] = {}
    for entry in entries:
        prompts[entry.prompt_id], sc_prompts[entry.sc_prompt_id] = entry.prompt, entry.sc_prompt
        positions = list(prompts).index(entry.prompt_id), list(sc_prompts).index(entry.sc_prompt_id)
        key = (*positions, entry.top_k, entry.top_p, entry.temperature, entry.cond_scale)
        folder, _, name = entry.file.rpartition("/")
        groups.setdefault((*key, folder + "/", ".png"), []).append(
            [name.removesuffix(".png"), entry.position, *entry.facts()]
        )
    return {
        "version": 1,
        "mode": mode,
        "archive": archive_name,
        "prompts": list(map(list, prompts.items())),
        "sc_prompts": list(map(list, sc_prompts.items())),
        "groups": [[*key, sorted(files, key=lambda file: file[1])] for key, files in groups.items()],
    }


def write_manifest_1(folder: Path, manifest: dict[str, Any]):
    (folder / "manifest.js").write_text(f"{MANIFEST_START}{json.dumps(manifest)};\n", encoding="ascii")


def listed_paths(manifest: dict[str, Any]) -> list[str]:
    """The files that a manifest lists."""
    groups, names = manifest["groups"], manifest["images"]["name"]
    ends = zip(groups["prefix"], groups["suffix"], groups["count"], strict=True)
    rows = [(prefix, suffix) for prefix, suffix, count in ends for _ in range(count)]
    names = names if isinstance(names, list) else [names] * len(rows)
    return [prefix + name + suffix for (prefix, suffix), name in zip(rows, names, strict=True)]
