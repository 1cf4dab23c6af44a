"""The processes of one launch: on a GPU each, or sharing the CPU."""

from __future__ import annotations

import atexit
import functools
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .errors import AlignError, ConfigError, ElsewhereError
from .stopping import stop, watch

if TYPE_CHECKING:
    from accelerate import PartialState


def process_state() -> PartialState:
    """accelerate's state of this process; every module of ours asks for it here.

    accelerate forms no group on the CPU unless it is told to, and whoever asks first decides for the whole process.

    Raises:
        ConfigError: several processes were launched, but this one is alone.
    """
    import torch
    from accelerate import PartialState

    launched = launched_processes()
    if launched > 1:
        watch()  # before the group, which is waited for
    cpu = (
        os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.accelerator.is_available()
    )
    # While one process pairs or writes the page, the others wait: minutes with much data, and NCCL's default is ten.
    options = {"timeout": timedelta(hours=6)} if launched > 1 else {}
    state = PartialState(cpu=launched > 1 and cpu, **options)
    check_group(state.num_processes)
    if launched > 1:
        _leave_at_exit()
    return state


@functools.cache
def _leave_at_exit() -> None:
    """A group that is still there when the interpreter goes now and then aborts its process, its work long done: a thread
    of gloo's that lets go of a tensor of Python's while the interpreter ends is torn down with it, and the process, too.

    Destroying the group ends these threads only where nobody else, as DDP's reducer, holds it; so they are waited for."""
    import torch

    def leave_group() -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        rested, end = 0, time.monotonic() + 5
        while rested < 2 and time.monotonic() < end:
            time.sleep(0.01)  # without the interpreter's lock, for which they may be waiting
            rested = rested + 1 if all(state == "S" for state in _gloo_threads()) else 0

    atexit.register(leave_group)


def _gloo_threads() -> list[str]:
    """The states of the threads that do gloo's work, as Linux has them: S for one that sleeps, having nothing to do."""
    states = []
    for thread in Path("/proc/self/task").glob("*"):
        try:
            _, name, state = re.match(r"(\d+) \((.*)\) (\S)", (thread / "stat").read_text()).groups()
        except OSError:
            continue  # it has just ended
        if name.startswith("pt_gloo"):
            states.append(state)
    return states


def launched_processes() -> int:
    """How many processes torchrun, or `accelerate launch` by way of it, has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_with_deepspeed() -> bool:
    """Whether `accelerate launch` was told to use DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true")


def check_group(processes: int) -> None:
    """Raises a ConfigError where a process would do everything alone that it was launched to share; one that shares ends when
    another one fails."""
    if processes != launched_processes():
        raise ConfigError(
            f"{launched_processes()} processes were launched, but they form groups of {processes}: each would do all of "
            "the work. On the CPU, set use_cpu=True and let nothing ask accelerate for its state before the trainer is made"
        )
    if processes > 1:
        watch()


@contextmanager
def together(process: PartialState) -> Iterator[None]:
    """Runs a block of work that needs no other process, and ends it for all at once, in place of a barrier: what one process
    cannot use stops every one. A bug is not held back; its process dies, and the launcher ends the others.

    Raises:
        AlignError: what this process raised, where no process of a lower number raised any.
        ElsewhereError: another process's error is the one to be told.
    """
    from accelerate.utils import gather_object

    error = None
    try:
        yield
    except AlignError as caught:
        error = caught
    failed = [error is not None] if process.num_processes == 1 else gather_object([error is not None])
    if not any(failed):
        return
    first = failed.index(True)
    if error is not None and first == process.process_index:
        raise error
    raise ElsewhereError(f"process {first} stopped, and says why") from error


def leave(error: AlignError) -> NoReturn:
    """Ends this process with one line on stderr and exit code 2; with the code alone where another process says why, of itself
    or of all. Those that wait for this one end, too."""
    elsewhere = isinstance(error, ElsewhereError)
    # A worker of a DataLoader hands an error over with its traceback in front of it.
    text = str(error).rpartition(f"{type(error).__module__}.{type(error).__name__}: ")[2].strip()
    stop(None if elsewhere else lambda: print(f"align: {text}", file=sys.stderr, flush=True))
    sys.exit(2)
