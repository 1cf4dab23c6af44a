"""What is wrong with a trainer's rows, by name, before its first step: none, unknown columns, or more tokens than the model takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy
from datasets import Dataset, IterableDataset

from ..errors import ConfigError, MissingColumnError, RecordError
from ..models import vocab_size
from ..positions import check_positions, position_limit
from ..records import check_ids, row_name
from .row_data import lengths_of, numbers_of, tables_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import SFTConfig

#: What TRL's SFT learns from, for messages.
SFT_COLUMNS = "input_ids; or prompt and completion; or messages; or text (dataset_text_field)"


def data_sets(train: Any, evaluation: Any) -> Iterator[tuple[str, Any]]:
    """The data sets that a trainer is given, with their names."""
    yield "train", train
    if isinstance(evaluation, Mapping):
        yield from evaluation.items()
    elif evaluation is not None and not isinstance(evaluation, str):  # a name is of a set that the trainer has
        yield "eval", evaluation


def made_when_read(dataset: Any) -> bool:
    """Whether a user's function makes the rows of a data set when they are read (`set_transform`).

    Then the columns that the data set declares are not those of its rows.
    """
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def check_not_empty(dataset: Any, name: str) -> None:
    """Checks that there is a data set, and a row in it.

    Raises:
        ConfigError: there is none, or it is not a data set.
        RecordError: it has no rows.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        found = f"{name} data set is {'missing' if dataset is None else 'a ' + type(dataset).__name__}"
        found = "`train_dataset` is required" if dataset is None and name == "train" else found  # TRL's words
        raise ConfigError(f"{found}; give a datasets.Dataset, such as Dataset.from_list(rows)")
    if next(iter(dataset), None) is None:
        raise RecordError(f"{name} data set: it has no rows; give some, or look for what left all of them out")


def check_sft_rows(dataset: Dataset | IterableDataset, name: str, args: SFTConfig, has_template: bool) -> None:
    """Checks that TRL's SFT can tokenize each row; of a stream, the first one.

    Raises:
        MissingColumnError, RecordError: naming the row and the column.
        ConfigError: rows are messages, and the tokenizer has no chat template.
    """
    columns = list(dataset.column_names or next(iter(dataset)))
    if "input_ids" in columns:
        return
    read = _columns_read(columns, args.dataset_text_field)
    if not set(read) <= set(columns) or not read:
        raise MissingColumnError(
            f"{name} data set: its columns are {', '.join(columns)}; rename them to those that SFT learns from: {SFT_COLUMNS}"
        )
    rows = dataset.select_columns(read) if isinstance(dataset, Dataset) else [next(iter(dataset))]
    for index, row in enumerate(rows):
        where = f"{name} data set, {row_name(row, index)}"
        for column in read:
            if not isinstance(row[column], (str, list)) or row[column] == []:
                raise RecordError(
                    f"{where}: {column} = {row[column]!r} must be text or messages; fill it or remove the row"
                )
            if isinstance(row[column], list) and not has_template:
                raise ConfigError(
                    f"{where}: {column} is chat messages, and the tokenizer has no chat template; set tokenizer.chat_template or "
                    "chat_template_path, or give text"
                )
        if len({type(row[column]) for column in read}) > 1:
            raise RecordError(f"{where}: of prompt and completion, one is text and one messages; give both alike")


def _columns_read(columns: Sequence[str], text: str) -> list[str]:
    """The columns that TRL's SFT tokenizes, in the order in which it looks for them."""
    if "prompt" in columns:
        return ["prompt", "completion"]
    return next(([column] for column in ("messages", "conversations", text) if column in columns), [])


def check_sft_ids(model: PreTrainedModel, dataset: Any, name: str) -> None:
    """Checks rows as SFT trains on them: ids in the model's vocabulary, and no more of them than it has positions.

    Raises:
        RecordError: names the row, the value and the remedy.
    """
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names or made_when_read(dataset):
        return
    if "seq_lengths" in dataset.column_names:  # packed; positions begin again with each
        lengths = [max(row, default=0) for row in dataset["seq_lengths"]]
    else:
        lengths = lengths_of(dataset, ("input_ids",))["input_ids"]
    check_longest(model, dataset, numpy.asarray(lengths), name)
    size, start = vocab_size(model), 0
    for table in tables_of(dataset, ("input_ids",)):
        found = numbers_of(table["input_ids"])
        if found is None or not len(found[1]) or found[1].min() < 0 or found[1].max() >= size:
            for place, ids in enumerate(table["input_ids"].to_pylist(), start):
                check_ids(ids, "input_ids", f"{name} data set, {row_name(dataset[place], place)}", size)
        start += len(table)


def check_pair_lengths(trainer: Any, dataset: Any, name: str) -> None:
    """Checks that the model of a preference trainer has a position for each token of a pair's sequences.

    Raises:
        RecordError: names the row, its length and the limit.
    """
    if not isinstance(dataset, Dataset):
        return
    lengths = lengths_of(dataset, ("prompt_ids", "chosen_ids", "rejected_ids"))
    longest = lengths["prompt_ids"] + numpy.maximum(lengths["chosen_ids"], lengths["rejected_ids"])
    if trainer.args.max_length is not None:
        longest = numpy.minimum(longest, trainer.args.max_length)
    check_longest(trainer.model, dataset, longest, name)


def check_longest(model: PreTrainedModel, dataset: Dataset, lengths: numpy.ndarray, name: str) -> None:
    """Raises a RecordError that names the first row with more tokens than the model has positions."""
    limit = position_limit(model)
    if limit is not None and (over := numpy.flatnonzero(lengths > limit)).size:
        place = int(over[0])
        where = f"{name} data set, {row_name(dataset[place], place)}: its length"
        check_positions(int(lengths[place]), limit, where, f"set max_length to {limit} or less")
