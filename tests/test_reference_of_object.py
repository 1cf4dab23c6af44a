"""The reference of a model that is passed as an object is the model as it was passed, whatever its folder holds."""

import math

import pytest
import torch
from conftest import random_pairs, tiny_llama
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, OPTConfig

from align import (
    BASHConfig,
    BASHTrainer,
    CDPOConfig,
    CDPOTrainer,
    TGDPOConfig,
    TGDPOTrainer,
    TokenDPOConfig,
    TokenDPOTrainer,
    load_model,
)
from align.errors import ConfigError, RecordError

PAIRS = random_pairs(8)
METHODS = {
    "dpo": (TokenDPOConfig, TokenDPOTrainer, ()),
    "cdpo": (CDPOConfig, CDPOTrainer, ("ce_scores",)),
    "tgdpo": (TGDPOConfig, TGDPOTrainer, ("guidance_logratios",)),
}


def changed(model, seed=0, scale=0.02):
    """Adds noise to every weight, in memory alone."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)
    return model


def loaded(model_dir, **kwargs):
    return changed(AutoModelForCausalLM.from_pretrained(model_dir, **kwargs))


def build(folder, model, tokenizer, method="dpo", pairs=PAIRS, peft_config=None, ref_model=None, **kwargs):
    config, trainer, _ = METHODS[method]
    args = config(**{
        "output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, "max_steps": 3, "logging_steps": 1,
        "save_strategy": "no", "learning_rate": 1e-3, "max_length": None, **kwargs,
    })  # fmt: skip
    return trainer(
        model, ref_model=ref_model, args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer,
        peft_config=peft_config,
    )  # fmt: skip


def losses(trainer):
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def starts_at_ln2(trainer, digits=1e-4):
    first, *_, last = losses(trainer)
    assert first == pytest.approx(math.log(2), abs=digits)
    assert last < first - 1e-3  # the reference stays where it was, or all of them were ln 2


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"gradient_checkpointing": True},
        {"cache_reference": False},
        {"prefix_sharing": False},
        {"max_tokens_per_batch": 64},
    ],
    ids=str,
)
def test_weights_changed_in_memory(tmp_path, model_dir, tokenizer, precompute, kwargs):
    starts_at_ln2(build(tmp_path, loaded(model_dir), tokenizer, precompute_ref_log_probs=precompute, **kwargs))


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(tmp_path, model_dir, tokenizer, method, precompute):
    pairs = random_pairs(8, columns=METHODS[method][2])
    trainer = build(tmp_path, loaded(model_dir), tokenizer, method, pairs, precompute_ref_log_probs=precompute)
    trainer.train()
    found = [
        [row[f"rewards/{side}_unweighted"] for side in ("chosen", "rejected")] for row in trainer.state.log_history[:-1]
    ]
    assert found[0] == pytest.approx([0, 0], abs=1e-5) and abs(found[-1][0]) > 1e-3


@pytest.mark.parametrize("precompute", [False, True])
def test_more_embeddings(tmp_path, model_dir, tokenizer, precompute):
    model = loaded(model_dir)
    model.resize_token_embeddings(410)
    tokens = AutoTokenizer.from_pretrained(model_dir)
    tokens.add_tokens([f"<new{i}>" for i in range(410 - len(tokens))])
    pairs = [pair | {"chosen_ids": [*pair["chosen_ids"], 409]} for pair in PAIRS]
    starts_at_ln2(build(tmp_path, model, tokens, pairs=pairs, precompute_ref_log_probs=precompute))


@pytest.mark.parametrize("precompute", [False, True])
def test_bfloat16(tmp_path, model_dir, tokenizer, precompute):
    model = loaded(model_dir, dtype=torch.bfloat16)
    trainer = build(tmp_path, model, tokenizer, precompute_ref_log_probs=precompute, learning_rate=1e-2)
    starts_at_ln2(trainer, digits=0.02)
    if not precompute:
        assert {parameter.dtype for parameter in trainer.ref_model.parameters()} == {torch.bfloat16}


def test_a_model_of_no_folder(tmp_path, tokenizer):
    starts_at_ln2(build(tmp_path, tiny_llama(3), tokenizer))
    with pytest.raises(ConfigError, match="its tokenizer is unknown; give processing_class"):
        build(tmp_path, tiny_llama(3), None)


def test_the_reference_is_frozen_and_apart(tmp_path, model_dir, tokenizer):
    model = loaded(model_dir)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = build(tmp_path, model, tokenizer)
    trainer.train()
    after = trainer.accelerator.unwrap_model(trainer.ref_model).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert any(not torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_tied_matrices_stay_tied(tmp_path, tokenizer):
    model = tiny_llama(1, tie_word_embeddings=True)
    trainer = build(tmp_path, model, tokenizer)
    reference = trainer.accelerator.unwrap_model(trainer.ref_model)
    assert reference.lm_head.weight is reference.model.embed_tokens.weight is not model.model.embed_tokens.weight
    starts_at_ln2(trainer)


def test_trained_a_second_time(tmp_path, model_dir, tokenizer):
    """The same object: the second training's reference is what the first one made of it."""
    model = loaded(model_dir)
    losses(build(tmp_path / "a", model, tokenizer))
    starts_at_ln2(build(tmp_path / "b", model, tokenizer))


def test_the_cache_is_not_the_folder_s(tmp_path, model_dir, tokenizer):
    """Numbers of another model of the same name are not taken from the cache."""
    for seed in (0, 1):
        model = changed(AutoModelForCausalLM.from_pretrained(model_dir), seed, 0.05)
        starts_at_ln2(build(tmp_path / str(seed), model, tokenizer, precompute_ref_log_probs=True))


def test_a_given_reference_is_used(tmp_path, model_dir, tokenizer):
    model, reference = loaded(model_dir), AutoModelForCausalLM.from_pretrained(model_dir)
    trainer = build(tmp_path, model, tokenizer, ref_model=reference)
    assert trainer.accelerator.unwrap_model(trainer.ref_model) is reference
    assert abs(losses(trainer)[0] - math.log(2)) > 0.01
    with pytest.raises(ConfigError, match="ref_model = .* must be a model"):
        build(tmp_path, loaded(model_dir), tokenizer, ref_model=model_dir)
    pairs = [PAIRS[0] | {"id": "mine", "chosen_ids": [3, 389]}]
    with pytest.raises(RecordError, match="mine.*389"):  # an id that the policy has, and the reference has not
        build(tmp_path, loaded(model_dir), tokenizer, pairs=pairs, ref_model=tiny_llama(vocab_size=380))


def test_a_name_keeps_trl_s_way(tmp_path, model_dir, tokenizer, monkeypatch):
    monkeypatch.setattr("align.trainers.token_dpo.frozen_copy", lambda model: pytest.fail("copied"))
    starts_at_ln2(build(tmp_path, model_dir, tokenizer))


@pytest.mark.parametrize("precompute", [False, True])
def test_a_new_adapter(tmp_path, model_dir, tokenizer, precompute):
    lora = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])
    model = loaded(model_dir)
    model.resize_token_embeddings(410)
    trainer = build(
        tmp_path, model, tokenizer, peft_config=lora, precompute_ref_log_probs=precompute, learning_rate=1e-1
    )
    assert trainer.ref_model is None
    starts_at_ln2(trainer)


#: Adapters with all of their weights changed, so that base and adapter differ.
ADAPTERS = {
    "linear": {"target_modules": ["q_proj", "down_proj"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "DoRA": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embeddings saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6, 7]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_model_with_an_adapter(tmp_path, tokenizer, kind, precompute, tied):
    """The reference is base and adapter as passed: TRL's copy of the adapter leaves out that of embeddings."""
    model = get_peft_model(tiny_llama(1, tie_word_embeddings=tied), LoraConfig(r=4, **ADAPTERS[kind]))
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    trainer = build(tmp_path, model, tokenizer, precompute_ref_log_probs=precompute, learning_rate=1e-2)
    with torch.no_grad():
        batch = trainer.data_collator([trainer.train_dataset[0]])
        ids = batch["input_ids"][:1, batch["attention_mask"][0].bool()]
        expected = trainer.model.eval()(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        own, _ = trainer._reference({name: tensor for name, tensor in batch.items() if not name.startswith("token_")})
    count = len(trainer.train_dataset[0]["chosen_ids"])
    assert torch.allclose(own[0, : len(expected)][-count:], expected[-count:], atol=1e-4)
    trainer.model.train()
    starts_at_ln2(trainer)


@pytest.mark.parametrize("trainer", [TokenDPOTrainer, BASHTrainer])
def test_new_tokens_are_trained_of_a_tied_model(tmp_path, tokenizer, trainer):
    """TRL asks PEFT's wrapper of tokens for a bias, which it has not."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 6, 7])
    model, settings = (
        tiny_llama(1, tie_word_embeddings=True),
        {"max_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False},
    )
    rows = PAIRS if trainer is TokenDPOTrainer else [{"prompt": "1 + 1 =", "completion": " 2"}] * 2
    config = TokenDPOConfig if trainer is TokenDPOTrainer else BASHConfig
    trained = trainer(
        model, args=config(str(tmp_path), **settings), train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=lora,
    )  # fmt: skip
    assert math.isfinite(trained.train().training_loss)
    trained.save_model(tmp_path / "saved")
    assert not [name for name in load_file(tmp_path / "saved" / "adapter_model.safetensors") if name.endswith("bias")]


def test_adapters_that_trl_cannot_copy(tmp_path, model_dir, tokenizer):
    model = get_peft_model(loaded(model_dir), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    with pytest.raises(ConfigError, match="adapters are called mine; load the one to train as 'default'"):
        build(tmp_path, model, tokenizer)
    model = get_peft_model(loaded(model_dir), LoraConfig(r=2, target_modules=["q_proj"]))
    build(tmp_path, model, tokenizer)
    with pytest.raises(ConfigError, match="has an adapter 'ref'.*delete_adapter"):
        build(tmp_path, model, tokenizer)
    of_head = get_peft_model(loaded(model_dir), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ConfigError, match="adapter on its head"):
        build(tmp_path, of_head, tokenizer)
    model.delete_adapter("ref")
    starts_at_ln2(build(tmp_path, model, tokenizer, learning_rate=1e-1))


def test_what_cannot_be_copied_is_refused(tmp_path, model_dir, tokenizer):
    model = loaded(model_dir)
    model.generator = (number for number in range(3))  # nothing copies a generator
    with pytest.raises(
        ConfigError, match="the reference cannot be copied .*; give ref_model, or .*precompute_ref_log_probs"
    ):
        build(tmp_path, model, tokenizer)
    starts_at_ln2(build(tmp_path, model, tokenizer, precompute_ref_log_probs=True))


def test_a_device_map(tmp_path, model_dir, tokenizer):
    """Hooks of accelerate are copied with the model, and work on the copy; what they hold elsewhere cannot be trained."""
    from accelerate import cpu_offload, dispatch_model

    model = dispatch_model(loaded(model_dir), {"": "cpu"}, main_device="cpu", force_hooks=True)
    starts_at_ln2(build(tmp_path, model, tokenizer))
    model = cpu_offload(loaded(model_dir), "cpu")
    with pytest.raises(ConfigError, match="model.embed_tokens is offloaded.* load the model without device_map"):
        build(tmp_path, model, tokenizer)


def test_stages_train_from_what_they_loaded(tmp_path, model_dir, tokenizer):
    model = load_model(model_dir, dtype="float32")
    starts_at_ln2(build(tmp_path, model, tokenizer))


DROPPING = {
    "opt": OPTConfig(
        vocab_size=400, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        word_embed_proj_dim=32, dropout=0.1, attention_dropout=0.1, layerdrop=0.1, eos_token_id=0, pad_token_id=0, init_std=0.2,
    ),
    "llama": LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, attention_dropout=0.1,
        eos_token_id=0, pad_token_id=0, initializer_range=0.2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("name", DROPPING)
def test_functional_dropout(tmp_path, tokenizer, name, precompute, lora):
    """`disable_dropout` holds for dropout that is a function, too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DROPPING[name])
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None
    trainer = build(
        tmp_path, model, tokenizer, peft_config=config, precompute_ref_log_probs=precompute, learning_rate=1e-2
    )
    starts_at_ln2(trainer)
    assert model.config.attention_dropout == 0.1  # what is saved has the model's own
