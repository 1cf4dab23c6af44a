"""Whether a model can have an adapter: the layers that it names are there, which PEFT does not check, and its loss fits it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftType

from ..errors import ConfigError, ModelLoadError
from ..hub import source_of
from ..models import base_model

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

#: Settings of an adapter that name layers, or weights.
NAMING = ("target_modules", "modules_to_save", "target_parameters")

#: Where PEFT puts a layer's own weights; the layer keeps its name.
_WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save(\.\w+)?)(?=\.|$)")


def named_layers(config: PeftConfig | None) -> dict[str, set[str]]:
    """Per setting, the layers that a configuration names; patterns and `all-linear` are PEFT's to match."""
    given = {setting: getattr(config, setting, None) for setting in NAMING}
    return {setting: set(names) for setting, names in given.items() if names and not isinstance(names, str)}


def check_layers(model: torch.nn.Module, named: Mapping[str, set[str]], where: str = "lora") -> None:
    """Raises a ConfigError where no layer of a model has a name that an adapter's settings have."""
    base = base_model(model)
    modules = {_WRAPPED.sub("", name) for name, _ in base.named_modules()}
    weights = {_WRAPPED.sub("", name) for name, _ in base.named_parameters()}
    for setting, names in named.items():
        there = weights if setting == "target_parameters" else modules
        if missing := sorted(name for name in names if not _found(name, there)):
            raise ConfigError(
                f"{where}: {setting} = {missing[0]!r} must be a layer of {type(base).__name__}; name some of "
                f"{', '.join(_last_names(there))}, or leave it out"
            )


def _found(name: str, there: Iterable[str]) -> bool:
    return any(known == name or known.endswith(f".{name}") for known in there)


def _last_names(there: Iterable[str]) -> list[str]:
    """What the layers are called in their blocks, numbers left out."""
    last = {name.rpartition(".")[2] for name in there if name}
    return sorted(name for name in last if not (name.isdecimal() or name == "default" or name.startswith("lora_")))[:40]


def check_router_loss(trainer: Any) -> None:
    """Raises a ConfigError where prefix tuning has a router's loss: the attention mask then has positions that no router sees."""
    kinds = {config.peft_type for config in getattr(trainer.model, "peft_config", {}).values()}
    if trainer.aux_loss_enabled and PeftType.PREFIX_TUNING in kinds:
        raise ConfigError(
            "peft_config is of prefix tuning, whose positions have no router loss; set router_aux_loss_coef=0"
        )


@contextmanager
def checked_layers(config: PeftConfig | None) -> Iterator[dict[str, set[str]]]:
    """Gives what a configuration names before PEFT changes it, and makes a ConfigError of PEFT's "not found"."""
    try:
        yield named_layers(config)
    except ValueError as error:
        if config is None or "Target modules" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"lora: {reason}; name layers of the model, or all-linear") from error


def check_lora_layers(model: Mapping[str, Any], lora: Mapping[str, Any], where: str) -> None:
    """`check_layers` from a model's configuration alone, before its weights are loaded.

    Args:
        model: arguments of `align.load_model`.
        lora: fields of `peft.LoraConfig`.
        where: the section's name, for messages.
    """
    if named := named_layers(LoraConfig(**lora)):
        check_layers(_without_weights(model), named, where)


def _without_weights(model: Mapping[str, Any]) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    trusted = {"trust_remote_code": model.get("trust_remote_code", False)}
    try:
        config = AutoConfig.from_pretrained(model["path"], **{**source_of(model), **trusted})
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **trusted)
    except Exception as error:  # noqa: BLE001 - of a damaged configuration, it raises nearly everything
        reason = " ".join(str(error).split())[:200]
        raise ModelLoadError(
            f"{model['path']}: no model can be made of its config.json ({reason}); fetch it again"
        ) from error
