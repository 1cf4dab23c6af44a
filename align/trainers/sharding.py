"""What trainers do about weights that lie in pieces in several processes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from accelerate.utils import has_offloaded_params

from ..errors import ConfigError
from ..processes import launched_with_deepspeed

if TYPE_CHECKING:
    from transformers import Trainer


def launched_with_fsdp() -> bool:
    """Whether accelerate was told to shard with FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def check_sharding(trainer: Trainer) -> None:
    """Raises a ConfigError where the launcher was told to shard and accelerate does not: on a CPU it takes DDP without a
    word; and where it shards in a way that was never tried: FSDP 1, other stages of ZeRO."""
    if launched_with_fsdp() and not trainer.is_fsdp_enabled:
        raise ConfigError(
            "launched with FSDP, but accelerate shards on GPUs only, and this process would train with all weights; launch "
            "with recipes/accelerate/cpu.yaml, or without use_cpu"
        )
    if launched_with_deepspeed() and not trainer.is_deepspeed_enabled:
        raise ConfigError(
            "launched with DeepSpeed, but ACCELERATE_USE_CPU has accelerate leave it out, and this process would train with "
            "all weights; unset it, or launch with recipes/accelerate/cpu.yaml"
        )
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage != 3:
        raise ConfigError(
            f"ZeRO stage {trainer.accelerator.state.deepspeed_plugin.zero_stage} was never tried; set zero_stage: 3, as "
            "recipes/accelerate/zero3.yaml does, or launch with recipes/accelerate/ddp.yaml"
        )
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ConfigError("FSDP 1 is not supported; set fsdp_version: 2, as recipes/accelerate/fsdp2.yaml does")


def check_offloaded(model: Any) -> None:
    """Raises a ConfigError where a model to be trained was loaded with weights elsewhere: training would change copies of them."""
    modules = () if isinstance(model, str) else model.named_modules()
    for name, module in modules:
        trained = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if trained and has_offloaded_params(module):
            raise ConfigError(
                f"{name} is offloaded, so its weights cannot be trained; load the model without device_map, or launch with "
                "recipes/accelerate/fsdp2.yaml, which shards it"
            )
