"""Tiny models of the families that people train: windows, soft caps, attention sinks, experts."""

from collections.abc import Iterable

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    Starcoder2Config,
)  # fmt: skip

SIZES = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None,
    "initializer_range": 0.2,
}  # fmt: skip
PLAIN = {name: value for name, value in SIZES.items() if name != "head_dim"}
#: Positions that a sliding window holds.
WINDOW = 4
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4}
LOCAL_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}

WINDOWED = {
    "mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma2": Gemma2Config(**SIZES, **ALTERNATING, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": Gemma3TextConfig(**SIZES, **ALTERNATING),
    "phi3": Phi3Config(**PLAIN, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**PLAIN, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "olmo3": Olmo3Config(**PLAIN, **ALTERNATING),
    "cohere2": Cohere2Config(**PLAIN, **ALTERNATING),
    "ministral": MinistralConfig(**SIZES, **ALTERNATING),
    "starcoder2": Starcoder2Config(**PLAIN, sliding_window=WINDOW),
}
ROUTED = {
    "gpt-oss": GptOssConfig(**SIZES, **ALTERNATING, **LOCAL_EXPERTS),
    "mixtral": MixtralConfig(**SIZES, **LOCAL_EXPERTS),
    "mixtral, window": MixtralConfig(**SIZES, **LOCAL_EXPERTS, sliding_window=WINDOW),
    "qwen2-moe": Qwen2MoeConfig(**PLAIN, **EXPERTS, moe_intermediate_size=32, shared_expert_intermediate_size=32),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, **EXPERTS, moe_intermediate_size=32),
    "olmoe": OlmoeConfig(**PLAIN, **EXPERTS),
}
FAMILIES: dict[str, PretrainedConfig] = WINDOWED | ROUTED
#: Those that share every mechanism with another family: slow tests have them.
ALIKE = ("cohere2", "ministral", "starcoder2", "mixtral, window", "qwen2-moe", "olmoe")


def each(names: Iterable[str]) -> list[ParameterSet]:
    """Parameters of a test."""
    return [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in names]


def tiny(name: str, **settings) -> PreTrainedModel:
    """A model of a family, in eval mode.

    Args:
        settings: of `from_config`, and any of its configuration.
    """
    config = type(FAMILIES[name]).from_dict(FAMILIES[name].to_dict())
    loading = {
        key: settings.pop(key) for key in ("dtype", "attn_implementation", "experts_implementation") if key in settings
    }
    for key, value in settings.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, **loading).eval()
