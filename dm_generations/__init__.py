"""An archive of text-to-image generations, and the pipeline around it.

In Python: `Archive`; `Generator` with `SamplingParams`, prompts to tokens; `Decoder`, tokens to images; `Scorer`,
images to CLIP scores; `load_checkpoint` for the models; and `MinDalle`, the methods of the package min-dalle. They are
imported on first use, and JAX with those that need it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dm_generations.api.archive import Archive
    from dm_generations.api.generator import Generator
    from dm_generations.compat.min_dalle import MinDalle
    from dm_generations.inference.decoder import Decoder
    from dm_generations.inference.scorer import Scorer
    from dm_generations.models.loading import load_checkpoint
    from dm_generations.sampling.params import SamplingParams

__version__ = "0.1.0"
__all__ = ["Archive", "Decoder", "Generator", "MinDalle", "SamplingParams", "Scorer", "load_checkpoint"]

_MODULES = {
    "Archive": "dm_generations.api.archive",
    "Decoder": "dm_generations.inference.decoder",
    "Generator": "dm_generations.api.generator",
    "MinDalle": "dm_generations.compat.min_dalle",
    "SamplingParams": "dm_generations.sampling.params",
    "Scorer": "dm_generations.inference.scorer",
    "load_checkpoint": "dm_generations.models.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
