"""A guard: do stored reference log-probabilities belong to the tokens they stand beside?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from accelerate.logging import get_logger
from datasets import IterableDataset

from ..errors import RecordError
from ..records import row_name
from ..tokens import shift_to_labels
from .preference_data import SIDES

if TYPE_CHECKING:
    from .token_dpo import TokenDPOTrainer

logger = get_logger(__name__)

#: Rows looked at; the shortest, so that the check costs next to nothing.
ROWS = 4
#: Mean absolute difference, in nats, that dtype and quantization do not explain.
TOLERANCE = 0.5


def check_reference_columns(trainer: TokenDPOTrainer) -> None:
    """Compares stored reference log-probabilities with the trainer's reference on a few rows of the training data.

    Numbers that fit better after a shift by one position are an error. Numbers that fit nowhere are reported only: the
    reference may be another model on purpose.

    Raises:
        RecordError: names the row and the shift.
    """
    dataset = trainer.train_dataset
    if isinstance(dataset, IterableDataset):
        return
    lengths = [
        len(p) + max(len(c), len(r))
        for p, c, r in zip(*(dataset[c] for c in ("prompt_ids", "chosen_ids", "rejected_ids")), strict=True)
    ]
    shortest = sorted(range(len(dataset)), key=lengths.__getitem__)[:ROWS]
    training = trainer.model.training
    trainer.model.eval()
    differences = []
    for index in shortest:
        batch = {k: v.to(trainer.accelerator.device) for k, v in trainer.data_collator([dataset[index]]).items()}
        stored = shift_to_labels(torch.cat([batch.pop(f"token_{side}_ref_logps") for side in SIDES]))
        actual, _ = trainer._reference(batch)
        mask = shift_to_labels(batch["completion_mask"]).bool()
        best, found = _best_shift(stored, actual, mask)
        differences.append(found[0])
        if best != 0 and found[0] > TOLERANCE and found[best] < found[0] / 2:
            raise RecordError(
                f"train data set, {row_name(dataset[index], index)}: chosen_ref_logps / rejected_ref_logps differ from the "
                f"reference model by {found[0]:.2f} nats a token, but by {found[best]:.2f} when moved by {best:+d}: they are "
                "shifted by one position. Store one number per id, that of the id itself"
            )
    trainer.model.train(training)
    if (mean := sum(differences) / len(differences)) > TOLERANCE:
        logger.warning(
            f"Stored reference log-probabilities differ from the model training starts from by {mean:.2f} nats a token. "
            "That is right only if the reference is another model."
        )


def _best_shift(stored: torch.Tensor, actual: torch.Tensor, mask: torch.Tensor) -> tuple[int, dict[int, float]]:
    """The shift of stored numbers, in positions, that fits best, and the mean absolute difference of each shift."""
    found = {}
    for shift in (-1, 0, 1):
        moved, inside = stored.roll(shift, dims=1), mask & mask.roll(shift, dims=1)
        found[shift] = (moved - actual)[inside].abs().mean().item() if inside.any() else float("inf")
    return min(found, key=found.__getitem__), found
