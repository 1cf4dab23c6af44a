"""Weights from the policy's own uncertainty: the tokens at which it has a choice ("Beyond the 80/20 Rule", Wang et al. 2025,
arXiv 2506.01939, keeps a fifth of all tokens)."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..logps import Batch, Row, completion_logits, per_token
from ..losses import entropies
from ..records import Record
from .pairs import SIDES, both_sides, score_stage

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def token_entropies(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    pad_token_id: int,
    adapter: str | None = None,
    max_tokens_per_batch: int = 8192,
) -> list[list[float]]:
    """Entropy, in nats, of the policy's next-token distribution at the place of every completion token.

    Args:
        model: causal LM in eval mode.
        rows: prompt and completion ids.
        adapter: see `align.logps.completion_logits`.

    Returns:
        One list per row, one number in [0, log V] per id of its completion.
    """

    def compute(batch: Batch) -> torch.Tensor:
        return entropies(completion_logits(model, batch, adapter))[batch.positions]

    return per_token(model, rows, compute, pad_token_id=pad_token_id, max_tokens_per_batch=max_tokens_per_batch)


def score_entropy(
    model: PreTrainedModel,
    pairs: Sequence[Record],
    out_path: str | os.PathLike,
    *,
    pad_token_id: int,
    top: float = 0.2,
    max_length: int | None = None,
    max_tokens_per_batch: int = 8192,
    settings: dict | None = None,
) -> dict[str, int]:
    """The stage `align score entropy`: adds `chosen_entropies`, `rejected_entropies` (nats), and `chosen_weights`,
    `rejected_weights`, 1 for the tokens of highest entropy and 0 for all others.

    Args:
        model: the policy; where it has an adapter, that is on.
        pairs: pair records; other token-level columns are kept.
        out_path: scored pairs, JSONL or Parquet.
        top: share of all completion tokens of the data set that keep weight 1; equal entropies at the edge are all kept.
        max_length: pairs whose prompt and longer completion exceed it are left out and counted.
        settings: what else the numbers depend on (hash of the model), for resuming.

    Returns:
        Counts: `rows`, `too_long`, `tokens`, `kept` (tokens of weight 1), `threshold` (nats),
        `constant` (pairs with one weight for all tokens of each completion).

    Raises:
        ConfigError: `top` is no share.
    """
    if not 0 < top <= 1:
        raise ConfigError(f"top = {top} must lie in (0, 1]: the share of tokens that keep their weight")
    adapter = getattr(model, "active_adapter", None) if hasattr(model, "peft_config") else None

    def compute(rows: list[Row]) -> dict[str, list[list[float]]]:
        options = {"pad_token_id": pad_token_id, "max_tokens_per_batch": max_tokens_per_batch}
        return {"entropies": token_entropies(model, rows, adapter=adapter, **options)}

    found = {"kept": 0, "threshold": 0.0}

    def finish(rows: Sequence[Record]) -> Iterator[Record]:
        values = array("f")  # what they were computed in: nothing is lost
        for row in rows:
            for side in SIDES:
                values.extend(row[f"{side}_entropies"])
        least = found["threshold"] = _largest(values, math.ceil(top * len(values)))
        for row in rows:
            for side in SIDES:
                row[f"{side}_weights"] = [float(value >= least) for value in row[f"{side}_entropies"]]
                found["kept"] += int(sum(row[f"{side}_weights"]))
            yield row

    return score_stage(
        pairs, out_path, both_sides(compute), model=model, max_length=max_length, stage="score entropy",
        settings={"top": top, **(settings or {})}, adds=("weights",), varies="weights", finish=finish, count=lambda _: found,
    )  # fmt: skip


def _largest(values: array, k: int) -> float:
    """The k-th largest of float32 numbers, which are put into another order."""
    import numpy

    numbers = numpy.frombuffer(values, dtype=numpy.float32)
    numbers.partition(len(numbers) - k)
    return float(numbers[len(numbers) - k])
