"""TRL's SFT, guarded as the other trainers are."""

from __future__ import annotations

from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from ..checks import fit_fields
from ..damage import whole_folders
from ..errors import ConfigError, RecordError
from ..positions import check_positions
from ..processes import check_group
from ..safety import no_pickles
from .adapters import check_layers, checked_layers
from .longest import LongestBatch, collate, longest_rows, row_id
from .preflight import Preflight
from .row_checks import check_not_empty, check_sft_ids, check_sft_rows, data_sets
from .sharding import check_sharding
from .trackers import check_trackers

logger = get_logger(__name__)


@dataclass
class GuardedSFTConfig(SFTConfig):
    """TRL's settings, and:

    Args:
        preflight: whether the longest batch has a forward and backward pass before the first step; see
            [`~align.trainers.preflight.Preflight`].
    """

    preflight: bool = field(default=True, metadata={"help": "Take the longest batch once before the first step."})

    def __post_init__(self) -> None:
        fit_fields(self)
        super().__post_init__()
        check_trackers(self.report_to)


class GuardedSFTTrainer(Preflight, SFTTrainer):
    """TRL's, which takes its longest batch first, and stops where a loss or gradient is not finite."""

    config_class = GuardedSFTConfig

    def __init__(self, model: Any, args: GuardedSFTConfig | None = None, *others: Any, **kwargs: Any) -> None:
        if args is None:
            args = self.config_class("trainer_output")
        if not isinstance(args, self.config_class):
            raise ConfigError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, not a {type(args).__name__}"
            )
        check_group(args.world_size)
        given = signature(SFTTrainer.__init__).bind_partial(self, model, args, *others, **kwargs).arguments
        for name, dataset in data_sets(given.get("train_dataset"), given.get("eval_dataset")):
            check_not_empty(dataset, name)
        #: Rows, and how many of them were dropped, of every data set, by its name.
        self.data_report: dict[str, dict[str, int]] = {}
        with no_pickles(model), whole_folders(model), checked_layers(given.get("peft_config")) as layers:
            super().__init__(model, args, *others, **kwargs)
        check_layers(self.model, layers)
        for name, dataset in data_sets(self.train_dataset, self.eval_dataset):
            check_sft_ids(self.model, dataset, name)
        check_sharding(self)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        check_not_empty(dataset, dataset_name)
        if formatting_func is None:
            check_sft_rows(dataset, dataset_name, args, bool(processing_class.chat_template or self.chat_template))
        prepared = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if isinstance(prepared, Dataset):
            dropped = 0 if packing and len(prepared) else len(dataset) - len(prepared)
            self._report_rows(dataset_name, len(dataset), dropped, args.max_length)
        return prepared

    def _report_rows(self, name: str, rows: int, dropped: int, max_length: int | None) -> None:
        """Counts the rows that have nothing to learn after truncation, which TRL drops without a word."""
        self.data_report[name] = {"rows": rows, "prompt_fills_max_length": dropped}
        reason = f"max_length = {max_length} leaves them no token to learn (their prompts fill it, say)"
        if dropped == rows:
            raise RecordError(f"{name} data set: none of its {rows} rows can be used: {reason}; raise max_length")
        if dropped:
            logger.warning(f"{name} data set: {dropped} of {rows} rows dropped: {reason}")

    def compute_loss(self, model: Any, inputs: dict[str, Any], *others: Any, **kwargs: Any) -> Any:
        if "position_ids" not in inputs and "input_ids" in inputs:  # rows of a stream are not known before
            tokens = inputs["input_ids"].shape[1]
            check_positions(tokens, self._positions, "the longest row of a batch", "set max_length to it or less")
        return super().compute_loss(model, inputs, *others, **kwargs)

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
