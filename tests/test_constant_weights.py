"""Weights or scores that tell no token from another are said so: before training, and where they are made."""

import json

import pytest
from conftest import random_pairs, tiny_llama
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from align import CDPOTrainer, TGDPOTrainer, TokenDPOTrainer
from align.scoring.contrastive import score_contrastive
from align.scoring.entropy import score_entropy
from align.scoring.guidance import score_guidance
from align.stages import manifest_path
from align.trainers.training import train_preference

CPU = {
    "use_cpu": True, "report_to": "none", "dataloader_pin_memory": False, "save_strategy": "no", "bf16": False,
    "disable_tqdm": True, "per_device_train_batch_size": 2,
}  # fmt: skip


def pairs(n=6, **columns):
    """Random pairs; per column a number for all tokens, or a function of row and token."""
    rows = random_pairs(n)
    for i, row in enumerate(rows):
        for name, value in columns.items():
            ids = row[f"{name.split('_')[0]}_ids"]
            row[name] = [float(value(i, t) if callable(value) else value) for t in range(len(ids))]
    return rows


def build(tmp_path, tokenizer, rows, cls=CDPOTrainer, dataset=None, **settings):
    args = cls.config_class(str(tmp_path), **CPU, **settings)
    dataset = Dataset.from_list(rows) if dataset is None else dataset
    lora = LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
    return cls(tiny_llama(), args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)


def warned(caplog):
    return [record.getMessage() for record in caplog.records if "every rejected token" in record.getMessage()]


VARYING = {"chosen_guidance_logratios": lambda i, t: i - t, "rejected_guidance_logratios": lambda i, t: t}
SAME = {"chosen_guidance_logratios": 0, "rejected_guidance_logratios": 0}
CONSTANT = {
    "one score": (CDPOTrainer, {"rejected_ce_scores": 0.25}, {}, ["rejected token weight 0.75", "both sides scaled, not cDPO", "rejected_ce_scores is 0.25 throughout", "align score contrastive"]),
    "scores of 0": (CDPOTrainer, {"rejected_ce_scores": 0}, {}, ["rejected token weight 1", "this is DPO, not cDPO"]),
    "both sides": (CDPOTrainer, {"rejected_ce_scores": 0.5, "chosen_ce_scores": 0.5}, {"weight_chosen": True}, ["chosen token has weight 0.5"]),
    "guide is reference": (TGDPOTrainer, SAME, {}, ["this is DPO, not TGDPO", "rejected_guidance_logratios is 0 throughout", "align score guidance"]),
    "alpha": (TGDPOTrainer, VARYING, {"alpha": 0.0}, ["this is DPO, not TGDPO", "alpha = 0 takes no guidance"]),
    "floor": (TGDPOTrainer, {"chosen_guidance_logratios": lambda i, t: -9 - t, "rejected_guidance_logratios": lambda i, t: 9 + t}, {"weight_floor": 1.0}, ["weight_floor = 1.0"]),
    "user's weights": (TokenDPOTrainer, {"chosen_weights": 2, "rejected_weights": 2}, {}, ["chosen token has weight 2", "leave the columns out"]),
    "one side given": (TokenDPOTrainer, {"chosen_weights": 2}, {}, ["chosen token has weight 2", "rejected token weight 1"]),
    "rounding": (CDPOTrainer, {"rejected_ce_scores": lambda i, t: 0.25 + 1e-8 * t}, {}, ["rejected token weight 0.75"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTANT)
def test_one_weight_for_all_tokens_is_said_once_before_training(tmp_path, tokenizer, caplog, name):
    cls, columns, settings, words = CONSTANT[name]
    trainer = build(tmp_path, tokenizer, pairs(**columns), cls, max_steps=2, **settings)
    (message,) = warned(caplog)
    assert "train data set: in all of its 6 rows, " in message
    for word in words:
        assert word in message
    trainer.train()
    assert len(warned(caplog)) == 1


def single(rows):
    """The first pair, with the first token of its rejected side alone."""
    return [rows[0] | {name: rows[0][name][:1] for name in ("rejected_ids", "rejected_ce_scores")}]


QUIET = {
    "tokens differ": (CDPOTrainer, pairs(rejected_ce_scores=lambda i, t: 0.1 * (t % 3)), {}),
    # Of rows whose tokens are alike, the pairs are weighted: no DPO either.
    "rows differ": (CDPOTrainer, pairs(rejected_ce_scores=lambda i, t: 0.1 * i), {}),
    "one side is all 1, as rollouts leave it": (TokenDPOTrainer, pairs(chosen_weights=1, rejected_weights=lambda i, t: t), {}),
    "the scores of chosen tokens are not read": (CDPOTrainer, pairs(chosen_ce_scores=0.5, rejected_ce_scores=lambda i, t: 0.1 * i), {}),
    "DPO on purpose": (TokenDPOTrainer, pairs(), {}),
    "one rejected token": (CDPOTrainer, single(pairs(rejected_ce_scores=0.5)), {}),
    "guidance": (TGDPOTrainer, pairs(**VARYING), {}),
    "only the last row differs": (CDPOTrainer, pairs(300, rejected_ce_scores=lambda i, t: 0.5 + 0.1 * (i == 299)), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", QUIET)
def test_weights_that_mean_something_are_not_doubted(tmp_path, tokenizer, caplog, name):
    cls, rows, settings = QUIET[name]
    trainer = build(tmp_path, tokenizer, rows, cls, max_steps=2, **settings)
    trainer.train()
    assert not warned(caplog)


def test_of_many_rows_some_are_looked_at_all_over(tmp_path, tokenizer, caplog, monkeypatch):
    monkeypatch.setattr("align.trainers.weight_check.ROWS", 20)
    build(tmp_path, tokenizer, pairs(100, rejected_ce_scores=0.5))
    (message,) = warned(caplog)
    assert "in 20 of its 100 rows" in message
    caplog.clear()
    build(tmp_path, tokenizer, pairs(100, rejected_ce_scores=lambda i, t: 0.5 if i < 95 else 0.4))
    assert not warned(caplog)


@pytest.mark.parametrize("max_steps, budget", [(14, None), (3, None), (3, 30)])
def test_a_stream_is_judged_by_its_first_batches(tmp_path, tokenizer, caplog, max_steps, budget):
    rows = pairs(40, rejected_ce_scores=0.25)
    stream = Dataset.from_list(rows).to_iterable_dataset()
    trainer = build(tmp_path, tokenizer, rows, dataset=stream, max_steps=max_steps, max_tokens_per_batch=budget)
    assert not warned(caplog)  # nothing was read yet
    trainer.train()
    (message,) = warned(caplog)
    assert f"in its first {2 * min(max_steps, 10)} rows" in message and "rejected_ce_scores is 0.25" in message


def test_a_stream_that_varies_is_not_doubted(tmp_path, tokenizer, caplog):
    rows = pairs(8, rejected_ce_scores=lambda i, t: 0.25 if i < 4 else 0.5)
    build(tmp_path, tokenizer, rows, dataset=Dataset.from_list(rows).to_iterable_dataset(), max_steps=4).train()
    assert not warned(caplog)


@pytest.mark.parametrize("method, said", [("token_dpo", 1), ("dpo", 0)])
def test_a_recipe_that_trains_dpo_by_name_is_not_doubted(tmp_path, model_dir, caplog, method, said):
    """It leaves the weights of its pairs alone."""
    rows = pairs(chosen_weights=1, rejected_weights=1)
    train_preference(method, {"path": model_dir}, rows, tmp_path / "out", args={**CPU, "max_steps": 1})
    assert len(warned(caplog)) == said


@pytest.fixture
def adapted():
    """A model with adapters: `positive` and `negative` do nothing, `some` does."""
    config = {"r": 2, "target_modules": ["up_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny_llama(), LoraConfig(**config), adapter_name="positive")
    model.add_adapter("negative", LoraConfig(**config))
    model.add_adapter("some", LoraConfig(**config, init_lora_weights=False))
    return model.eval()


def counts_of(path):
    return json.loads(manifest_path(path).read_text())["counts"]


def test_adapters_without_a_contrast_are_said(tmp_path, adapted, capsys):
    """The scores of two equal models are the model's own probabilities: they differ, and say nothing of a contrast."""
    rows = random_pairs(6)
    score_contrastive(adapted, rows, tmp_path / "a.jsonl", pad_token_id=0)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("align:")]
    assert len(lines) == 1 and "of 6 of 6 pairs" in lines[0] and "plain probabilities" in lines[0]
    assert counts_of(tmp_path / "a.jsonl") | {"tokens": 0} == {
        "rows": 6, "too_long": 0, "tokens": 0, "constant": 0, "no_contrast": 6,
    }  # fmt: skip
    assert not any(
        "contrast" in key for line in (tmp_path / "a.jsonl").read_text().splitlines() for key in json.loads(line)
    )
    adapted.delete_adapter("negative")
    adapted.add_adapter(
        "negative", LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    )
    score_contrastive(adapted, rows, tmp_path / "b.jsonl", pad_token_id=0)
    assert "align:" not in capsys.readouterr().err
    assert counts_of(tmp_path / "b.jsonl")["no_contrast"] == 0


def test_a_guide_that_is_the_reference_is_said(tmp_path, adapted, capsys):
    rows = random_pairs(9)
    judged = sum(min(len(row["chosen_ids"]), len(row["rejected_ids"])) > 1 for row in rows)
    assert 0 < judged < 9
    adapted.set_adapter("positive")
    score_guidance(adapted, None, rows, tmp_path / "a.jsonl", pad_token_id=0)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("align:")]
    assert f"in {judged} of {judged} pairs" in line and "same guidance_logratios" in line
    assert counts_of(tmp_path / "a.jsonl")["constant"] == judged
    adapted.set_adapter("some")
    score_guidance(adapted, None, rows, tmp_path / "b.jsonl", pad_token_id=0)
    assert "align:" not in capsys.readouterr().err and counts_of(tmp_path / "b.jsonl")["constant"] == 0


def test_weights_of_entropy_that_keep_all_tokens_are_said(tmp_path, capsys):
    rows = random_pairs(9)
    score_entropy(tiny_llama(), rows, tmp_path / "a.jsonl", pad_token_id=0, top=1.0)
    assert "have the same weights" in capsys.readouterr().err
    score_entropy(tiny_llama(), rows, tmp_path / "b.jsonl", pad_token_id=0, top=0.5)
    assert "align:" not in capsys.readouterr().err
