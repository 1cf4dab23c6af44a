"""Layouts of sequences that begin alike: a prefix tree computes once what they share. Knows tensors, not models.

A tree of rows with one prompt is laid out as one row: its nodes in the order in which they were added, so that every
node comes after its parent. Position ids are depths, and a node attends to itself and its ancestors, which is what its
own sequence would let it see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: A prompt and its completion, as ids.
Row = tuple[Sequence[int], Sequence[int]]


@dataclass
class PrefixTree:
    """Token ids of several rows, each prefix once.

    Args:
        ids, parents, depths: per node; a root's parent is -1.
        predictors: per row, the nodes whose logits predict its completion tokens, one per token. A completion's last
            token predicts nothing and gets no node of its own.
    """

    ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    predictors: list[list[int]] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def new_nodes(self, row: Row) -> int:
        """How many nodes `add` would make."""
        node, known = -1, 0
        tokens = [*row[0], *row[1][:-1]]
        for token in tokens:
            node = self._children.get((node, token), -2)
            if node == -2:
                break
            known += 1
        return len(tokens) - known

    def add(self, row: Row) -> None:
        """Adds a row; neither its prompt nor its completion is empty."""
        prompt, completion = row
        node, path = -1, []
        for depth, token in enumerate([*prompt, *completion[:-1]]):
            child = self._children.get((node, token))
            if child is None:
                child = self._children[(node, token)] = len(self.ids)
                self.ids.append(token)
                self.parents.append(node)
                self.depths.append(depth)
            node = child
            path.append(node)
        self.predictors.append(path[len(prompt) - 1 :])

    @property
    def is_chain(self) -> bool:
        """Whether the tree is one sequence, for which causal attention is the same."""
        return all(parent == i - 1 for i, parent in enumerate(self.parents))


def ancestor_mask(trees: Sequence[PrefixTree], width: int) -> torch.Tensor:
    """(B, 1, width, width) bool: whether node i of a tree attends to node j, that is, whether j is i or an ancestor.

    Padding attends to itself, so that no row of the mask is empty.
    """
    import torch

    mask = torch.zeros(len(trees), width, width, dtype=torch.bool)
    triangle = torch.ones(width, width, dtype=torch.bool).tril()
    for tree, seen in zip(trees, mask, strict=True):
        # Within a run of nodes, each the child of the one before, all see what the run's first parent sees.
        starts = [i for i, parent in enumerate(tree.parents) if parent != i - 1 or i == 0]
        for start, end in zip(starts, [*starts[1:], len(tree)], strict=True):
            if tree.parents[start] >= 0:
                seen[start:end] = seen[tree.parents[start]]
            seen[start:end, start:end] |= triangle[: end - start, : end - start]
        rest = torch.arange(len(tree), width)
        seen[rest, rest] = True
    return mask.unsqueeze(1)


def within(mask: torch.Tensor, positions: torch.Tensor, window: int | None) -> torch.Tensor:
    """A bool mask (B, 1, W, W) without what lies `window` positions back or more, as in transformers' sliding windows.

    Args:
        positions: (B, W).
        window: `None` leaves the mask as it is.
    """
    if window is None:
        return mask
    return mask & (positions[:, None, :, None] - positions[:, None, None, :] < window)


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask as numbers to add to attention scores; made once here, not in every layer."""
    import torch

    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def grow_trees(rows: Sequence[Row], share: bool = True, most: int | None = None) -> list[tuple[PrefixTree, list[int]]]:
    """Puts rows with equal prompts into trees.

    Attention costs the square of a tree's width, so a tree stops growing at twice its longest row; a pair always fits.

    Args:
        share: `False` gives every row a tree of its own.
        most: nodes that several rows together may have at most.

    Returns:
        Trees, each with the indices of its rows.
    """
    grown: list[tuple[PrefixTree, list[int]]] = []
    open_trees: dict[tuple[int, ...], tuple[PrefixTree, list[int], int]] = {}
    for index, row in enumerate(rows):
        prompt, length = tuple(row[0]), len(row[0]) + len(row[1])
        tree, members, longest = open_trees.get(prompt, (None, [], 0))
        longest = max(longest, length)
        limit = 2 * longest if most is None else min(2 * longest, most)
        if not share or tree is None or len(tree) + tree.new_nodes(row) > limit:
            tree, members, longest = PrefixTree(), [], length
            grown.append((tree, members))
        tree.add(row)
        members.append(index)
        open_trees[prompt] = (tree, members, longest)
    return grown
