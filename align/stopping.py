"""How a launch ends in which a process fails, wherever the others are: the first to stop says why, and all others end without
a word.

It goes by the key-value store of the launcher and not by the processes' group: who has an error to tell cannot know which
operation the others wait in.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, ElsewhereError

if TYPE_CHECKING:
    from torch.distributed import Store

#: The key that counts processes which stopped with an error.
STOPPED = "stopped"

#: Seconds: between two looks at the store; that who stops waits for the others to hear of it; that they then have to end by
#: themselves; and who stopped, to end its group, which may wait for ever, and what else is done at exit.
EVERY, HEARING, GRACE, OWN_GRACE = 1.0, 5.0, 10.0, 60.0

#: Seconds in which the store has to answer.
ANSWER = 30.0

#: What a store raises that is gone, with the process or the launcher that held it.
LOST = (RuntimeError, OSError)


class Launch:
    """The processes of a launch, as one of them sees it; from now on it ends when another one has stopped.

    Args:
        store: shared by all processes.
        process: the number of this one.
        processes: how many there are.
    """

    def __init__(self, store: Store, process: int, processes: int) -> None:
        self.store, self.process = store, process
        self.heard = [f"heard/{number}" for number in range(processes)]
        self._stopping, self._over = False, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="align-watch", daemon=True)
        self._thread.start()
        atexit.register(self._end)
        self._told = sys.excepthook
        sys.excepthook = self._uncaught

    def stop(self, say: Callable[[], None] | None) -> None:
        """See `stop`."""
        self._stopping = True
        try:
            first = say is not None and self.store.add(STOPPED, 1) == 1
        except LOST:
            first = say is not None
        if first:
            say()
        # The launcher's store may go with this process, so it stays until the others know; one that is held up is not waited for.
        with suppress(*LOST):
            self.store.set(self.heard[self.process], "")
            self.store.wait([STOPPED, *self.heard], timedelta(seconds=HEARING))
        if not first:
            time.sleep(GRACE)  # so that the launcher sees the other one go first, and names it; it ends this one

    def _watch(self) -> None:
        try:
            while not self.store.check([STOPPED]):
                if self._over.wait(EVERY):
                    return
            self.store.set(self.heard[self.process], "")
        except LOST:
            return
        if not self._over.wait(OWN_GRACE if self._stopping else GRACE):
            os._exit(2)  # the main thread may never come back from the operation that it waits in

    def _end(self) -> None:
        self._over.set()
        self._thread.join(
            timeout=HEARING
        )  # a thread that wakes up in an interpreter that is gone can abort the process

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        """Python's last word on an exception, a bug or an AlignError that nobody caught: in the first process alone, since those
        of the others are mostly of connections to it."""
        if issubclass(kind, KeyboardInterrupt):
            self._told(kind, error, trace)
        else:
            self.stop(None if isinstance(error, ElsewhereError) else lambda: self._told(kind, error, trace))


_launch: Launch | None = None


def watch() -> None:
    """Ends this process, one of several, within seconds of another one's failing; may be called again.

    Raises:
        ConfigError: the launcher's store does not answer, so no group of processes could be formed either.
    """
    try:
        _connect()
    except LOST as error:
        raise ConfigError(
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, where the processes of this launch meet, does not answer "
            f"({str(error).splitlines()[0][:200]}); those of the first machine have ended, or it cannot be reached from here"
        ) from error


def stop(say: Callable[[], None] | None) -> None:
    """Calls `say`, unless another process of this launch has stopped before; lets the others know, and waits until they do.

    Args:
        say: tells what is wrong; `None` where another process does.
    """
    launch = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with suppress(*LOST):
            launch = _connect()
    if launch is not None:
        launch.stop(say)
    elif say is not None:
        say()


def _connect() -> Launch | None:
    """The launch that this process belongs to; `None` while there is no store to be reached."""
    global _launch
    if _launch is None:
        import torch

        # Held by torchrun, the store is there before the processes are; otherwise the first of them brings it with its group.
        held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        there = all(name in os.environ for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
        if there and (held or torch.distributed.is_initialized()):
            found = torch.distributed.rendezvous("env://", timeout=timedelta(seconds=ANSWER))
            store, process, processes = next(found)
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            _launch = Launch(torch.distributed.PrefixStore(f"align/{attempt}", store), process, processes)
    return _launch
