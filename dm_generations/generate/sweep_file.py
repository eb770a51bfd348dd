"""Sweeps described in a TOML file: the flags of `generate`, a key each, a value or a list of values.

prompts = ["a rocket", "a castle"]
top_k = [50, 256]
cond_scale = [1, 3, 10]
n = 8
"""

import tomllib
from pathlib import Path
from typing import Any

from dm_generations.errors import UserError, one_line

# What each key holds, and whether it can list several.
KEYS: dict[str, tuple[tuple[type, ...], bool]] = {
    "prompts": ((str,), True),
    "sc_prompts": ((str,), True),
    "top_k": ((int,), True),
    "top_p": ((int, float), True),
    "temperature": ((int, float), True),
    "cond_scale": ((int, float), True),
    "keys": ((str,), True),
    "n": ((int,), False),
    "seed": ((int,), False),
    "same_seeds": ((bool,), False),
}
_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def read_sweep(path: Path) -> dict[str, Any]:
    """The values in a sweep file by key, lists where the flag takes several. Ranges are checked with the sweep.

    Raises UserError for a file that cannot be read, is no TOML, or has a key or a kind of value that is not known.
    """
    try:
        values = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"--sweep {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, not UTF-8, a NUL byte in the name
        raise UserError(f"--sweep {str(path)!r}: not a TOML file: {one_line(error)}") from error
    return {key: _checked(path, key, value) for key, value in values.items()}


def _checked(path: Path, key: str, value: Any) -> Any:
    if key not in KEYS:
        raise UserError(f"--sweep {path}: unknown key {key!r:.60}; known are {', '.join(KEYS)}")
    kinds, takes_several = KEYS[key]
    listed = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not takes_several:
        raise UserError(f"--sweep {path}: {key} takes one value, not a list")
    for entry in listed:
        if type(entry) not in kinds:  # a bool is an int to isinstance
            expected = " or ".join(_KINDS[kind] for kind in kinds)
            raise UserError(f"--sweep {path}: {key} must be {expected}, not {entry!r:.60}")
    return listed if takes_several else value
