"""Several processes: the same losses whole and sharded, one message where one fails, launch files that are understood."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import byte_level_tokenizer, tiny_llama
from safetensors.torch import load_file
from test_distributed import ENVIRONMENT, TESTS

ROOT = TESTS.parent
CONFIGS = sorted((ROOT / "recipes/accelerate").glob("*.yaml"))
GPU_CONFIGS = [path for path in CONFIGS if path.stem != "cpu"]


def launch(config: Path, processes: int, *command: str, timeout: int = 240) -> subprocess.CompletedProcess:
    options = ["--config_file", str(config), "--num_processes", str(processes), "--main_process_port", "0"]
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, *command],
        env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory) -> Path:
    """The shipped file, with the processes of this test on the CPU."""
    path = tmp_path_factory.mktemp("fsdp2") / "fsdp2.yaml"
    settings = yaml.safe_load((ROOT / "recipes/accelerate/fsdp2.yaml").read_text())
    path.write_text(yaml.safe_dump(settings | {"use_cpu": True, "gpu_ids": "-1,-1", "mixed_precision": "no"}))
    return path


def train(config: Path, processes: int, method: str, lora: str, out: Path, **settings) -> dict:
    script = [str(TESTS / "parallel_losses.py"), method, str(out), lora, json.dumps(settings)]
    done = launch(config, processes, *script)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("LOGGED", 1)[1])


def save_base(folder: Path) -> None:
    tiny_llama(vocab_size=len(byte_level_tokenizer())).save_pretrained(folder)


#: Batches of which the two processes draw different numbers.
SMALL = {"generation_tokens": 60}


@pytest.mark.parametrize(
    "method, lora, settings",
    [
        ("cdpo", "full", {}),
        ("bash", "full", {}),  # one batch a window: the other process draws nothing
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("cdpo", "lora", {}), ("tgdpo", "full", {}), ("tgdpo", "lora", {}), ("bash", "lora", SMALL),
                ("bash", "full", {"generation": "autoregressive", **SMALL}), ("rac", "full", {}), ("rac", "lora", SMALL),
            )
        ),
    ],
)  # fmt: skip
def test_two_sharded_processes_log_the_losses_of_one_and_save_whole_weights(tmp_path, fsdp2, method, lora, settings):
    save_base(tmp_path / "base")
    one = train(ROOT / "recipes/accelerate/cpu.yaml", 1, method, lora, tmp_path / "1", **settings)
    two = train(fsdp2, 2, method, lora, tmp_path / "2", **settings)
    assert (one["kind"], two["kind"], two["processes"]) == ("MULTI_CPU", "FSDP", 2)
    assert len(one["logged"]) == 6
    for a, b in zip(one["logged"], two["logged"], strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-5)
    name = "adapter_model.safetensors" if lora == "lora" else "model.safetensors"
    weights = [load_file(tmp_path / processes / "final" / name) for processes in ("1", "2")]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        assert value.shape == weights[1][key].shape and (value - weights[1][key]).abs().max() < 1e-3
    if method in ("bash", "rac"):
        drawn = [sorted((tmp_path / processes / "contexts").iterdir()) for processes in ("1", "2")]
        assert len(drawn[0]) == 2 and [a.read_text() for a in drawn[0]] == [b.read_text() for b in drawn[1]]


@pytest.mark.parametrize("method", [pytest.param("tgdpo", marks=pytest.mark.slow), "bash"])
def test_two_whole_processes_log_the_losses_of_one(tmp_path, method):
    save_base(tmp_path / "base")
    cpu = ROOT / "recipes/accelerate/cpu.yaml"
    one, two = (train(cpu, n, method, "full", tmp_path / str(n)) for n in (1, 2))
    for a, b in zip(one["logged"], two["logged"], strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", ["row", "bug"])
def test_what_stops_one_process_stops_all(tmp_path, kind):
    cpu = ROOT / "recipes/accelerate/cpu.yaml"
    done = launch(cpu, 2, str(TESTS / "failing_stage.py"), kind, str(tmp_path / "out.jsonl"), timeout=60)
    assert done.returncode != 0 and not (tmp_path / "out.jsonl").exists()
    lines = [line for line in done.stderr.splitlines() if line.startswith("align:")]
    assert lines == (["align: row 1: bad"] if kind == "row" else [])
    assert ("RuntimeError: a bug" in done.stderr) == (kind == "bug")


def test_a_loss_that_is_no_number_in_one_process_stops_all(tmp_path):
    """With one message, and the rows of both."""
    save_base(tmp_path / "base")
    done = launch(
        ROOT / "recipes/accelerate/cpu.yaml", 2, str(TESTS / "ddp_non_finite.py"), str(tmp_path / "out"), timeout=100
    )
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("align:")]
    assert done.returncode != 0 and "step 1: not finite: losses" in line
    report = json.loads((tmp_path / "out" / "non_finite.json").read_text())
    losses = [batch["loss"] for process in report["processes"] for batch in process["micro_batches"]]
    assert len(losses) == 2 and losses[1] == "nan" and losses[0] != "nan"
    ids = [
        name
        for process in report["processes"]
        for batch in process["micro_batches"]
        for row in batch["rows"]
        for name in row["ids"]
    ]
    assert len(set(ids)) == 4 and all(name in line for name in ids)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_launch_files_are_understood(path):
    settings = yaml.safe_load(path.read_text())
    load_config_from_file(str(path))  # refuses unknown fields
    parser = launch_command_parser()
    known = {action.dest for action in parser._actions}
    for section in ("fsdp_config", "deepspeed_config"):
        assert {k for k in settings.get(section, {}) if k not in known and f"fsdp_{k}" not in known} == set()
    args, _, _ = _validate_launch_command(parser.parse_args(["--config_file", str(path), "script.py"]))
    assert args.use_fsdp == (path.stem == "fsdp2") and args.use_deepspeed == (path.stem == "zero3")
    if path.stem == "zero3":
        assert int(args.zero_stage) == 3


@pytest.mark.parametrize("path", GPU_CONFIGS, ids=lambda path: path.stem)
def test_launch_lines_are_understood(path):
    lines = re.findall(r"accelerate launch (.*)", path.read_text())
    assert len(lines) == 3
    for line, (machines, processes) in zip(lines, ((None, 1), (None, 8), (2, 16)), strict=True):
        args = launch_command_parser().parse_args(line.replace("RANK", "1").split())
        assert args.config_file == f"recipes/accelerate/{path.name}"
        assert (args.num_machines, args.num_processes) == (machines, processes)
