"""A training that dies, and what it goes on from: checkpoints, whole or not, of its own settings or of others."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_crash import ARGS, ROWS, run

from align.errors import ConfigError, RecordFileError
from align.merge import merge_adapter
from align.stages import is_complete, write_manifest
from align.trainers.checkpoints import checkpoint_damage, last_whole_checkpoint
from align.trainers.training import train_sft


def test_a_finished_training_whose_weights_are_damaged_is_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    save_file({"w": torch.zeros(8)}, out / "model.safetensors")
    write_manifest(out, "sft", {}, {})
    (out / "README.md").write_text("a card that somebody added to")
    assert is_complete(out, "sft", {})
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(RecordFileError, match=r"model\.safetensors: has \d+ bytes instead of"):
        is_complete(out, "sft", {})
    (out / "model.safetensors").unlink()
    with pytest.raises(RecordFileError, match="model.safetensors: is missing"):
        is_complete(out, "sft", {})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, model_dir):
    """What a training leaves that was killed before its end, and its arguments."""
    from align.trainers import training

    folder, kept = tmp_path_factory.mktemp("checkpoints"), []
    original = training.SFTTrainer.train

    def killed(self, **kwargs):
        original(self, **kwargs)
        kept.append(self.args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training.SFTTrainer, "train", killed)
        train_sft({"path": model_dir, "dtype": "float32"}, ROWS, folder / "out", args=ARGS)
    return folder / "out.training", kept[0]


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda c: half(c / "model.safetensors"), r"model\.safetensors \(\d+ bytes\) is cut off"),
        (lambda c: (c / "model.safetensors").write_bytes(b""), r"model\.safetensors \(0 bytes\) is cut off"),
        (lambda c: (c / "model.safetensors").unlink(), "there are no weights"),
        (lambda c: half(c / "optimizer.pt"), r"optimizer\.pt \(\d+ bytes\) is cut off"),
        (lambda c: (c / "optimizer.pt").unlink(), r"optimizer\.pt is missing"),
        (lambda c: (c / "scheduler.pt").unlink(), r"scheduler\.pt is missing"),
        (lambda c: half(c / "rng_state.pth"), r"rng_state\.pth \(\d+ bytes\) is cut off"),
        (lambda c: (c / "rng_state.pth").unlink(), r"rng_state\.pth is missing"),
        (lambda c: half(c / "trainer_state.json"), r"trainer_state\.json \(\d+ bytes\) is cut off"),
        (lambda c: (c / "trainer_state.json").write_text("[]"), r"trainer_state\.json does not say at which step"),
        (lambda c: (c / "trainer_state.json").unlink(), r"trainer_state\.json is missing"),
        (
            lambda c: (c / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-2.safetensors"}}'),
            r"model-2\.safetensors is missing",
        ),
    ],
)
def test_an_incomplete_checkpoint_is_named_and_skipped(tmp_path, capsys, checkpoints, damage, words):
    folder, args = checkpoints
    shutil.copytree(folder, tmp_path / "t", ignore=shutil.ignore_patterns("checkpoint-4"))
    third = tmp_path / "t" / "checkpoint-3"
    assert checkpoint_damage(third, args) is None
    damage(third)
    assert last_whole_checkpoint(tmp_path / "t", args).endswith("checkpoint-2")
    assert re.search(f"checkpoint-3 is incomplete and skipped: {words}", capsys.readouterr().err)
    assert sorted(p.name for p in (tmp_path / "t").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_checkpoint_needs_the_random_state_of_every_process(checkpoints):
    folder, args = checkpoints
    assert checkpoint_damage(folder / "checkpoint-2", args, processes=2) == "rng_state_0.pth is missing"


def tamper(marker: Path, **counts) -> None:
    manifest = json.loads(marker.read_text())
    marker.write_text(json.dumps(manifest | {"counts": counts}))


@pytest.fixture
def killed(tmp_path, checkpoints):
    """A copy of what that training left, and a call that goes on with it."""
    folder, _ = checkpoints
    shutil.copytree(folder, tmp_path / folder.name)
    for name in (".settings", ".settings.manifest.json"):
        shutil.copy(f"{folder}{name}", tmp_path / f"{folder.name}{name}")
    return tmp_path / "out"


def test_a_training_that_died_after_its_last_step_takes_no_other(killed, model_dir, monkeypatch):
    """Not even where the checkpoint of that step is the only one."""
    last = killed.with_name("out.training") / "checkpoint-4"
    for path in killed.with_name("out.training").glob("checkpoint-[123]"):
        shutil.rmtree(path)
    weights = (last / "model.safetensors").read_bytes()
    losses = [e["loss"] for e in json.loads((last / "trainer_state.json").read_text())["log_history"] if "loss" in e]

    def step(*_, **__):
        raise AssertionError("another step")

    monkeypatch.setattr("align.trainers.guards.FiniteGuard.training_step", step)
    counts = train_sft({"path": model_dir, "dtype": "float32"}, ROWS, killed, args=ARGS)
    assert (killed / "model.safetensors").read_bytes() == weights
    assert counts["steps"] == len(losses) == 4 and counts["train_loss"] == pytest.approx(sum(losses) / 4)


def test_checkpoints_of_more_processes_are_not_thrown_away(killed, model_dir):
    working = killed.with_name("out.training")
    tamper(killed.with_name("out.training.settings.manifest.json"), processes=2)
    with pytest.raises(
        ConfigError, match="checkpoint-1 is of a training in 2 processes, and this one would go on in 1"
    ):
        train_sft({"path": model_dir, "dtype": "float32"}, ROWS, killed, args=ARGS)
    assert len(list(working.glob("checkpoint-*"))) == 4


def test_unfinished_work_of_other_settings_is_named(killed, tmp_path, model_dir, capsys):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out.jsonl", interrupt=1, n=4, model={"path": "x"})
    capsys.readouterr()
    run(tmp_path / "out.jsonl", n=5, model={"path": "x"})
    told = capsys.readouterr().err
    assert "out.jsonl.parts is unfinished work of other settings (settings.n); it is removed" in told
    train_sft({"path": model_dir, "dtype": "float32"}, ROWS, killed, args=ARGS | {"save_steps": 3})
    told = capsys.readouterr().err
    assert "out.training is unfinished work of other settings (args.save_steps); it is removed" in told


def test_unfinished_work_of_another_method_is_named(killed, model_dir, capsys):
    train_sft({"path": model_dir, "dtype": "float32"}, ROWS, killed, args=ARGS, method="bash")
    assert "out.training is unfinished work of other settings (method); it is removed" in capsys.readouterr().err


def test_a_result_cannot_be_put_where_a_link_stands(tmp_path, model_dir):
    """Told before the training, not by the system at its end."""
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big")
    with pytest.raises(ConfigError, match="out is a link; give the folder that it leads to"):
        train_sft({"path": model_dir, "dtype": "float32"}, ROWS, tmp_path / "out", args=ARGS)
    with pytest.raises(ConfigError, match="out exists already"):
        merge_adapter(model_dir, model_dir, tmp_path / "out")
