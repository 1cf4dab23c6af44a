"""The longest batch, forward and backward, before the first step: whether it fits, and what it takes."""

from __future__ import annotations

import json
import random
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerCallback

from ..atomic import atomic_path
from ..errors import DeviceMemoryError
from ..logps import length_dependent
from ..positions import position_limit
from ..processes import together
from .guards import FiniteGuard
from .longest import LongestBatch
from .memory import MemoryMeter, in_words, optimizer_states, out_of_memory
from .token_budget import metrics_aside

logger = get_logger(__name__)

#: What is written beside the checkpoints.
FILE = "preflight.json"

#: Most rows that are named.
NAMED = 8


class Preflight(FiniteGuard, ABC):
    """A `FiniteGuard` that takes the longest batch first, and leaves of it nothing but a report.

    Before the first step, of a resumed training too, the batches of `longest_batches` have their forward and backward
    pass, twice where gradients are accumulated, since the second finds those of the first in memory. On CUDA, memory for
    the states that AdamW or SGD will have is held meanwhile. What it took is printed and written to `preflight.json` in
    the output folder. Then gradients are dropped, and random numbers, metrics and buffers put back: the training is, to
    the last bit, what it is without.

    Raises:
        DeviceMemoryError: it does not fit; names the rows, their lengths and what to lower. With `auto_find_batch_size`,
            the device's own error, for which a smaller batch is tried.
        NonFiniteError: a loss or gradient of it is not finite.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.preflight:
            self.add_callback(_BeforeTheFirstStep(self))

    @cached_property
    def _positions(self) -> int | None:
        """Most tokens of a sequence; `None` without a bound."""
        return position_limit(self.model)

    @abstractmethod
    def longest_batches(self) -> list[LongestBatch]:
        """The batches that need most memory, the same in every process: whatever the order, each may get them."""

    def run_preflight(self) -> None:
        """Takes the longest batches and reports, unless there is nothing left to train."""
        if self.state.global_step >= self.state.max_steps:
            return
        if reason := self._why_no_preflight():
            logger.warning(f"no preflight: {reason}")
            report: dict[str, Any] = {"skipped": reason, "summary": f"no preflight: {reason}"}
        else:
            report = self._longest()
        process = self.accelerator.state
        # One process writes; what it cannot write ends all.
        with together(process):
            if process.is_main_process:
                with atomic_path(Path(self.args.output_dir) / FILE) as temporary:
                    temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
                if "skipped" not in report:
                    print(f"align: {report['summary']}", file=sys.stderr, flush=True)

    def _why_no_preflight(self) -> str | None:
        optimizer = str(getattr(self.args.optim, "value", self.args.optim))
        if not isinstance(self.train_dataset, Dataset):
            return "which rows of a stream are the longest is not known beforehand"
        if self.is_deepspeed_enabled:
            return "DeepSpeed's backward pass updates the weights"
        if optimizer.endswith("layerwise") or optimizer in ("lomo", "adalomo"):
            return f"optim={optimizer!r} updates the weights within the backward pass"
        if self.args.torch_compile:
            return "torch_compile makes its kernels for the first batch that it sees"
        if reason := length_dependent(self.accelerator.unwrap_model(self.model).config):
            return f"{reason}, and on those before"
        if (device := self.accelerator.device.type) not in ("cpu", "cuda"):
            return f"it does not know the random numbers and counters of {device}"
        return None

    def _longest(self) -> dict[str, Any]:
        """Runs the batches; what they took, the largest of all processes."""
        process = self.accelerator.state
        # Under FSDP, passes are everyone's: nobody waits for a process that has left one.
        alone = nullcontext() if self.is_fsdp_enabled else together(process)
        taken: list[LongestBatch] = []
        with self._unchanged():
            with alone:
                begin = time.perf_counter()
                taken = self.longest_batches()
                memory, states = self._run_all(taken)
                seconds = time.perf_counter() - begin
            names = [row["id"] for batch in taken for row in batch.rows]
            # Not what stands in its place in the instance: the passes are none of an update.
            FiniteGuard.check_update(self, "preflight, before ", names)
        each = gather_object([{"seconds": seconds, "memory": memory}])
        most = max(each, key=lambda one: max(part["peak"] or 0 for part in one["memory"]))
        report = {
            "step": self.state.global_step + 1,
            "batches": [{"rows": b.rows, "tokens": sum(sum(row["tokens"]) for row in b.rows)} for b in taken],
            "accumulated": self.args.gradient_accumulation_steps > 1, "seconds": max(one["seconds"] for one in each),
            "processes": len(each), "memory": most["memory"], "optimizer_states": states,
        }  # fmt: skip
        return report | {"summary": summary(report)}

    def _run_all(self, batches: list[LongestBatch]) -> tuple[list[dict[str, Any]], int | None]:
        """Memory, and bytes of the optimizer's states that are not there yet."""
        states = optimizer_states(self.optimizer)
        meter = MemoryMeter(self.model)
        for batch in batches:
            failed, held = None, []
            try:
                held += [
                    torch.empty(number, dtype=torch.uint8, device=device)
                    for device, number in (states or {}).items()
                    if device.type == "cuda"
                ]
                self._passes(batch)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                if self.args.auto_find_batch_size:
                    raise
                failed = " ".join(str(error).split())[:200]
            held.clear()
            if failed is not None:  # the device's error is gone, and with it all that its frames held
                raise DeviceMemoryError(self._too_large(batch, failed))
        return meter.read(), None if states is None else sum(states.values())

    def _passes(self, batch: LongestBatch) -> None:
        """As many forward and backward passes as it takes for gradients to be there in the last."""
        steps, model = self.args.gradient_accumulation_steps, self.model_wrapped
        self.current_gradient_accumulation_steps = steps
        model.zero_grad()
        for last in (False, True) if steps > 1 else (True,):
            # DDP learns from the first reduction how to do the others; this must not be it.
            with nullcontext() if last and self.is_fsdp_enabled else self.accelerator.no_sync(model):
                inputs = self._prepare_inputs(dict(batch.inputs))
                items = self._get_num_items_in_batch([inputs], self.args.device)
                self.training_step(model, inputs, items)

    def _too_large(self, batch: LongestBatch, what: str) -> str:
        args = self.args
        longest = max(max(row["tokens"]) for row in batch.rows)
        shown = LongestBatch({}, batch.rows[:NAMED])
        budget = getattr(args, "max_tokens_per_batch", None)
        remedies = []
        if len(batch.rows) > 1:
            remedies.append("per_device_train_batch_size (and raise gradient_accumulation_steps, for the same update)")
        if budget is not None and len(batch.rows) > 1:
            remedies.append(f"max_tokens_per_batch, now {budget}")
        remedies.append(f"max_length below {longest}")
        others = []
        if hasattr(args, "max_tokens_per_batch") and budget is None and len(batch.rows) > 1:
            others.append("max_tokens_per_batch")
        # transformers has renamed it along the way.
        name = "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"
        if not getattr(args, name):
            others.append(f"{name}=True")
        return (
            f"preflight, before step {self.state.global_step + 1}: the longest batch does not fit into memory: {shown}"
            f"{' …' if len(batch.rows) > NAMED else ''}: {what}. Lower {', or '.join(remedies)}"
            f"{'; or set ' + ' or '.join(others) if others else ''}"
        )

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Puts back what forward and backward passes change, but for the caching of memory."""
        model = self.model_wrapped
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        modes = [(module, module.training) for module in model.modules()]
        divisor = vars(self).get("current_gradient_accumulation_steps")
        # DDP: whether the next forward pass begins with sending buffers round; here, none may wait for others.
        sends = getattr(model, "require_forward_param_sync", None)
        if sends is not None:
            model.require_forward_param_sync = False
        devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
        try:
            with same_random_numbers(devices), metrics_aside(self):
                yield
        finally:
            self._update = []
            model.zero_grad()
            with torch.no_grad():
                for buffer, kept in buffers:
                    buffer.copy_(kept)
            for module, mode in modes:
                module.training = mode
            if sends is not None:
                model.require_forward_param_sync = sends
            if divisor is None:
                vars(self).pop("current_gradient_accumulation_steps", None)
            else:
                self.current_gradient_accumulation_steps = divisor
            if devices:
                torch.cuda.empty_cache()


@contextmanager
def same_random_numbers(devices: Sequence[int] = ()) -> Iterator[None]:
    """Puts back the states of all random numbers, those of some CUDA devices among them."""
    numbers = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(numbers[0])
        numpy.random.set_state(numbers[1])


def summary(report: dict[str, Any]) -> str:
    """One line of what a preflight found."""
    (first, *further), states = report["batches"], report["optimizer_states"]
    shown = LongestBatch({}, first["rows"][:NAMED])
    rest = len(first["rows"]) - NAMED
    text = f"preflight: the longest batch, {shown}{f' and {rest} more' if rest > 0 else ''}"
    text += ", and the fullest pass" if further else ""
    text += f", took {report['seconds']:.1f} s and "
    parts = []
    for part in report["memory"]:
        if part["device"] != "process":
            parts.append(
                f"{in_words(part['peak'])} of {part['device']}'s {in_words(part['total'])} at most ({in_words(part['before'])} before, "
                f"{in_words(part['reserved'])} reserved)"
            )
        elif part["peak"] is None:
            parts.append("memory that this system does not count")
        elif part["grown"]:
            parts.append(
                f"raised the peak of the process's memory by {in_words(part['grown'])} to {in_words(part['peak'])}"
            )
        else:
            parts.append(f"no more memory than the process had at its peak before, {in_words(part['peak'])}")
    text += ", ".join(parts)
    if report["processes"] > 1:
        text += f", the most of {report['processes']} processes"
    if states is None:
        return text + "; what the optimizer will add is not known"
    counted = "counted in" if report["memory"][0]["device"] != "process" else "not counted in"
    return text + (f"; the optimizer's states, {in_words(states)} from step 1 on, are {counted}" if states else "")


class _BeforeTheFirstStep(TrainerCallback):
    def __init__(self, trainer: Preflight) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.run_preflight()
