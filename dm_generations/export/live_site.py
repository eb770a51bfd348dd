"""A site that decodes in the visitor's browser: the archive, the codec as ONNX, and the scripts that run them.

    index.html     the page
    site.json      which files there are, and the codec that they were made for
    archive.db     the selected images, in the newest format
    codec-*.onnx   tokens (1, L) int32 to pixels (1, H, W, 3) float32 from 0 to 1
    worker.js      reads the archive and decodes, beside the page
    scripts/       onnxruntime-web and sql.js

All but `index.html`, which is written last, may be there from a run that was stopped.
"""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dm_generations.archive import Archive, merge
from dm_generations.archive.ratings import model_label
from dm_generations.archive.selection import ALL, Selection
from dm_generations.atomic_io import open_locked, remove_stale_temporaries, write_atomic
from dm_generations.errors import UserError, one_line
from dm_generations.export.npm import read_scripts
from dm_generations.export.plan import check_codec, is_finished, select_groups
from dm_generations.export.site import INDEX
from dm_generations.export.writers import check_folders, make_folder
from dm_generations.models.loading import Checkpoint, is_other_embedded, load_checkpoint
from dm_generations.paths import PAGE, shipped

ARCHIVE, SITE, WORKER, SCRIPTS = "archive.db", "site.json", "worker.js", "scripts"
SITE_VERSION = 1
META = '<meta name="site" content="">'  # of the page
_NEW_ARCHIVE, _LOCK = ".new-archive.db", ".lock"


def export_live_site(
    path: Path, out_dir: Path, selection: Selection, codec: str | None, packages: Path | None
) -> tuple[Path, int]:
    """Write the site of an archive.

    Args:
        path: The archive.
        out_dir: The folder.
        selection: Which images.
        codec: See ExportOptions.
        packages: See `read_scripts`.

    Returns:
        The page, and how many images there are.

    Raises:
        UserError: The archive has a bad row, the codec is not one for it, a package is missing, or a file cannot be
            written.
    """
    find_converter()  # before anything takes time
    checkpoint = load_checkpoint(codec, "codec")
    scripts = read_scripts(packages)
    check_folders(out_dir, [SCRIPTS])
    make_folder(out_dir)
    try:
        with open_locked(out_dir / _LOCK), contextlib.ExitStack() as at_end:
            remove_stale_temporaries(out_dir)
            new_archive = out_dir / _NEW_ARCHIVE
            new_archive.unlink(missing_ok=True)
            at_end.callback(new_archive.unlink, missing_ok=True)
            merge([path], new_archive, selection)
            with Archive.open(new_archive) as archive:
                grid, _ = check_codec(archive, select_groups(archive, ALL), checkpoint)
                image_count, site = archive.count(), _describe(archive, path.name, checkpoint, grid)
            if not is_finished(out_dir, site["codec"]["file"]):
                write_atomic(out_dir / site["codec"]["file"], export_codec(checkpoint, grid))
            (out_dir / SCRIPTS).mkdir(exist_ok=True)
            for name, content in scripts.items():
                write_atomic(out_dir / SCRIPTS / name, content)
            write_atomic(out_dir / WORKER, shipped(f"browser/{WORKER}").read_bytes())
            os.replace(new_archive, out_dir / ARCHIVE)
            write_atomic(out_dir / SITE, json.dumps(site).encode())
            page = shipped(PAGE).read_text(encoding="utf-8").replace(META, META.replace('""', f'"{SITE}"'), 1)
            write_atomic(out_dir / INDEX, page.encode())
    except BlockingIOError as error:
        raise UserError(f"{out_dir}: another process writes a site here; wait, or choose another --out-dir") from error
    except OSError as error:
        raise UserError(f"cannot write the site into {out_dir}: {error.strerror or one_line(error)}") from error
    return out_dir / INDEX, image_count


def _describe(archive: Archive, name: str, checkpoint: Checkpoint, grid: int) -> dict[str, Any]:
    models = archive.models()
    labels = {
        row_id: None if is_other_embedded(model.name, model.sha256, "generator") else model_label(model.name)
        for row_id, model in models.items()
        if model.kind == "generator"
    }
    codec = {
        "file": f"codec-{checkpoint.sha256[:16]}-{grid}.onnx",
        "ids": [row_id for row_id, model in models.items() if model.sha256 == checkpoint.sha256],
        "token_count": grid**2,
        "codebook_size": checkpoint.config.codebook_size,
        "image_size": checkpoint.config.image_size // checkpoint.config.grid * grid,
    }
    return {"version": SITE_VERSION, "archive": ARCHIVE, "name": name, "models": labels, "codec": codec}


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
