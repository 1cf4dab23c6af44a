"""What dies while it works, and what it finds when it comes back: locks, damaged files, full disks, checkpoints."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_pairs

from align.atomic import atomic_path, write_error
from align.errors import ConfigError, RecordFileError
from align.export import export_completions
from align.locks import locked
from align.pair import pair
from align.records import read_records, write_records
from align.stages import run_in_parts, write_chosen
from align.trainers.training import train_sft

ROOT = Path(__file__).parent.parent
ARGS = {
    "max_steps": 4, "per_device_train_batch_size": 2, "bf16": False, "gradient_checkpointing": False, "save_steps": 1,
    "disable_tqdm": True, "logging_steps": 1,
}  # fmt: skip
ROWS = [
    {"id": p["id"], "prompt": "x", "completion": "y", "prompt_ids": p["prompt_ids"], "completion_ids": p["chosen_ids"]}
    for p in random_pairs(6)
]


def run(path, computed=None, interrupt=None, **settings):
    """A stage of three parts."""

    def compute(number, batch):
        if number == interrupt:
            raise KeyboardInterrupt
        if computed is not None:
            computed.append(number)
        return [{"id": str(x), "value": x} for x in batch]

    return run_in_parts(
        path, [[5, 4], [3, 2], [1, 0]], compute, stage="test", settings=settings, order=lambda row: row["value"]
    )


def start(code: str, *arguments: object, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **options,
    )  # fmt: skip


HOLD = """
import sys, time
from align.locks import locked
from align.merge import merge_adapter
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds an output."""
    started = []

    def hold(path):
        started.append(start(HOLD, path))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def verdicts(path: Path) -> Path:
    rows = [
        {"id": "a", "prompt": "x", "answer": "7", "sample": i, "prompt_ids": [1], "completion_ids": [2], "rule": "last",
         "completion": "7", "finish_reason": "stop", "extracted": str(7 + i), "correct": i == 0}
        for i in range(2)
    ]  # fmt: skip
    write_records(path, rows)
    return path


def test_a_second_process_on_the_same_output_is_refused(tmp_path, holder, model_dir):
    out = tmp_path / "out.jsonl"
    process = holder(out)
    message = rf"out\.jsonl: process {process.pid} on .* is writing it; wait until that has ended"
    with pytest.raises(RecordFileError, match=message):
        run(out)
    with pytest.raises(RecordFileError, match=message):
        write_chosen(out, ROWS, "t", {}, {})
    with pytest.raises(RecordFileError, match=message):
        pair(verdicts(tmp_path / "verdicts.jsonl"), tmp_path / "pairs.jsonl", out, tmp_path / "negative.jsonl")
    with pytest.raises(RecordFileError, match=message):
        export_completions(read_records(tmp_path / "verdicts.jsonl")[:1], out, "alpaca-eval", "m")
    with pytest.raises(RecordFileError, match=message):
        train_sft({"path": model_dir, "dtype": "float32"}, ROWS, out, args=ARGS)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".lock") == ["verdicts.jsonl"]
    process.kill()
    process.wait()
    assert run(out) == {"rows": 6}  # what a killed process leaves does not block


def test_a_second_recipe_in_the_same_folder_is_refused(tmp_path, holder):
    from align.config import read_config
    from align.pipeline import Chain

    chain = Chain(read_config(ROOT / "recipes/configs/cdpo/tiny-arithmetic.yaml"), tmp_path / "run")
    process = holder(tmp_path / "run")
    with pytest.raises(RecordFileError, match=rf"run: process {process.pid} on "):
        chain.run()
    assert not (tmp_path / "run").exists()


def test_processes_of_one_launch_share_the_lock(tmp_path, holder, monkeypatch):
    holder(tmp_path / "out.jsonl")
    monkeypatch.setenv("RANK", "1")
    with locked(tmp_path / "out.jsonl"):  # the first of them holds it
        pass
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RecordFileError), locked(tmp_path / "out.jsonl"):
        pass


def test_a_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out.jsonl", interrupt=1)
    process = start(HOLD, tmp_path / "out.jsonl")
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.communicate()


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    for name in (".out.jsonl.17.tmp", ".out.jsonl.manifest.json.17.tmp"):
        (tmp_path / name).write_text("half a")
    (tmp_path / ".out.jsonl.18.tmp").mkdir()
    others = [".other.jsonl.17.tmp", ".out.jsonl.notes.tmp", ".the.out.jsonl.17.tmp"]
    for name in others:
        (tmp_path / name).write_text("another's")
    run(tmp_path / "out.jsonl")
    left = {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"}
    assert left == {*others, "out.jsonl", "out.jsonl.manifest.json"}


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda part, seal: part.write_bytes(part.read_bytes()[:-9]), "bytes instead of"),
        (lambda part, seal: part.write_bytes(part.read_bytes().splitlines(keepends=True)[0]), "bytes instead of"),
        (lambda part, seal: part.write_bytes(b""), "has 0 bytes instead of"),
        (lambda part, seal: part.write_bytes(part.read_bytes().replace(b"5", b"9")), "does not hold what was written"),
        (lambda part, seal: part.unlink(), "is missing"),
        (lambda part, seal: seal.unlink(), "has no record of its size"),
        (lambda part, seal: seal.write_text("{"), "not readable"),
        (lambda part, seal: seal.write_text("[]"), "not readable"),
    ],
)
def test_a_damaged_part_is_named_and_computed_again(tmp_path, capsys, damage, words):
    run(tmp_path / "whole.jsonl")
    out, computed = tmp_path / "out.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        run(out, interrupt=2)
    parts = Path(f"{out}.parts")
    damage(parts / "000000.jsonl", parts / "000000.seal.json")
    (parts / ".000001.jsonl.17.tmp").write_text("half a")
    capsys.readouterr()
    assert run(out, computed) == {"rows": 6}
    assert computed == [0, 2]  # the whole one is kept
    error = capsys.readouterr().err
    assert "out.jsonl.parts/000000.jsonl" in error and words in error and "000001" not in error
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not parts.exists()


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_finished_output_that_was_cut_off_is_refused(tmp_path, ending):
    out = tmp_path / f"out.{ending}"
    run(out)
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecordFileError, match=rf"out\.{ending}: has \d+ bytes instead of {len(whole)}.* remove .*out"):
        run(out)
    out.unlink()
    run(out)
    assert out.read_bytes() == whole


def test_parts_left_by_a_death_at_the_very_end_are_removed(tmp_path, monkeypatch):
    original = shutil.rmtree

    def dying(path, **options):
        if Path(path).suffix == ".parts":
            raise KeyboardInterrupt
        original(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr("align.stages.shutil.rmtree", dying)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl.parts").exists()
    computed = []
    assert run(tmp_path / "out.jsonl", computed) == {"rows": 6} and computed == []
    assert not (tmp_path / "out.jsonl.parts").exists()


LIMITED = """
import resource, signal, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
from align.cli import main
sys.argv = ["align", "pair", *sys.argv[1:]]
main()
"""


def test_a_file_that_takes_no_more_is_named_on_the_command_line(tmp_path):
    """A limit on file sizes, where every system has one: what is refused is a real write."""
    rows = read_records(verdicts(tmp_path / "verdicts.jsonl"))
    write_records(tmp_path / "verdicts.jsonl", [r | {"id": str(i)} for i in range(20) for r in rows])
    names = [tmp_path / f"{name}.jsonl" for name in ("pairs", "positive", "negative")]
    process = start(
        LIMITED, tmp_path / "verdicts.jsonl", names[0], "--positive", names[1], "--negative", names[2], cwd=tmp_path
    )
    _, error = process.communicate()
    assert process.returncode == 2, error
    assert error.splitlines()[-1].startswith(
        f"align: {names[1]}: cannot be written: {os.strerror(errno.EFBIG)}; raise the limit"
    )
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == ["verdicts.jsonl"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True)
    if done.returncode:
        pytest.skip("mounting needs root")
    yield disk
    # Lazily: what a failed write left open is closed when its traceback is let go.
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_is_named_and_finished_parts_stay(small_disk, model_dir):
    out, computed = small_disk / "out.jsonl", []

    def compute(number, batch):
        computed.append(number)
        return [{"id": str(batch), "text": "x" * 19_000}]

    def work():
        return run_in_parts(out, list(range(4)), compute, stage="t", settings={}, order=lambda row: row["id"])

    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 200_000)
    with pytest.raises(
        RecordFileError, match=r"00000\d.*jsonl: cannot be written: No space left on device; free space"
    ):
        work()
    assert not out.exists() and not list(small_disk.rglob(".*.tmp"))
    filler.unlink()
    known = len(computed)
    assert work() == {"rows": 4}
    assert 2 <= known <= 4 and computed[known:] == list(range(known - 1, 4))  # what was whole is not computed again
    with pytest.raises(RecordFileError, match=r"sft.training: cannot be written: No space left.*last whole checkpoint"):
        train_sft({"path": model_dir, "dtype": "float32"}, ROWS, small_disk / "sft", args=ARGS)


def test_a_folder_that_cannot_be_written_to_is_named(small_disk):
    run(small_disk / "done.jsonl")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert run(small_disk / "done.jsonl") == {"rows": 6}  # what is complete needs no writing
    with pytest.raises(
        RecordFileError, match=r"out.jsonl: cannot be written: Read-only file system; give an output in"
    ):
        run(small_disk / "out.jsonl")


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="a folder in which nobody may write, on Linux")
def test_a_folder_of_the_system_is_named():
    with pytest.raises(RecordFileError, match=r"/sys/out.jsonl: cannot be written: .*; give an output in a folder"):
        run("/sys/out.jsonl")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full, on Linux")
def test_a_full_disk_is_known_by_what_libraries_say():
    def told(write) -> str:
        with pytest.raises(Exception) as caught:
            write()
        return str(write_error("out", caught.value))

    words = "out: cannot be written: No space left on device; free space there and run it again"
    assert told(lambda: torch.save({"w": torch.zeros(100_000)}, "/dev/full")) == words
    assert told(lambda: Path("/dev/full").write_text("x")) == words


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_refusal_at_the_last_moment_leaves_the_old_file(tmp_path, monkeypatch, number):
    (tmp_path / "a.jsonl").write_text("old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    with pytest.raises(RecordFileError, match=rf"a\.jsonl: cannot be written: {os.strerror(number)}"):
        write_records(tmp_path / "a.jsonl", [{"id": "new"}])
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"] and (tmp_path / "a.jsonl").read_text() == "old"


def test_an_error_that_names_its_file_is_passed_on(tmp_path):
    with pytest.raises(RecordFileError, match="^inner"), atomic_path(tmp_path / "a"):
        raise RecordFileError("inner: gone")


def test_an_input_is_never_an_output(tmp_path):
    """Not of a function, and not by its name in a recipe's folder."""
    from align.config import read_config
    from align.pipeline import Chain
    from align.preferences import tokenize_pairs
    from align.verify import verify

    path = verdicts(tmp_path / "samples.jsonl")
    whole = path.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(path)
    for stage in (verify, lambda source, out: tokenize_pairs(str(source), None, out)):
        with pytest.raises(ConfigError, match=r"link\.jsonl is given twice"):
            stage(path, tmp_path / "link.jsonl")
    for section in ("train", "test"):
        config = read_config(ROOT / "recipes/configs/cdpo/tiny-arithmetic.yaml", [f"{section}.source={path}"])
        with pytest.raises(ConfigError, match=r"samples\.jsonl lies in .*, where stages write files of their own"):
            Chain(config, tmp_path).run()
    assert path.read_bytes() == whole


def test_a_file_where_parts_would_lie_is_named(tmp_path):
    (tmp_path / "out.jsonl.parts").write_text("somebody's")
    with pytest.raises(RecordFileError, match=r"out\.jsonl\.parts: cannot be written: .*a file stands where a folder"):
        run(tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl.parts").read_text() == "somebody's"
