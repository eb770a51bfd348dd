"""What `decode` is asked for and what it reports."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dm_generations.archive.selection import Selection
from dm_generations.export.captions import Strips
from dm_generations.export.output_file import Encoding
from dm_generations.export.plan import Layout
from dm_generations.paths import PAGE

if TYPE_CHECKING:
    from dm_generations.inference.diffusion import Diffusion


@dataclass(frozen=True)
class ExportOptions:
    """How to decode an archive into files.

    Attributes:
        codec: A folder, a file or a name on the hub; None is the embedded one.
        diffusion: What decodes in place of the codec's own decoder.
        dtype: Of the decoder's activations.
        batch_size: Images decoded at a time; None is as many as the device has memory for.
        num_workers: Threads that encode; None is one for each core.
        overwrite: Decode what is on disk already.
        encoding: Of image files, whose names end in its extension.
        has_metadata: Whether image files carry their rows.
        strips: The text on galleries.
        has_thumbnails: Whether each image file gets a smaller one, at its `thumbnail_path`.
        page: The name of the page.
    """

    out_dir: Path
    layout: Layout = field(default_factory=lambda: Layout("images", 8, 4))
    selection: Selection = field(default_factory=Selection)
    codec: str | None = None
    diffusion: "Diffusion | None" = None
    dtype: str = "float32"
    batch_size: int | None = 32
    num_workers: int | None = None
    overwrite: bool = False
    encoding: Encoding = field(default_factory=Encoding)
    has_metadata: bool = False
    strips: Strips = field(default_factory=Strips)
    has_thumbnails: bool = False
    page: str = PAGE


@dataclass
class ExportReport:
    """What an export did.

    Attributes:
        written: Files written.
        already_there: Files that were finished before.
        problems: A line for each bad row and each file that could not be written.
        page: To open in a browser.
        manifest: What the page shows.
        left_out_count: Files in the folder, of other archives or selections, that are not on the page.
    """

    written: int = 0
    already_there: int = 0
    problems: list[str] = field(default_factory=list)
    page: Path | None = None
    manifest: dict[str, Any] | None = None
    left_out_count: int = 0
