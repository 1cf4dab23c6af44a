"""Forward passes of a few tokens, recorded once and replayed: on a GPU, starting their many small kernels takes longer than
running them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

#: Largest difference between a replay and the pass itself, in standard deviations of the logits: kernels may be others.
ALIKE = 0.05


class Recorded:
    """A function of tensors on one CUDA device, as a CUDA graph.

    Args:
        function: from tensors to a tensor, without reading any value back to the host. What else it reads and writes, weights
            and caches, has to stay where it is.
        inputs: tensors to record it with; later ones have their shapes and dtypes.
        pool: memory that recordings share, which are replayed one at a time.

    Raises:
        RuntimeError: it cannot be recorded, or its replay computes something else.
    """

    def __init__(self, function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], pool: Any = None) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        side = torch.cuda.Stream(self.inputs[0].device)
        side.wait_stream(torch.cuda.current_stream(side.device))
        with torch.cuda.stream(side):
            truth = function(*self.inputs).float()  # also what libraries set up on their first call
        torch.cuda.current_stream(side.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.output = function(*self.inputs)
        off = (self(*inputs).float() - truth).nan_to_num(0.0).abs().max()
        if not bool(off <= ALIKE * truth[truth.isfinite()].std()):
            raise RuntimeError(f"a replayed pass differs from the pass itself by {float(off):.3g}")

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The function's value; the next call overwrites it."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output


class Graphs:
    """Recordings by key, and none at all from the first that fails on."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._known: dict[tuple, Recorded] = {}
        self._pool: Any = None

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._known)

    def run(self, key: tuple, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        """`function(*inputs)`, recorded when `key` is new."""
        if not self.enabled:
            return function(*inputs)
        if key not in self._known:
            try:
                # A pool dies with the last recording in it.
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                self._known[key] = Recorded(function, inputs, self._pool)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self.enabled = False
                self.forget()
                first = str(error).strip().splitlines()[0]
                warnings.warn(f"passes run one kernel at a time, since they cannot be recorded: {first}", stacklevel=2)
                return function(*inputs)
        return self._known[key](*inputs).clone()

    def forget(self) -> None:
        """Drops all recordings: what they read or write has moved."""
        self._known.clear()
        self._pool = None
