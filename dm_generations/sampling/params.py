"""The settings that tokens are sampled with, and their ranges. Imports neither NumPy nor JAX."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dm_generations.errors import UserError

MAX_TOP_K = 2**31 - 1
DECODER_STEPS = "dpm25"  # of a diffusion decoder, unless told otherwise
MAX_REAL = 3.0e38  # settings are computed with in float32
MAX_STEPS = 256  # of masked decoding
_MAX_DIGITS = 40  # of a number in a message; Python refuses to write the longest ones


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling settings of one image; the defaults switch every setting off.

    The names are those of the archive's columns and of the flags of `generate`.

    Attributes:
        top_k: Sample among the `top_k` most likely tokens, 0 to 2,147,483,647; 0 is no limit.
        top_p: Sample among the most likely tokens that together hold this probability, above 0 and at most 1; 1 is no
            limit.
        temperature: The logits are divided by it, 0 to 3e38; 0 always takes the most likely token.
        cond_scale: Weight of the prompt in classifier-free guidance (super conditioning), 0 to 3e38; 1 is off.
    """

    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0
    cond_scale: float = 1.0

    def values(self) -> tuple[int, float, float, float]:
        """Return the settings in the order above, many times faster than `dataclasses.astuple`."""
        return self.top_k, self.top_p, self.temperature, self.cond_scale

    def validate(self) -> None:
        """Check the range of every setting.

        Raises:
            UserError: A setting is out of its range or NaN. The message names the setting, its range and the value.
        """
        check_range("top_k", self.top_k, 0, MAX_TOP_K)
        if not 0 < self.top_p <= 1:  # NaN too
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        check_range("temperature", self.temperature, 0, MAX_REAL)
        check_range("cond_scale", self.cond_scale, 0, MAX_REAL)


@dataclass(frozen=True, slots=True)
class ExtraSetting:
    """A setting of one kind of model, beyond `SamplingParams`; a whole number if its default is one.

    Attributes:
        default: What it is if nobody sets it.
        lowest: The smallest value.
        highest: The largest value, at most MAX_REAL.
    """

    default: int | float
    lowest: int
    highest: float


def complete_extra_settings(known: Mapping[str, ExtraSetting], values: Mapping[str, Any]) -> dict[str, int | float]:
    """Check extra settings, and add the defaults of the others.

    Args:
        known: Those of the model, by name.
        values: Some of them.

    Returns:
        All of them, in the order of `known`.

    Raises:
        UserError: The model has no such setting, or a value is not a number of its range.
    """
    if unknown := [name for name in values if name not in known]:
        has = f"has {', '.join(known)}" if known else "has none"
        raise UserError(f"extra setting {unknown[0]!r:.60} is unknown: this model {has}")
    completed: dict[str, int | float] = {}
    for name, setting in known.items():
        value, kind = values.get(name, setting.default), type(setting.default)
        if type(value) not in (int, kind):
            raise UserError(f"{name} must be a {'whole number' if kind is int else 'number'}, not {value!r:.60}")
        check_range(name, value, setting.lowest, setting.highest)
        completed[name] = kind(value) + 0  # makes -0.0 the 0.0 that it equals
    return completed


def check_range(name: str, value: float, lowest: int, highest: float) -> None:
    """Check that a number lies between two limits, both included.

    Raises:
        UserError: It does not, or is NaN.
    """
    if lowest <= value <= highest:
        return
    limit = f"{highest:,}" if isinstance(highest, int) else f"{highest:g}"
    is_long = isinstance(value, int) and abs(value) >= 10**_MAX_DIGITS
    found = f"a number of more than {_MAX_DIGITS} digits" if is_long else value
    raise UserError(f"{name} must be from {lowest} to {limit}, not {found}")


@dataclass(frozen=True, slots=True)
class Unconditional:
    """The model's own unconditional prompt, for models where it depends on the prompt: on its length, say."""

    prompt: str
