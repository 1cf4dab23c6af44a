"""A training that FSDP shards goes on from its checkpoints, and from no others."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_parallel import fsdp2, save_base, train  # noqa: F401
from transformers import TrainingArguments

from align.errors import ConfigError
from align.trainers.checkpoints import checkpoint_damage, last_whole_checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("method, lora", [("cdpo", "full"), ("cdpo", "lora"), ("bash", "full")])
def test_a_sharded_training_goes_on_as_if_undisturbed(tmp_path, fsdp2, method, lora):  # noqa: F811
    save_base(tmp_path / "base")
    settings = {"save_strategy": "steps", "save_steps": 3}
    if method == "bash":
        settings["refresh_steps"] = 4  # the checkpoint stands within a window
    whole = train(fsdp2, 2, method, lora, tmp_path / "whole", **settings)
    checkpoint = tmp_path / "whole/checkpoint-3"
    args = TrainingArguments(str(tmp_path))
    assert checkpoint_damage(checkpoint, args, processes=2) is None
    shutil.copytree(checkpoint, tmp_path / "again/checkpoint-3")
    again = train(fsdp2, 2, method, lora, tmp_path / "again", **settings)
    assert len(whole["logged"]) == 6 and again["logged"] == whole["logged"]
    name = "adapter_model.safetensors" if lora == "lora" else "model.safetensors"
    weights, resumed = (load_file(tmp_path / folder / "final" / name) for folder in ("whole", "again"))
    assert weights.keys() == resumed.keys() and all(torch.equal(weights[key], resumed[key]) for key in weights)
    trained, half = weights, load_file(checkpoint / name)
    assert any(not torch.equal(trained[key], half[key]) for key in trained)


@pytest.fixture
def folder(tmp_path):
    """What a checkpoint of one process under FSDP consists of."""
    path = tmp_path / "t" / "checkpoint-3"
    path.mkdir(parents=True)
    for name in ("pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.pt", "rng_state.pth"):
        torch.save({"x": torch.zeros(2)}, path / name)
    save_file({"x": torch.zeros(2)}, path / "model.safetensors")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 3, "max_steps": 6}))
    return path


def in_pieces(path):
    """Makes it one of fsdp_state_dict_type SHARDED_STATE_DICT."""
    for name in ("pytorch_model_fsdp", "optimizer"):
        (path / f"{name}.bin").unlink()
        (path / f"{name}_0").mkdir()
        for part in (".metadata", "__0_0.distcp"):
            (path / f"{name}_0" / part).write_bytes(b"x")


@pytest.mark.parametrize("pieces", [False, True])
def test_a_sharded_checkpoint_without_optimizer_is_incomplete(tmp_path, folder, pieces):
    args = TrainingArguments(str(tmp_path))
    if pieces:
        in_pieces(folder)
    assert checkpoint_damage(folder, args) is None
    assert last_whole_checkpoint(folder.parent, args, fsdp=True) == str(folder)
    names = ["scheduler.pt", "optimizer_0/.metadata" if pieces else "optimizer.bin"]
    for name in [*names, *(["pytorch_model_fsdp_0/.metadata"] if pieces else [])]:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        assert checkpoint_damage(folder, args) == f"{name} is missing"
        (folder / name).write_bytes(content)


def test_a_checkpoint_of_another_kind_of_launch_is_refused_and_kept(tmp_path, folder):
    args = TrainingArguments(str(tmp_path))
    with pytest.raises(ConfigError, match=f"{re.escape(str(folder))} was written under FSDP, and this training is not"):
        last_whole_checkpoint(folder.parent, args)
    (folder / "pytorch_model_fsdp.bin").unlink()
    (folder / "optimizer.bin").rename(folder / "optimizer.pt")
    with pytest.raises(ConfigError, match="has no pytorch_model_fsdp.*written without FSDP"):
        last_whole_checkpoint(folder.parent, args, fsdp=True)
    assert last_whole_checkpoint(folder.parent, args) == str(folder)


def test_deepspeeds_checkpoint_is_refused_without_it_and_ours_with_it(tmp_path, folder):
    """Weights are in both, so that the Trainer would go on, with a fresh optimizer."""
    args = TrainingArguments(str(tmp_path))
    (folder / "pytorch_model_fsdp.bin").unlink()
    (folder / "optimizer.bin").rename(folder / "optimizer.pt")
    with pytest.raises(ConfigError, match="checkpoint-3 has no global_step.*written without DeepSpeed"):
        last_whole_checkpoint(folder.parent, args, deepspeed=True)
    (folder / "optimizer.pt").unlink()
    (folder / "global_step3").mkdir()
    with pytest.raises(ConfigError, match="checkpoint-3 was written under DeepSpeed.*zero3.yaml"):
        last_whole_checkpoint(folder.parent, args)
    assert last_whole_checkpoint(folder.parent, args, deepspeed=True) == str(folder)
