"""Checks of settings that several stages share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .errors import ConfigError

#: Lowest temperature but 0: below, logits over it leave float32.
COLDEST = 1e-30


def check_whole(name: str, value: Any, low: int) -> None:
    """Raises a ConfigError where a setting is no whole number of at least `low`, or no machine's integer holds it."""
    if isinstance(value, bool) or not isinstance(value, int) or value >= 2**63:
        raise ConfigError(f"{name} = {value!r} must be a whole number that 64 bits hold")
    if value < low:
        raise ConfigError(f"{name} = {value} must be at least {low}")


def check_seed(name: str, value: Any) -> None:
    """Raises a ConfigError where a seed is no whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} = {value!r} must be a whole number")


def check_temperature(name: str, value: Any) -> None:
    """Raises a ConfigError where a temperature is neither 0 (greedy) nor a number that logits can be divided by."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (value == 0 or COLDEST <= value < float("inf")):
        raise ConfigError(
            f"{name} = {value!r} must be at least 0: 0 for the likeliest token, or from {COLDEST} on, and finite"
        )


def check_share(name: str, value: Any) -> None:
    """Raises a ConfigError where a share or probability is no number in [0, 1]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        text = ", and no text: YAML reads 1e-5 as one, and 1.0e-5 as a number" if isinstance(value, str) else ""
        raise ConfigError(f"{name} = {value!r} must lie in [0, 1]{text}")


def check_apart(*paths: str | os.PathLike | None) -> None:
    """Raises a ConfigError where two of a stage's files are one: an output would replace an input or another output."""
    seen: dict[Path, str | os.PathLike] = {}
    for path in filter(None, paths):
        place = Path(os.path.realpath(path))
        if place in seen:
            raise ConfigError(f"{path} is given twice; one would replace the other, so name another file")
        seen[place] = path
