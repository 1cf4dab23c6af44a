"""What vLLM is told of a LoRA adapter, and which adapters it would draw with otherwise than PEFT, without a word."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .errors import ConfigError, ModelLoadError
from .safety import check_folder

#: Ranks of LoRA that vLLM has room for; an adapter of another rank takes the next one.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

#: Fields of `adapter_config.json` that change what an adapter does. vLLM passes over fields that its version does not know.
MEANINGFUL = (
    "rank_pattern", "alpha_pattern", "modules_to_save", "use_rslora", "use_dora", "lora_bias", "alora_invocation_tokens",
    "layer_replication", "use_bdlora", "use_qalora",
)  # fmt: skip

#: Beginnings of `init_lora_weights` with which PEFT changes the base's weights when it loads the adapter; vLLM does not.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


def adapter_rank(adapter: str, known: Collection[str]) -> int:
    """The rank that vLLM has to have room for.

    Args:
        adapter: folder.
        known: fields of an adapter's configuration that this vLLM reads.

    Raises:
        ModelLoadError: there is no LoRA adapter, or its weights are pickles.
        ConfigError: vLLM would not draw with it, or not as PEFT does.
    """
    check_folder(adapter)
    file = Path(adapter) / "adapter_config.json"
    try:
        raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        rank = max(raw["r"], *(raw.get("rank_pattern") or {}).values(), 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(
            f"{file}: no rank of a LoRA adapter can be read ({' '.join(str(error).split())[:300]}); engine 'vllm' takes a folder "
            "with a LoRA adapter"
        ) from error
    if rank > LORA_RANKS[-1]:
        raise ConfigError(
            f"adapter {adapter} has rank {rank}, vLLM takes {LORA_RANKS[-1]} at most; merge it: align merge"
        )
    if ignored := [field for field in MEANINGFUL if raw.get(field) and field not in known]:
        raise ConfigError(
            f"adapter {adapter} has {ignored[0]} = {raw[ignored[0]]!r}, which this vLLM passes over; merge it: align merge"
        )
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        raise ConfigError(
            f"adapter {adapter} has init_lora_weights {init!r}: PEFT changes the base's weights when it loads it, vLLM does not; "
            "merge it: align merge"
        )
    return next(size for size in LORA_RANKS if size >= rank)
