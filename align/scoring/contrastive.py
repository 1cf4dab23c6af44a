"""Contrastive scores of preference pairs: which tokens of a wrong solution are critical (cDPO, arXiv 2411.19943)."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigError, ModelMismatchError
from ..logps import Batch, Row, completion_logits, per_token
from ..losses import contrastive_scores
from ..records import Record
from .pairs import SIDES, both_sides, score_stage

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


#: Logits that differ by less are the same: those of two adapters that do nothing, or the same.
SAME = 1e-6


def score_rows(
    model: PeftModel,
    rows: Sequence[Row],
    *,
    pad_token_id: int,
    positive: str = "positive",
    negative: str = "negative",
    beta: float = 1.0,
    max_tokens_per_batch: int = 8192,
) -> list[list[float]]:
    """Contrastive probability s_t of every completion token, from two adapters over one base.

    Args:
        model: base with the adapters `positive` and `negative`, in eval mode; neither is merged.
        rows: prompt and completion ids.
        beta: β_CE; the paper uses 1.

    Returns:
        One list per row, one number in [0, 1] per id of its completion; low = critical.

    Raises:
        ConfigError: β_CE is negative.
        ModelMismatchError: an adapter is missing.
    """
    return [
        [score for score, _ in row]
        for row in _scores(model, rows, pad_token_id, positive, negative, beta, max_tokens_per_batch)
    ]


def _scores(
    model: PeftModel, rows: Sequence[Row], pad_token_id: int, positive: str, negative: str, beta: float, max_tokens: int
) -> list[list[tuple[float, float]]]:
    """See `score_rows`; per token, its score, and how far the two models' logits of it are apart."""
    import torch

    if beta < 0:
        raise ConfigError(f"beta = {beta} must not be negative; the paper uses 1")
    for name in (positive, negative):
        if name not in getattr(model, "peft_config", {}):
            raise ModelMismatchError(f"the model has no adapter {name!r}; load both with align.models.load_adapters")

    def compute(batch: Batch) -> torch.Tensor:
        logits = [completion_logits(model, batch, adapter) for adapter in (positive, negative)]
        own = [each[batch.positions, batch.token_ids].float() for each in logits]
        scores = contrastive_scores(*logits, batch.token_ids, beta, batch.positions)
        return torch.stack((scores, (own[0] - own[1]).abs()), 1)

    return per_token(model, rows, compute, pad_token_id=pad_token_id, max_tokens_per_batch=max_tokens)


def score_contrastive(
    model: PeftModel,
    pairs: Sequence[Record],
    out_path: str | os.PathLike,
    *,
    pad_token_id: int,
    beta: float = 1.0,
    max_length: int | None = None,
    max_tokens_per_batch: int = 8192,
    settings: dict | None = None,
) -> dict[str, int]:
    """The stage `align score contrastive`: adds `chosen_ce_scores` and `rejected_ce_scores` to pairs.

    Args:
        model: base with adapters named `positive` and `negative`.
        pairs: pair records.
        out_path: scored pairs, JSONL or Parquet.
        max_length: pairs whose prompt and longer completion exceed it are left out and counted.
        settings: what else the scores depend on (hashes of the adapters), for resuming.

    Returns:
        Counts: `rows`, `too_long`, `tokens`, `constant` (pairs with one score for all tokens of each completion),
        `no_contrast` (pairs of whose tokens both adapters say the same: their scores are plain probabilities).
    """

    def compute(rows: list[Row]) -> dict[str, list[list[float]]]:
        found = _scores(model, rows, pad_token_id, "positive", "negative", beta, max_tokens_per_batch)
        return {
            "ce_scores": [[score for score, _ in row] for row in found],
            "_contrast": [max(contrast for _, contrast in row) for row in found],
        }

    without = 0

    def finish(rows: Sequence[Record]) -> Iterator[Record]:
        nonlocal without
        for row in rows:
            # Parts of an earlier version have none.
            contrasts = [row.pop(f"{side}__contrast", math.inf) for side in SIDES]
            without += max(contrasts) < SAME
            yield row
        if without > len(rows) / 2:
            print(
                f"align: score contrastive: of {without} of {len(rows)} pairs, the positive and the negative adapter say the same; "
                "scores there are plain probabilities, no contrast. Give adapters that were trained apart, for longer or at a "
                "higher learning rate",
                file=sys.stderr,
            )

    return score_stage(
        pairs, out_path, both_sides(compute), model=model, max_length=max_length, stage="score contrastive",
        settings={"beta": beta, **(settings or {})}, varies="ce_scores", finish=finish, count=lambda _: {"no_contrast": without},
    )  # fmt: skip
