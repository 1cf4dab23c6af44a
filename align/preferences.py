"""Preference data sets from a local file or the hub as pair records: tokenized once, drops counted by reason."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .checks import check_apart
from .errors import ConfigError, MissingColumnError, RecordError
from .problems import prompt_column
from .prompts import PROMPT_COLUMNS, Phrasing, phrase, without_nulls
from .records import PAIR_WEIGHT, Record, check_pair_weight, check_prompt, is_empty, row_name
from .sources import load_rows, row_id
from .stages import file_hash, is_complete, read_manifest, run_in_parts
from .tokens import CompletionRule, encode_pair, with_prompt

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
    chat_template_kwargs: dict[str, Any] | None = None,
    max_prompt_length: int | None = None,
    trl_completions: bool = False,
    settings: dict[str, Any] | None = None,
) -> dict[str, int]:
    """The stage `align tokenize`: writes pair records of a preference data set.

    A row has `prompt` (or `question`, `problem`, `instruction`), `chosen` and `rejected`, each as text or as messages;
    messages of `chosen` and `rejected` may begin with the prompt's. Where a row has no column for its prompt, their text
    begins with it. A column `weight`, which scales the pair's loss, is kept.

    Args:
        source, split, subset: see `align.sources.load_rows`.
        out_path: pairs, JSONL or Parquet.
        limit: only the first so many rows.
        chat: makes text prompts user messages, after `system_prompt` if there is one, and text completions the
            assistant's, so that the tokenizer's chat template is applied.
        system_prompt: text of a system message, for `chat` and for prompts that are messages.
        chat_template_kwargs: see `align.load_problems`. What other columns of a row become is the table of `align.prompts`.
        max_prompt_length: rows whose prompt is longer, in tokens, are left out and counted.
        trl_completions: makes completions as TRL does: all that the chat template writes, without an end token of ours,
            turns of others included; see `align.tokens.CompletionRule`.
        settings: what else the ids depend on (the tokenizer's name or hash), for resuming.

    Returns:
        Counts: `rows`, `source_rows`, and of those left out `prompt_too_long`, `equal` (chosen is rejected, as text or as ids),
        `empty`.

    Raises:
        ConfigError: settings that contradict each other or have no place in a row's prompt, or a source that does not load.
        MissingColumnError, RecordError: a row that is no preference, or a column that has no place in its prompt.
    """
    how = Phrasing(chat, None, system_prompt, chat_template_kwargs)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit = {limit} must be at least 1")
    check_apart(source, out_path)
    stamp = file_hash(source) if os.path.isfile(source) else source
    settings = {
        "source": stamp, "split": split, "subset": subset, "limit": limit, "chat": chat, "system_prompt": system_prompt,
        "max_prompt_length": max_prompt_length, **({"trl_completions": True} if trl_completions else {}), **(settings or {}),
    }  # fmt: skip
    settings |= {"chat_template_kwargs": chat_template_kwargs} if chat_template_kwargs else {}
    if is_complete(out_path, "tokenize", settings):
        return read_manifest(out_path)["counts"]
    raw = load_rows(source, split=split, subset=subset)
    total = len(raw) if limit is None else min(limit, len(raw))
    weighted = raw[0].get(PAIR_WEIGHT) is not None
    parts = [range(start, min(start + ROWS_PER_PART, total)) for start in range(0, total, ROWS_PER_PART)]
    dropped: Counter[str] = Counter(prompt_too_long=0, equal=0, empty=0)
    rule = CompletionRule.of(tokenizer, trl=trl_completions)

    def compute(_number: int, part: range) -> list[Record]:
        rows = []
        for index in part:
            row = dict(raw[index])
            name = f"{source}, {row_name(row, index)}"
            check_pair_weight(row, name, weighted)
            found = _to_pair(row, name, how) | ({PAIR_WEIGHT: row[PAIR_WEIGHT]} if weighted else {})
            reason = _reason_to_drop(found)
            if reason is None:
                found |= encode_pair(tokenizer, found, name, rule, _is_implicit(row))
                # Texts that differ can have equal ids: templates strip white space.
                reason = "equal" if found["chosen_ids"] == found["rejected_ids"] else None
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


def _to_pair(row: Record, name: str, how: Phrasing) -> Record:
    for side in ("chosen", "rejected"):
        if row.get(side) is None:
            raise MissingColumnError(
                f"{name}: no {side}; a preference has chosen and rejected, and a prompt ({', '.join(PROMPT_COLUMNS)})"
            )
        if row[side] != []:  # an answer without a message is empty, and counted
            check_prompt(row[side], name, side)
    pair, column = {side: without_nulls(row[side]) for side in ("chosen", "rejected")}, prompt_column(row)
    if isinstance(pair["chosen"], list) and pair["chosen"] and pair["chosen"][0]["role"] != "assistant":
        pair, column = _without_prompt(row, pair, name), "chosen"
    elif column:
        pair["prompt"] = row[column]
    elif not _is_implicit(row):
        raise MissingColumnError(f"{name}: no prompt; one of the columns {', '.join(PROMPT_COLUMNS)} is needed")
    elif how.chat:
        raise ConfigError(
            f"{name}: chat needs a prompt apart from the answers, and chosen begins with it; give a column 'prompt', or messages"
        )
    elif is_empty(pair["chosen"]) or is_empty(pair["rejected"]):
        return pair  # counted, and left out
    else:
        pair, column = with_prompt(pair, name), "chosen"
    was_text = isinstance(pair["prompt"], str)
    pair |= phrase(row, pair["prompt"], name, how, column)
    if was_text and how.chat:
        for side in ("chosen", "rejected"):
            if isinstance(pair[side], str):
                pair[side] = [{"role": "assistant", "content": pair[side]}] if pair[side] else ""
    return pair


def _is_implicit(row: Mapping[str, Any]) -> bool:
    """Whether a row of text has no column for its prompt, which its answers then begin with."""
    return isinstance(row["chosen"], str) and not any(column in row for column in PROMPT_COLUMNS)


def _without_prompt(row: Record, pair: Record, name: str) -> Record:
    """Take the prompt out of conversations that begin with it.

    Raises:
        RecordError: only chosen begins with it, or a prompt column says something else.
    """
    from trl.data_utils import extract_prompt

    if not isinstance(pair["rejected"], list) or not pair["rejected"]:
        raise RecordError(f"{name}: chosen begins with the prompt's messages, rejected does not; give both alike")
    pair = extract_prompt(pair)
    given = row.get("prompt") or ""
    texts = [given] if isinstance(given, str) else [message.get("content") for message in given]
    there = [message.get("content") for message in pair["prompt"]]
    if any(not any(_is_within(text, content) for content in there) for text in texts):
        raise RecordError(
            f"{name}: prompt = {str(given)[:80]!r} must be among the messages that chosen and rejected begin with; "
            "remove the column, or begin both with it"
        )
    return pair


def _is_within(text: Any, content: Any) -> bool:
    return text == content or (isinstance(text, str) and isinstance(content, str) and text.strip() in content)


def _reason_to_drop(pair: Mapping[str, Any]) -> str | None:
    if is_empty(pair["chosen"]) or is_empty(pair["rejected"]):
        return "empty"
    return "equal" if pair["chosen"] == pair["rejected"] else None
