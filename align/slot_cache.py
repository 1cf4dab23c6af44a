"""Keys and values that lie at slots of one's choice: rows of a batch need not be of one length, nor grow by as much."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

#: Fewest slots that are kept for a row.
LEAST = 256


def room_for(width: int) -> int:
    """Slots to keep for rows of so many: a power of two, or half as many again. So growing is rare, and few widths occur."""
    kept = LEAST
    while kept < width:
        kept = kept * 3 // 2 if kept & (kept - 1) == 0 else kept * 4 // 3
    return kept


@dataclass
class Slots:
    """Where the tokens of a pass go, the same in all layers.

    Args:
        rows: B, rows of a pass.
        width: how many slots of a row a pass looks at.
        at: (B, n) slots of its tokens; `None` for a first pass, whose tokens fill slots from 0 on.
        copies: (B,) for a first pass, which of its rows each of the B is.
    """

    rows: int = 0
    width: int = 0
    at: torch.Tensor | None = None
    copies: torch.Tensor | None = None
    _numbers: dict[tuple, torch.Tensor] = field(default_factory=dict)

    def index(self, device: torch.device) -> tuple[torch.Tensor, slice, torch.Tensor]:
        """Of the tokens' keys (B, n, heads, size) in those of all slots (B, heads, W, size)."""
        key = (device, self.rows)
        if key not in self._numbers:
            self._numbers[key] = torch.arange(self.rows, device=device)[:, None]
        return self._numbers[key], slice(None), self.at.to(device)


class SlotLayer(DynamicLayer):
    """(R, heads, W, size) keys and values of one layer, of which a pass sees the first `rows` and the first `width` slots.

    What a row has not filled is masked out by the caller. It is zero or of tokens that are no longer there, and has to be finite:
    even a weight of 0 makes NaN of what is not. Who meets a first pass that is not, lets the cache go.
    """

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts (B, heads, n, size) of the tokens of a pass into their slots."""
        slots, states = self.slots, (key_states, value_states)
        if not self.is_initialized:
            self.keys, self.values = (s.new_zeros(0, s.shape[1], 0, s.shape[3]) for s in states)
            self.is_initialized = True
        self.grow(slots.rows, slots.width)
        if slots.at is None:
            for kept, new in zip((self.keys, self.values), states, strict=True):
                kept[: slots.rows, :, : new.shape[2]] = new[slots.copies.to(new.device)]
            return states
        index = slots.index(self.keys.device)
        for kept, new in zip((self.keys, self.values), states, strict=True):
            # Of a draft that nobody takes, they would spoil the tokens before it.
            kept[: slots.rows][index] = new.transpose(1, 2).nan_to_num(0.0, 0.0, 0.0)
        return self.keys[: slots.rows, :, : slots.width], self.values[: slots.rows, :, : slots.width]

    def get_seq_length(self) -> int:
        """Tokens before those of a pass that comes without a mask, which is a first one: none."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys of such a pass, and where they begin."""
        return query_length, 0

    def grow(self, rows: int, width: int) -> None:
        """Keeps at least so many rows and slots; what is kept moves."""
        more = max(0, rows - self.keys.shape[0]), max(0, width - self.keys.shape[2])
        if any(more):
            wider = 0, 0, 0, more[1], 0, 0, 0, more[0]
            self.keys, self.values = (torch.nn.functional.pad(kept, wider) for kept in (self.keys, self.values))

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Puts the given rows, in the given order, in front."""
        for kept in (self.keys, self.values):
            kept[: len(rows)] = kept[rows.to(kept.device)]


class SlotCache(Cache):
    """A model's keys and values, in a `SlotLayer` for each of its layers. It serves one batch after the other."""

    def __init__(self) -> None:
        self.slots = Slots()
        super().__init__(layer_class_to_replicate=partial(SlotLayer, self.slots))

    def holds(self, rows: int, width: int) -> bool:
        """Whether there is room for so many in all layers that there are."""
        return all(layer.keys.shape[0] >= rows and layer.keys.shape[2] >= width for layer in self.layers)

    def grow(self, rows: int, width: int) -> None:
        """See `SlotLayer`."""
        for layer in self.layers:
            layer.grow(rows, width)

    def keep_rows(self, rows: torch.Tensor) -> None:
        """See `SlotLayer`."""
        for layer in self.layers:
            layer.keep_rows(rows)
