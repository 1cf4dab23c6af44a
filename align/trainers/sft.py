"""TRL's SFT, guarded as the other trainers are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import AutoProcessor
from trl import SFTConfig, SFTTrainer

from ..errors import ConfigError
from ..hub import source_of
from ..processes import check_group
from ..safety import no_pickles
from .loading import name_bias, name_of_tokenizer, source_of_trainer, whole_source, with_revision
from .longest import LongestBatch, collate, longest_rows, row_id
from .preflight import Preflight
from .sharding import check_offloaded, check_sharding
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

    def __init__(
        self, model: Any, args: GuardedSFTConfig | None = None, data_collator: Any = None, train_dataset: Any = None,
        eval_dataset: Any = None, processing_class: Any = None, *others: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        if args is None:
            args = self.config_class("trainer_output")
        if not isinstance(args, self.config_class):
            raise ConfigError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, not a {type(args).__name__}"
            )
        check_group(args.world_size)
        if processing_class is None and source_of(args.model_init_kwargs):
            processing_class = AutoProcessor.from_pretrained(name_of_tokenizer(model), **source_of_trainer(args))
        kwargs["peft_config"] = with_revision(kwargs.get("peft_config"), model, args)
        if kwargs["peft_config"] is None:
            check_offloaded(model)
        with no_pickles(model, subfolder=source_of_trainer(args).get("subfolder")), whole_source(model, args):
            super().__init__(
                model, args, data_collator, train_dataset, eval_dataset, processing_class, *others, **kwargs
            )
        name_bias(self.model)
        check_sharding(self)

    def _why_no_preflight(self) -> str | None:
        if isinstance(self.train_dataset, Dataset) and "input_ids" not in self.train_dataset.column_names:
            return "rows have no input_ids before they are in a batch, so which are the longest is not known"
        return super()._why_no_preflight()

    def longest_batches(self) -> list[LongestBatch]:
        longest = longest_rows(self)
        rows, inputs = collate(self, longest)
        found = [
            {"id": row_id(row, place), "tokens": [len(row["input_ids"])]}
            for row, place in zip(rows, longest, strict=True)
        ]
        return [LongestBatch(inputs, found)]
