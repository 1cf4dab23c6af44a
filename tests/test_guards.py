"""A loss or gradient that is not finite ends a training, with its rows written down and the weights untouched."""

import json

import pytest
import torch
from conftest import random_pairs, tiny_llama
from datasets import Dataset
from transformers import AutoModelForCausalLM

from align import BASHConfig, BASHTrainer, TokenDPOConfig, TokenDPOTrainer
from align.errors import AlignError, NonFiniteError
from align.trainers.training import train_sft

CPU = {"use_cpu": True, "report_to": "none", "dataloader_pin_memory": False, "save_strategy": "no", "logging_steps": 1}
STEP = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 1,
    "learning_rate": 1e-2,
}


class Poisoned(TokenDPOTrainer):
    """A method whose weights are no numbers where the column says 7."""

    def token_weights(self, chosen, rejected):
        weighed = super().token_weights(chosen, rejected)
        return tuple(torch.where(value == 7, torch.nan, value) for value in weighed)


def preference_trainer(tmp_path, tokenizer, model_dir, poisoned, **kwargs):
    """Eight pairs in their order, four an update; the loss of one of them is no number."""
    pairs = random_pairs(8, columns=("weights",))
    if poisoned is not None:
        pairs[poisoned]["chosen_weights"] = [7.0] * len(pairs[poisoned]["chosen_ids"])
    settings = {"output_dir": str(tmp_path), "train_sampling_strategy": "sequential", **CPU, **STEP, **kwargs}
    return Poisoned(
        AutoModelForCausalLM.from_pretrained(model_dir), args=TokenDPOConfig(**settings), train_dataset=Dataset.from_list(pairs), processing_class=tokenizer,
    )  # fmt: skip


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 0.0}, {"logging_nan_inf_filter": False}], ids=str)
def test_a_loss_that_is_not_finite_names_the_rows_of_its_update(tmp_path, tokenizer, model_dir, settings):
    trainer = preference_trainer(tmp_path, tokenizer, model_dir, 5, **settings)
    seen = []
    check = trainer.check_update

    def checked():
        seen.append(weights(trainer.model))
        check()

    trainer.check_update = checked
    with pytest.raises(NonFiniteError, match=r"step 2: not finite: losses nan, .* \(by p5\).*p4, p5, p6, p7") as caught:
        trainer.train()
    assert isinstance(caught.value, AlignError)
    # The first update changed the weights; the second has not.
    assert len(seen) == 2 and trainer.state.global_step == 1
    now = weights(trainer.model)
    assert all(torch.equal(value, now[name]) for name, value in seen[1].items())
    assert any(not torch.equal(value, now[name]) for name, value in seen[0].items())
    report = json.loads((tmp_path / "non_finite.json").read_text())
    (process,) = report["processes"]
    assert report["step"] == 2 and len(process["micro_batches"]) == 2
    pairs = random_pairs(8, columns=("weights",))
    for number, batch in enumerate(process["micro_batches"]):
        rows = [pairs[4 + 2 * number], pairs[5 + 2 * number]]
        for side, drawn in (("chosen", batch["rows"][:2]), ("rejected", batch["rows"][2:])):
            assert [row["input_ids"] for row in drawn] == [row["prompt_ids"] + row[f"{side}_ids"] for row in rows]
            assert [row["ids"] for row in drawn] == [[row["id"]] for row in rows]
            assert [row["finite"] for row in drawn] == [(row["id"], side) != ("p5", "chosen") for row in rows]
    finite = [torch.isfinite(torch.tensor(float(batch["loss"]))).item() for batch in process["micro_batches"]]
    assert finite == [False, True]


def test_what_is_finite_is_left_alone(tmp_path, tokenizer, model_dir):
    """As the bare trainer trains, whose check does nothing."""
    found = []
    for guarded in (True, False):
        trainer = preference_trainer(tmp_path, tokenizer, model_dir, None)
        if not guarded:
            trainer.check_update = lambda: None
        trainer.train()
        assert trainer.state.global_step == 2
        found.append(weights(trainer.model))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert not (tmp_path / "non_finite.json").exists()


def test_passes_within_a_batch_are_looked_at_too(tmp_path, tokenizer, model_dir):
    """The longest pairs come first then; p5 is among those of whichever update it is in."""
    trainer = preference_trainer(tmp_path, tokenizer, model_dir, 5, max_tokens_per_batch=40)
    with pytest.raises(NonFiniteError, match=r"not finite: losses .* \(by p5\).*Rows of the update: .*p5"):
        trainer.train()


def test_a_gradient_is_named_where_the_loss_is_finite(tmp_path, tokenizer, model_dir):
    trainer = preference_trainer(tmp_path, tokenizer, model_dir, None)
    name = "model.layers.1.mlp.up_proj.weight"
    dict(trainer.model.named_parameters())[name].register_hook(lambda gradient: gradient * float("inf"))
    before = weights(trainer.model)
    with pytest.raises(NonFiniteError, match=f"step 1: not finite: .*gradient of .*{name}"):
        trainer.train()
    assert all(torch.equal(value, before[key]) for key, value in weights(trainer.model).items())


def test_training_on_own_tokens_stops_too(tmp_path, tokenizer):
    rows = [{"id": f"d{i}", "input_ids": [5, 6, 7 + i, 9], "completion_mask": [0, 0, 1, 1]} for i in range(4)]
    trainer = BASHTrainer(
        tiny_llama(), args=BASHConfig(str(tmp_path), refresh_steps=1, completion_only_loss=True, **CPU, **STEP),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteError, match="gradient of lm_head.weight"):
        trainer.train()
    assert json.loads((tmp_path / "non_finite.json").read_text())["step"] == 1


def test_a_training_stage_keeps_its_report_and_no_result(tmp_path, model_dir):
    rows = [
        {"id": f"d{i}", "prompt": "x", "completion": "y", "prompt_ids": [5, 6], "completion_ids": [7 + i, 0]}
        for i in range(4)
    ]
    out = tmp_path / "sft"
    with pytest.raises(NonFiniteError, match="row 0|row 1|row 2|row 3"):
        # Weights that have run away: one update of this size, and nothing is finite any more.
        train_sft(
            {"path": model_dir},
            rows,
            out,
            args={**CPU, **STEP, "learning_rate": 1e30, "num_train_epochs": 3, "warmup_steps": 0},
        )
    assert not out.exists()
    assert json.loads((tmp_path / "sft.training" / "non_finite.json").read_text())["step"] >= 2
