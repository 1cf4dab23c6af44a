"""What a piece of a training takes of a device's memory, and what its optimizer is still to take."""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

GIB = 1 << 30


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the system, has no memory left. A Linux that promises more than it has kills
    the process instead, and says nothing."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error):
        return True
    return isinstance(error, RuntimeError) and "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def in_words(number: float) -> str:
    """A number of bytes, in MiB below one GiB."""
    return f"{number / GIB:.2f} GiB" if number >= GIB else f"{number / (1 << 20):.1f} MiB"


def optimizer_states(optimizer: Any) -> dict[torch.device, int] | None:
    """Bytes, per device, of states that an optimizer has not made yet: tensors of its parameters' shapes, not the step
    counters. `None` for optimizers whose states are not known here.

    Args:
        optimizer: torch's Adam, AdamW or SGD, or one of accelerate's around it.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)):
        return None
    found: dict[torch.device, int] = {}
    for group in optimizer.param_groups:
        adam = not isinstance(optimizer, torch.optim.SGD)
        states = 2 + bool(group.get("amsgrad")) if adam else int(bool(group.get("momentum")))
        for parameter in group["params"]:
            if not parameter.requires_grad or optimizer.state.get(parameter):
                continue
            local: torch.Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            found[local.device] = found.get(local.device, 0) + states * local.numel() * local.element_size()
    return found


class MemoryMeter:
    """Measures from its creation until `read`. CUDA's peak counters are reset at both; those of a process cannot be.

    Args:
        model: lies on the devices that are looked at, all CUDA devices of one process.
    """

    def __init__(self, model: nn.Module) -> None:
        self.devices = sorted(
            {p.device for p in model.parameters() if p.device.type == "cuda"}, key=lambda d: d.index or 0
        )
        for device in self.devices:
            torch.cuda.reset_peak_memory_stats(device)
        self.before = [torch.cuda.memory_allocated(device) for device in self.devices]
        self.rss = _peak_rss()

    def read(self) -> list[dict[str, Any]]:
        """Per CUDA device, in bytes: `before`, `peak` (allocated), `reserved` (peak, by torch's allocator) and `total`.
        Without one, of the process: `peak` (resident, since it began), `grown`, by how much that rose here: 0 where more
        had been needed earlier; both `None` where the system does not count."""
        found = []
        for device, before in zip(self.devices, self.before, strict=True):
            torch.cuda.synchronize(device)
            found.append(
                {"device": str(device), "before": before, "peak": torch.cuda.max_memory_allocated(device),
                 "reserved": torch.cuda.max_memory_reserved(device),
                 "total": torch.cuda.get_device_properties(device).total_memory}
            )  # fmt: skip
            torch.cuda.reset_peak_memory_stats(device)
        if found:
            return found
        peak = _peak_rss()
        grown = None if peak is None or self.rss is None else peak - self.rss
        return [{"device": "process", "peak": peak, "grown": grown}]


def _peak_rss() -> int | None:
    """The largest resident size that this process has had, bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
