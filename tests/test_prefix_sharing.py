"""Token DPO in the prefix-shared layout: the numbers of padded rows, for every kind of attention and training; and models that
cannot do it are named."""

import copy

import pytest
import torch
from conftest import random_pairs, tiny_llama
from datasets import Dataset
from families import SIZES, tiny
from peft import LoraConfig, PromptTuningConfig, TaskType
from test_token_dpo import LORA, assert_close, batch_loss, options
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3nTextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    Qwen3NextConfig,
)  # fmt: skip

from align import TokenDPOConfig, TokenDPOTrainer
from align.logps import configured_not_to_share

OTHERS = {
    "qwen3, tied": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "mistral, full attention": MistralConfig(**SIZES, sliding_window=None),
    "gpt2": GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, eos_token_id=0, bos_token_id=0, initializer_range=0.2, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    "gpt-neox": GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
}  # fmt: skip
UNABLE = {
    "attention_chunk_size": LlamaConfig(**SIZES, attention_chunk_size=4),
    "layers of kind linear_attention": Qwen3NextConfig(
        **SIZES,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        router_aux_loss_coef=0.0,
    ),
    "takes no position_ids": BloomConfig(
        vocab_size=400, hidden_size=32, n_layer=2, n_head=4, eos_token_id=0, pad_token_id=0, bos_token_id=None
    ),
    "rope_type 'dynamic'": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ),
}


def make_trainer(tmp_path, tokenizer, model, pairs=None, lora=None, **kwargs):
    """A trainer whose policy is not its reference."""
    reference = None if lora else copy.deepcopy(model)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return TokenDPOTrainer(
        model, ref_model=reference, args=TokenDPOConfig(**options(tmp_path, **kwargs)), train_dataset=Dataset.from_list(pairs or random_pairs(8)),
        processing_class=tokenizer, peft_config=lora,
    )  # fmt: skip


def both(tmp_path, tokenizer, make, pairs, lora=None, **kwargs):
    """Loss and gradients with what pairs share computed once, and in padded rows."""
    found = []
    for share in (True, False):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, tokenizer, make(), pairs, lora, prefix_sharing=share, **kwargs)
        assert trainer._layout.shares == share
        found.append(batch_loss(trainer, pairs))
    return found


@pytest.mark.parametrize("copied_by", ["trainer", "user"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_copy_of_a_model_that_was_trained_before_computes_with_its_own_weights(
    tmp_path, tokenizer, family, copied_by
):
    model, pairs, data = tiny(family), random_pairs(4), {"processing_class": tokenizer}
    data["train_dataset"] = Dataset.from_list(pairs)
    args = TokenDPOConfig(**options(tmp_path))
    assert TokenDPOTrainer(model, args=args, **data)._layout.shares
    reference = copy.deepcopy(model) if copied_by == "user" else None
    trainer = TokenDPOTrainer(model, ref_model=reference, args=args, **data)
    batch = trainer.data_collator(pairs)
    expected, _ = trainer._reference(batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(trainer._reference(batch)[0], expected)


def mixed_pairs():
    """Random pairs, and some whose completions begin alike."""
    pairs = random_pairs(8, columns=("weights",))
    for pair in pairs[::3]:
        pair["rejected_ids"] = (pair["chosen_ids"] + pair["rejected_ids"])[: len(pair["rejected_ids"])]
    pairs[0]["rejected_ids"], pairs[0]["rejected_weights"] = pairs[0]["chosen_ids"], pairs[0]["chosen_weights"]
    return pairs


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_gradient_are_those_of_padded_rows(tmp_path, tokenizer, attention, lora):
    config = LoraConfig(**LORA) if lora else None
    (loss, grads), (expected_loss, expected) = both(
        tmp_path, tokenizer, lambda: tiny_llama(attn_implementation=attention), mixed_pairs(), config
    )
    assert_close(loss, grads, expected_loss, expected, 1e-5)


def test_a_quantized_base(tmp_path, tokenizer, model_dir):
    """Loss and gradients of QLoRA."""
    pytest.importorskip("bitsandbytes")
    from align import load_model

    found = []
    for share in (True, False):
        torch.manual_seed(0)
        trainer = TokenDPOTrainer(
            load_model(model_dir, dtype="float32", quantization="4bit"), args=TokenDPOConfig(**options(tmp_path, prefix_sharing=share)),
            train_dataset=Dataset.from_list(mixed_pairs()), processing_class=tokenizer,
            peft_config=LoraConfig(**{**LORA, "init_lora_weights": False}),
        )  # fmt: skip
        assert trainer._layout.shares == share
        found.append(batch_loss(trainer, mixed_pairs()))
    (loss, grads), (expected_loss, expected) = found
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    # TRL keeps the adapters of a quantized base in bfloat16, and so are their gradients: equal but for their last bit, which
    # is up to 2^-7 of a number; on which CPU it differs hangs on its kernels.
    assert_close(loss, grads, expected_loss, expected, 2**-7)


@pytest.mark.slow
def test_flex_attention_evaluates_the_same(tmp_path, tokenizer):
    """Its backward pass needs a GPU."""
    losses = []
    for share in (True, False):
        model = tiny_llama(attn_implementation="flex_attention" if share else "sdpa")
        trainer = make_trainer(tmp_path, tokenizer, model, mixed_pairs(), prefix_sharing=share)
        assert trainer._layout.shares == share
        batch = trainer._prepare_inputs(trainer.data_collator(mixed_pairs()))
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model.eval(), batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_other_models(tmp_path, tokenizer, name):
    def make():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(OTHERS[name])

    (loss, grads), (expected_loss, expected) = both(tmp_path, tokenizer, make, mixed_pairs())
    assert_close(loss, grads, expected_loss, expected, 1e-5)


def test_a_padding_token_without_embedding_has_a_gradient(tmp_path, tokenizer):
    """Gemma 3n divides by the root of a mean square, whose gradient at 0 is infinite."""
    config = Gemma3nTextConfig(
        **SIZES, vocab_size_per_layer_input=400, hidden_size_per_layer_input=8, laurel_rank=4, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0],
    )  # fmt: skip
    found = []
    for share in (True, False):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, tokenizer, AutoModelForCausalLM.from_config(config), prefix_sharing=share)
        assert trainer._layout.shares == share
        with torch.no_grad():
            trainer.model.get_input_embeddings().weight[0] = 0
        found.append(batch_loss(trainer, random_pairs(8)))
    (loss, grads), (expected_loss, expected) = found
    assert all(grad.isfinite().all() for grad in expected.values())
    assert_close(loss, grads, expected_loss, expected, 1e-5)


def test_gradient_checkpointing_and_autocast(tmp_path, tokenizer):
    (loss, grads), (expected_loss, expected) = both(
        tmp_path, tokenizer, tiny_llama, mixed_pairs(), gradient_checkpointing=True
    )
    assert_close(loss, grads, expected_loss, expected, 1e-5)
    (loss, grads), (expected_loss, expected) = both(tmp_path, tokenizer, tiny_llama, mixed_pairs(), bf16=True)
    assert loss == pytest.approx(expected_loss, rel=0.05)  # bfloat16 keeps eight bits
    for name, grad in expected.items():
        assert torch.nn.functional.cosine_similarity(grads[name].flatten(), grad.flatten(), dim=0) > 0.99, name


@pytest.mark.parametrize("reason", UNABLE)
def test_models_that_cannot_are_named_and_train_in_rows(tmp_path, tokenizer, caplog, reason):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(UNABLE[reason])
    with caplog.at_level("WARNING"):
        trainer = make_trainer(tmp_path, tokenizer, model, max_steps=1)
    assert not trainer._layout.shares
    [message] = [r.getMessage() for r in caplog.records if "prefix_sharing is off" in r.getMessage()]  # one line
    assert any(part in message for part in reason.split("|")) and type(model).__name__ in message
    trainer.train()


def test_prompt_tuning_is_named(tmp_path, tokenizer, caplog):
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    with caplog.at_level("WARNING"):
        trainer = make_trainer(tmp_path, tokenizer, tiny_llama(), lora=config)
    assert not trainer._layout.shares
    assert "puts positions before the prompt" in caplog.text


def test_settings_that_rows_must_not_share_are_named(tmp_path, tokenizer, caplog):
    for lora, settings, words in (
        (
            LoraConfig(**{**LORA, "alora_invocation_tokens": [5, 6]}, task_type="CAUSAL_LM"),
            {},
            "alora_invocation_tokens",
        ),
        (None, {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        (LoraConfig(**LORA, lora_dropout=0.1), {"disable_dropout": False}, "dropout is on"),
    ):
        caplog.clear()
        with caplog.at_level("WARNING"):
            assert not make_trainer(tmp_path, tokenizer, tiny_llama(), lora=lora, **settings)._layout.shares
        assert words in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        model = tiny_llama(attention_dropout=0.1)  # a function's, no module's
        assert not make_trainer(tmp_path, tokenizer, model, disable_dropout=False)._layout.shares
    assert "dropout is on" in caplog.text
    with caplog.at_level("WARNING"):
        model = tiny_llama()
        model.config._attn_implementation = "flash_attention_2"
        assert "'flash_attention_2' takes no mask of ours" in configured_not_to_share(model)


def test_a_model_that_breaks_on_our_mask_trains_in_rows(tmp_path, tokenizer, caplog):
    def forward(module, args, kwargs):
        if kwargs["attention_mask"].ndim != 2:
            raise AssertionError("padding masks only")

    model = tiny_llama()
    model.base_model.register_forward_pre_hook(forward, with_kwargs=True)
    with caplog.at_level("WARNING"):
        assert not make_trainer(tmp_path, tokenizer, model)._layout.shares
    assert "fails on the layout's mask (AssertionError: padding masks only)" in caplog.text


def test_a_model_that_ignores_our_mask_is_found_out_in_bfloat16(tmp_path, tokenizer, caplog):
    """Weights as small as those of a fresh model, where nothing makes much of a difference."""

    def forward(module, args, kwargs):
        mask = kwargs.get("attention_mask")
        return args, kwargs | ({"attention_mask": None} if mask is not None and mask.ndim == 4 else {})

    model = tiny_llama(initializer_range=0.02).bfloat16()
    model.base_model.register_forward_pre_hook(forward, with_kwargs=True)
    with caplog.at_level("WARNING"):
        trainer = make_trainer(tmp_path, tokenizer, model, lora=LoraConfig(**LORA), bf16=True)
    assert not trainer._layout.shares and "gives other log-probabilities" in caplog.text
    assert make_trainer(
        tmp_path, tokenizer, tiny_llama(initializer_range=0.02).bfloat16(), lora=LoraConfig(**LORA), bf16=True
    )._layout.shares


def test_a_model_that_makes_nan_of_our_mask_is_found_out(tmp_path, tokenizer, caplog):
    def spoil(module, args, kwargs, output):
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 4:
            output.last_hidden_state = output.last_hidden_state * float("nan")
        return output

    model = tiny_llama()
    model.base_model.register_forward_hook(spoil, with_kwargs=True)
    with caplog.at_level("WARNING"):
        assert not make_trainer(tmp_path, tokenizer, model)._layout.shares
    assert "gives other log-probabilities in the shared layout (by nan)" in caplog.text


def test_a_model_that_makes_something_else_of_our_mask_is_found_out(tmp_path, tokenizer, caplog):
    """Nothing in its configuration tells; two short pairs do."""

    class Forgetful(type(tiny_llama())):
        def forward(self, *args, position_ids=None, **kwargs):
            return super().forward(*args, **kwargs)

    model = tiny_llama()
    model.__class__ = Forgetful
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"position_ids": None}), with_kwargs=True
    )
    with caplog.at_level("WARNING"):
        trainer = make_trainer(tmp_path, tokenizer, model)
    assert not trainer._layout.shares
    assert "gives other log-probabilities in the shared layout" in caplog.text


def test_evaluation_with_logits(tmp_path, tokenizer):
    """`compute_metrics` makes TRL ask for logits, which are those of padded rows."""
    shapes = []
    trainer = TokenDPOTrainer(
        tiny_llama(), ref_model=tiny_llama(), args=TokenDPOConfig(**options(tmp_path)), train_dataset=Dataset.from_list(random_pairs(8)),
        eval_dataset=Dataset.from_list(random_pairs(4, seed=1)), processing_class=tokenizer,
        compute_metrics=lambda found: shapes.append(found.predictions.shape) or {},
    )  # fmt: skip
    assert trainer._layout.shares
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert shapes[0][0] == 4 and shapes[0][-1] == 400


@pytest.mark.parametrize("share", [True, False])
def test_changing_a_pair_leaves_all_others_as_they_were(tmp_path, tokenizer, share):
    """Through all of the trainer: log-probabilities to the last bit."""
    pairs = random_pairs(6, seed=2)
    trainer = make_trainer(tmp_path, tokenizer, tiny_llama(), pairs, prefix_sharing=share)

    def logps(rows):
        batch = trainer._prepare_inputs(trainer.data_collator(rows))
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        kwargs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with torch.no_grad():
            return trainer._layout(trainer.model, **kwargs, labels=labels, fused_lm_head=True).log_probs

    before = logps(pairs)
    for index, pair in enumerate(pairs):
        others = [row for row in range(12) if row % 6 != index]
        for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
            values = [[395] * len(pair[column])]
            if column == "rejected_ids":  # both sides begin alike, or no longer do
                values.append([*pair["chosen_ids"][:1], *pair[column][1:]])
            for value in values:
                changed = [dict(row) for row in pairs]
                changed[index][column] = value
                after = logps(changed)
                assert torch.equal(after[others], before[others])
                assert value == pair[column] or not torch.equal(after, before)
