"""Forward passes of a few tokens, recorded once and replayed: on a GPU, starting their many small kernels takes longer than
running them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch

#: Largest difference between a replay and the pass itself, in standard deviations of the logits: kernels may be others.
ALIKE = 0.05


class Recorded:
    """A function of tensors on one CUDA device, as a CUDA graph.

    Args:
        function: from tensors to a tensor, without reading any value back to the host. What else it reads and writes, weights
            and caches, has to stay where it is.
        inputs: tensors to record it with; later ones have their shapes and dtypes.
        side: the stream to record on; memory is shared by recordings on one stream alone.
        pool: memory that recordings share, which are replayed one at a time.

    Raises:
        RuntimeError: it cannot be recorded, or its replay computes something else.
    """

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        inputs: Sequence[torch.Tensor],
        side: torch.cuda.Stream,
        pool: tuple[int, int],
    ) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        with torch.cuda.device(self.inputs[0].device):  # kernels are recorded on the current one
            current = torch.cuda.current_stream()
            side.wait_stream(current)
            try:
                with torch.cuda.stream(side):
                    truth = function(*self.inputs).float()  # also what libraries set up on their first call
                current.wait_stream(side)
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, pool=pool, stream=side):
                    self.output = function(*self.inputs)
            finally:
                torch.cuda.set_stream(current)  # a recording that fails leaves its own
        self.output.fill_(float("nan"))  # a replay that does nothing shall not pass
        replayed = self(*inputs).float()
        finite = truth.isfinite()
        if not finite.any():
            return  # whoever draws from these says what is wrong with them
        off = (replayed - truth)[finite].abs().max()
        if not bool(finite.equal(replayed.isfinite()) and off <= ALIKE * truth[finite].std()):
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
        self._side: torch.cuda.Stream | None = None
        self._pool: tuple[int, int] | None = None

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._known)

    def run(self, key: tuple, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        """`function(*inputs)`, recorded when `key` is new."""
        if self.enabled and key not in self._known:
            try:
                # A pool dies with the last recording in it.
                self._side = self._side or torch.cuda.Stream(inputs[0].device)
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                self._known[key] = Recorded(function, inputs, self._side, self._pool)
            except RuntimeError as error:
                # Too little memory is one, too, and a pass alone may fit once the error has let go of its own.
                self.enabled = False
                self.forget()
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                warnings.warn(f"passes run one kernel at a time, since they cannot be recorded: {first}", stacklevel=2)
        return self._known[key](*inputs).clone() if self.enabled else function(*inputs)

    def forget(self) -> None:
        """Drops all recordings: what they read or write has moved."""
        self._known.clear()
        self._pool = None
