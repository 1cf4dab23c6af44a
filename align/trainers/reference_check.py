"""A guard: do stored reference log-probabilities belong to the tokens they stand beside?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy
import torch
from accelerate.logging import get_logger
from datasets import IterableDataset

from ..errors import RecordError
from ..records import row_name
from ..tokens import shift_to_labels
from .preference_data import SIDES
from .row_data import lengths_of

if TYPE_CHECKING:
    from .token_dpo import TokenDPOTrainer

logger = get_logger(__name__)

#: Rows looked at: the shortest with completions long enough to tell a shift, so that the check costs next to nothing.
ROWS, TOKENS = 8, 4
#: Tokens of both sides that a row needs to be judged on its own.
ENOUGH = 12
#: Mean absolute difference, in nats, that dtype and quantization do not explain.
TOLERANCE = 0.5
#: Positions by which stored numbers are moved; the first is where they should be.
SHIFTS = (0, -1, 1)
#: A shift is held to be one where moving the numbers back leaves less than this share of the difference.
LEFT = 0.25


def check_reference_columns(trainer: TokenDPOTrainer) -> None:
    """Compares stored reference log-probabilities with the trainer's reference on a few rows of the training data.

    Numbers that fit much better after a shift by one position, in a row or in all rows together, are an error. Numbers
    that fit nowhere are reported only: the reference may be another model on purpose.

    Raises:
        RecordError: names the row and the shift.
    """
    dataset = trainer.train_dataset
    if isinstance(dataset, IterableDataset):
        return
    lengths = lengths_of(dataset, ("prompt_ids", "chosen_ids", "rejected_ids"))
    chosen, rejected = lengths["chosen_ids"], lengths["rejected_ids"]
    sizes = lengths["prompt_ids"] + numpy.maximum(chosen, rejected)
    looked_at = numpy.lexsort((sizes, numpy.minimum(chosen, rejected) < TOKENS))[:ROWS].tolist()
    training = trainer.model.training
    trainer.model.eval()
    sums = torch.zeros(len(SHIFTS))
    for index in looked_at:
        batch = {k: v.to(trainer.accelerator.device) for k, v in trainer.data_collator([dataset[index]]).items()}
        stored = shift_to_labels(torch.cat([batch.pop(f"token_{side}_ref_logps") for side in SIDES]))
        actual, _ = trainer._reference(batch)
        mask = shift_to_labels(batch["completion_mask"]).bool()
        differences = _differences(stored, actual, mask)
        if mask.sum() >= ENOUGH:  # of fewer, one that is rounded far off can look like a shift
            _refuse_shift(differences, row_name(dataset[index], index))
        sums += differences
    trainer.model.train(training)
    mean = sums / len(looked_at)
    _refuse_shift(mean, f"rows {', '.join(map(str, sorted(looked_at)))} together")
    if mean[0] > TOLERANCE:
        logger.warning(
            f"Stored reference log-probabilities differ from the model training starts from by {mean[0]:.2f} nats a "
            "token. That is right only if the reference is another model."
        )


def _differences(stored: torch.Tensor, actual: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference, in nats, for each of `SHIFTS`; over the same tokens, so that they can be compared."""
    inside = mask & mask.roll(1, dims=1) & mask.roll(-1, dims=1)
    if not inside.any():
        return torch.zeros(len(SHIFTS))
    return torch.stack([(stored.roll(shift, dims=1) - actual)[inside].abs().mean() for shift in SHIFTS]).cpu()


def _refuse_shift(differences: torch.Tensor, where: str) -> None:
    best = int(differences.argmin())
    # Rounding differs by hundredths of a nat; what is smaller cannot be told from it, whatever the ratio.
    if differences[0] > 0.01 and differences[best] < LEFT * differences[0]:
        raise RecordError(
            f"train data set, {where}: chosen_ref_logps / rejected_ref_logps differ from the reference model by "
            f"{differences[0]:.3f} nats a token, but by {differences[best]:.3f} when moved by {SHIFTS[best]:+d}: they are "
            "shifted by one position. Store one number per id, that of the id itself (check_reference=False skips this)"
        )
