"""Checks of settings that several stages share."""

from __future__ import annotations

import builtins
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import Enum
from functools import cache
from inspect import signature
from math import isfinite
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

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


def fitted(owner: Any, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values of a section, each of the type that a dataclass or function declares for it.

    Text that is a number becomes one where a number is needed, because YAML reads 1e-5 as text. A value that equals the
    default fits, as do objects of libraries.

    Args:
        owner: the dataclass or function.
        where: the section's name, for messages.

    Raises:
        ConfigError: names the section, the key, the value and what it must be.
    """
    return {key: _fitted_value(owner, key, value, f"{where}: {key}") for key, value in values.items()}


#: Least values of training arguments that torch and transformers do not look at before the first step.
_LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1, "max_length": 1,
    "num_train_epochs": 0, "dataloader_num_workers": 0, "dataset_num_proc": 1, "save_steps": 0, "logging_steps": 0,
}  # fmt: skip


_CHOICES = {"truncation_mode": ("keep_start", "keep_end")}


def fit_fields(config: Any) -> None:
    """Puts `fitted` values into the fields of a training's configuration, and checks those that must not be too small."""
    cls = type(config)
    # transformers declares `fsdp` as text, takes more than that, and sets it to True itself. Its parser of command lines
    # sets `debug` to None where it is not given.
    values = {field.name: getattr(config, field.name) for field in fields(cls) if field.init and field.name != "fsdp"}
    if values.get("debug", "") is None:
        del values["debug"]
    for name, value in fitted(cls, values, cls.__name__).items():
        setattr(config, name, value)
        unused = name == "num_train_epochs" and values.get("max_steps", -1) > 0
        if value is not None and name in _LEAST and value < _LEAST[name] and not unused:
            raise ConfigError(f"{cls.__name__}: {name} = {value!r} must be at least {_LEAST[name]}; raise it")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ConfigError(
                f"{cls.__name__}: {name} = {value!r} must be one of {', '.join(_CHOICES[name])}; correct it"
            )


def _fitted_value(owner: Any, key: str, value: Any, name: str) -> Any:
    hint, default = _declared(owner, key)
    if type(value) not in _PLAIN or (type(value) is type(default) and value == default):
        return value
    alternatives = _alternatives(hint)
    if isinstance(value, str) and float in alternatives and str not in alternatives and (number := _number(value)):
        return number[0]
    if not any(_fits(value, alternative) for alternative in alternatives):
        words = " or ".join(dict.fromkeys(map(_words, alternatives)))
        raise ConfigError(f"{name} = {value!r} must be {words}; correct the value, or leave the key out")
    return value


#: Types that YAML and JSON have; other values come from Python, and libraries check them.
_PLAIN = (bool, int, float, str, list, tuple, dict, type(None))


@cache
def _declared(owner: Any, key: str) -> tuple[Any, Any]:
    """The type and the default of a dataclass's field or a function's parameter; `Any` where none is known."""
    if is_typeddict(owner):
        return get_type_hints(owner).get(key, Any), None
    if isinstance(owner, type):
        field = {field.name: field for field in fields(owner)}.get(key)
        try:
            hint = get_type_hints(owner).get(key, Any)
        except NameError:  # a class of a notebook, with types that only its cell has
            hint = Any
        return hint, getattr(field, "default", None)
    one = type(
        "", (), {"__annotations__": {key: owner.__annotations__.get(key, Any)}}
    )  # the others may name types of checkers
    hints = get_type_hints(one, owner.__globals__, _Unimported(owner.__globals__))
    return hints[key], signature(owner).parameters[key].default


class _Unimported(dict):
    """Names that a module has for type checkers alone stand for anything."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        super().__init__()
        self.names = names

    def __missing__(self, name: str) -> Any:
        if name in self.names or hasattr(builtins, name) or name.startswith("__"):
            raise KeyError(name)
        return Any


#: Stands for text where transformers takes a mapping also as JSON, or as the name of a file of it.
_JSON = "JSON of one, or a file of it"


def _alternatives(hint: Any) -> list[Any]:
    """The types of a union; an enumeration's names stand for it, and not any text."""
    found = list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]
    if any(isinstance(one, type) and issubclass(one, Enum) for one in found):
        found = [one for one in found if one is not str]
    mapping = any((get_origin(one) or one) is dict for one in found)
    return [_JSON if mapping and one is str else one for one in found]


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint) or hint, get_args(hint)
    if isinstance(origin, type) and issubclass(origin, Enum):
        return value in [one.value for one in origin]
    if origin is Literal:  # of text, what it may be is for the library to say: some have numbers in them
        return type(value) in map(type, parts)
    if origin in (list, tuple, Sequence):
        inner = [part for part in parts if part is not ...][:1] or [Any]
        one = any(_fits(value, alternative) for alternative in _alternatives(inner[0]))
        return one or (
            isinstance(value, (list, tuple)) and all(any(_fits(v, a) for a in _alternatives(inner[0])) for v in value)
        )
    if origin is _JSON:
        return isinstance(value, str) and (value.lstrip().startswith("{") or os.path.isfile(value))
    if origin in (dict, Mapping):
        return isinstance(value, dict)
    if origin is bool:
        return isinstance(value, bool) or (type(value) is int and value in (0, 1))
    if origin is int:
        return type(value) is int
    if origin is float:
        return type(value) in (int, float)
    return not isinstance(origin, type) or origin not in (str, type(None)) or isinstance(value, origin)


def _words(hint: Any) -> str:
    origin = get_origin(hint) or hint
    if isinstance(origin, type) and issubclass(origin, Enum):
        return f"one of {', '.join(str(one.value) for one in origin)}"
    known = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping", Mapping: "a mapping",
             type(None): "null"}  # fmt: skip
    if origin in (list, tuple, Sequence):
        return "a list" + "".join(f", each {_words(part)}" for part in get_args(hint)[:1])
    return hint if hint is _JSON else known.get(origin) or getattr(hint, "__name__", str(hint))


def _number(text: str) -> tuple[float] | None:
    """The finite number that a text is."""
    try:
        number = float(text)
    except ValueError:
        return None
    return (number,) if isfinite(number) else None
