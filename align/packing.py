"""The prefix-shared layout of preference pairs: the prompt of a pair is there once. Knows tensors alone.

A pair of rows c (chosen) and r (rejected) whose first m tokens are the same becomes

    trunk c[:m-1] | branch c[m-1:-1] | branch r[m-1:-1]

m is the prompt's length, so the trunk is the prompt but for its last token. A branch attends to the trunk and to itself, and
its positions go on from the trunk's, so every slot sees what it would see in its own row. The prompt's last token stands in
both branches: every slot predicts exactly one token. A row's last token predicts nothing and gets no slot, unless a loss
counts every token of a row, as a router's does. A window of attention is a bound on the distance of positions. Several
pairs lie in one row of slots, and see nothing of each other. What else two completions begin with is not shared. So where
the slots of a batch lie depends on lengths alone, and a token that changes leaves all other pairs' numbers bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch

from .prefix_tree import within

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

#: What TRL and transformers call a position without a label.
IGNORED = -100


def shared_tokens(chosen: Sequence[int], rejected: Sequence[int], prompt: int) -> int:
    """How many tokens two rows begin with in common, `prompt` at most, and not the last of either, which predicts nothing.
    Prompts that are cut at their beginning may have less in common than their length."""
    most = min(prompt, len(chosen) - 1, len(rejected) - 1)
    if most <= 0:
        return 0
    differs = np.asarray(chosen[:most]) != np.asarray(rejected[:most])
    return int(differs.argmax()) if differs.any() else most


def pair_slots(chosen: Sequence[int], rejected: Sequence[int], prompt: int) -> int:
    """Slots that a pair of rows takes, `prompt` tokens and a completion each; their last tokens have none."""
    trunk = max(shared_tokens(chosen, rejected, prompt) - 1, 0)
    return max(len(chosen) + len(rejected) - 2 - trunk, 0)


def prompt_length(labelled: Sequence[np.ndarray]) -> int:
    """Tokens before the first labelled one of a pair's two rows, given as bools."""
    return min(int(row.argmax()) if row.any() else len(row) for row in labelled)


def fill_rows(sizes: Sequence[int], width: int) -> list[list[int]]:
    """Puts items into rows of `width`, largest first, each where it leaves least room (best fit decreasing).

    Args:
        sizes: none larger than `width`.

    Returns:
        Per row, the indices of its items.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fitting = [(left, row) for row, left in enumerate(room) if left >= sizes[index]]
        if fitting:
            _, row = min(fitting)
            rows[row].append(index)
            room[row] -= sizes[index]
        else:
            rows.append([index])
            room.append(width - sizes[index])
    return rows


@dataclass
class PairLayout:
    """R rows of W slots that hold some pairs of a padded batch of 2B rows of L tokens, chosen rows first.

    Args:
        input_ids, position_ids: (R, W).
        pair: (R, W), which pair a slot belongs to; -1 is padding.
        branch: (R, W), 0 for a trunk, 1 for chosen, 2 for rejected.
        labelled: (U,) flat indices of the slots that predict a labelled token.
        targets: (U,) those tokens.
        places: (N,) flat indices into the batch's shifted labels, (2B, L-1), of its labelled tokens.
        sources: (N,) which of the U slots predicts each.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    pair: torch.Tensor
    branch: torch.Tensor
    labelled: torch.Tensor
    targets: torch.Tensor
    places: torch.Tensor
    sources: torch.Tensor

    def to(self, device: torch.device) -> PairLayout:
        """The same on another device."""
        return PairLayout(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))

    def counts(self) -> torch.Tensor:
        """(R, W) how many of the batch's rows hold a slot's token: a trunk's two, padding's none."""
        return torch.where(self.branch == 0, 2, 1).masked_fill(self.pair < 0, 0)

    def mask(self, window: int | None = None) -> torch.Tensor:
        """(R, 1, W, W) bool: whether a slot attends to another. Padding attends to itself, so that no row is empty.

        Args:
            window: how many positions attention reaches back, its own among them; by default all.
        """
        order = torch.arange(self.pair.shape[1], device=self.pair.device)
        same = self.pair[:, :, None] == self.pair[:, None, :]
        on_path = (self.branch[:, None, :] == 0) | (self.branch[:, None, :] == self.branch[:, :, None])
        seen = same & on_path & (order[None, :] <= order[:, None]) & (self.pair >= 0)[:, :, None]
        mask = (seen | (order[None, :] == order[:, None])).unsqueeze(1)
        return within(mask, self.position_ids, window)

    def block_mask(self, window: int | None = None) -> BlockMask:
        """The same as `mask`, for FlexAttention."""
        from torch.nn.attention.flex_attention import create_block_mask

        pair, branch, position = self.pair, self.branch, self.position_ids

        def sees(row, _head, query, key):
            same = (pair[row, query] == pair[row, key]) & (pair[row, query] >= 0)
            on_path = (branch[row, key] == 0) | (branch[row, key] == branch[row, query])
            return (same & on_path & (key <= query)) | (key == query)

        def sees_within(row, head, query, key):
            return sees(row, head, query, key) & (position[row, query] - position[row, key] < window)

        rows, width = pair.shape
        return create_block_mask(
            sees if window is None else sees_within, B=rows, H=None, Q_LEN=width, KV_LEN=width, device=pair.device
        )


@dataclass
class _Pair:
    """Slots of one pair, and the labels they predict: see `PairLayout`; `slots` and `places` are of equal length."""

    ids: np.ndarray
    positions: np.ndarray
    branches: np.ndarray
    slots: np.ndarray
    targets: np.ndarray
    places: np.ndarray


def _lay_out_pair(
    ids: np.ndarray, real: np.ndarray, labels: np.ndarray, chosen: int, rejected: int, whole: bool
) -> _Pair:
    width = labels.shape[1] - 1
    end = None if whole else -1
    columns = [np.flatnonzero(real[row]) for row in (chosen, rejected)]
    rows = [ids[row, where] for row, where in zip((chosen, rejected), columns, strict=True)]
    wanted = [labels[row, where] != IGNORED for row, where in zip((chosen, rejected), columns, strict=True)]
    trunk = max(shared_tokens(*rows, prompt_length(wanted)) - 1, 0)
    lengths = [len(row[trunk:end]) for row in rows]
    starts = [trunk, trunk + lengths[0]]
    slots, targets, places = [], [], []
    for side, row in enumerate((chosen, rejected)):
        own = rows[side]
        # Token k + 1 is predicted by slot k of the trunk, or by the branch's slot k - trunk.
        predicting = np.arange(max(len(own) - 1, 0))
        at = np.where(predicting < trunk, predicting, starts[side] + predicting - trunk)
        there = wanted[side][1:]
        slots.append(at[there])
        targets.append(own[1:][there])
        places.append(row * width + columns[side][1:][there] - 1)
    return _Pair(
        ids=np.concatenate([rows[0][:trunk], rows[0][trunk:end], rows[1][trunk:end]]),
        positions=np.concatenate([np.arange(trunk), *(trunk + np.arange(length) for length in lengths)]),
        branches=np.repeat([0, 1, 2], [trunk, *lengths]),
        slots=np.concatenate(slots),
        targets=np.concatenate(targets),
        places=np.concatenate(places),
    )


def layout_slots(sizes: Sequence[int], multiple: int = 1, one_row: bool = False) -> int:
    """Slots, padding included, of a layout of pairs of these sizes (see `pair_slots`); parameters as in `lay_out_pairs`."""
    rows = _rows(sizes, one_row)
    return len(rows) * _width(sizes, rows, multiple)


def group_pairs(sizes: Sequence[int], most: int, multiple: int = 1, one_row: bool = False) -> list[list[int]]:
    """Groups pairs so that the layout of each group has at most `most` slots, padding included.

    Returns:
        Per group, the indices of its pairs; the largest pairs come first, and one larger than `most` is a group of its own.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if groups and layout_slots([sizes[i] for i in (*groups[-1], index)], multiple, one_row) <= most:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _rows(sizes: Sequence[int], one_row: bool) -> list[list[int]]:
    return [list(range(len(sizes)))] if one_row else fill_rows(sizes, max(sizes))


def _width(sizes: Sequence[int], rows: list[list[int]], multiple: int) -> int:
    """Of rows that hold these pairs; at least one slot, for a mask without any is none."""
    return -(-max(1, *(sum(sizes[i] for i in row) for row in rows)) // multiple) * multiple


def lay_out_pairs(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    *,
    multiple: int = 1,
    most: int | None = None,
    one_row: bool = False,
    whole: bool = False,
) -> list[PairLayout]:
    """Lays out the pairs of a padded batch.

    Args:
        input_ids: (2B, L), chosen rows first, rejected ones after them; padding on either side.
        attention_mask: (2B, L), 0 at padding.
        labels: (2B, L), not shifted, -100 where no log-probability is asked for.
        multiple: the width of the slots' rows is one of these.
        most: slots, padding included, of a layout; a pair that is larger gets one of its own. One layout by default.
        one_row: whether a layout is one row, as FlexAttention has it; otherwise a row is as wide as the widest pair, since a
            dense mask costs the square of the width.
        whole: whether a row's last token has a slot, too.

    Returns:
        Layouts of all pairs, the largest first, on the batch's device.
    """
    device = input_ids.device
    ids, real, wanted = (tensor.cpu().numpy() for tensor in (input_ids, attention_mask != 0, labels))
    half = len(ids) // 2
    pairs = [_lay_out_pair(ids, real, wanted, i, half + i, whole) for i in range(half)]
    sizes = [len(pair.ids) for pair in pairs]
    groups = [list(range(half))] if most is None else group_pairs(sizes, most, multiple, one_row)
    layouts = []
    for group in groups:
        own = [sizes[i] for i in group]
        rows = _rows(own, one_row)
        placed = [[group[i] for i in row] for row in rows]
        layouts.append(_gather(pairs, placed, _width(own, rows, multiple)).to(device))
    return layouts


def _gather(pairs: list[_Pair], rows: list[list[int]], width: int) -> PairLayout:
    def filled(value: int, parts: Iterable[tuple[int, int, np.ndarray]]) -> torch.Tensor:
        slots = np.full((len(rows), width), value, dtype=np.int64)
        for row, start, numbers in parts:
            slots[row, start : start + len(numbers)] = numbers
        return torch.from_numpy(slots)

    placed = [
        (number, start, index)
        for number, row in enumerate(rows)
        for index, start in zip(row, accumulate((len(pairs[i].ids) for i in row), initial=0), strict=False)
    ]
    at = np.concatenate([number * width + start + pairs[i].slots for number, start, i in placed])
    targets = np.concatenate([pairs[i].targets for _, _, i in placed])
    labelled, first, sources = np.unique(at, return_index=True, return_inverse=True)
    ids = filled(0, ((n, s, pairs[i].ids) for n, s, i in placed))
    pair = filled(-1, ((n, s, np.full(len(pairs[i].ids), i)) for n, s, i in placed))
    return PairLayout(
        # Padding is a row's first token again. A padding token's embedding may be 0, and a norm then has no gradient there.
        input_ids=ids.where(pair >= 0, ids[:, :1]),
        position_ids=filled(0, ((n, s, pairs[i].positions) for n, s, i in placed)),
        pair=pair,
        branch=filled(0, ((n, s, pairs[i].branches) for n, s, i in placed)),
        labelled=torch.from_numpy(labelled),
        targets=torch.from_numpy(targets[first].astype(np.int64)),
        places=torch.from_numpy(np.concatenate([pairs[i].places for _, _, i in placed])),
        sources=torch.from_numpy(sources.astype(np.int64)),
    )
