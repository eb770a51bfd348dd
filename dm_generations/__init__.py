"""An archive of text-to-image generations, and the pipeline around it.

In Python: `MinDalle`, the methods of the package min-dalle, and `Generator` with `SamplingParams`, the sampling loop.
They are imported on first use, and JAX with them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dm_generations.compat.min_dalle import MinDalle
    from dm_generations.inference.generator import Generator
    from dm_generations.sampling.params import SamplingParams

__version__ = "0.1.0"
__all__ = ["Generator", "MinDalle", "SamplingParams"]

_MODULES = {
    "Generator": "dm_generations.inference.generator",
    "MinDalle": "dm_generations.compat.min_dalle",
    "SamplingParams": "dm_generations.sampling.params",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
