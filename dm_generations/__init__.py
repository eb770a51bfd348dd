"""An archive of text-to-image generations, and the pipeline around it.

In Python: `Generator` with `RowSettings`, prompts to tokens; `Decoder`, tokens to images; `Scorer`, images to CLIP
scores; and `MinDalle`, the methods of the package min-dalle. They are imported when they are asked for, and JAX with
them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dm_generations.inference.decoder import Decoder
    from dm_generations.inference.generator import Generator, RowSettings
    from dm_generations.inference.scorer import Scorer
    from dm_generations.min_dalle import MinDalle

__version__ = "0.1.0"
__all__ = ["Decoder", "Generator", "MinDalle", "RowSettings", "Scorer"]

_MODULES = {
    "Decoder": "dm_generations.inference.decoder",
    "Generator": "dm_generations.inference.generator",
    "MinDalle": "dm_generations.min_dalle",
    "RowSettings": "dm_generations.inference.generator",
    "Scorer": "dm_generations.inference.scorer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
