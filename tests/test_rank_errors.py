"""Whatever stops one process of a training stops all, wherever they are, with one message."""

import json
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import random_pairs, tiny_llama
from test_distributed import ENVIRONMENT, TESTS
from test_parallel import ROOT, launch, save_base
from torch.utils.data import DataLoader

from align import BASHConfig, BASHTrainer, stopping
from align.errors import ConfigError, RecordError, RecordFileError
from align.processes import leave
from align.records import write_records
from align.trainers import row_data

CPU = ROOT / "recipes/accelerate/cpu.yaml"
SCRIPT = str(TESTS / "failing_training.py")


def said(stderr: str) -> list[str]:
    """Of errors; a training also says what its longest batch took."""
    lines = [line for line in stderr.splitlines() if line.startswith("align:")]
    return [line for line in lines if not line.startswith("align: preflight: ")]


def tracebacks(stderr: str) -> int:
    """Of our processes; the launcher has one of its own."""
    return stderr.count("Traceback (most recent call last)") - 1


def first_to_fail(stderr: str) -> tuple[int, int]:
    """Number and exit code of the process that the launcher saw first."""
    found = re.search(r"Root Cause.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)", stderr, re.DOTALL)
    return int(found[1]), int(found[2])


def write_files(folder: Path) -> None:
    save_base(folder / "base")
    write_records(folder / "pairs.jsonl", random_pairs(8, vocab_size=20))
    text = (folder / "pairs.jsonl").read_bytes()
    (folder / "damaged.jsonl").write_bytes(text[: len(text) // 2])


@pytest.mark.parametrize(
    "kind, message",
    [
        ("collator", "row p7: bad"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("file", "damaged.jsonl"), ("places", "update 2: bad"), ("engine", "127.0.0.1:9"))
        ),
    ],
)
def test_what_one_process_cannot_use_ends_all(tmp_path, kind, message):
    """The others wait for it in a backward pass, where data are shared, or in a barrier."""
    write_files(tmp_path)
    done = launch(CPU, 2, SCRIPT, kind, str(tmp_path / "out"), timeout=200)
    (line,) = said(done.stderr)
    assert message in line and tracebacks(done.stderr) == 0
    assert done.returncode != 0 and first_to_fail(done.stderr)[1] == 2


@pytest.mark.parametrize(
    "kind, message",
    [
        pytest.param("held_out", "row 3", marks=pytest.mark.slow),
        pytest.param("stream", "row 10", marks=pytest.mark.slow),
    ],
)
def test_what_no_process_can_use_is_said_once(tmp_path, kind, message):
    write_files(tmp_path)
    done = launch(CPU, 2, SCRIPT, kind, str(tmp_path / "out"), timeout=200)
    (line,) = said(done.stderr)
    assert message in line and tracebacks(done.stderr) == 0 and first_to_fail(done.stderr)[1] == 2


def test_a_recipes_bad_row_is_said_once(tmp_path):
    """Every process reads it."""
    rows = random_pairs(8, vocab_size=20)
    rows[3]["chosen_ids"] = "no ids"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["--config", "recipes/configs/cdpo/tiny-arithmetic.yaml", "--data", str(tmp_path / "pairs.jsonl")]
    done = launch(CPU, 2, "recipes/dpo.py", *settings, "--output", str(tmp_path / "out"), timeout=200)
    (line,) = said(done.stderr)
    assert "row 3" in line and "chosen_ids" in line and tracebacks(done.stderr) == 0
    assert first_to_fail(done.stderr)[1] == 2 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind, last_line",
    [
        pytest.param(
            "constructor",
            "align.errors.RecordError: train data set: the prompt of each of its 4 rows fills max_length",
            marks=pytest.mark.slow,
        ),
        pytest.param("bug", "KeyError: 'a bug'", marks=pytest.mark.slow),
    ],
)
def test_what_nobody_catches_has_one_traceback(tmp_path, kind, last_line):
    save_base(tmp_path / "base")
    done = launch(CPU, 2, SCRIPT, kind, str(tmp_path / "out"), timeout=200)
    assert done.returncode != 0 and tracebacks(done.stderr) == 1 and said(done.stderr) == []
    assert done.stderr.count(last_line) == 1


def on_two_machines(*command: str) -> list[subprocess.CompletedProcess]:
    """Two launchers, none of which ends the processes of the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def machine(rank: int) -> subprocess.CompletedProcess:
        where = ["--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"]
        options = ["--config_file", str(CPU), "--num_processes", "2", *where, "--main_process_port", port]
        return subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *options, *command],
            env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=200,
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(machine, range(2)))


@pytest.mark.slow
@pytest.mark.parametrize("kind, message", [("waiting", "row 1"), ("collator", "row p7")])
def test_another_machine_ends_too(tmp_path, kind, message):
    """Without a launcher that ends its processes, and without a broken connection; where one breaks, nothing is said of it."""
    write_files(tmp_path)
    first, second = on_two_machines(SCRIPT, kind, str(tmp_path / "out"))
    assert first.returncode != 0 and second.returncode != 0
    assert said(first.stderr) == [] and tracebacks(first.stderr) == 0
    (line,) = said(second.stderr)
    assert message in line and tracebacks(second.stderr) == 0 and first_to_fail(second.stderr) == (1, 2)


class BadRow:
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict:
        raise RecordError(f"row {index}: bad")


def test_a_row_that_a_loaders_worker_reads_is_said_in_one_line(capsys):
    with pytest.raises(RecordError, match="Traceback") as caught:
        next(iter(DataLoader(BadRow(), num_workers=1)))
    with pytest.raises(SystemExit) as left:
        leave(caught.value)
    assert (left.value.code, capsys.readouterr().err) == (2, "align: row 0: bad\n")


def test_rows_that_another_machine_cannot_see_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(row_data, "_write", lambda rows, path, hidden: None)  # it went to the disk of process 0
    with pytest.raises(
        RecordFileError, match="rows.arrow: process 0 cannot read what process 0 wrote.*all machines share"
    ):
        row_data.dataset_on_disk([{"id": "a"}], tmp_path / "rows.arrow")


def test_a_process_that_is_alone_and_should_share_does_not_draw(tmp_path, monkeypatch):
    args = BASHConfig(str(tmp_path), bf16=False, use_cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were launched"):
        BASHTrainer(tiny_llama(), args)


def test_a_launch_whose_store_is_gone_is_not_waited_for(monkeypatch):
    """As for a process that comes late, when those of the first machine have ended."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = str(nobody.getsockname()[1])
        for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setattr(stopping, "ANSWER", 1.0)
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.* does not answer"):
            stopping.watch()
