"""Write a model of any format as a folder of this program's own format, tensor by tensor."""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from dm_generations.errors import UserError
from dm_generations.models.base import class_count_of
from dm_generations.models.dalle_mini.tokenizer import WORDS_FILE
from dm_generations.models.kakao_mindalle import checkpoint as kakao_mindalle
from dm_generations.models.loading import Checkpoint, find_checkpoint
from dm_generations.models.registry import ROLES
from dm_generations.models.tokenization import VOCAB_OR_MERGES_NAME
from dm_generations.runtime.device import memory_errors
from dm_generations.weights import native
from dm_generations.weights.mmap import is_apple_double
from dm_generations.weights.tar import is_archive

# Files of tokenizers, in any of the public models, and those that only go with one.
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    *kakao_mindalle.TOKENIZER_FILES,
    *kakao_mindalle.TOKENIZER_ARCHIVES,
    "bpe_simple_vocab_16e6.txt",
    "bpe_simple_vocab_16e6.txt.gz",
)
_EXTRA_FILES = (WORDS_FILE, "preprocessor_config.json", "processor_config.json", "tokenizer_config.json")
_DTYPES: dict[str, type] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@memory_errors("convert the model on a machine with more")
def convert(
    spec: str,
    out: Path,
    tokenizer: Path | None = None,
    dtype: str | None = None,
    overrides: Mapping[str, Any] = MappingProxyType({}),
) -> list[str]:
    """Write every model of a checkpoint as folders of our own. `out` appears as a whole or not at all.

    Args:
        spec: a folder, a file or a name on the Hugging Face hub.
        out: the folder to write; what is with its first model goes to subfolders, a generator's codec to `codec`.
        tokenizer: the generator's, in place of its own.
        dtype: "float32", "float16" or "bfloat16"; None leaves weights as they are.
        overrides: entries of the generator's config that replace what the files say.

    Returns:
        A line about each model.

    Raises:
        UserError: if nothing at `spec` loads, if a value does not fit `dtype`, or if `out` exists.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} exists already; choose another --out")
    options = {"generator": overrides}
    checkpoints = (find_checkpoint(spec, role, options.get(role, {})) for role in ROLES)
    found = [checkpoint for checkpoint in checkpoints if checkpoint is not None]
    if not found:
        raise UserError(f"{spec} holds no model that this program knows")
    if tokenizer is not None and found[0].text_style is None:
        raise UserError(f"{spec} is a {found[0].kind}, which takes no --tokenizer")
    unfinished = out.with_name(f"{out.name}.unfinished-{os.getpid()}")
    try:
        lines = []
        for index, checkpoint in enumerate(found):
            folder, final = (root / checkpoint.role if index else root for root in (unfinished, out))
            lines.append(_write(checkpoint, folder, final, tokenizer, dtype))
        os.rename(unfinished, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return lines


def _write(checkpoint: Checkpoint, folder: Path, final: Path, tokenizer: Path | None, dtype: str | None) -> str:
    is_complete = write_checkpoint(checkpoint, folder, tokenizer, dtype)
    missing = "" if is_complete else ", without a tokenizer: it is not in the model's folder, give it with --tokenizer"
    size = (folder / native.WEIGHTS_FILE).stat().st_size
    return f"{final}: {checkpoint.kind}, {size / 1e6:,.1f} MB{missing}"


def write_checkpoint(
    checkpoint: Checkpoint, folder: Path, tokenizer: Path | None = None, dtype: str | None = None
) -> bool:
    """Write a model as a folder of our own, with its tokenizer and lineage.

    Args:
        checkpoint: The model.
        folder: Made if it does not exist.
        tokenizer: In place of its own.
        dtype: See `convert`.

    Returns:
        Whether it is complete: False for a model of prompts whose tokenizer is missing.

    Raises:
        UserError: A value does not fit `dtype`.
        OSError: The folder cannot be written.
    """
    config = (
        checkpoint.config.to_dict() if hasattr(checkpoint.config, "to_dict") else dataclasses.asdict(checkpoint.config)
    )
    if checkpoint.lineage is not None:
        config = {**config, native.LINEAGE: checkpoint.lineage}
    if dtype == "float16":
        _check_range(checkpoint)
    stored = _DTYPES[dtype] if dtype else None
    native.save(folder, checkpoint.kind, config, checkpoint.params, stored, checkpoint.text_style or "")
    source = tokenizer or checkpoint.tokenizer
    needs_none = checkpoint.text_style is None or class_count_of(checkpoint.config) > 0
    return needs_none or (source is not None and _copy_tokenizer(source, folder))


def _copy_tokenizer(source: Path, folder: Path) -> bool:
    """Copy the files of a tokenizer under the names that loading looks for, with those that belong to a named file.

    Returns:
        Whether there is one.
    """
    if source.is_dir():
        copies = {source / name: name for name in (*TOKENIZER_FILES, *_EXTRA_FILES)}
        copies |= {
            extra: extra.name for extra in source.glob("*.model") if not is_apple_double(extra)
        }  # YouTokenToMe's
    elif match := VOCAB_OR_MERGES_NAME.fullmatch(source.name):
        ending = match[1] or match[2] or ""  # min-dalle's two sizes in one folder
        copies = {source.with_name(f"vocab{ending}.json"): "vocab.json"}
        copies |= {source.with_name(f"merges{ending}.txt"): "merges.txt"}
    elif source.name in kakao_mindalle.TOKENIZER_FILES:
        copies = {source.with_name(name): name for name in kakao_mindalle.TOKENIZER_FILES}
    elif is_archive(source):
        copies = {source: kakao_mindalle.TOKENIZER_ARCHIVES[0]}
    else:
        copies = {source: "tokenizer.json" if source.suffix == ".json" else source.name}
    if not source.is_dir():  # which a model's normaliser looks for in the same folder
        copies[source.with_name(WORDS_FILE)] = WORDS_FILE
    found = {original: name for original, name in copies.items() if original.is_file()}
    for original, name in found.items():
        shutil.copyfile(original, folder / name)
    return not set(found.values()) <= set(_EXTRA_FILES)


def _check_range(checkpoint: Checkpoint) -> None:
    largest = float(np.finfo(np.float16).max)
    for name, array in native.flatten(checkpoint.params).items():
        if array.size and float(np.abs(np.asarray(array, np.float32)).max()) > largest:
            raise UserError(f"{name} of {checkpoint.name!r} holds values above float16's {largest:,.0f}: use bfloat16")
