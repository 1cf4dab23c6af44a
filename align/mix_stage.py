"""The stage `align mix`: contexts of a model's own tokens, offline, to look at or to train on elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .contexts import OwnTokens, draw_contexts, mixed_row
from .errors import RecordError
from .mix import IGNORED, Example, epsilon_at
from .positions import check_positions, position_limit
from .rac import CorrectionSettings, draw_corrections
from .record_file import Derived
from .records import Record, check_records, row_name
from .stages import parts_of, records_hash, run_in_parts
from .tokens import check_row_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Rows of a part: what at most is drawn again after an interruption.
PART = 512


def mix_bash(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Record],
    out_path: str | os.PathLike,
    *,
    epsilon: float,
    config: OwnTokens | None = None,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes BASH contexts.

    Args:
        model: causal LM; where it has an adapter, that is on.
        demonstrations: demonstration records.
        out_path: records of `id`, `input_ids` (the context), `labels` (as TRL's `SFTTrainer` reads them with
            `dataset_kwargs={"skip_prepare_dataset": True}`), `source_ids` (ground truth), `own` (places of own tokens).
        epsilon: chance of an own token.
        config: how they are drawn.
        seed: decides the draws.
        settings: what else the rows depend on (hash of the model), for resuming.

    Returns:
        Counts: `rows`, `tokens` of completions, `own` among them, and `differ` of those.

    Raises:
        RecordError, MissingColumnError: a row that is no demonstration.
    """
    config = config or OwnTokens()
    epsilon_at(0, 1, epsilon)

    def draw(sources: list[Example], first: int) -> list[Record]:
        rows = [mixed_row(s.input_ids, s.labels, epsilon, seed, 0, first + i) for i, s in enumerate(sources)]
        draw_contexts(model, rows, config, tokenizer.pad_token_id)
        return [
            {"input_ids": row.context, "labels": s.labels, "own": [i for i, own in enumerate(row.own) if own]}
            for row, s in zip(rows, sources, strict=True)
        ]

    def count(rows: list[Record]) -> dict[str, int]:
        return {
            "tokens": sum(label != IGNORED for row in rows for label in row["labels"]),
            "own": sum(len(row["own"]) for row in rows),
            "differ": sum(row["input_ids"][i] != row["source_ids"][i] for row in rows for i in row["own"]),
        }

    depends = {"epsilon": epsilon, "seed": seed, **asdict(config), **(settings or {})}
    return _run(model, demonstrations, out_path, draw, "mix bash", depends, count)


def mix_rac(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Record],
    out_path: str | os.PathLike,
    *,
    config: CorrectionSettings | None = None,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes RAC examples: as `mix_bash`, but with `generated_ids`, `own_tokens`, `ended`, `matches`, `kept`.

    Returns:
        Counts: `rows`, `matches` (generations with the reference's answer), `kept` of those, `unended`, and
        `prompt_fills_max_length` of those left out, where `max_length` leaves some nothing to learn.

    Raises:
        RecordError, MissingColumnError: a row that is no demonstration, or no row is left.
    """
    config = config or CorrectionSettings()
    check_records(demonstrations, "demonstration", source="demonstrations")
    longest = float("inf") if config.max_length is None else config.max_length
    fitting = [index for index, row in enumerate(demonstrations) if len(row["prompt_ids"]) < longest]
    left_out = len(demonstrations) - len(fitting)
    if left_out and not fitting:
        raise RecordError(f"the prompts of all {left_out} demonstrations fill max_length = {longest}; raise it")
    rows = Derived(demonstrations, lambda row: row, fitting) if left_out else demonstrations

    def draw(sources: list[Example], first: int) -> list[Record]:
        keys = [(first, i) for i in range(len(sources))]
        return draw_corrections(model, tokenizer, sources, keys, config, seed).rows

    def count(rows: list[Record]) -> dict[str, int]:
        unended = {"unended": sum(not row["ended"] for row in rows)}
        dropped = {"prompt_fills_max_length": left_out} if left_out else {}
        return {name: sum(row[name] for row in rows) for name in ("matches", "kept")} | unended | dropped

    depends = {"seed": seed, **asdict(config), **(settings or {})}
    longest = config.max_new_tokens if config.generates else 0
    return _run(model, rows, out_path, draw, "mix rac", depends, count, longest)


def _run(
    model: PreTrainedModel,
    demonstrations: Sequence[Record],
    out_path: str | os.PathLike,
    draw: Callable[[list[Example], int], list[Record]],
    stage: str,
    settings: dict[str, Any],
    count: Callable[[list[Record]], dict[str, int]],
    drawn: int | None = None,
) -> dict[str, Any]:
    """`drawn`: tokens that are drawn after a prompt; `None` where tokens are drawn in place of the completion's."""
    from .models import vocab_size

    check_records(demonstrations, "demonstration", source="demonstrations")
    limit = position_limit(model)
    for index, row in enumerate(demonstrations):
        check_row_ids(row, index, ("prompt_ids", "completion_ids"), vocab_size(model))
        tokens = len(row["prompt_ids"]) + (len(row["completion_ids"]) if drawn is None else drawn)
        what, remedy = ("completion", "remove the row") if drawn is None else ("max_new_tokens", "lower max_new_tokens")
        check_positions(tokens, limit, f"demonstrations, {row_name(row, index)}: prompt and {what}", remedy)

    def compute(_number: int, part: range) -> list[Record]:
        rows = demonstrations[part.start : part.stop]
        sources = [
            Example(
                [*row["prompt_ids"], *row["completion_ids"]], [IGNORED] * len(row["prompt_ids"]) + row["completion_ids"]
            )
            for row in rows
        ]
        return [
            {"_row": number, "id": row["id"], **new, "source_ids": source.input_ids}
            for number, row, source, new in zip(part, rows, sources, draw(sources, part.start), strict=True)
        ]

    return run_in_parts(
        out_path, parts_of(demonstrations, PART), compute, stage=stage,
        settings=mix_settings(demonstrations, settings), order=lambda row: row.pop("_row"), count=count,
    )  # fmt: skip


def mix_settings(demonstrations: Sequence[Record], settings: dict[str, Any]) -> dict[str, Any]:
    """What the output depends on."""
    return {**settings, "demonstrations": records_hash(demonstrations)}
