"""Models of the Hugging Face hub by name: `owner/name` or `owner/name@revision`, kept in the hub's own cache."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dm_generations.errors import UserError, one_line

_NAME = re.compile(r"(?P<repository>[\w.-]{1,96}/[\w.-]{1,96})(@(?P<revision>[\w./-]{1,200}))?")
# The same weights lie in many repositories several times: the first kind found is fetched, the others are not.
_WEIGHTS = (
    ("model.safetensors",),
    ("flax_model.msgpack",),
    ("pytorch_model.bin",),
    ("encoder.pt", "decoder.pt", "detoker.pt"),
    ("stage1_last.ckpt", "stage2_last.ckpt"),
)
_PIECES = (r"model-\d+-of-\d+\.safetensors", r"pytorch_model-\d+-of-\d+\.bin")  # of transformers' large models
_SINGLE = (".pt", ".ckpt", ".pkl")
_SMALL = (".json", ".yaml", ".yml", ".txt", ".txt.gz", ".model", "tokenizer.tar.gz")


def is_hub_name(spec: str) -> bool:
    """Whether this can be the name of a model there; what lies on the disk goes before it."""
    return _NAME.fullmatch(spec) is not None and ".." not in spec


def fetched(spec: str) -> Path:
    """The local folder of a model on the hub, downloaded if it is not in the hub's cache.

    Raises UserError without huggingface_hub, for a name or revision that the hub lacks, and without a network
    for what the cache lacks.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        raise UserError(
            f"{spec}: no such file or folder; if it is a model of the Hugging Face hub: "
            "pip install 'dm-generations[checkpoints]'"
        ) from None
    match = _NAME.fullmatch(spec)
    repository, revision = match["repository"], match["revision"]
    # Without a network the errors are those of the library's HTTP client: requests, httpx and httpx2 have no base class
    # of their own in common.
    try:
        try:
            # not list_repo_files, which tries for half a minute where there is no network
            siblings = huggingface_hub.HfApi().model_info(repository, revision=revision).siblings
        except Exception as error:
            if 400 <= (_status(error) or 0) < 500 or isinstance(error, ValueError):
                raise
            patterns = None  # no network: what the cache holds
        else:
            patterns = wanted_files((file.rfilename for file in siblings or ()), spec)
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=patterns, local_files_only=patterns is None
            )
        )
    except UserError:
        raise
    except (LocalEntryNotFoundError, FileNotFoundError) as error:
        raise UserError(f"{spec}: not in the cache of the Hugging Face hub, and the hub cannot be reached") from error
    except Exception as error:
        raise UserError(
            f"{spec}: no such folder, and the Hugging Face hub does not give it ({one_line(error)})"
        ) from error


def _status(error: Exception) -> int | None:
    """The HTTP status that an error of the hub stands for, if it is an answer of the hub."""
    return getattr(getattr(error, "response", None), "status_code", None)


def wanted_files(names: Iterable[str], spec: str) -> list[str]:
    """Of a repository's files: one kind of weights, the configs and the tokenizers.

    spec: the repository, for messages. Raises UserError if there are no weights of a kind that loads.
    """
    names = list(names)
    weights = next((found for kind in _WEIGHTS if (found := _present(names, kind))), None)
    weights = weights or next((found for kind in _PIECES if (found := _matching(names, kind))), None)
    weights = weights or [name for name in names if name.endswith(_SINGLE)]
    if not weights:
        raise UserError(f"{spec} has no weights that load: " + ", ".join(name for (name, *_) in _WEIGHTS))
    return weights + [name for name in names if name.endswith(_SMALL)]


def _present(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    return [name for name in names if name.rsplit("/", 1)[-1] in wanted]


def _matching(names: Sequence[str], pattern: str) -> list[str]:
    return [name for name in names if re.fullmatch(pattern, name.rsplit("/", 1)[-1])]
