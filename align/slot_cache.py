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
    """Slots to keep for rows of so many: a power of two or half as many again, so that growing is rare and cheap."""
    kept = LEAST
    while kept < width:
        kept = kept * 3 // 2 if kept & (kept - 1) == 0 else kept * 4 // 3
    return kept


@dataclass
class Slots:
    """Where the tokens of a pass go, the same in all layers.

    Args:
        at: (B, n) slots; `None` for a first pass, whose tokens fill the slots from 0 on.
        width: how many slots the pass looks at.
    """

    at: torch.Tensor | None = None
    width: int = 0
    _rows: dict[tuple, torch.Tensor] = field(default_factory=dict)

    def index(self, device: torch.device) -> tuple[torch.Tensor, slice, torch.Tensor]:
        """Of the new keys (B, n, heads, size) in those of all slots (B, heads, W, size)."""
        key = (device, len(self.at))
        if key not in self._rows:
            self._rows[key] = torch.arange(len(self.at), device=device)[:, None]
        return self._rows[key], slice(None), self.at.to(device)


class SlotLayer(DynamicLayer):
    """(B, heads, W, size) keys and values of one layer, of which a pass sees the first `slots.width`.

    What a row has not filled is masked out by its caller. It is zero or of tokens that were taken back: always finite, since
    even a weight of 0 makes NaN of what is not.
    """

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts (B, heads, n, size) of the tokens of a pass into their slots."""
        if self.slots.at is None:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
            return key_states, value_states
        if not self.is_initialized:
            batch, heads, _, size = key_states.shape
            self.keys = key_states.new_zeros(batch, heads, 0, size)
            self.values = value_states.new_zeros(batch, heads, 0, value_states.shape[-1])
            self.is_initialized = True
        self.grow(self.slots.width)
        index = self.slots.index(self.keys.device)
        self.keys[index] = key_states.transpose(1, 2)
        self.values[index] = value_states.transpose(1, 2)
        return self.keys[:, :, : self.slots.width], self.values[:, :, : self.slots.width]

    def grow(self, width: int) -> None:
        """Keeps at least `width` slots."""
        missing = width - self.keys.shape[2]
        if missing > 0:
            self.keys, self.values = (torch.nn.functional.pad(v, (0, 0, 0, missing)) for v in (self.keys, self.values))

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Keeps the given rows, in the given order, and any as often as it is given."""
        self.keys, self.values = (v[rows.to(v.device)] for v in (self.keys, self.values))


class SlotCache(Cache):
    """A model's keys and values, in a `SlotLayer` for each of its layers."""

    def __init__(self) -> None:
        self.slots = Slots()
        super().__init__(layer_class_to_replicate=partial(SlotLayer, self.slots))

    @property
    def width(self) -> int:
        """Slots that are kept of a row."""
        return min((layer.keys.shape[2] for layer in self.layers if layer.is_initialized), default=0)

    def grow(self, width: int) -> None:
        """See `SlotLayer`; what is kept moves."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.grow(width)

    def keep_rows(self, rows: torch.Tensor) -> None:
        """See `SlotLayer`."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keep_rows(rows)
