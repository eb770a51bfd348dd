"""Write a model of any format as a folder of this program's own format, tensor by tensor."""

import dataclasses
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np

from dm_generations.errors import UserError
from dm_generations.models import checkpoints
from dm_generations.models.checkpoints import mindalle, own
from dm_generations.models.checkpoints.unpacked import is_archive
from dm_generations.models.networks import ROLES
from dm_generations.text.dalle_mini import WORDS_FILE
from dm_generations.text.tokenizer_files import VOCAB_OR_MERGES_NAME

# Files of the tokenizers of all public models, and of CLIP's image preprocessing.
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    WORDS_FILE,
    *mindalle.TOKENIZER_FILES,
    *mindalle.TOKENIZER_ARCHIVES,
    "bpe_simple_vocab_16e6.txt",
    "bpe_simple_vocab_16e6.txt.gz",
    "preprocessor_config.json",
    "processor_config.json",
)
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def convert(spec: str, out: Path, tokenizer: Path | None = None, dtype: str | None = None) -> list[str]:
    """Write every model at `spec` into the new folder `out`, which appears whole or not at all.

    Args:
        spec: Folder, file or name on the Hugging Face hub.
        tokenizer: Replaces the model's own tokenizer.
        dtype: A key of `_DTYPES` to store the weights in; None leaves them as they are.

    Returns:
        A line about each model.

    Raises:
        UserError: Nothing at `spec` loads, a value is out of the range of `dtype`, or `out` exists.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} exists already; choose another --out")
    found = [checkpoint for role in ROLES if (checkpoint := checkpoints.find(spec, role)) is not None]
    if not found:
        raise UserError(f"{spec} holds no model that this program knows")
    if tokenizer is not None and found[0].text_style is None:
        raise UserError(f"{spec} is a {found[0].kind}, which has no use for --tokenizer")
    unfinished = out.with_name(f"{out.name}.unfinished-{os.getpid()}")
    try:
        lines = []
        for index, checkpoint in enumerate(found):
            is_own_codec = index > 0
            folder = unfinished / own.CODEC_FOLDER if is_own_codec else unfinished
            lines.append(_write(checkpoint, folder, out / own.CODEC_FOLDER if is_own_codec else out, tokenizer, dtype))
        os.rename(unfinished, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return lines


def _write(
    checkpoint: checkpoints.Checkpoint, folder: Path, final: Path, tokenizer: Path | None, dtype: str | None
) -> str:
    config = (
        checkpoint.config.to_dict() if hasattr(checkpoint.config, "to_dict") else dataclasses.asdict(checkpoint.config)
    )
    if dtype == "float16":
        _check_range(checkpoint)
    own.save(
        folder,
        checkpoint.kind,
        config,
        checkpoint.params,
        None if dtype is None else _DTYPES[dtype],
        checkpoint.text_style or "",
    )
    source = tokenizer or checkpoint.tokenizer
    if source is not None:
        _copy_tokenizer(source, folder)
    size = (folder / own.WEIGHTS_FILE).stat().st_size
    return f"{final}: {checkpoint.kind}, {size / 1e6:,.1f} MB"


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer under the names that loading looks for, with those that belong to a named file."""
    if source.is_dir():
        copies = {source / name: name for name in TOKENIZER_FILES}
        copies |= {extra: extra.name for extra in source.glob("*.model")}  # YouTokenToMe's
    elif match := VOCAB_OR_MERGES_NAME.fullmatch(source.name):
        ending = match[1] or match[2] or ""  # min-dalle's two sizes in one folder
        copies = {source.with_name(f"vocab{ending}.json"): "vocab.json"}
        copies |= {source.with_name(f"merges{ending}.txt"): "merges.txt"}
    elif source.name in mindalle.TOKENIZER_FILES:
        copies = {source.with_name(name): name for name in mindalle.TOKENIZER_FILES}
    elif is_archive(source):
        copies = {source: mindalle.TOKENIZER_ARCHIVES[0]}
    else:
        copies = {source: "tokenizer.json" if source.suffix == ".json" else source.name}
    if not source.is_dir():  # which the text normalizer looks for in the file's folder
        copies[source.with_name(WORDS_FILE)] = WORDS_FILE
    for original, name in copies.items():
        if original.is_file():
            shutil.copyfile(original, folder / name)


def _check_range(checkpoint: checkpoints.Checkpoint) -> None:
    largest = float(np.finfo(np.float16).max)
    for name, array in own.flatten(checkpoint.params).items():
        if array.size and float(np.abs(np.asarray(array, np.float32)).max()) > largest:
            raise UserError(f"{name} of {checkpoint.name!r} holds values above float16's {largest:,.0f}: use bfloat16")
