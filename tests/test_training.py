"""Training as a stage: what is refused, what is resumed, and what stays untouched."""

import json

import pytest
from conftest import random_pairs

from align.errors import ConfigError, MissingColumnError, RecordError
from align.stages import read_manifest
from align.trainers.training import train_preference, train_sft

ARGS = {
    "max_steps": 4, "per_device_train_batch_size": 2, "bf16": False, "gradient_checkpointing": False, "save_steps": 1,
    "disable_tqdm": True, "learning_rate": 1e-3, "logging_steps": 1,
}  # fmt: skip
LORA = {"r": 2, "target_modules": ["up_proj"]}


def demonstrations(n=6):
    return [
        {
            "id": p["id"],
            "prompt": "x",
            "completion": "y",
            "prompt_ids": p["prompt_ids"],
            "completion_ids": p["chosen_ids"],
        }
        for p in random_pairs(n)
    ]


def test_a_folder_of_something_else_is_left_alone(tmp_path, model_dir):
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="precious exists and is no output of a training"):
        train_sft({"path": model_dir, "dtype": "float32"}, demonstrations(), out, args=ARGS, lora=LORA)
    assert (out / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"completion_ids": []}, RecordError, "row 1 .*completion_ids is empty"),
        ({"prompt_ids": []}, RecordError, "row 1 .*prompt_ids is empty"),
        ({"completion_ids": [40_000]}, RecordError, "row 1 .*40000 is not in the vocabulary"),
        ({"completion": None}, RecordError, "row 1 .*completion None must be text"),
    ],
)
def test_bad_demonstrations_are_named(tmp_path, model_dir, change, error, words):
    rows = demonstrations()
    rows[1] |= change
    with pytest.raises(error, match=words):
        train_sft({"path": model_dir, "dtype": "float32"}, rows, tmp_path / "out", args=ARGS, lora=LORA)
    del rows[1]["prompt_ids"]
    with pytest.raises(MissingColumnError, match="prompt_ids"):
        train_sft({"path": model_dir, "dtype": "float32"}, rows, tmp_path / "out", args=ARGS, lora=LORA)


def test_demonstrations_without_room_are_counted(tmp_path, model_dir):
    rows = demonstrations(12)
    limit = sorted(len(row["prompt_ids"]) for row in rows)[8]
    model = {"path": model_dir, "dtype": "float32"}
    counts = train_sft(model, rows, tmp_path / "out", args=ARGS | {"max_length": limit}, lora=LORA)
    assert counts["prompt_fills_max_length"] == sum(len(row["prompt_ids"]) >= limit for row in rows) > 0
    assert counts["rows"] + counts["prompt_fills_max_length"] == 12
    with pytest.raises(RecordError, match="prompts of all 12 demonstrations fill max_length = 1"):
        train_sft(model, rows, tmp_path / "none", args=ARGS | {"max_length": 1}, lora=LORA)
    with pytest.raises(RecordError, match="no demonstrations"):
        train_sft(model, [], tmp_path / "none", args=ARGS, lora=LORA)


def test_pairs_without_room_are_counted_in_the_manifest(tmp_path, model_dir):
    pairs = random_pairs(12)
    limit = sorted(len(pair["prompt_ids"]) for pair in pairs)[8]
    model, out = {"path": model_dir, "dtype": "float32"}, tmp_path / "out"
    counts = train_preference("dpo", model, pairs, out, args=ARGS | {"max_steps": 1, "max_length": limit}, lora=LORA)
    assert counts["prompt_fills_max_length"] == sum(len(pair["prompt_ids"]) >= limit for pair in pairs) > 0
    assert counts["rows"] + counts["prompt_fills_max_length"] == 12
    assert read_manifest(out)["counts"] == counts


def test_an_interrupted_training_goes_on_even_from_a_half_written_checkpoint(tmp_path, model_dir, monkeypatch):
    from align.trainers import training

    model, pairs = {"path": model_dir, "dtype": "float32"}, random_pairs(8, columns=("ce_scores",))

    def train(out, **changes):
        return train_preference("cdpo", model, pairs, tmp_path / out, args=ARGS | changes, lora=LORA)

    whole = train("whole")
    original = training.CDPOTrainer.train

    def killed(self, **kwargs):
        original(self, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training.CDPOTrainer, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            train("broken")
    working = tmp_path / "broken.training"
    (working / "checkpoint-4" / "trainer_state.json").unlink()  # killed while it was written
    resumed = []
    with monkeypatch.context() as patched:
        patched.setattr(
            training.CDPOTrainer, "train", lambda self, **kwargs: resumed.append(kwargs) or original(self, **kwargs)
        )
        assert train("broken")["steps"] == whole["steps"] == 4
    assert resumed[0]["resume_from_checkpoint"].endswith("checkpoint-3")
    losses = [
        [
            e["loss"]
            for e in json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
            if "loss" in e
        ]
        for name in ("whole", "broken")
    ]
    assert losses[0] == losses[1] and not working.exists()
    assert read_manifest(tmp_path / "broken")["counts"]["train_loss"] == pytest.approx(whole["train_loss"], abs=1e-4)
    assert train("broken") == {}  # complete


def test_a_death_between_result_and_manifest_does_not_lock_the_folder(tmp_path, model_dir, monkeypatch):
    from align.trainers import training

    model, out = {"path": model_dir, "dtype": "float32"}, tmp_path / "out"
    original = training.write_manifest

    def dying(path, *args, **kwargs):
        if path == out:
            raise KeyboardInterrupt
        original(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(training, "write_manifest", dying)
        with pytest.raises(KeyboardInterrupt):
            train_sft(model, demonstrations(), out, args=ARGS, lora=LORA)
    assert not out.exists()
    assert train_sft(model, demonstrations(), out, args=ARGS, lora=LORA)["steps"] == 4
