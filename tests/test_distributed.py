"""Two processes on the CPU train and sample what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("aggregation", ["sequence", "position"])
def test_two_processes_log_the_losses_of_one(tmp_path, aggregation):
    logged = []
    for processes in (1, 2):
        out = launch(
            processes, str(TESTS / "ddp_losses.py"), str(tmp_path / str(processes)), aggregation, port=29600 + processes
        )
        logged.append(json.loads(out.split("LOGGED", 1)[1]))
    assert len(logged[0]) == 10
    for one, two in zip(*logged, strict=True):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-6)


def test_two_processes_sample_the_rows_of_one(tmp_path):
    from align.records import read_records

    rows = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.jsonl"
        launch(
            processes, "-m", "align", "sample", "data/tiny-arithmetic/test.jsonl", str(out), "--model", "data/tiny-arithmetic/model",
            "--dtype", "float32", "--limit", "12", "--n", "2", "--batch-size", "6", "--max-new-tokens", "20", port=29610 + processes,
        )  # fmt: skip
        rows.append(read_records(out, "sample"))
    assert len(rows[0]) == 24 and rows[0] == rows[1]
