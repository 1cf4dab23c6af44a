"""A pair's own weight: (1/B) Σ_i weight_i f_i in place of TRL's (1/B) Σ_i f_i, f_i being the loss of pair i alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError
from ..records import PAIR_WEIGHT
from .longest import collate_first
from .preference_data import SIDES, column_names
from .preflight import same_random_numbers
from .token_budget import Part
from .token_reference import PREFIX

if TYPE_CHECKING:
    from .token_dpo import TokenDPOConfig, TokenDPOTrainer

#: What the batch calls the weights of its pairs, (B,). The prefix keeps them from TRL and from the model.
PAIR_WEIGHTS = f"{PREFIX}pair_weights"


def check_weighable(dataset: Any, name: str, args: TokenDPOConfig) -> None:
    """Raises a ConfigError where pairs have weights, and the loss is not a sum over pairs."""
    if "aot_unpaired" in args.loss_type and PAIR_WEIGHT in column_names(dataset):
        raise ConfigError(
            f"{name} data set: column {PAIR_WEIGHT} scales the loss of a pair, and loss_type 'aot_unpaired' sorts all pairs of a "
            "batch; remove the column, or use another loss type"
        )


def check_collator(trainer: TokenDPOTrainer, dataset: Any, name: str) -> None:
    """Raises a ConfigError where the collator leaves a column out of the batch that the loss reads."""
    report = trainer.data_report.get(name, {})
    counts = dict(report)
    with same_random_numbers():  # a collator may draw some, and the training must not begin with others than TRL's
        row, batch = collate_first(trainer, dataset)
    report.update(counts)  # a stream counts the rows that it drops before its first one, and counts them again later
    columns = (*trainer.token_columns, "ref_logps")
    expected = {f"{side}_{column}": f"{PREFIX}{side}_{column}" for side in SIDES for column in columns}
    expected[PAIR_WEIGHT] = PAIR_WEIGHTS
    if missing := [column for column, key in expected.items() if column in row and key not in batch]:
        raise ConfigError(
            f"{name} data set: data_collator leaves {', '.join(missing)} out of the batch, so that nothing reads them; derive it from "
            f"TokenPreferenceCollator, keep what its torch_call adds to the batch, and give it columns={columns}"
        )


def groups_of(
    weights: torch.Tensor, completion_mask: torch.Tensor, whole: Part | None
) -> Iterator[tuple[float, float, Part]]:
    """The pairs of a batch, grouped by their weight.

    Pairs of weight 0 are left out, so that nothing of them gets into the loss, NaN included.

    Args:
        weights: (B,).
        completion_mask: (2B, L), chosen rows first.
        whole: the part that these pairs are of a larger batch, over which the loss is a mean; `None` where they are all.

    Yields:
        A weight, the share of its pairs in these B, and its pairs as a part of the whole batch.
    """
    share, chosen_share = (1.0, 1.0) if whole is None else (whole.share, whole.chosen_share)
    tokens = completion_mask[: len(weights), 1:].sum(1).tolist()
    pairs: dict[float, list[int]] = {}
    for place, weight in enumerate(weights.tolist()):
        pairs.setdefault(weight, []).append(place)
    for weight, places in pairs.items():
        if weight:
            of_pairs = len(places) / len(weights)
            of_tokens = sum(tokens[place] for place in places) / max(sum(tokens), 1)
            yield weight, of_pairs, Part(places, slice(None), share * of_pairs, chosen_share * of_tokens)
