"""What the reader of one public format gives: a config and weights, not yet checked against each other."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]


def as_here(path: str, shape: Shape) -> tuple[str, Shape]:
    return path, shape


@dataclasses.dataclass(frozen=True)
class Source:
    """A model as its files hold it. The arrays are views of mapped files, in the dtype of the file."""

    kind: str  # the network: a key of `networks.NETWORKS`
    config: Any  # the network's config
    params: dict  # nested, names of the network
    files: tuple[Path, ...]  # the weight files
    tokenizer: Path | None = None  # where the prompts' tokenizer lies, file or folder
    text_style: str | None = None  # generators: how prompts become ids, see `text.load_tokenizer`
    # Of weights in several files, for messages: the file of the parameters whose paths begin so; "" is the rest's.
    places: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    # For messages too: from the path and shape of a parameter to its name and shape in the file, which may lack it.
    in_file: Callable[[str, Shape], tuple[str, Shape]] = as_here

    def file_of(self, name: str) -> Path:
        """The file that has, or should have, the parameter of this path ("a/b/kernel")."""
        prefix = max((prefix for prefix in self.places if name.startswith(prefix)), key=len, default=None)
        return self.files[0] if prefix is None else self.places[prefix]
