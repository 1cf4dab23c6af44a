"""On CUDA: the shared layout against padded rows, under both kinds of attention, in bfloat16 and on a 4-bit base."""

import gc
import json

import pytest
import torch
from conftest import random_pairs, tiny_llama
from datasets import Dataset
from peft import LoraConfig
from test_token_dpo import LORA, assert_close, batch_loss, options

from align import CDPOConfig, CDPOTrainer
from align.errors import DeviceMemoryError
from align.models import load_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def found(tmp_path, tokenizer, model, **kwargs):
    pairs = random_pairs(8, columns=("ce_scores",))
    args = CDPOConfig(**options(tmp_path, use_cpu=False, per_device_train_batch_size=8) | kwargs)
    torch.manual_seed(0)
    trainer = CDPOTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA),
    )
    assert trainer._layout.shares == args.prefix_sharing
    return batch_loss(trainer, pairs)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_loss_and_gradient_are_those_of_padded_rows(tmp_path, tokenizer, attention, checkpointing):
    # FlexAttention's kernels want heads of 16 numbers or more.
    sizes = {"hidden_size": 64, "num_attention_heads": 4}
    shared = found(
        tmp_path, tokenizer, tiny_llama(attn_implementation=attention, **sizes), gradient_checkpointing=checkpointing
    )
    padded = found(tmp_path, tokenizer, tiny_llama(attn_implementation="sdpa", **sizes), prefix_sharing=False)
    assert_close(*shared, *padded, 1e-5 if attention != "flex_attention" else 1e-3)


def test_bfloat16_and_four_bits(tmp_path, model_dir, tokenizer):
    pytest.importorskip("bitsandbytes")
    for model, settings in (
        (lambda: tiny_llama(), {"bf16": True}),
        (lambda: load_model(model_dir, dtype="bfloat16", quantization="4bit"), {"bf16": True}),
    ):
        (loss, grads), (expected_loss, expected) = (
            found(tmp_path, tokenizer, model(), prefix_sharing=share, **settings) for share in (True, False)
        )
        assert loss == pytest.approx(expected_loss, rel=0.05)
        for name, grad in expected.items():
            assert torch.nn.functional.cosine_similarity(grads[name].flatten(), grad.flatten(), dim=0) > 0.98, name


def test_memory_keeps_to_the_budget(tmp_path, tokenizer):
    """Four times the pairs in passes of the same size take about the same memory."""
    peaks = []
    for count in (8, 32):
        pairs = random_pairs(count, columns=("ce_scores",))
        args = CDPOConfig(
            **options(tmp_path, use_cpu=False, per_device_train_batch_size=count, max_tokens_per_batch=64, max_steps=2)
        )
        trainer = CDPOTrainer(
            tiny_llama(hidden_size=256, intermediate_size=4096), args=args, train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer, peft_config=LoraConfig(**LORA),
        )  # fmt: skip
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        peaks.append(torch.cuda.max_memory_allocated())
        del trainer
    assert peaks[1] < 1.2 * peaks[0]


def test_a_preflight_measures_what_the_training_takes(tmp_path, tokenizer):
    """As much as the longest batch of the training itself, whose optimizer has its states by then; and its weights, to the
    last bit. No other test covers what CUDA counts."""
    pairs, found = random_pairs(16, columns=("ce_scores",)), []
    for preflight in (True, False):
        # All pairs in every batch: the second step meets the longest with all states there.
        args = CDPOConfig(
            **options(
                tmp_path,
                use_cpu=False,
                per_device_train_batch_size=16,
                max_steps=3,
                preflight=preflight,
                disable_dropout=False,
            )
        )
        trainer = CDPOTrainer(
            tiny_llama(hidden_size=256, intermediate_size=4096), args=args, train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer, peft_config=LoraConfig(**LORA, lora_dropout=0.5),
        )  # fmt: skip
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        found.append({name: value.cpu() for name, value in trainer.model.state_dict().items()})
        peak = torch.cuda.max_memory_allocated()
        del trainer
        gc.collect()
    (memory,) = json.loads((tmp_path / "preflight.json").read_text())["memory"]
    assert memory["before"] < memory["peak"] <= memory["reserved"] <= memory["total"]
    assert memory["peak"] == pytest.approx(peak, rel=0.2)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_batch_that_a_device_cannot_hold_is_named(tmp_path, tokenizer):
    args = CDPOConfig(**options(tmp_path, use_cpu=False, max_steps=3))
    trainer = CDPOTrainer(
        tiny_llama(), args=args, train_dataset=Dataset.from_list(random_pairs(8, columns=("ce_scores",))),
        processing_class=tokenizer, peft_config=LoraConfig(**LORA),
    )  # fmt: skip

    def take(*_):
        torch.empty(2 * torch.cuda.get_device_properties(0).total_memory, dtype=torch.uint8, device="cuda")

    trainer.model.get_base_model().get_input_embeddings().register_forward_pre_hook(take)
    before = torch.cuda.memory_allocated()
    with pytest.raises(DeviceMemoryError, match="does not fit into memory: p.*out of memory.*max_tokens_per_batch"):
        trainer.train()
    assert torch.cuda.memory_allocated() <= 1.1 * before
