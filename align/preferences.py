"""Preference data sets from a local file or the hub as pair records: tokenized once, drops counted by reason."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .checks import check_apart
from .errors import ConfigError, MissingColumnError, RecordError
from .problems import PROMPT_COLUMNS
from .records import Record, check_prompt, is_empty, row_name
from .sources import first_of, load_rows, row_id
from .stages import file_hash, is_complete, read_manifest, run_in_parts
from .tokens import CompletionRule, encode_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ID_COLUMNS = ("id", "prompt_id", "uid")
ROWS_PER_PART = 1000


def tokenize_pairs(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    out_path: str | os.PathLike,
    *,
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
    chat: bool = False,
    system_prompt: str | None = None,
    max_prompt_length: int | None = None,
    trl_completions: bool = False,
    settings: dict[str, Any] | None = None,
) -> dict[str, int]:
    """The stage `align tokenize`: writes pair records of a preference data set.

    A row has `prompt` (or `question`, `problem`, `instruction`), `chosen` and `rejected`, each as text or as messages;
    messages of `chosen` and `rejected` may begin with the prompt's.

    Args:
        source, split, subset: see `align.sources.load_rows`.
        out_path: pairs, JSONL or Parquet.
        limit: only the first so many rows.
        chat: makes text prompts user messages, after `system_prompt` if there is one, and text completions the
            assistant's, so that the tokenizer's chat template is applied.
        max_prompt_length: rows whose prompt is longer, in tokens, are left out and counted.
        trl_completions: makes completions as TRL does: all that the chat template writes, without an end token of ours,
            turns of others included; see `align.tokens.CompletionRule`.
        settings: what else the ids depend on (the tokenizer's name or hash), for resuming.

    Returns:
        Counts: `rows`, `source_rows`, and of those left out `prompt_too_long`, `equal` (chosen is rejected), `empty`.

    Raises:
        ConfigError: settings that contradict each other, or a source that does not load.
        MissingColumnError, RecordError: a row that is no preference.
    """
    if system_prompt is not None and not chat:
        raise ConfigError("system_prompt needs chat: true; without it, there is no place for it")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit = {limit} must be at least 1")
    check_apart(source, out_path)
    stamp = file_hash(source) if os.path.isfile(source) else source
    settings = {
        "source": stamp, "split": split, "subset": subset, "limit": limit, "chat": chat, "system_prompt": system_prompt,
        "max_prompt_length": max_prompt_length, **({"trl_completions": True} if trl_completions else {}), **(settings or {}),
    }  # fmt: skip
    if is_complete(out_path, "tokenize", settings):
        return read_manifest(out_path)["counts"]
    raw = load_rows(source, split=split, subset=subset)
    total = len(raw) if limit is None else min(limit, len(raw))
    parts = [range(start, min(start + ROWS_PER_PART, total)) for start in range(0, total, ROWS_PER_PART)]
    dropped: Counter[str] = Counter(prompt_too_long=0, equal=0, empty=0)
    rule = CompletionRule.of(tokenizer, trl=trl_completions)

    def compute(_number: int, part: range) -> list[Record]:
        rows = []
        for index in part:
            row = dict(raw[index])
            name = f"{source}, {row_name(row, index)}"
            found = _to_pair(row, name, chat, system_prompt)
            reason = _reason_to_drop(found)
            if reason is None:
                found |= encode_pair(tokenizer, found, name, rule)
                if max_prompt_length is not None and len(found["prompt_ids"]) > max_prompt_length:
                    reason = "prompt_too_long"
            # A row left out leaves its reason, so that a run that is resumed counts it, too.
            kept = {"id": row_id(row, index, split, ID_COLUMNS), **found} if reason is None else {"_reason": reason}
            rows.append({"_row": index, **kept})
        return rows

    def finish(rows: Sequence[Record]) -> Iterator[Record]:
        for row in rows:
            if "_reason" in row:
                dropped[row["_reason"]] += 1
            else:
                yield row
        if dropped.total() == total:
            raise RecordError(f"{source}: none of its {total} rows can be used ({dict(dropped)}); raise the limits")

    return run_in_parts(
        out_path, parts, compute, stage="tokenize", settings=settings, order=lambda row: row.pop("_row"),
        finish=finish, count=lambda rows: {"source_rows": total, **dropped},
    )  # fmt: skip


def _to_pair(row: Mapping[str, Any], name: str, chat: bool, system_prompt: str | None) -> Record:
    for side in ("chosen", "rejected"):
        if row.get(side) is None:
            raise MissingColumnError(
                f"{name}: no {side}; a preference has chosen and rejected, and a prompt ({', '.join(PROMPT_COLUMNS)})"
            )
        if row[side] != []:  # an answer without a message is empty, and counted
            check_prompt(row[side], name, side)
    pair = {
        key: row[key] for key in ("chosen", "rejected", "tools", "chat_template_kwargs") if row.get(key) is not None
    }
    if isinstance(pair["chosen"], list) and pair["chosen"] and pair["chosen"][0]["role"] != "assistant":
        from trl.data_utils import extract_prompt

        if not isinstance(pair["rejected"], list) or not pair["rejected"]:
            raise RecordError(f"{name}: chosen begins with the prompt's messages, rejected does not; give both alike")
        pair |= extract_prompt({side: pair[side] for side in ("chosen", "rejected")})  # they begin with the prompt
    else:
        prompt = first_of(dict(row), PROMPT_COLUMNS)
        if prompt is None:
            raise MissingColumnError(f"{name}: no prompt; one of the columns {', '.join(PROMPT_COLUMNS)} is needed")
        pair["prompt"] = prompt
    if chat and isinstance(pair["prompt"], str):
        system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        pair["prompt"] = [*system, {"role": "user", "content": pair["prompt"]}]
        for side in ("chosen", "rejected"):
            if isinstance(pair[side], str):
                pair[side] = [{"role": "assistant", "content": pair[side]}] if pair[side] else ""
    return pair


def _reason_to_drop(pair: Mapping[str, Any]) -> str | None:
    if is_empty(pair["chosen"]) or is_empty(pair["rejected"]):
        return "empty"
    return "equal" if pair["chosen"] == pair["rejected"] else None
