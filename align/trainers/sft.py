"""TRL's SFT, guarded as the other trainers are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import global_then_local_main_first

from ..errors import ConfigError
from ..processes import check_group
from ..records import row_name
from ..safety import no_pickles
from ..tokens import CompletionRule, encode_row, template_of
from .longest import LongestBatch, collate, longest_rows, row_id
from .preference_data import column_names
from .preflight import Preflight
from .sharding import check_sharding
from .trackers import check_trackers


@dataclass
class GuardedSFTConfig(SFTConfig):
    """TRL's settings, and:

    Args:
        preflight: whether the longest batch has a forward and backward pass before the first step; see
            [`~align.trainers.preflight.Preflight`].
        trl_completions: tokenizes rows of `prompt` and `completion` as TRL does. By default a completion is what is sampled:
            the model's own turn, up to and including its end token; see [`~align.tokens.CompletionRule`].
    """

    preflight: bool = field(default=True, metadata={"help": "Take the longest batch once before the first step."})
    trl_completions: bool = field(default=False, metadata={"help": "Tokenize prompts and completions as TRL does."})

    def __post_init__(self) -> None:
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
        self._checkpoint, self._rule = getattr(model, "generation_config", model), None
        with no_pickles(model):
            super().__init__(model, args, *others, **kwargs)
        check_sharding(self)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        names = set(column_names(dataset))
        self._rule = self._rule or CompletionRule.of(
            getattr(processing_class, "tokenizer", processing_class), self._checkpoint, args.trl_completions
        )
        if "input_ids" in names:
            self._rule.check_unused(f"{dataset_name} data set")
        pairs = {"prompt", "completion"} <= names and "input_ids" not in names and formatting_func is None
        # Masks of a template's own, transforms and processors of images are TRL's matter.
        ours = not (self._rule.trl or args.assistant_only_loss) and hasattr(processing_class, "pad_token")
        if pairs and ours and not (isinstance(dataset, Dataset) and dataset.format["type"] == "custom"):
            dataset = self._encoded(dataset, processing_class, args, dataset_name)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _encoded(self, dataset: Dataset | IterableDataset, tokenizer, args, name: str) -> Dataset | IterableDataset:
        """Rows of prompt and completion with the ids and the mask that TRL makes labels of."""
        rule = self._rule

        def encode(row: dict[str, Any], index: int) -> dict[str, list[int]]:
            where = f"{name} data set, {row_name(row, index)}"
            completions = {"completion": row["completion"]}
            prompt_ids, ids = encode_row(tokenizer, row["prompt"], completions, where, template_of(row, where), rule)
            completion_ids = ids["completion"]
            mask = [0] * len(prompt_ids) + [1] * len(completion_ids)
            return {"input_ids": prompt_ids + completion_ids, "completion_mask": mask}

        options: dict[str, Any] = {}
        if isinstance(dataset, Dataset):
            options = {"num_proc": args.dataset_num_proc, "desc": f"Tokenizing {name} dataset"}
        with global_then_local_main_first():
            return dataset.map(encode, with_indices=True, **options)

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
