"""Tiny models of the families that people train, with random weights: windows, soft caps, attention sinks, experts."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from _pytest.mark.structures import ParameterSet
from conftest import byte_level_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    Olmo3Config,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
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
    "gpt_oss": GptOssConfig(**SIZES, **ALTERNATING, **LOCAL_EXPERTS),
    "mixtral": MixtralConfig(**SIZES, **LOCAL_EXPERTS),
    "mixtral, window": MixtralConfig(**SIZES, **LOCAL_EXPERTS, sliding_window=WINDOW),
    "qwen2_moe": Qwen2MoeConfig(**PLAIN, **EXPERTS, moe_intermediate_size=32, shared_expert_intermediate_size=32),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS, moe_intermediate_size=32),
    "olmoe": OlmoeConfig(**PLAIN, **EXPERTS),
}
OTHERS = {
    "llama": LlamaConfig(**PLAIN),
    "gpt2": GPT2Config(**PLAIN, n_embd=32, n_layer=2, n_head=4, n_positions=512, n_inner=64),
    "opt": OPTConfig(**PLAIN, ffn_dim=64, word_embed_proj_dim=32),
    "gpt_neox": GPTNeoXConfig(**PLAIN),
    "bloom": BloomConfig(**PLAIN, n_layer=2, n_head=4),
    "qwen3": Qwen3Config(**SIZES),
    "gemma": GemmaConfig(**SIZES),
    "cohere": CohereConfig(**PLAIN),
    "granite": GraniteConfig(**PLAIN),
    "smollm3": SmolLM3Config(**PLAIN),
}
FAMILIES: dict[str, PretrainedConfig] = OTHERS | WINDOWED | ROUTED
#: Those that share every mechanism with another family: slow tests have them.
ALIKE = ("cohere2", "ministral", "starcoder2", "mixtral, window", "qwen2_moe", "olmoe")


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


@cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="families-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@cache
def family_folder(family: str, **changed) -> str:
    """A saved model of a family with its tokenizer, which has a chat template.

    Args:
        changed: values of its configuration that are not those of the table.
    """
    model = tiny(family, **changed)
    folder = _root() / f"{family}-{len(list(_root().iterdir()))}"
    model.save_pretrained(folder)
    family_tokenizer().save_pretrained(folder)
    return str(folder)


@cache
def multimodal_folder() -> str:
    """A saved model that also reads images, a Gemma 3, with its processor."""
    torch.manual_seed(0)
    folder = str(_root() / "multimodal")
    processor = _new_processor()
    ids = dict(zip(IMAGE_TOKENS, processor.tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS.values())), strict=True))
    config = transformers.Gemma3Config(
        text_config={**SIZES, "vocab_size": len(processor.tokenizer)},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4, image_token_index=ids["image_token"], boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
    )  # fmt: skip
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


IMAGE_TOKENS = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}


def _new_processor() -> transformers.ProcessorMixin:
    plain = byte_level_tokenizer(chat=True)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain._tokenizer, eos_token=plain.eos_token, pad_token=plain.pad_token,
        extra_special_tokens=IMAGE_TOKENS,
    )  # fmt: skip
    images = transformers.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return transformers.Gemma3Processor(images, tokenizer, chat_template=PARTS_TEMPLATE, image_seq_length=4)


#: Messages in parts, as processors get them; text in place of parts would be taken for a list of images.
PARTS_TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<boi>{% endif %}{% endfor %}"
    "{{ '<|end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def multimodal_processor() -> transformers.ProcessorMixin:
    """A new processor each time."""
    return transformers.AutoProcessor.from_pretrained(multimodal_folder())


@cache
def _tokenizer_files() -> str:
    folder = _root() / "tokenizer"
    byte_level_tokenizer(chat=True).save_pretrained(folder)
    return str(folder)


def family_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A new tokenizer each time, because trainers change its padding token."""
    return transformers.AutoTokenizer.from_pretrained(_tokenizer_files())
