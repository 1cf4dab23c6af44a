"""Two processes that share weights under DeepSpeed's ZeRO-3, on the CPU: what one computes. What launches DeepSpeed is slow, and
skipped where it is not installed."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import byte_level_tokenizer, tiny_llama
from safetensors.torch import load_file
from test_distributed import ENVIRONMENT, TESTS
from test_parallel import ROOT, launch

from align.errors import ConfigError
from align.lm_head import knows_head
from align.models import vocab_size
from align.trainers.sharding import check_sharding

CPU = ROOT / "recipes/accelerate/cpu.yaml"
LOSSES = str(TESTS / "parallel_losses.py")
SECONDS = 400


def launches(test):
    """A test that runs DeepSpeed."""
    missing = find_spec("deepspeed") is None
    skipped = pytest.mark.skipif(missing, reason="DeepSpeed is not installed: pip install 'align[deepspeed]'")
    return pytest.mark.slow(skipped(test))


@pytest.fixture(autouse=True)
def deepspeed_on_the_cpu(monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="module")
def zero3(tmp_path_factory) -> Path:
    """The shipped file, with the processes of this test on the CPU."""
    return shipped(tmp_path_factory.mktemp("zero3") / "zero3.yaml")


def save_large_base(folder: Path) -> None:
    """ZeRO-3 leaves tensors of fewer than 100,000 numbers whole; those of this model lie on both sides."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}
    tiny_llama(vocab_size=len(byte_level_tokenizer()), **sizes).save_pretrained(folder)


def shipped(path: Path, **changed) -> Path:
    settings = yaml.safe_load((ROOT / "recipes/accelerate/zero3.yaml").read_text())
    settings["deepspeed_config"] |= changed
    path.write_text(yaml.safe_dump(settings | {"use_cpu": True, "gpu_ids": "-1,-1", "mixed_precision": "no"}))
    return path


def train(config: Path, processes: int, method: str, lora: str, out: Path, **settings) -> dict:
    done = launch(config, processes, LOSSES, method, str(out), lora, json.dumps(settings), timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("LOGGED", 1)[1])


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """What one process logs and saves, by method and kind of weights; each trained once."""
    folder, known = tmp_path_factory.mktemp("one"), {}
    save_large_base(folder / "base")

    def of(method: str, lora: str) -> tuple[dict, Path]:
        if (method, lora) not in known:
            out = folder / f"{method}-{lora}"
            known[method, lora] = train(CPU, 1, method, lora, out), out
        return known[method, lora]

    return of


@launches
@pytest.mark.parametrize(
    "method, lora, settings",
    [
        ("cdpo", "full", {}),
        ("cdpo", "lora", {"gradient_checkpointing": True}),
        ("tgdpo", "full", {}),
        ("tgdpo", "lora", {}),
        ("cdpo", "full", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}),
        ("cdpo", "full", {"precompute_ref_log_probs": True}),
        ("cdpo", "lora", {"precompute_ref_log_probs": True}),
    ],
    ids=str,
)
def test_zero3_logs_the_losses_of_one_process_and_saves_whole_weights(
    tmp_path, zero3, one_process, method, lora, settings
):
    save_large_base(tmp_path / "base")
    one, alone = one_process(method, lora)
    two = train(zero3, 2, method, lora, tmp_path / "2", **settings)
    assert (one["kind"], two["kind"], two["processes"]) == ("MULTI_CPU", "DEEPSPEED", 2)
    assert len(one["logged"]) == 6
    for a, b in zip(one["logged"], two["logged"], strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-5)
    name = "adapter_model.safetensors" if lora == "lora" else "model.safetensors"
    weights = [load_file(folder / "final" / name) for folder in (alone, tmp_path / "2")]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        assert value.shape == weights[1][key].shape and (value - weights[1][key]).abs().max() < 1e-3


@launches
def test_a_resumed_training_ends_as_an_uninterrupted_one(tmp_path, zero3):
    save_large_base(tmp_path / "base")
    out, settings = tmp_path / "2", {"save_strategy": "steps", "save_steps": 3}
    whole = train(zero3, 2, "cdpo", "full", out, **settings)["logged"]
    weights = load_file(out / "final/model.safetensors")
    rmtree(out / "final")
    rmtree(out / "checkpoint-6")
    state = json.loads((out / "checkpoint-3/trainer_state.json").read_text())
    state["log_history"][0]["loss"] = 7.0  # shows that it is what the training goes on from
    (out / "checkpoint-3/trainer_state.json").write_text(json.dumps(state))
    resumed = train(zero3, 2, "cdpo", "full", out, **settings)["logged"]
    assert resumed[0][0] == 7.0 and resumed[1:] == whole[1:]
    again = load_file(out / "final/model.safetensors")
    assert all(torch.equal(value, again[key]) for key, value in weights.items())


@launches
def test_the_trainings_of_a_recipe_follow_each_other(tmp_path, zero3):
    """The second one's model, and one that is loaded in between, are whole."""
    save_large_base(tmp_path / "base")
    byte_level_tokenizer().save_pretrained(tmp_path / "base")
    losses = []
    for config, processes in ((CPU, 1), (zero3, 2)):
        out = tmp_path / str(processes)
        done = launch(
            config, processes, str(TESTS / "zero3_stages.py"), str(tmp_path / "base"), str(out), timeout=SECONDS
        )
        assert done.returncode == 0, done.stderr[-3000:]
        states = [json.loads((out / stage / "trainer_state.json").read_text()) for stage in ("sft", "cdpo")]
        losses.append([entry["loss"] for state in states for entry in state["log_history"] if "loss" in entry])
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-5)
    assert (tmp_path / "1/cdpo/align_base.json").read_text() == (tmp_path / "2/cdpo/align_base.json").read_text()


@launches
@pytest.mark.parametrize("parameter", [None, "base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight"])
def test_what_is_not_finite_stops_all(tmp_path, zero3, parameter):
    """DeepSpeed itself leaves such an update out without a word."""
    save_large_base(tmp_path / "base")
    command = [str(TESTS / "ddp_non_finite.py"), str(tmp_path / "out"), *([parameter] if parameter else [])]
    done = launch(zero3, 2, *command, timeout=SECONDS)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("align:")]
    assert done.returncode != 0 and "step 1: not finite: losses" in line
    report = json.loads((tmp_path / "out" / "non_finite.json").read_text())
    losses = [batch["loss"] for process in report["processes"] for batch in process["micro_batches"]]
    assert len(losses) == 2 and (losses[1] == "nan") == (parameter is None) and losses[0] != "nan"
    if parameter:
        assert {name for process in report["processes"] for name in process["parameters"]} == {parameter}
        assert f"gradient of {parameter}" in line
    batches = [batch for process in report["processes"] for batch in process["micro_batches"]]
    ids = {name for batch in batches for row in batch["rows"] for name in row["ids"]}
    assert len(ids) == 4 and all(name in line for name in ids)


@launches
@pytest.mark.parametrize(
    "method, stage, environment, told",
    [
        ("bash", 3, {}, "BASHTrainer draws with the whole model"),
        ("cdpo", 2, {}, "ZeRO stage 2 was never tried"),
        ("cdpo", 3, {"ACCELERATE_USE_CPU": "true"}, "launched with DeepSpeed, but ACCELERATE_USE_CPU"),
    ],
)
def test_what_was_not_tried_is_refused(tmp_path, monkeypatch, method, stage, environment, told):
    save_large_base(tmp_path / "base")
    for name, value in environment.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    config = shipped(tmp_path / "zero.yaml", zero_stage=stage)
    done = launch(config, 2, LOSSES, method, str(tmp_path / "2"), "full", "{}", timeout=SECONDS)
    assert done.returncode != 0 and told in done.stderr


def test_a_launch_that_is_not_what_it_says_is_refused(monkeypatch):
    def trainer(enabled: bool, stage: int = 3) -> SimpleNamespace:
        state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
        return SimpleNamespace(
            is_deepspeed_enabled=enabled, is_fsdp_enabled=False, accelerator=SimpleNamespace(state=state)
        )

    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    check_sharding(trainer(False))
    check_sharding(trainer(True))
    with pytest.raises(ConfigError, match="ZeRO stage 2 was never tried"):
        check_sharding(trainer(True, stage=2))
    monkeypatch.setitem(os.environ, "ACCELERATE_USE_DEEPSPEED", "true")
    check_sharding(trainer(True))
    with pytest.raises(ConfigError, match="launched with DeepSpeed, but ACCELERATE_USE_CPU"):
        check_sharding(trainer(False))


def test_weights_that_are_elsewhere_between_passes():
    """The head is then TRL's, which gathers them; the vocabulary is as large as it was."""
    model = tiny_llama()
    assert knows_head(model) and vocab_size(model) == 400
    for parameter in model.parameters():
        parameter.ds_id, parameter.ds_shape = 0, parameter.shape
        parameter.data = torch.empty(0)
    assert not knows_head(model) and vocab_size(model) == 400
