"""A loss or a gradient that is no finite number stops a training before it reaches the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerCallback

from ..atomic import atomic_path
from ..errors import ElsewhereError, NonFiniteError
from .checkpoints import ResumesAtTheEnd

#: What is written beside the checkpoints.
FILE = "non_finite.json"

#: Most parameters that are named.
NAMED = 10


class FiniteGuard(ResumesAtTheEnd):
    """Looks at the losses and gradients of every update before the optimizer does; goes in front of a TRL trainer.

    `NonFiniteError` ends the training in every process; the rows of the update, those of all its micro-batches and processes, are then in
    `non_finite.json` in the output folder. Under fp16, gradients overflow as a matter of course and the scaler skips the update: there
    losses alone are looked at. DeepSpeed's engine takes the step within the backward pass; it is looked at in between.
    """

    #: Set by a trainer that has one: a number for every row of the batch, not finite where the row makes the loss that.
    of_rows: torch.Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._update: list[tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | None]] = []
        self._held: dict[str, torch.Tensor] = {}
        self._watched: Any = None
        self.add_callback(_BeforeTheOptimizer(self))

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        # Taken before the step: it may take inputs apart. No copy, nothing waits for the device.
        held = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        self.of_rows = None
        if self.is_deepspeed_enabled:
            self._held = held  # the engine's backward pass, watched, is what the loss is seen in
            return super().training_step(model, inputs, num_items_in_batch)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._update.append((loss.detach(), held, self.of_rows))
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        if not self.is_deepspeed_enabled:  # whose step is over
            self.check_update()  # clipping by a norm that is no number makes all gradients that
        return super()._clip_grad_norm(model)

    def _watch(self, engine: Any) -> None:
        """Has DeepSpeed's engine show each loss before its backward pass, and the update before its step."""
        if engine is self._watched:  # trained a second time
            return
        self._watched, backward, step = engine, engine.backward, engine.step

        def shown(loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._update.append((loss.detach(), self._held, self.of_rows))
            return backward(loss, *args, **kwargs)

        def checked(*args: Any, **kwargs: Any) -> Any:
            self.check_update()
            return step(*args, **kwargs)

        engine.backward, engine.step = shown, checked

    def _gradients(self) -> dict[str, torch.Tensor]:
        """This process's gradients, by parameter; none where they overflow as a matter of course (fp16)."""
        named = self.model.named_parameters()
        if not self.is_deepspeed_enabled:
            grads = {} if self.accelerator.scaler is not None else {name: p.grad for name, p in named}
        elif self.accelerator.deepspeed_engine_wrapped.engine.fp16_enabled():
            grads = {}
        else:
            from deepspeed.utils import safe_get_local_grad

            grads = {name: safe_get_local_grad(p) for name, p in named if p.requires_grad}
        return {name: grad for name, grad in grads.items() if grad is not None}

    def check_update(self, when: str = "", names: Sequence[str] = ()) -> None:
        """Raises a NonFiniteError where a loss or gradient since the last call is not finite, here or in another process.

        Args:
            when: what the message puts before the step's number.
            names: of the rows; by default looked up by their tokens.
        """
        update, self._update = self._update, []
        state = self.accelerator
        grads = self._gradients()
        sums = [loss.float().sum() for loss, *_ in update]
        if grads:
            norm = torch.nn.utils.get_total_norm(list(grads.values()))
            sums.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        # One number, for which the device is waited for once per update.
        found = sum(value.to(sums[0].device, torch.float32) for value in sums)
        if state.num_processes > 1:
            found = state.reduce(found, "sum")
        if torch.isfinite(found):
            return
        parts = gather_object([self._report(update, grads)])
        parts = [part | {"process": number} for number, part in enumerate(parts)]
        if not state.is_main_process:
            raise ElsewhereError("a loss or gradient is not finite; process 0 says where")
        path = Path(self.args.output_dir) / FILE
        with atomic_path(path) as temporary:
            temporary.write_text(
                json.dumps({"step": self.state.global_step + 1, "processes": parts}, indent=1, ensure_ascii=False)
            )
        rows = [row for part in parts for batch in part["micro_batches"] for row in batch["rows"]]
        names = list(names) or list(dict.fromkeys(name for row in rows for name in row["ids"]))
        bad = list(dict.fromkeys(name for row in rows if row.get("finite") is False for name in row["ids"]))
        losses = [batch["loss"] for part in parts for batch in part["micro_batches"]]
        gradients = list(dict.fromkeys(name for part in parts for name in part["parameters"]))
        what = f"losses {', '.join(map(str, losses))}" + (f" (by {', '.join(bad[:8])})" if bad else "")
        what += f", gradient of {gradients[0]}" if gradients else ""
        raise NonFiniteError(
            f"{when}step {self.state.global_step + 1}: not finite: {what}; weights are as they were before it. Rows of the update: "
            f"{', '.join(names[:8]) or len(rows)}{' …' if len(names) > 8 else ''}, all in {path}. Look at those rows, or lower the "
            "learning rate if the loss had been rising"
        )

    def _report(self, update: list, grads: dict[str, torch.Tensor]) -> dict[str, Any]:
        wrong = [name for name, grad in grads.items() if not _finite(grad)]
        batches = []
        for loss, held, of_rows in update:
            ids = held.get("input_ids", torch.zeros(0, 0, dtype=torch.long))  # a collator may give embeddings
            masks = held.get("attention_mask", torch.ones_like(ids)) if len(ids) else ids
            rows = [row[mask.bool()].tolist() for row, mask in zip(ids.cpu(), masks.cpu(), strict=True)]
            batches.append({"loss": str(loss.sum().item()), "rows": [{"input_ids": row} for row in rows]})
            if of_rows is not None:
                for row, finite in zip(batches[-1]["rows"], torch.isfinite(of_rows).tolist(), strict=True):
                    row["finite"] = finite
        found = self._names([row["input_ids"] for batch in batches for row in batch["rows"]])
        for batch in batches:
            for row in batch["rows"]:
                row["ids"] = found.get(tuple(row["input_ids"]), [])
        return {"parameters": wrong[:NAMED], "micro_batches": batches}

    def _names(self, rows: list[list[int]]) -> dict[tuple, list[str]]:
        """Ids, or places, of the training rows that have these tokens; a row that was cut is known by what is left of it."""
        dataset = self.train_dataset
        found: dict[tuple, list[str]] = {tuple(row): [] for row in rows}
        if not isinstance(dataset, Dataset):
            return found  # a stream is over
        for place, row in enumerate(dataset):
            name = str(row.get("id") or f"row {place}")
            for whole in _sequences(row):
                for tokens, names in found.items():
                    cut = (tuple(whole[: len(tokens)]), tuple(whole[len(whole) - len(tokens) :]))
                    if tokens in cut and name not in names:
                        names.append(name)
        return found


def _sequences(row: dict[str, Any]) -> Iterator[list[int]]:
    """What a row of a data set is as the model's input."""
    if row.get("input_ids") is not None:
        yield row["input_ids"]
    for side in ("chosen", "rejected"):
        if row.get(f"{side}_ids") is not None:
            yield [*row["prompt_ids"], *row[f"{side}_ids"]]


def _finite(gradient: torch.Tensor) -> bool:
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return bool(torch.isfinite(local).all())


class _BeforeTheOptimizer(TrainerCallback):
    def __init__(self, trainer: FiniteGuard) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.is_deepspeed_enabled:
            self.trainer._watch(self.trainer.accelerator.deepspeed_engine_wrapped.engine)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._update:  # nothing was clipped
            self.trainer.check_update()
