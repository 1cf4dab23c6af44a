"""Tiny models and tokenizers made on the spot: nothing is downloaded."""

import os
import re
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CORPUS = [
    "Question: Tom has 12 apples and buys 7 more. How many apples are there?\nAnswer: 12 + 7 = 19.\n#### 19",
    "Janet sells 16 - 3 - 4 = 9 duck eggs a day, for $2 each, which makes 9 * 2 = $18 every day.",
    "the answer is 42, because six times seven is forty-two; naïve café ☕ and 🦆 stay as they are.",
] * 4

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def byte_level_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2 style: byte-level BPE, no BOS; with `chat`, ids of a chat template as SmolLM2 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|start|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>" if chat else "<|endoftext|>", pad_token="<|endoftext|>"
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Llama-2 style: a space before every text, spaces as ▁, unknown characters as bytes, BOS in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")]
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*special, *alphabet], show_progress=False)
    tokenizer.train_from_iterator(CORPUS[:2] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def tiny_llama(seed: int = 0, vocab_size: int = 400, **kwargs) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    options = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": None,
        "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.2, "tie_word_embeddings": False,
    } | kwargs  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**options)).eval()


def random_pairs(n: int, seed: int = 0, vocab_size: int = 390, columns: tuple[str, ...] = ()) -> list[dict]:
    """Pairs of random ids of many lengths, completions of one token among them, with random token-level columns."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    pairs = []
    for i in range(n):
        pair = {"id": f"p{i}", "prompt": "x", "chosen": "y", "rejected": "z"}
        pair["prompt_ids"] = [draw(3, vocab_size) for _ in range(draw(1, 12))]
        for side in ("chosen", "rejected"):
            length = 1 if i % 4 == (side == "chosen") else draw(2, 14)
            pair[f"{side}_ids"] = [draw(3, vocab_size) for _ in range(length)]
            for column in columns:
                values = torch.rand(length, generator=generator)
                pair[f"{side}_{column}"] = (-3 * values if column == "ref_logps" else values).tolist()
        pairs.append(pair)
    return pairs


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer) -> str:
    """A saved tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path, model_dir):
    """A model's folder to spoil."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is taken from, or left in, the cache of whoever runs the tests."""
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))


def pytest_collection_modifyitems(items):
    """Marks the tests of each file that names a trainer or launches one: `make test-versions` runs these, a new file of them
    too."""
    names = re.compile(r"Trainer\b|train_sft|train_preference|recipes/accelerate")
    found = {path: names.search(path.read_text(encoding="utf-8")) for path in {item.path for item in items}}
    for item in items:
        if found[item.path]:
            item.add_marker("trainers")
