"""What vLLM is told of a LoRA adapter, and which adapters it would draw with otherwise than PEFT, without a word."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, ModelLoadError
from .safety import check_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Ranks of LoRA that vLLM has room for; an adapter of another rank takes the next one.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

#: Fields of `adapter_config.json` that change what an adapter does. vLLM passes over fields that its version does not know.
MEANINGFUL = (
    "rank_pattern", "alpha_pattern", "modules_to_save", "use_rslora", "use_dora", "lora_bias", "alora_invocation_tokens",
    "layer_replication", "use_bdlora", "use_qalora", "trainable_token_indices",
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


def check_tied(adapter: str, base: PretrainedConfig) -> None:
    """Raises a ConfigError where the adapter changes embeddings or head alone, and the base has one matrix for both.

    vLLM has one layer for both then; PEFT has two.
    """
    from safetensors import SafetensorError, safe_open

    if not getattr(base.get_text_config(), "tie_word_embeddings", False):
        return
    file = Path(adapter) / "adapter_model.safetensors"
    try:
        with safe_open(file, "pt") as weights:
            names = [name for name in weights.keys() if ".lora_" in name]  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{file}: not readable ({error}); fetch it again") from error
    # Layers of a model have numbers; embeddings and head lie beside them.
    if outside := [name for name in names if not any(part.isdigit() for part in name.split("."))]:
        raise ConfigError(
            f"adapter {adapter} changes {outside[0].partition('.lora_')[0]}, which the base ties to another matrix: vLLM would "
            "change both; merge it: align merge"
        )
