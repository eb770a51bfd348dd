"""What a decode is told, and what it tells."""

from dataclasses import dataclass, field
from pathlib import Path

from dm_generations.decode.captions import Strips
from dm_generations.decode.encode import Encoding
from dm_generations.decode.plan import Layout, Selection


@dataclass(frozen=True)
class Options:
    """How to decode; the command line's flags of the same names say more."""

    out_dir: Path
    layout: Layout = Layout("images", 8, 4)
    selection: Selection = Selection()
    codec: str | None = None  # a folder, a file or a name on the hub; None is the embedded one
    dtype: str = "float32"  # of the decoder's activations
    batch_size: int | None = 32  # None: as many as the device has memory for
    num_workers: int | None = None  # None: one for each core
    overwrite: bool = False
    encoding: Encoding = Encoding()  # of modes with pictures, whose names end in its extension
    has_metadata: bool = False  # pictures carry their rows
    strips: Strips = Strips()  # of galleries


@dataclass
class Report:
    """What a decode did. `problems` has a line for each bad row and each file that could not be written."""

    written: int = 0  # files
    already_there: int = 0  # files
    problems: list[str] = field(default_factory=list)
    page: Path | None = None  # to open in a browser
