"""A warning where a method's weights are the same for all tokens: what is trained is then DPO, under the method's name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import torch
from accelerate.logging import get_logger
from datasets import Dataset

from ..tokens import shift_to_labels
from .preference_data import SIDES, column_names

if TYPE_CHECKING:
    from .token_dpo import TokenDPOTrainer

logger = get_logger(__name__)

#: Rows of a data set that are looked at, evenly spread; and batches of a stream, whose rows nobody has seen before.
ROWS, BATCHES = 1000, 10
#: Rows of a look. Weights that differ are seen in the first.
ROWS_AT_ONCE = 50
#: Numbers that differ by less, relative to 1 or to the larger, count as the same.
TOLERANCE = 1e-6


class Range:
    """Least and greatest of numbers, and how many there were."""

    def __init__(self) -> None:
        self.low, self.high, self.count = float("inf"), float("-inf"), 0

    def add(self, values: torch.Tensor) -> None:
        """More numbers, of any shape."""
        if values.numel():
            self.low, self.high = min(self.low, values.min().item()), max(self.high, values.max().item())
            self.count += values.numel()

    @property
    def is_constant(self) -> bool:
        """Whether all are the same, and it takes more than one to say so."""
        return self.count > 1 and self.high - self.low <= TOLERANCE * max(1.0, abs(self.high), abs(self.low))


class ConstantWeights:
    """Looks at the weights of a trainer until two tokens of a side differ; where none do, warns, once.

    Judged are both sides together: methods leave one of them at 1, and a side of one token says nothing. Nothing is said of
    data without any column that the method reads, which is DPO by the caller's own choice.
    """

    def __init__(self, trainer: TokenDPOTrainer) -> None:
        self.trainer = trainer
        names = column_names(trainer.train_dataset)
        #: Prefixed columns that the rule reads.
        self.columns = [f"{s}_{column}" for s in SIDES for column in trainer.token_columns if f"{s}_{column}" in names]
        self.weights = {side: Range() for side in SIDES}
        self.values = {column: Range() for column in self.columns}
        self.rows, self.batches = 0, 0
        self.over = not self.columns or not trainer.accelerator.is_main_process

    def look_at_rows(self) -> None:
        """Judges the training data before the first step; a stream is left to `look_at_batch`."""
        dataset = self.trainer.train_dataset
        if self.over or not isinstance(dataset, Dataset):
            return
        chosen = numpy.unique(numpy.linspace(0, len(dataset) - 1, ROWS).astype(int)).tolist()
        for start in range(0, len(chosen), ROWS_AT_ONCE):
            part = dataset.select(chosen[start : start + ROWS_AT_ONCE])
            device = self.trainer.accelerator.device
            self._add({k: v.to(device) for k, v in self.trainer.data_collator(list(part)).items()})
            if self.over:
                return
        self._say(
            f"all of its {self.rows} rows" if self.rows == len(dataset) else f"{self.rows} of its {len(dataset)} rows"
        )

    def look_at_batch(self, inputs: dict[str, Any]) -> None:
        """Judges a stream by its first batches, as they are trained on."""
        if self.over:
            return
        self._add(inputs)
        self.batches += 1
        most = self.trainer.state.max_steps * self.trainer.args.gradient_accumulation_steps
        if not self.over and self.batches >= min(BATCHES, max(most, 1)):
            self._say(f"its first {self.rows} rows")

    def _add(self, inputs: dict[str, Any]) -> None:
        with torch.no_grad():
            mask = shift_to_labels(inputs["completion_mask"])
            weights = self.trainer._weights(inputs, mask.float())
        for side, part, inside in zip(SIDES, weights.chunk(2), mask.bool().chunk(2), strict=True):
            self.weights[side].add(part.expand_as(inside)[inside])
            for column in self.columns:
                if column.startswith(side):
                    self.values[column].add(shift_to_labels(inputs[f"token_{column}"])[inside])
        self.rows += len(mask) // 2
        self.over = any(found.count > 1 and not found.is_constant for found in self.weights.values())

    def _say(self, where: str) -> None:
        self.over = True
        if not all(found.is_constant for found in self.weights.values()):
            return  # a side of a single token
        (name, remedy), chosen, rejected = self.trainer.constant_weights(), *(self.weights[s].low for s in SIDES)
        same = [f"{c} is {r.low:.4g} throughout" for c, r in self.values.items() if r.is_constant]
        plain = "DPO" if abs(chosen - 1) + abs(rejected - 1) < TOLERANCE else "DPO with both sides scaled"
        logger.warning(
            f"train data set: in {where}, every chosen token has weight {chosen:.4g} and every rejected token weight "
            f"{rejected:.4g}, so that this is {plain}, not {name}{': ' * bool(same)}{', '.join(same)}. {remedy}"
        )
