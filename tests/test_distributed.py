"""Two processes on the CPU train and sample what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import random_pairs, tiny_llama
from datasets import Dataset

from align import TokenDPOConfig, TokenDPOTrainer
from align.errors import ConfigError
from align.records import read_records

TRAININGS = ("contrastive", "methods.sft", "methods.dpo", "methods.cdpo")
TESTS = Path(__file__).parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def launch(processes: int, *command: str, port: int) -> str:
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(TESTS.parent / "recipes/accelerate/cpu.yaml"),
    ]
    options = ["--num_processes", str(processes), "--main_process_port", str(port)]
    done = subprocess.run(
        [*launcher, *options, *command], env=ENVIRONMENT, cwd=TESTS.parent, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "aggregation, budget",
    [
        pytest.param("sequence", 0, marks=pytest.mark.slow), ("position", 0), pytest.param("sequence", 30, marks=pytest.mark.slow),
        pytest.param("weighted", 0, marks=pytest.mark.slow), ("weighted", 30),
    ],
)  # fmt: skip
def test_two_processes_log_the_losses_of_one(tmp_path, aggregation, budget):
    """Of batches done as a whole, and of batches in passes, of which each process has a number of its own; with pair weights, too."""
    logged = []
    for processes in (1, 2):
        out = launch(
            processes,
            str(TESTS / "ddp_losses.py"),
            str(tmp_path / str(processes)),
            aggregation,
            str(budget),
            port=29600 + processes,
        )
        assert f"PROCESSES {processes}\n" in out
        logged.append(json.loads(out.split("LOGGED", 1)[1]))
    assert len(logged[0]) == 10
    if aggregation == "weighted":
        assert len({entry[3] for entry in logged[0]}) > 3
    for one, two in zip(*logged, strict=True):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["bash", pytest.param("rac", marks=pytest.mark.slow)])
def test_two_processes_draw_the_contexts_of_one(tmp_path, kind):
    """Each draws a share of every window; the union, and what is learned from it, is the same."""
    found = []
    for processes in (1, 2):
        script = [str(TESTS / "ddp_contexts.py"), kind, str(tmp_path / str(processes))]
        out = launch(processes, *script, port=29630 + processes)
        assert f"PROCESSES {processes}\n" in out
        found.append(json.loads(out.split("LOGGED", 1)[1]))
    one, two = found
    assert two["contexts"] == one["contexts"] and len(one["contexts"]) == 28
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5) and len(one["losses"]) == 7


def test_processes_with_caches_of_their_own_agree(tmp_path):
    """Only the first process keeps what was computed; the second time, the others have it from there."""
    out = launch(2, str(TESTS / "ddp_reference.py"), str(tmp_path), port=29620)
    assert "SAME 0 1\n" in out
    assert len(list((tmp_path / "cache-0").rglob("*.safetensors"))) == 1 and not (tmp_path / "cache-1").exists()


@pytest.mark.slow
def test_two_processes_run_the_chain_that_one_runs(tmp_path):
    """The whole recipe: stages share their batches, trainings their gradients; what needs no sharing is done once."""
    common = [
        "train.limit=12", "test.limit=8", "sample.n=4", "sample.batch_size=16", "evaluate.batch_size=4",
        "contrastive.args.max_steps=2", *(f"methods.{method}.args.max_steps=2" for method in ("sft", "dpo", "cdpo")),
    ]  # fmt: skip
    for processes in (1, 2):
        batch = [f"{section}.args.per_device_train_batch_size={4 // processes}" for section in TRAININGS]
        flags = [word for value in (*common, *batch) for word in ("--set", value)]
        config = "recipes/configs/cdpo/tiny-arithmetic.yaml"
        recipe = ["recipes/cdpo.py", "--config", config, "--output", str(tmp_path / str(processes)), *flags]
        assert launch(processes, *recipe, port=29610 + processes).count("| cDPO") == 1  # one table, not one each
    one, two = (
        {path.relative_to(tmp_path / folder): path for path in sorted((tmp_path / folder).rglob("*.jsonl"))}
        for folder in ("1", "2")
    )
    assert one.keys() == two.keys() and len(one) >= 12
    for name in ("samples.jsonl", "verdicts.jsonl", "pairs.jsonl", "test/base-samples.jsonl"):
        assert one[Path(name)].read_bytes() == two[Path(name)].read_bytes()
    for row, other in zip(*(read_records(rows[Path("scored.jsonl")]) for rows in (one, two)), strict=True):
        for column in ("chosen_ref_logps", "rejected_ce_scores"):
            assert row[column] == pytest.approx(other[column], rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_two_processes_draw_the_traces_of_one(tmp_path):
    """Each draws a share of the batches; one of them chooses, and selects."""
    model = "data/tiny-arithmetic/model"
    for processes in (1, 2):
        out, kept, selected = (str(tmp_path / f"{name}-{processes}.jsonl") for name in ("traces", "kept", "selected"))
        flags = ["--limit", "8", "--n", "2", "--max-new-tokens", "60", "--batch-size", "4", "--prefix-tokens", "20"]
        models = ["--teacher", model, "--student", model, "--dtype", "float32"]
        command = ["-m", "align", "trace", "data/tiny-arithmetic/train.jsonl", out, "--kept", kept, *models, *flags]
        assert launch(processes, *command, port=29640 + processes).count('"tokens_per_teacher_pass"') == 1
        rule = ["--model", model, "--dtype", "float32", "--rule", "rsr", "--keep-per-problem", "1"]
        launch(processes, "-m", "align", "select", out, selected, *rule, port=29650 + processes)
    for name in ("traces", "kept"):
        one, two = ((tmp_path / f"{name}-{processes}.jsonl").read_bytes() for processes in (1, 2))
        assert one == two and one
    one, two = (read_records(tmp_path / f"selected-{processes}.jsonl") for processes in (1, 2))
    assert [row["completion_ids"] for row in one] == [row["completion_ids"] for row in two]


def test_a_process_alone_that_was_launched_to_share_is_refused(tmp_path, monkeypatch):
    args = TokenDPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were launched.*use_cpu=True"):
        TokenDPOTrainer(tiny_llama(), args=args, train_dataset=Dataset.from_list(random_pairs(2)))


@pytest.mark.skipif(sys.platform != "linux", reason="tells its threads apart as Linux does")
def test_a_group_whose_last_work_is_still_being_put_away_does_not_abort_its_process(tmp_path):
    for attempt in range(3):  # without the wait at exit, about two in three die
        done = subprocess.run(
            [sys.executable, str(TESTS / "gloo_at_exit.py"), str(tmp_path / str(attempt))],
            env=ENVIRONMENT, cwd=TESTS.parent, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, "DONE\n"), done.stderr[-1000:]
