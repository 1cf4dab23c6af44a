"""Prefix sharing on the models that people train, against TRL's own trainer on padded rows and against one row at a time."""

import copy
from collections import Counter

import pytest
import torch
from conftest import random_pairs
from datasets import Dataset
from families import FAMILIES, ROUTED, WINDOW, WINDOWED, each, tiny
from oracles import completion_logps
from peft import LoraConfig
from test_token_dpo import assert_close, batch_loss, options
from transformers import AutoModelForCausalLM, PhimoeConfig
from trl import DPOConfig, DPOTrainer

from align import TokenDPOConfig, TokenDPOTrainer
from align.logps import shares_prefixes, token_logps

LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}


class IdsDPOTrainer(DPOTrainer):
    """TRL's on ids; it would tokenize whatever it is given."""

    def _prepare_dataset(self, dataset, *_):
        return dataset


def long_pairs(count=8, seed=0):
    """Pairs several times longer than a window, prompts of few tokens and of many among them, reference numbers with them."""
    pairs = random_pairs(count, seed=seed)
    for i, pair in enumerate(pairs):
        if i % 3:
            pair["prompt_ids"] = (pair["prompt_ids"] * 30)[: 5 * WINDOW + i]
        if i % 2:
            pair["chosen_ids"] = (pair["chosen_ids"] + pair["prompt_ids"])[: 4 * WINDOW]
    return pairs


def step(tmp_path, tokenizer, cls, model, reference, pairs, lora=None, **settings):
    """Loss, gradients and metrics of one batch; a trainer."""
    torch.manual_seed(0)
    config = TokenDPOConfig if issubclass(cls, TokenDPOTrainer) else DPOConfig
    trainer = cls(
        model, ref_model=reference, args=config(**options(tmp_path, **settings)), train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer, peft_config=lora,
    )  # fmt: skip
    loss, grads = batch_loss(trainer, pairs)
    return trainer, loss, grads, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def moved(model):
    """Another policy than the reference."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return model


def assert_equal_to_trl(tmp_path, tokenizer, make, lora=None, pairs=None, **settings):
    """Loss, every gradient and every metric of TRL's trainer within 1e-5; returns ours."""
    pairs, found = pairs or long_pairs(), []
    for cls in (IdsDPOTrainer, TokenDPOTrainer):
        reference = None if lora else make()
        found.append(step(tmp_path, tokenizer, cls, moved(make()), reference, pairs, lora, **settings))
    (_, expected_loss, expected, expected_metrics), (trainer, loss, grads, metrics) = found
    assert trainer._layout.shares
    assert_close(loss, grads, expected_loss, expected, 1e-5)
    assert expected_metrics.keys() <= metrics.keys()
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=2e-5), name
    return trainer, metrics


@pytest.mark.parametrize("name", each(WINDOWED | ROUTED))
def test_full_fine_tuning_equals_trl(tmp_path, tokenizer, name):
    trainer, metrics = assert_equal_to_trl(tmp_path, tokenizer, lambda: tiny(name))
    assert ("aux_loss" in metrics) == (name in ROUTED)
    if name in ROUTED:
        assert trainer.router_aux_loss_coef > 0
    # A window of another length is another loss, so what was compared has windows.
    wider = tiny(name)
    for config in {id(m.config): m.config for m in wider.modules() if hasattr(m, "config")}.values():
        if getattr(config, "sliding_window", None):
            config.sliding_window = 100
    wider, plain = (
        token_logps(model, [(p["prompt_ids"], p["chosen_ids"]) for p in long_pairs()], pad_token_id=0)[7]
        for model in (wider, tiny(name))
    )
    assert (max(abs(a - b) for a, b in zip(wider, plain, strict=True)) > 1e-3) == (
        name in WINDOWED or name in ("gpt_oss", "mixtral, window")
    )


@pytest.mark.parametrize("name", each(WINDOWED | ROUTED))
def test_lora_with_checkpointing_and_truncated_prompts_equals_trl(tmp_path, tokenizer, name):
    assert_equal_to_trl(
        tmp_path, tokenizer, lambda: tiny(name), LoraConfig(**LORA), gradient_checkpointing=True,
        max_length=6 * WINDOW, truncation_mode="keep_end",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["mistral", "gemma3", "qwen2", "mixtral, window"])
def test_eager_attention_equals_trl(tmp_path, tokenizer, name):
    """SDPA's is what these models have by default; Gemma 2 and gpt-oss are eager."""
    assert tiny(name).config._attn_implementation == "sdpa"
    assert_equal_to_trl(tmp_path, tokenizer, lambda: tiny(name, attn_implementation="eager"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "gemma2", "qwen3_moe"])
@torch._dynamo.config.patch(automatic_dynamic_shapes=False)
def test_flex_attention_evaluates_the_same(tmp_path, tokenizer, name):
    """Its backward pass needs a GPU. Shapes are static, because torch 2.13 makes C++ that does not compile for this mask where
    they are dynamic."""
    torch._dynamo.reset()
    pairs, losses = long_pairs(), []
    for attention in ("flex_attention", "eager"):
        trainer = TokenDPOTrainer(
            moved(tiny(name, attn_implementation=attention)), ref_model=tiny(name, attn_implementation=attention),
            args=TokenDPOConfig(**options(tmp_path, prefix_sharing=attention == "flex_attention")),
            train_dataset=Dataset.from_list(pairs), processing_class=tokenizer,
        )  # fmt: skip
        assert trainer._layout.shares == (attention == "flex_attention")
        batch = trainer._prepare_inputs(trainer.data_collator(pairs))
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model.eval(), batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def shared_logps(trainer, pairs):
    """(2B, T) of the policy in the shared layout, and the mask of completions."""
    batch = trainer._prepare_inputs(trainer.data_collator(pairs))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    kwargs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    outputs = trainer._layout(trainer.model, **kwargs, labels=labels, fused_lm_head=True, use_cache=False)
    return outputs.log_probs, labels[:, 1:] != -100


@pytest.mark.parametrize("name", each(WINDOWED | ROUTED))
def test_log_probabilities_are_those_of_rows_one_by_one(tmp_path, tokenizer, name):
    pairs = long_pairs()
    trainer, *_ = step(tmp_path, tokenizer, TokenDPOTrainer, tiny(name), None, pairs)
    assert trainer._layout.shares
    with torch.no_grad():
        found, mask = shared_logps(trainer, pairs)
        rows = [(p["prompt_ids"], p[f"{side}_ids"]) for side in ("chosen", "rejected") for p in pairs]
        twin = tiny(name, experts_implementation="eager").double()  # the one that takes float64
        for row, (prompt, completion) in enumerate(rows):
            expected = torch.stack(completion_logps(twin, prompt, completion))
            assert (found[row, mask[row]] - expected).abs().max() < 2e-5


def others_after_changes(tmp_path, tokenizer, model, share=True):
    """Log-probabilities of four of five pairs, and the gradient of their sum, before and after tokens of the fifth change."""
    pairs = long_pairs(5, seed=3)
    trainer = TokenDPOTrainer(
        model, args=TokenDPOConfig(**options(tmp_path, prefix_sharing=share)), train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )  # fmt: skip
    assert trainer._layout.shares == share

    def numbers(rows, others):
        trainer.model.zero_grad()
        logps, _ = shared_logps(trainer, rows)
        logps[others].sum().backward()
        grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        return logps[others].detach(), grads

    for index in (0, 2, 4):
        others = [row for row in range(10) if row % 5 != index]
        before = numbers(pairs, others)
        for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
            changed = copy.deepcopy(pairs)
            changed[index][column] = [395] * len(pairs[index][column])
            yield before, numbers(changed, others)


@pytest.mark.parametrize("name", each(WINDOWED | ROUTED))
def test_changing_a_pair_leaves_all_others_as_they_were(tmp_path, tokenizer, name):
    """To the last bit. Experts compute token by token here: see the next test."""
    settings = {"experts_implementation": "batched_mm"} if name in ROUTED else {}
    for (logps, grads), (found, found_grads) in others_after_changes(tmp_path, tokenizer, tiny(name, **settings)):
        assert torch.equal(found, logps)
        assert logps.abs().max() > 1 and grads.keys() == found_grads.keys()
        for parameter, grad in grads.items():
            assert torch.equal(found_grads[parameter], grad), parameter


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", each(ROUTED))
def test_grouped_experts_round_gradients_elsewhere(tmp_path, tokenizer, name, share):
    """By default an expert computes all its tokens at once. How many it has decides in which order its gradient is summed, and
    the changed pair's tokens are among them: the last bit of a gradient moves, in padded rows as well; no log-probability does."""
    model = tiny(name)
    assert model.config._experts_implementation == "grouped_mm"
    for (logps, grads), (found, found_grads) in others_after_changes(tmp_path, tokenizer, model, share):
        assert torch.equal(found, logps)
        for parameter, grad in grads.items():
            assert (found_grads[parameter] - grad).abs().max() <= 2e-6 * grad.abs().max(), parameter


def prefix_warnings(caplog):
    return [r.getMessage() for r in caplog.records if "prefix_sharing is off" in r.getMessage()]


def trainer_of(tmp_path, tokenizer, model, **settings):
    return TokenDPOTrainer(
        model, args=TokenDPOConfig(**options(tmp_path, **settings)), train_dataset=Dataset.from_list(long_pairs(4)),
        processing_class=tokenizer,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", each(WINDOWED | ROUTED))
def test_fresh_models_share_and_wrong_windows_are_found_out(tmp_path, tokenizer, caplog, name, dtype, monkeypatch):
    """Windows of thousands of positions, weights as small as those of a fresh model, whose attention moves little."""
    window = {"sliding_window": 4096} if getattr(FAMILIES[name], "sliding_window", None) else {}
    settings = {"initializer_range": 0.02, "dtype": getattr(torch, dtype), **window}
    with caplog.at_level("WARNING"):
        assert trainer_of(tmp_path, tokenizer, tiny(name, **settings), bf16=dtype == "bfloat16")._layout.shares
        assert not prefix_warnings(caplog)
        if not window:
            return
        for wrong in (lambda mask, positions, window: mask, off_by_one):
            caplog.clear()
            monkeypatch.setattr("align.packing.within", wrong)
            trainer = trainer_of(tmp_path, tokenizer, tiny(name, **settings), bf16=dtype == "bfloat16")
            if wrong is off_by_one and dtype == "bfloat16":
                continue  # next to its rounding
            assert not trainer._layout.shares
            (message,) = prefix_warnings(caplog)
            assert "gives other log-probabilities in the shared layout" in message


def off_by_one(mask, positions, window):
    near = positions[:, None, :, None] - positions[:, None, None, :] <= (window or positions.shape[1])
    return mask & near


def test_windows_that_modules_make_masks_of_are_found_out(tmp_path, tokenizer, caplog):
    """A model whose layers cut our mask by the order of slots, with a window of their own that its configuration lacks."""
    model = tiny("mistral", sliding_window=None)
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 100

        def cut(module, args, kwargs):
            mask, order = kwargs["attention_mask"], torch.arange(kwargs["hidden_states"].shape[1])
            if mask is not None:
                far = order[:, None] - order >= module.sliding_window
                mask = mask & ~far if mask.dtype == torch.bool else mask.masked_fill(far, torch.finfo(mask.dtype).min)
            return args, kwargs | {"attention_mask": mask}

        layer.self_attn.register_forward_pre_hook(cut, with_kwargs=True)
    with caplog.at_level("WARNING"):
        assert not trainer_of(tmp_path, tokenizer, model)._layout.shares
    assert len(prefix_warnings(caplog)) == 1
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [100, 100]  # as they were


def test_a_configured_window_that_a_model_ignores(tmp_path, tokenizer, caplog):
    """OLMoE has full attention, whatever its configuration has for a window."""
    with caplog.at_level("WARNING"):
        assert not trainer_of(tmp_path, tokenizer, tiny("olmoe", sliding_window=4096))._layout.shares
    assert len(prefix_warnings(caplog)) == 1


def test_experts_that_draw_random_numbers_are_named(tmp_path, tokenizer, caplog):
    """Phi-3.5-MoE draws its experts in training; both sides would share a prompt's."""
    torch.manual_seed(0)
    config = {**FAMILIES["olmoe"].to_dict(), "num_local_experts": 4}
    keep = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    model = AutoModelForCausalLM.from_config(
        PhimoeConfig(
            **{name: config[name] for name in keep},
            num_local_experts=4,
            eos_token_id=0,
            pad_token_id=0,
            bos_token_id=None,
        )
    )
    with caplog.at_level("WARNING"):
        assert not trainer_of(tmp_path, tokenizer, model, router_aux_loss_coef=0.0)._layout.shares
    (message,) = prefix_warnings(caplog)
    assert "PhimoeForCausalLM draws random numbers in training" in message
    with caplog.at_level("WARNING"):
        assert not trainer_of(tmp_path, tokenizer, tiny("mixtral", router_jitter_noise=0.1))._layout.shares
    assert "MixtralForCausalLM draws random numbers in training" in prefix_warnings(caplog)[1]


def test_the_trial_leaves_random_numbers_as_they_were(tmp_path, tokenizer):
    """Sharing or not, a training draws the same numbers afterwards."""
    states = []
    for share in (True, False):
        model = tiny("mixtral", router_jitter_noise=0.1)
        torch.manual_seed(7)
        trainer_of(tmp_path, tokenizer, model, prefix_sharing=share)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("coefficient", [0.0, None])
def test_a_router_loss_of_another_kind_is_named_where_it_is_on(tmp_path, tokenizer, caplog, coefficient):
    """A model whose router's numbers depend on how many tokens there are."""
    model = tiny("mixtral")

    def scaled(module, args, output):
        if output.get("router_logits"):
            output.router_logits = tuple(x * len(x) / 10 for x in output.router_logits)

    model.model.register_forward_hook(scaled)
    with caplog.at_level("WARNING"):
        shares = trainer_of(tmp_path, tokenizer, model, router_aux_loss_coef=coefficient)._layout.shares
    assert shares == (coefficient == 0.0)
    messages = prefix_warnings(caplog)
    assert len(messages) == (0 if shares else 1)
    assert shares or "MixtralForCausalLM gives another router loss" in messages[0]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_without_the_router_loss(tmp_path, tokenizer, name):
    """Also where the configuration asks for the router's numbers."""
    _, metrics = assert_equal_to_trl(
        tmp_path, tokenizer, lambda: tiny(name, output_router_logits=True), router_aux_loss_coef=0.0
    )
    assert "aux_loss" not in metrics


def test_the_router_loss_of_evaluation(tmp_path, tokenizer):
    """Training with a large coefficient, and evaluation: TRL's numbers."""
    found = []
    for cls in (IdsDPOTrainer, TokenDPOTrainer):
        trainer, *_ = step(
            tmp_path,
            tokenizer,
            cls,
            moved(tiny("qwen3_moe")),
            tiny("qwen3_moe"),
            long_pairs(),
            router_aux_loss_coef=3.0,
        )
        found.append(trainer.evaluate(Dataset.from_list(long_pairs(6, seed=1))))
    for name in ("eval_loss", "eval_aux_loss", "eval_entropy", "eval_rewards/margins"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5, abs=1e-5), name


def test_passes_of_a_budget_add_up(tmp_path, tokenizer):
    """Windows and experts, without the router's loss, which takes all of a batch."""
    widths = []
    for name in ("gemma3", "gpt_oss"):
        results = []
        for budget in (None, 90):
            trainer, *_ = step(
                tmp_path, tokenizer, TokenDPOTrainer, moved(tiny(name)), tiny(name), long_pairs(), max_tokens_per_batch=budget,
                router_aux_loss_coef=0.0 if name in ROUTED else None,
            )  # fmt: skip
            trainer.current_gradient_accumulation_steps = 1
            widths.clear()
            trainer.model.get_input_embeddings().register_forward_hook(
                lambda m, args, out: widths.append(args[0].numel())
            )
            trainer.model.zero_grad()
            loss = trainer.training_step(trainer.model, trainer.data_collator(long_pairs()))
            grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
            results.append((loss.item(), grads))
        assert len(widths) > 2 and max(widths) <= 90
        assert_close(*results[1], *results[0], 1e-5)


@pytest.mark.parametrize("name", each(WINDOWED | ROUTED))
def test_prefix_trees_score_as_rows_one_by_one(name):
    """Scoring computes prompts once, too."""
    model = tiny(name)
    assert shares_prefixes(model) and not model.training
    rows = [(p["prompt_ids"], p[f"{side}_ids"]) for p in long_pairs() for side in ("chosen", "rejected")]
    widths = Counter()
    model.get_input_embeddings().register_forward_hook(lambda m, args, out: widths.update(nodes=args[0].numel()))
    found = token_logps(model, rows, pad_token_id=0, max_tokens_per_batch=1)  # no padding
    assert widths["nodes"] < sum(len(p) + len(c) - 1 for p, c in rows)
    twin = tiny(name, experts_implementation="eager").double()
    with torch.no_grad():
        for (prompt, completion), logps in zip(rows, found, strict=True):
            expected = torch.stack(completion_logps(twin, prompt, completion)).tolist()
            assert logps == pytest.approx(expected, abs=2e-5)
