"""Kills every stage, and training, again and again while it works, starts it again, and compares what it ends with.

    python tests/kills.py --kills 30                 # at random moments of each stage's own work
    python tests/kills.py --kills 30 --at-writes     # in the middle of 30 of its writes, moves and removals of files
    python tests/kills.py --works verify pair --kills 3

A stage runs in a fork of this process, which has imported everything and computed nothing, so that a kill costs no start of
Python. After a kill the same stage is started again on what is there; where it ends, its files are compared with those of a
run that nothing disturbed, byte for byte (of a training: weights and losses), and the next round begins in an empty folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

from kill_works import WORKS, import_all, prepare, small_parts


def fork(work: Callable[[Path, Path], None], given: Path, out: Path, log: Path, kill_at: int = 0) -> int:
    """Starts `work` in a fork.

    Args:
        kill_at: at which opening for writing, move or removal of a file below `out`, counted from 1, it kills itself;
            0 is never.
    """
    if child := os.fork():
        return child
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        writes = watch_writes(out, kill_at)
        work(given, out)
        log.with_name("writes").write_text(str(len(writes)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def watch_writes(out: Path, kill_at: int) -> list[str]:
    """The writes below `out`, as they come.

    Python tells an audit hook of every file that it opens, moves or removes; libraries in other languages tell nothing.
    Of a file that it opens to write, half a line is left.
    """
    met: list[str] = []

    def hook(event: str, args: tuple) -> None:
        writes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (
            event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        )
        if writes and str(args[0]).startswith(str(out)):
            met.append(event)
            if len(met) == kill_at:
                if event == "open":  # as a kill in the middle of this writing would leave it
                    with suppress(OSError), open(os.open(args[0], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as file:
                        file.write('{"id": "ha')
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return met


def wait(child: int, log: Path) -> bool:
    """Whether a fork was killed; raises where it failed by itself."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status:
        raise SystemExit(f"a start failed by itself:\n{log.read_text(errors='replace')}")
    return False


def has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def outcome(out: Path) -> dict[str, object]:
    """All that a stage leaves: bytes by name. Of a training, times differ from run to run: weights, losses, and names."""
    found: dict[str, object] = {}
    for file in sorted(path for path in out.rglob("*") if path.is_file() and path.suffix != ".lock"):
        name = str(file.relative_to(out))
        training = (out / name.split("/")[0] / "trainer_state.json").exists() or (
            name.endswith(".manifest.json") and "train_loss" in file.read_text()
        )
        if not training or file.suffix == ".safetensors" or "contexts" in name:
            found[name] = file.read_bytes()
        elif file.name == "trainer_state.json":
            log = json.loads(file.read_text())["log_history"]
            found[name] = [entry["loss"] for entry in log if "loss" in entry]
        else:
            found[name] = None
    return found


def check(whole: dict[str, object], out: Path, name: str) -> None:
    ended = outcome(out)
    if differs := sorted(key for key in whole.keys() | ended.keys() if whole.get(key, "") != ended.get(key, "")):
        raise SystemExit(f"{name}: differs from an undisturbed run in {', '.join(differs)}")


def kill_work(name: str, given: Path, folder: Path, kills: int, at_writes: bool, chance: random.Random) -> dict:
    """Kills one stage so often, at random moments or at its writes; returns what happened."""
    work, log, out = WORKS[name], folder / "log", folder / "out"

    def fresh() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()

    fresh()
    start = time.perf_counter()
    wait(fork(work, given, out, log), log)
    seconds, whole = time.perf_counter() - start, outcome(out)
    assert whole, f"{name} wrote nothing"
    killed = ended = resumed = 0
    if at_writes:
        writes = int(log.with_name("writes").read_text())
        for place in sorted(chance.sample(range(1, writes + 1), min(kills, writes))):
            fresh()
            killed += wait(fork(work, given, out, log, kill_at=place), log)
            resumed += bool(outcome(out))
            wait(fork(work, given, out, log), log)
            check(whole, out, f"{name}, killed at write {place} of {writes}")
            ended += 1
    else:
        fresh()
        while killed < kills:
            start, untouched = time.perf_counter(), not any(out.iterdir())
            child = fork(work, given, out, log)
            moment = start + chance.uniform(0, seconds)
            while time.perf_counter() < moment and not has_ended(child):
                time.sleep(0.002)
            os.kill(child, signal.SIGKILL)  # one that has ended is still waited for, so that its number is its own
            if wait(child, log):
                killed += 1
                resumed += bool(outcome(out))
            else:
                if untouched:  # on a machine that others use, too, the first run may have been slow
                    seconds = min(seconds, time.perf_counter() - start)
                check(whole, out, f"{name} after {killed} kills")
                ended += 1
                fresh()
        wait(fork(work, given, out, log), log)
        check(whole, out, f"{name} after {killed} kills")
        ended += 1
    return {
        "work": name,
        "undisturbed_s": round(seconds, 2),
        "killed": killed,
        "with_files": resumed,
        "compared": ended,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--kills", type=int, default=30, help="of each stage; those count that strike while it works")
    parser.add_argument(
        "--at-writes", action="store_true", help="kill at so many of its writes instead, chosen at random"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import_all()
    small_parts()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "given"
        given.mkdir()
        wait(fork(prepare, given, given, Path(folder) / "log"), Path(folder) / "log")
        for name in options.works:
            start = time.perf_counter()
            found = kill_work(name, given, Path(folder), options.kills, options.at_writes, chance)
            print(json.dumps(found | {"took_s": round(time.perf_counter() - start, 1)}), flush=True)


if __name__ == "__main__":
    main()
