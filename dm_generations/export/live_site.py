"""A site that decodes in the visitor's browser: the archives, the codec as ONNX, and the scripts that run them.

    index.html     the page
    site.json      which files there are, and the codec that they were made for
    archive-1.db   the selected images of the first archive, in the newest format; further ones have further numbers
    codec-*.onnx   tokens (1, L) int32 to pixels (1, H, W, 3) float32 from 0 to 1
    worker.js      reads the archives and decodes, beside the page
    scripts/       onnxruntime-web and sql.js

All but `index.html`, which is written last, may be there from a run that was stopped.
"""

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dm_generations.archive import Archive, merge
from dm_generations.archive.selection import ALL, Selection
from dm_generations.atomic_io import open_locked, remove_stale_temporaries, write_atomic
from dm_generations.errors import UserError, one_line
from dm_generations.export.manifest import HASH_DIGITS
from dm_generations.export.npm import read_scripts
from dm_generations.export.plan import check_codec, is_finished, select_groups
from dm_generations.export.site import INDEX
from dm_generations.export.writers import check_folders, make_folder
from dm_generations.models.loading import Checkpoint, is_other_embedded, load_checkpoint
from dm_generations.paths import PAGE, label_paths, model_label, shipped

SITE, WORKER, SCRIPTS = "site.json", "worker.js", "scripts"
SITE_VERSION = 1
META = '<meta name="site" content="">'  # of the page
_LOCK = ".lock"
_NEW = ".new-"  # begins the name of an archive that is not in its place yet


def export_live_site(
    paths: Sequence[Path], out_dir: Path, selection: Selection, codec: str | None, packages: Path | None
) -> tuple[Path, int]:
    """Write the site of an archive, or of several side by side.

    Args:
        paths: The archives.
        out_dir: The folder.
        selection: Which images.
        codec: See ExportOptions.
        packages: See `read_scripts`.

    Returns:
        The page, and how many images there are.

    Raises:
        UserError: An archive has a bad row, the codec is not one for it, a package is missing, or a file cannot be
            written.
    """
    find_converter()  # before anything takes time
    checkpoint = load_checkpoint(codec, "codec")
    scripts = read_scripts(packages)
    check_folders(out_dir, [SCRIPTS])
    make_folder(out_dir)
    files = [f"archive-{number}.db" for number in range(1, len(paths) + 1)]
    try:
        with open_locked(out_dir / _LOCK), contextlib.ExitStack() as at_end:
            remove_stale_temporaries(out_dir)
            archives, grids, image_count = [], {}, 0
            for path, name, file in zip(paths, label_paths(paths), files, strict=True):
                new_archive = out_dir / (_NEW + file)
                new_archive.unlink(missing_ok=True)
                at_end.callback(new_archive.unlink, missing_ok=True)
                merge([path], new_archive, selection)
                with Archive.open(new_archive) as archive:
                    try:
                        grids[path], _ = check_codec(archive, select_groups(archive, ALL), checkpoint)
                    except UserError as error:  # it names the archive that is read
                        raise UserError(str(error).replace(str(new_archive), str(path))) from error
                    archives.append({"file": file, "name": name, **_describe_models(archive, checkpoint)})
                    image_count += archive.count()
            decoder = _describe_codec(checkpoint, _one_grid(grids))
            if not is_finished(out_dir, decoder["file"]):
                write_atomic(out_dir / decoder["file"], export_codec(checkpoint, grids[paths[0]]))
            (out_dir / SCRIPTS).mkdir(exist_ok=True)
            for name, content in scripts.items():
                write_atomic(out_dir / SCRIPTS / name, content)
            write_atomic(out_dir / WORKER, shipped(f"browser/{WORKER}").read_bytes())
            for file in files:
                os.replace(out_dir / (_NEW + file), out_dir / file)
            site = {"version": SITE_VERSION, "archives": archives, "codec": decoder}
            write_atomic(out_dir / SITE, json.dumps(site).encode())
            page = shipped(PAGE).read_text(encoding="utf-8").replace(META, META.replace('""', f'"{SITE}"'), 1)
            write_atomic(out_dir / INDEX, page.encode())
    except BlockingIOError as error:
        raise UserError(f"{out_dir}: another process writes a site here; wait, or choose another --out-dir") from error
    except OSError as error:
        raise UserError(f"cannot write the site into {out_dir}: {error.strerror or one_line(error)}") from error
    return out_dir / INDEX, image_count


def _one_grid(grids: Mapping[Path, int]) -> int:
    (first, grid), *others = grids.items()
    for path, other in others:
        if other != grid:
            raise UserError(
                f"{first} has grids of {grid} x {grid} tokens, {path} of {other} x {other}; export them apart"
            )
    return grid


def _describe_models(archive: Archive, checkpoint: Checkpoint) -> dict[str, Any]:
    models = archive.models()
    labels = {
        row_id: None if is_other_embedded(model.name, model.sha256, "generator") else model_label(model.name)
        for row_id, model in models.items()
        if model.kind == "generator"
    }
    codec_ids = [row_id for row_id, model in models.items() if model.sha256 == checkpoint.sha256]
    return {"models": labels, "codec_ids": codec_ids}


def _describe_codec(checkpoint: Checkpoint, grid: int) -> dict[str, Any]:
    return {
        "file": f"codec-{checkpoint.sha256[:16]}-{grid}.onnx",
        "name": model_label(checkpoint.name),
        "sha256": checkpoint.sha256[:HASH_DIGITS],
        "token_count": grid**2,
        "codebook_size": checkpoint.config.codebook_size,
        "image_size": checkpoint.config.image_size // checkpoint.config.grid * grid,
    }


def find_converter() -> Callable[..., Any]:
    """Return what makes ONNX of a function of JAX.

    Raises:
        UserError: The library for it is missing.
    """
    try:
        from jax2onnx import to_onnx
    except ImportError as error:
        raise UserError("--live needs a library for ONNX: pip install 'dm-generations[site]'") from error
    return to_onnx


def export_codec(checkpoint: Checkpoint, grid: int) -> bytes:
    """Return the decoder of a codec as ONNX: tokens (1, L) int32 to pixels (1, H, W, 3) float32 from 0 to 1.

    Raises:
        UserError: The library for it is missing, or cannot convert this network.
    """
    to_onnx = find_converter()
    import jax
    import jax.numpy as jnp

    network = checkpoint.network_class(checkpoint.config, jnp.float32)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), checkpoint.params)

    def decode(tokens: jax.Array) -> jax.Array:
        return jnp.clip(network.apply({"params": params}, tokens, method="decode_code"), 0.0, 1.0)

    tokens = jax.ShapeDtypeStruct((1, grid**2), np.int32)
    try:
        return to_onnx(decode, inputs=[tokens], model_name="codec").SerializeToString()
    except Exception as error:  # whatever it meets in a network that it does not know
        reason = f"codec {checkpoint.name!r} cannot be converted to ONNX: {one_line(error)}"
        raise UserError(f"{reason}; export the site without --live") from error
