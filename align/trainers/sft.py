"""TRL's SFT, guarded as the other trainers are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig, SFTTrainer

from .longest import LongestBatch, collate, longest_rows, row_id
from .preflight import Preflight
from .sharding import check_sharding
from .trackers import check_trackers


@dataclass
class GuardedSFTConfig(SFTConfig):
    """TRL's settings, and:

    Args:
        preflight: whether the longest batch has a forward and backward pass before the first step; see
            [`~align.trainers.preflight.Preflight`].
    """

    preflight: bool = field(default=True, metadata={"help": "Take the longest batch once before the first step."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_trackers(self.report_to)


class GuardedSFTTrainer(Preflight, SFTTrainer):
    """TRL's, which takes its longest batch first, and stops where a loss or gradient is not finite."""

    config_class = GuardedSFTConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_sharding(self)

    def longest_batches(self) -> list[LongestBatch]:
        longest = longest_rows(self)
        rows, inputs = collate(self, longest)
        found = [
            {"id": row_id(row, place), "tokens": [len(row["input_ids"])]}
            for row, place in zip(rows, longest, strict=True)
        ]
        return [LongestBatch(inputs, found)]
