"""The seam into TRL: against float64 oracles, against TRL itself, and against misuse."""

import copy

import pytest
import torch
from conftest import random_pairs, tiny_llama
from datasets import Dataset
from oracles import completion_logps, position_loss, sequence_loss
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from align import CDPOConfig, CDPOTrainer, TokenDPOConfig, TokenDPOTrainer
from align.trl_versions import FUSED_HEAD

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}


def options(tmp_path, **kwargs):
    return {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 4, "bf16": False, "report_to": "none", "logging_steps": 1,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "gradient_checkpointing": False, "seed": 3, "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "max_length": 512, "beta": 0.3,
    } | kwargs  # fmt: skip


def batch_loss(trainer, rows):
    """Loss and gradients of the trainer on one batch."""
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def separate_reference(model_dir):
    """The saved model, and a policy that has moved away from it."""
    reference, policy = tiny_llama(), tiny_llama()
    with torch.no_grad():
        for i, parameter in enumerate(policy.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    policy.config._name_or_path = model_dir
    return policy, reference


def assert_close(loss, grads, expected_loss, expected, tolerance):
    assert abs(loss - expected_loss) <= tolerance * abs(expected_loss)
    assert grads.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name in grads:
        assert (grads[name] - expected[name]).abs().max() <= tolerance * largest, name


def oracle(model_dir, pairs, weights, aggregation, beta=0.3):
    # Fresh models: TRL patches the forward of those it trains, and a copy would call the original's.
    twin, reference = (model.double() for model in separate_reference(model_dir))
    if aggregation == "sequence":
        loss = sequence_loss(twin, reference, pairs, beta, weights)
    else:
        width = max(len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs)
        loss = position_loss(twin, reference, pairs, beta, weights, width)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("stored_reference", [False, True])
@pytest.mark.parametrize("weight_chosen", [False, True])
@pytest.mark.parametrize("aggregation", ["sequence", "position"])
def test_cdpo_matches_float64_oracle(
    tmp_path, model_dir, tokenizer, aggregation, weight_chosen, stored_reference, share
):
    policy, reference = separate_reference(model_dir)
    pairs = random_pairs(8, columns=("ce_scores",))
    if stored_reference:
        exact = copy.deepcopy(reference).double()
        for pair in pairs:
            for side in ("chosen", "rejected"):
                with torch.no_grad():
                    logps = completion_logps(exact, pair["prompt_ids"], pair[f"{side}_ids"])
                pair[f"{side}_ref_logps"] = [x.item() for x in logps]
    args = CDPOConfig(
        **options(tmp_path, weight_chosen=weight_chosen, loss_aggregation=aggregation, check_reference=False),
        prefix_sharing=share,
    )
    trainer = CDPOTrainer(
        policy, ref_model=None if stored_reference else reference, args=args, train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )  # fmt: skip

    def weights(pair):
        chosen = pair["chosen_ce_scores"] if weight_chosen else [1.0] * len(pair["chosen_ids"])
        return chosen, [1 - s for s in pair["rejected_ce_scores"]]

    loss, grads = batch_loss(trainer, pairs)
    expected_loss, expected = oracle(model_dir, pairs, weights, aggregation)
    assert_close(loss, grads, expected_loss, expected, 1e-5)
    # The check bites: scores moved by one position are another loss.
    for pair in pairs:
        scores = pair["rejected_ce_scores"]
        pair["rejected_ce_scores"] = scores[1:] + scores[:1]
    moved, _ = batch_loss(trainer, pairs)
    assert abs(moved - loss) > 1e-4


def test_user_weights_match_float64_oracle(tmp_path, model_dir, tokenizer):
    policy, reference = separate_reference(model_dir)
    pairs = random_pairs(6, seed=5, columns=("weights",))
    for pair in pairs:
        pair["rejected_weights"] = [3 * w - 1 for w in pair["rejected_weights"]]  # any finite number, negative ones too
    trainer = TokenDPOTrainer(
        policy, ref_model=reference, args=TokenDPOConfig(**options(tmp_path)), train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )  # fmt: skip
    loss, grads = batch_loss(trainer, pairs)
    expected_loss, expected = oracle(
        model_dir, pairs, lambda p: (p["chosen_weights"], p["rejected_weights"]), "sequence"
    )
    assert_close(loss, grads, expected_loss, expected, 1e-5)


@pytest.mark.parametrize("multiple", [None, 64])
def test_sequence_loss_does_not_depend_on_padding(tmp_path, model_dir, tokenizer, multiple):
    policy, reference = separate_reference(model_dir)
    pairs = random_pairs(6, columns=("ce_scores",))
    losses = []
    for width in (None, multiple):
        args = CDPOConfig(**options(tmp_path, pad_to_multiple_of=width))
        trainer = CDPOTrainer(
            copy.deepcopy(policy), ref_model=copy.deepcopy(reference), args=args, train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
        )  # fmt: skip
        losses.append(batch_loss(trainer, pairs))
    assert_close(*losses[0], *losses[1], 1e-5)


LOSSES = [
    {"loss_type": ["sigmoid"]},
    {"loss_type": ["ipo"]},
    {"loss_type": ["hinge"]},
    {"loss_type": ["apo_zero"]},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    {"loss_type": ["robust"], "label_smoothing": 0.1},
    {"loss_type": ["sigmoid"], "ld_alpha": 0.5},
    {"loss_type": ["sigmoid"], "f_divergence_type": "js_divergence"},
]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: "-".join(map(str, x.values())))
def test_all_one_weights_equal_trl(tmp_path, model_dir, tokenizer, loss, lora, share):
    """Three training steps of TRL's DPOTrainer and ours, from text: the same losses, gradient norms and metrics."""
    rows = [
        {"prompt": f"Question: {i} + {i} = ?\nAnswer:", "chosen": f" it is {2 * i}", "rejected": f" {i}" * (i % 5 + 1)}
        for i in range(12)
    ]
    # Adam would divide by gradients that are next to nothing, and blow rounding up.
    logs, sgd = [], {"optim": "sgd", "learning_rate": 0.1}
    for config, cls in ((DPOConfig, DPOTrainer), (TokenDPOConfig, TokenDPOTrainer)):
        data = Dataset.from_list(rows)
        if cls is TokenDPOTrainer:
            from align.tokens import encode_pair

            pairs = [row | encode_pair(tokenizer, row, "row") for row in rows]
            for pair in pairs:
                for side in ("chosen", "rejected"):
                    pair[f"{side}_weights"] = [1.0] * len(pair[f"{side}_ids"])
            data = Dataset.from_list(pairs)
        policy, reference = separate_reference(model_dir)
        trainer = cls(
            policy, ref_model=None if lora else reference,
            args=config(**options(tmp_path, max_steps=3, **sgd, **loss), **({} if cls is DPOTrainer else {"prefix_sharing": share})),
            train_dataset=data, processing_class=tokenizer, peft_config=LoraConfig(**LORA) if lora else None,
        )  # fmt: skip
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    assert len(logs[0]) == 3
    other_sums = "sft" in loss["loss_type"] and not FUSED_HEAD  # TRL 1.14 has a cross-entropy of its own for `sft`
    for theirs, ours in zip(*logs, strict=True):
        for key in theirs.keys() - {"epoch", "step"}:
            # Sums in another order: float32 rounds log-ratios of some 60 nats elsewhere.
            close = {"rel": 1e-5, "abs": 5e-6} if share or other_sums else {"rel": 1e-6, "abs": 1e-9}
            assert ours[key] == pytest.approx(theirs[key], **close), key
    assert abs(logs[0][-1]["loss"] - logs[0][0]["loss"]) > 1e-4  # something was trained


@pytest.mark.parametrize("share", [True, False])
def test_qlora_equals_trl(tmp_path, model_dir, tokenizer, share):
    """A 4-bit base: the same losses as TRL's trainer on it, weights of 1; and weights change them."""
    pytest.importorskip("bitsandbytes")
    from align.models import load_model

    pairs = random_pairs(8, columns=("weights",))
    runs = []
    for cls, config, ones in (
        (DPOTrainer, DPOConfig, True),
        (TokenDPOTrainer, TokenDPOConfig, True),
        (TokenDPOTrainer, TokenDPOConfig, False),
    ):
        rows = [
            p | {f"{s}_weights": [1.0] * len(p[f"{s}_ids"]) for s in ("chosen", "rejected")} if ones else p
            for p in pairs
        ]
        model = load_model(model_dir, dtype="float32", quantization="4bit")
        if cls is DPOTrainer:  # it tokenizes whatever it is given, so its preparation is set aside
            cls = type("IdsDPOTrainer", (DPOTrainer,), {"_prepare_dataset": lambda self, dataset, *_: dataset})
        sharing = {"prefix_sharing": share} if config is TokenDPOConfig else {}
        trainer = cls(
            model, args=config(**options(tmp_path, max_steps=2), **sharing), train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, peft_config=LoraConfig(**LORA),
        )  # fmt: skip
        trainer.train()
        runs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-5 if share else 1e-6)
    # Adam's first update is the gradient's sign, which rounding decides where there is next to no gradient.
    assert runs[1] == pytest.approx(runs[0], rel=1e-3 if share else 1e-6)
    assert abs(runs[2][0] - runs[0][0]) > 1e-4


def test_sft_term_stays_unweighted(tmp_path, model_dir, tokenizer):
    policy, _ = separate_reference(model_dir)
    pairs = random_pairs(4, columns=("weights", "ref_logps"))
    args = TokenDPOConfig(**options(tmp_path, loss_type=["sft"], check_reference=False))
    trainer = TokenDPOTrainer(policy, args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    loss, _ = batch_loss(trainer, pairs)
    twin, _ = (model.double() for model in separate_reference(model_dir))
    logps = [x.item() for p in pairs for x in completion_logps(twin, p["prompt_ids"], p["chosen_ids"])]
    assert loss == pytest.approx(-sum(logps) / len(logps), rel=1e-5)


def test_precomputed_reference_equals_the_live_one(tmp_path, model_dir, tokenizer):
    pairs = random_pairs(8, columns=("ce_scores",))
    losses = []
    for precompute in (False, True):
        args = CDPOConfig(**options(tmp_path, precompute_ref_log_probs=precompute, max_steps=3, max_length=14))
        trainer = CDPOTrainer(
            tiny_llama(), args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer,
            peft_config=LoraConfig(**LORA),
        )  # fmt: skip
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_full_fine_tuning_with_stored_reference_loads_no_second_model(tmp_path, model_dir, tokenizer):
    pairs = random_pairs(4, columns=("ce_scores", "ref_logps"))
    args = CDPOConfig(**options(tmp_path, check_reference=False))
    trainer = CDPOTrainer(
        model_dir, args=args, train_dataset=Dataset.from_list(pairs), eval_dataset=Dataset.from_list(pairs)
    )
    assert trainer.ref_model is None
    assert trainer.evaluate()["eval_loss"] > 0


def trained(tmp_path, model_dir, tokenizer, resume=None, callbacks=(), **kwargs):
    pairs = random_pairs(16, columns=("ce_scores",))
    args = CDPOConfig(**options(tmp_path, **kwargs))
    trainer = CDPOTrainer(
        tiny_llama(), args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer,
        peft_config=LoraConfig(**LORA), callbacks=list(callbacks),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], weights


def test_one_batch_of_eight_equals_eight_accumulated(tmp_path, model_dir, tokenizer):
    one, weights_one = trained(tmp_path / "a", model_dir, tokenizer, per_device_train_batch_size=8, max_steps=4)
    many, weights_many = trained(
        tmp_path / "b", model_dir, tokenizer, per_device_train_batch_size=1, gradient_accumulation_steps=8, max_steps=4
    )
    assert one == pytest.approx(many, rel=1e-5)
    # Adam divides by the gradient's size, which blows rounding up where a gradient is next to nothing.
    for name, weight in weights_one.items():
        assert (weight - weights_many[name]).abs().mean() < 1e-4, name


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 3


def test_resumed_equals_uninterrupted(tmp_path, model_dir, tokenizer):
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
    whole, weights = trained(tmp_path / "whole", model_dir, tokenizer, **saving)
    trained(tmp_path / "cut", model_dir, tokenizer, callbacks=[StopAt()], **saving)
    resumed, weights_resumed = trained(
        tmp_path / "cut", model_dir, tokenizer, resume=str(tmp_path / "cut" / "checkpoint-3"), **saving
    )
    assert len(whole) == 6
    assert resumed == whole
    assert all(torch.equal(weights[name], weights_resumed[name]) for name in weights)


def test_gradient_checkpointing_and_eval(tmp_path, model_dir, tokenizer):
    plain, _ = trained(tmp_path / "a", model_dir, tokenizer, max_steps=3)
    checkpointed, _ = trained(tmp_path / "b", model_dir, tokenizer, max_steps=3, gradient_checkpointing=True)
    assert plain == pytest.approx(checkpointed, rel=1e-5)


def test_model_card_cites_the_paper(tmp_path, model_dir, tokenizer):
    trained(tmp_path, model_dir, tokenizer, max_steps=1, save_strategy="steps", save_steps=1)
    card = (tmp_path / "README.md").read_text()
    assert "2411.19943" in card and "Critical Tokens Matter" in card and "cDPO" in card
