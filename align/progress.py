"""Progress bars: rows that are done, of all, on stderr, in the first process of a launch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")

#: Seconds after which the bar of a pass that computes little shows: most are over by then.
DELAY = 2.0


def is_shown() -> bool:
    """Whether bars are shown here: in the first process, unless `TQDM_DISABLE` is set."""
    return os.environ.get("RANK", "0") == "0" and not os.environ.get("TQDM_DISABLE")


def progress(
    total: int | None, name: str, *, done: int = 0, unit: str = " rows", hidden: bool = False, **options: Any
) -> tqdm:
    """A bar to be updated and closed, or a context manager.

    Args:
        total: rows in all; `None` where nobody knows.
        name: what is done.
        done: rows that an earlier run has done.
        hidden: shows nothing, as the `disable_tqdm` of a training asks for.
        options: of tqdm.
    """
    from tqdm import tqdm

    # A `disable` of ours would go before tqdm's own reading of the environment.
    return tqdm(total=total, desc=name, initial=done, unit=unit, disable=hidden or not is_shown(), **options)


def watched(
    rows: Iterable[T], name: str, total: int | None = None, *, unit: str = " rows", delay: float = 0.0
) -> Iterator[T]:
    """Rows that are gone through once, with a bar.

    Args:
        total: how many there are; their length where they have one.
        delay: seconds after which the bar shows; `DELAY` for a pass that computes little, and is long over many rows only.
    """
    total = len(rows) if total is None and isinstance(rows, Sized) else total
    with progress(total, name, unit=unit, delay=delay) as bar:
        for row in rows:
            yield row
            bar.update()
