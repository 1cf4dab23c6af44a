"""TRL's SFT, guarded as the other trainers are."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, Features, IterableDataset, Json, List
from transformers import AutoProcessor, TrainingArguments
from trl import SFTConfig, SFTTrainer

from ..checks import fit_fields
from ..damage import whole_folders
from ..errors import ConfigError, RecordError
from ..hub import source_of
from ..positions import check_positions
from ..processes import check_group
from ..prompts import (
    READ_COLUMNS,
    check_template,
    check_used,
    template_arguments,
    template_columns,
    with_content,
    without_nulls,
)
from ..records import row_name
from ..safety import no_pickles
from ..tokens import CompletionRule, encode_row
from ..trl_versions import global_then_local_main_first
from .adapters import check_layers, check_router_loss, checked_layers
from .loading import default_output, name_bias, name_of_tokenizer, source_of_trainer, whole_source, with_revision
from .longest import LongestBatch, collate, longest_rows, row_id
from .preference_data import column_names
from .preflight import Preflight
from .row_checks import check_not_empty, check_sft_ids, check_sft_rows, data_sets, made_when_read
from .sharding import check_offloaded, check_sharding
from .trackers import check_trackers
from .trl_check import check_trl, sft_difference

logger = get_logger(__name__)

#: Columns of which TRL renders prompts and answers.
_RENDERED = ("messages", "conversations", "prompt", "completion", "tools", "chat_template_kwargs")

#: Those that hold a prompt, in the order in which TRL looks for them.
_PROMPTS = ("prompt", "messages", "conversations")


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
        fit_fields(self)
        super().__post_init__()
        check_trackers(self.report_to)


class GuardedSFTTrainer(Preflight, SFTTrainer):
    """TRL's, which takes its longest batch first, and stops where a loss or gradient is not finite."""

    config_class = GuardedSFTConfig

    def __init__(  # the parameters of TRL's, in their order
        self, model: Any, args: GuardedSFTConfig | TrainingArguments | None = None, data_collator: Any = None,
        train_dataset: Any = None, eval_dataset: Any = None, processing_class: Any = None, compute_loss_func: Any = None,
        compute_metrics: Any = None, callbacks: Any = None, optimizers: Any = (None, None),
        optimizer_cls_and_kwargs: Any = None, preprocess_logits_for_metrics: Any = None, quantization_config: Any = None,
        peft_config: Any = None, formatting_func: Any = None,
    ) -> None:  # fmt: skip
        args = self._own_config(args, model)
        self.check_seam(args)
        check_group(args.world_size)
        self._checkpoint, self._rule = getattr(model, "generation_config", model), None
        for name, dataset in data_sets(train_dataset, eval_dataset):
            check_not_empty(dataset, name)
        #: Rows, and how many of them were dropped, of every data set, by its name.
        self.data_report: dict[str, dict[str, int]] = {}
        if processing_class is None and source_of(args.model_init_kwargs):
            processing_class = AutoProcessor.from_pretrained(name_of_tokenizer(model), **source_of_trainer(args))
        peft_config = with_revision(peft_config, model, args)
        if peft_config is None:
            check_offloaded(model)
        with (
            no_pickles(model, subfolder=source_of_trainer(args).get("subfolder")),
            whole_folders(model),
            whole_source(model, args),
            checked_layers(peft_config) as layers,
        ):
            super().__init__(
                model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_loss_func,
                compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics,
                quantization_config, peft_config, formatting_func,
            )  # fmt: skip
        check_layers(self.model, layers)
        check_router_loss(self)
        name_bias(self.model)
        for name, dataset in data_sets(self.train_dataset, self.eval_dataset):
            check_sft_ids(self.model, dataset, name)
        check_sharding(self)

    @staticmethod
    def check_seam(args: GuardedSFTConfig) -> None:
        """Checks that the installed TRL is one that this trainer works with."""
        check_trl(args, partial(sft_difference, GuardedSFTTrainer))

    def _own_config(self, args: TrainingArguments | None, model: Any) -> GuardedSFTConfig:
        """The settings as this class has them. Without any, the folder has TRL's name; transformers' get our defaults."""
        if args is None:
            return self.config_class(default_output(model, self._name))
        if isinstance(args, TrainingArguments) and not isinstance(args, SFTConfig):
            # `to_dict` hides the token.
            return self.config_class(**{**args.to_dict(), "hub_token": args.hub_token})
        if not isinstance(args, self.config_class):
            raise ConfigError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, not a {type(args).__name__}"
            )
        return args

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        check_not_empty(dataset, dataset_name)
        made = made_when_read(dataset)  # which TRL refuses
        if formatting_func is None and not made:
            check_sft_rows(dataset, dataset_name, args, bool(processing_class.chat_template or self.chat_template))
        names = column_names(dataset)
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._rule = self._rule or CompletionRule.of(
            tokenizer,
            self._checkpoint,
            args.trl_completions,
            source_of_trainer(args),
        )
        if "input_ids" in names:
            self._rule.check_unused(f"{dataset_name} data set")
        elif formatting_func is None and not made:
            dataset = _as_given(dataset, names, dataset_name, args.dataset_text_field, tokenizer)
            # TRL makes the masks of a template, and reads images with a processor.
            ours = not (self._rule.trl or args.assistant_only_loss) and hasattr(processing_class, "pad_token")
            if {"prompt", "completion"} <= set(names) and ours:
                dataset = self._encoded(dataset, processing_class, args, dataset_name)
        prepared = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if isinstance(prepared, Dataset):
            dropped = 0 if packing and len(prepared) else len(dataset) - len(prepared)
            self._report_rows(dataset_name, len(dataset), dropped, args.max_length)
        elif next(iter(prepared), None) is None:
            raise RecordError(
                f"{dataset_name} data set: truncation to max_length = {args.max_length} leaves no token to train on in any "
                "row; raise max_length"
            )
        return prepared

    def _encoded(self, dataset: Dataset | IterableDataset, tokenizer, args, name: str) -> Dataset | IterableDataset:
        """Rows of prompt and completion with the ids and the mask that TRL makes labels of."""
        rule = self._rule

        def encode(row: dict[str, Any], index: int) -> dict[str, list[int]]:
            where = f"{name} data set, {row_name(row, index)}"
            completions, template = {"completion": row["completion"]}, template_arguments(row, where)
            prompt_ids, ids = encode_row(tokenizer, row["prompt"], completions, where, template, rule)
            mask = [0] * len(prompt_ids) + [1] * len(ids["completion"])
            return {"input_ids": prompt_ids + ids["completion"], "completion_mask": mask}

        options: dict[str, Any] = {}
        if isinstance(dataset, Dataset):
            options = {"num_proc": args.dataset_num_proc, "desc": f"Tokenizing {name} dataset"}
        with global_then_local_main_first():
            return dataset.map(encode, with_indices=True, **options)

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
        if made_when_read(self.train_dataset):
            return "rows are made when they are read (set_transform), so which are the longest is not known"
        return super()._why_no_preflight()

    def longest_batches(self) -> list[LongestBatch]:
        longest = longest_rows(self)
        rows, inputs = collate(self, longest)
        found = [
            {"id": row_id(row, place), "tokens": [len(row["input_ids"])]}
            for row, place in zip(rows, longest, strict=True)
        ]
        return [LongestBatch(inputs, found)]


def _as_given(
    dataset: Dataset | IterableDataset, names: list[str], name: str, text: str, tokenizer: Any
) -> Dataset | IterableDataset:
    """Rows without the nulls that Arrow puts into messages and tools; see `align.prompts`. TRL renders them.

    Args:
        names: of the columns.
        name: of the data set.
        text: the column of plain text.

    Raises:
        RecordError: a column that a model should read is not in its text, or not in its chat template.
    """
    rendered = [column for column in _RENDERED if column in names]
    nested = [column for column in rendered if dataset.features is None or _may_have_gaps(dataset.features[column])]
    arguments = [column for column in ("tools", "chat_template_kwargs") if column in names]
    if not nested and not arguments and not set(names) & set(READ_COLUMNS):
        return dataset

    def plain(row: dict[str, Any], index: int) -> dict[str, Any]:
        where = f"{name} data set, {row_name(row, index)}"
        prompt = next((row[column] for column in (*_PROMPTS, text) if row.get(column) is not None), None)
        check_used(row, prompt, where)
        template = template_arguments({**row, "prompt": prompt}, where)
        if template and getattr(tokenizer, "chat_template", None):
            source = tokenizer.get_chat_template(template.get("chat_template"), template.get("tools"))
            check_template(source, template, where)
        kept = template_columns(row, where).get("chat_template_kwargs", {})
        found = {column: with_content(without_nulls(row[column])) for column in nested}
        return found | ({"chat_template_kwargs": kept} if "chat_template_kwargs" in names else {})

    if isinstance(dataset, IterableDataset):
        return dataset.map(plain, with_indices=True)
    # As JSON, or Arrow would put the nulls back.
    features = dict(dataset.features) | {column: _json_feature(dataset.features[column]) for column in nested}
    features |= {"chat_template_kwargs": Json()} if "chat_template_kwargs" in names else {}
    return dataset.map(plain, with_indices=True, features=Features(features), desc=f"Reading {name} dataset")


def _may_have_gaps(feature: Any) -> bool:
    """Whether a column's values have keys that Arrow, or a user, may have filled with null."""
    inner = feature.feature if isinstance(feature, List) else feature
    return isinstance(inner, Json) or (
        isinstance(inner, dict) and not set(inner) <= {"role", "content", "from", "value"}
    )


def _json_feature(feature: Any) -> Any:
    return List(Json()) if isinstance(feature, List) else Json()
