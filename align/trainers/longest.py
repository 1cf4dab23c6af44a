"""Which rows of a data set make the batches that need most memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from ..tokens import truncate
from .preference_data import SIDES
from .row_data import lengths_of

if TYPE_CHECKING:
    from transformers import Trainer

    from .token_dpo import TokenDPOTrainer

#: Places of a sorted data set at which a pass within a budget may begin, of which the fullest is looked for.
STARTS = 64


@dataclass
class LongestBatch:
    """A collated batch, and per row its `id`, or its place in the data set, and how many `tokens` its sequences have."""

    inputs: dict[str, Any]
    rows: list[dict[str, Any]]

    def __str__(self) -> str:
        return ", ".join(f"{row['id']} ({' + '.join(map(str, row['tokens']))} tokens)" for row in self.rows)


def collate(trainer: Trainer, places: Sequence[int]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the training data, and their batch as the data loader would make it."""
    some = trainer.train_dataset.select([int(place) for place in places])
    return list(some), trainer.data_collator(list(trainer._remove_unused_columns(some)))


def collate_first(trainer: Trainer, dataset: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first row of a data set or stream, and its batch as the data loader would make it."""
    row = next(iter(dataset))
    return row, trainer._get_collator_with_removed_columns(trainer.data_collator)([dict(row)])


def longest_rows(trainer: Trainer) -> list[int]:
    """Where the rows of the training data lie that have most `input_ids`, as many as are in a batch."""
    lengths = lengths_of(trainer.train_dataset, ("input_ids",))["input_ids"]
    return numpy.argsort(-lengths, kind="stable")[: trainer._train_batch_size].tolist()


def row_id(row: dict[str, Any], place: int) -> str:
    return str(row.get("id") or f"row {place}")


def pair_sizes(
    lengths: dict[str, numpy.ndarray], max_length: int | None, truncation_mode: str, shares: bool
) -> numpy.ndarray:
    """(N,) tokens that each pair takes of a pass: what its layout's `size` gives for its ids, from lengths alone.

    Prompts that are cut at their beginning by different numbers of tokens count as having nothing in common.

    Args:
        lengths: (N,) of `prompt_ids`, `chosen_ids` and `rejected_ids`.
        shares: whether the layout is the prefix-shared one.
    """
    prompt = lengths["prompt_ids"]
    whole = numpy.stack([prompt + lengths[f"{side}_ids"] for side in SIDES])
    kept = whole if max_length is None else numpy.minimum(whole, max_length)
    if not shares:
        return 2 * kept.max(0)
    shared = numpy.minimum(prompt, kept.min(0) - 1)
    if truncation_mode == "keep_end":
        cut = whole - kept
        shared = numpy.where(cut[0] == cut[1], numpy.minimum(shared, prompt - cut[0]), 0)
    return numpy.maximum(kept.sum(0) - 2 - numpy.maximum(shared - 1, 0), 0)


def longest_pairs(trainer: TokenDPOTrainer) -> list[LongestBatch]:
    """The batch of the longest pairs; with `max_tokens_per_batch`, also the pairs that fill a pass better than those do."""
    args, layout, count = trainer.args, trainer._layout, trainer._train_batch_size
    lengths = lengths_of(trainer.train_dataset, ("prompt_ids", "chosen_ids", "rejected_ids"))
    sizes = pair_sizes(lengths, args.max_length, args.truncation_mode, layout.shares)
    order = numpy.argsort(-sizes, kind="stable")
    chosen = [order[:count]]
    if args.max_tokens_per_batch is not None:
        on_cpu = trainer.accelerator.device.type == "cpu"
        start, end = fullest_pass(
            sizes[order].tolist(), count, args.max_tokens_per_batch, lambda part: layout.slots(part, on_cpu)
        )
        if start:
            chosen.append(order[start:end])
    return [_pairs(trainer, places) for places in chosen]


def _pairs(trainer: TokenDPOTrainer, places: Sequence[int]) -> LongestBatch:
    rows, inputs = collate(trainer, places)
    cut = trainer.args.max_length, trainer.args.truncation_mode
    found = [
        {
            "id": row_id(row, int(place)),
            "tokens": [len(truncate([*row["prompt_ids"], *row[f"{side}_ids"]], *cut)) for side in SIDES],
        }
        for row, place in zip(rows, places, strict=True)
    ]
    return LongestBatch(inputs, found)


def fullest_pass(sizes: Sequence[int], count: int, most: int, slots: Callable[[Sequence[int]], int]) -> tuple[int, int]:
    """Where, among pairs in falling order of size, a pass begins and ends that holds most tokens: about, since only some
    places are looked at. The largest pair's pass where no other holds more.

    Args:
        count: pairs of a batch.
        most: tokens that several pairs may have together.
        slots: tokens, padding included, of a pass of pairs of some sizes.
    """
    last = len(sizes) - 1
    starts = [i for i in range(len(sizes)) if i in (0, last) or sizes[i] != sizes[i - 1] or sizes[i] != sizes[i + 1]]
    best, place = 0, (0, 0)
    for start in starts[:: -(-len(starts) // STARTS)]:
        end = start + 1
        while end < min(start + count, len(sizes)) and slots(sizes[start : end + 1]) <= most:
            end += 1
        if (held := slots(sizes[start:end])) > best:
            best, place = held, (start, end)
    return place
