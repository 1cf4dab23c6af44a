"""On CUDA: the shared layout against padded rows, under both kinds of attention, in bfloat16 and on a 4-bit base."""

import pytest
import torch
from conftest import random_pairs, tiny_llama
from datasets import Dataset
from peft import LoraConfig
from test_token_dpo import LORA, assert_close, batch_loss, options

from align import CDPOConfig, CDPOTrainer
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
