"""What trainers do about weights that lie in pieces in several processes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from transformers import Trainer


def check_sharding(trainer: Trainer) -> None:
    """Raises a ConfigError where the launcher was told to shard and accelerate does not: on a CPU it takes DDP without a
    word; and FSDP 1 was never tried."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true") and not trainer.is_fsdp_enabled:
        raise ConfigError(
            "launched with FSDP, but accelerate shards on GPUs only, and this process would train with all weights; launch "
            "with recipes/accelerate/cpu.yaml, or without use_cpu"
        )
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ConfigError("FSDP 1 is not supported; set fsdp_version: 2, as recipes/accelerate/fsdp2.yaml does")
