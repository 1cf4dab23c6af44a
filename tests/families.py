"""Tiny models of the families that people train, with random weights, saved once for a run of the tests."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
import transformers
from conftest import byte_level_tokenizer

SHAPE = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
#: Shorter than the rows, so that a window has something to cut.
WINDOW = {"sliding_window": 8}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}

#: Per family, its configuration's class and what `SHAPE` does not have.
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", {}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 64}),
    "opt": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "mistral": ("MistralConfig", WINDOW),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "phi3": ("Phi3Config", WINDOW),
    "olmo3": ("Olmo3Config", WINDOW),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "query_pre_attn_scalar": 8, **WINDOW}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "query_pre_attn_scalar": 8, **WINDOW}),
    "cohere": ("CohereConfig", {}),
    "granite": ("GraniteConfig", {}),
    "smollm3": ("SmolLM3Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 8, **EXPERTS}),
    "gpt_oss": ("GptOssConfig", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **WINDOW}),
}  # fmt: skip


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
    name, own = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SHAPE, **own, **changed})
    model = transformers.AutoModelForCausalLM.from_config(config)
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
        text_config={**SHAPE, "vocab_size": len(processor.tokenizer), "head_dim": 8},
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


#: Messages in parts, as processors get them.
PARTS_TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<boi>{% endif %}{% endfor %}{% endif %}"
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
