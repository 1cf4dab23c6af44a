"""Completions in the files that win-rate judges read: AlpacaEval's model outputs, Arena-Hard-Auto's model answers."""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from .atomic import atomic_path
from .errors import ConfigError, MissingColumnError, RecordError
from .locks import locked
from .progress import watched
from .records import Record, check_records, row_name

#: What Arena-Hard-Auto's style control counts in an answer, code blocks left out.
_CODE = re.compile("```[^`]*```")
_HEADER = re.compile(r"^(#{1,6})\s", re.MULTILINE)
_LISTS = {
    "ordered": re.compile(r"^\s*\d+\.\s", re.MULTILINE),
    "unordered": re.compile(r"^\s*[-*+]\s", re.MULTILINE),
}
_BOLD = {"**": re.compile(r"\*\*[^*\n]+\*\*"), "__": re.compile(r"__[^_\n]+__")}


def export_completions(
    samples: Sequence[Record], out_path: str | os.PathLike, format_: str, model_name: str
) -> dict[str, int]:
    """Writes one completion per prompt in a judge's format; the file appears whole or not at all.

    `alpaca-eval`: a JSON list of `instruction`, `output`, `generator`, and `dataset` where the prompts have one, for
    `alpaca_eval --model_outputs FILE`. `arena-hard`: JSON lines of `uid`, `ans_id`, `model`, `messages`, `tstamp`,
    `metadata`, to be put under `data/<benchmark>/model_answer/<model>.jsonl`; `metadata.token_len` counts the model's own
    tokens, which `utils/add_markdown_info.py` there replaces where lengths must be comparable.

    Args:
        samples: sample or verdict records of open-ended prompts, one draw each.
        model_name: how the leaderboard calls the model.

    Returns:
        Counts: `rows`, `cut` (completions that were cut at their length limit), `empty`.

    Raises:
        ConfigError: an unknown format, or no model name.
        RecordError, MissingColumnError: several draws of a prompt, or a prompt that is not one user message.
    """
    check_format(format_)
    if not model_name:
        raise ConfigError("an export needs the model's name, as the leaderboard shall call it")
    check_records(samples, "sample", source="samples")
    if not samples:
        raise RecordError("there are no samples to export; run `align sample` first")
    seen: set[str] = set()
    rows = []
    for index, row in enumerate(watched(samples, f"export {format_}")):
        if row["id"] in seen:
            raise RecordError(
                f"samples, {row_name(row, index)}: a second draw of this prompt; judges read one, so sample with --n 1"
            )
        seen.add(row["id"])
        instruction = _instruction(row, f"samples, {row_name(row, index)}")
        rows.append(_WRITERS[format_](row, instruction, model_name))
    with locked(out_path), atomic_path(out_path) as temporary:
        if format_ == "alpaca-eval":
            text = json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
        else:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text(text, encoding="utf-8")
    return {
        "rows": len(rows),
        "cut": sum(row["finish_reason"] == "length" for row in samples),
        "empty": sum(not row["completion"].strip() for row in samples),
    }


def check_format(format_: str) -> None:
    """Raises a ConfigError where there is no such format."""
    if not isinstance(format_, str) or format_ not in _WRITERS:
        raise ConfigError(f"export format {format_!r} is unknown; there are {', '.join(_WRITERS)}")


def _instruction(row: Record, name: str) -> str:
    """The instruction as it stood in the source: a judge joins outputs and references on it."""
    if isinstance(row.get("instruction"), str):
        return row["instruction"]
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    users = [message["content"] for message in prompt if message["role"] == "user" and message.get("content")]
    if len(users) != 1:
        raise MissingColumnError(f"{name}: its prompt has {len(users)} user messages; give a column `instruction`")
    return users[0]


def _whole_answer(row: Record) -> str:
    """The assistant's turn; its beginning may stand in the prompt."""
    last = {} if isinstance(row["prompt"], str) else row["prompt"][-1]
    begun = last.get("content") if last.get("role") == "assistant" else ""
    return ((begun if isinstance(begun, str) else "") + row["completion"]).strip()


def _alpaca(row: Record, instruction: str, model_name: str) -> dict[str, Any]:
    found = {"instruction": instruction, "output": _whole_answer(row), "generator": model_name}
    return {**({"dataset": row["dataset"]} if "dataset" in row else {}), **found}


def _arena(row: Record, instruction: str, model_name: str) -> dict[str, Any]:
    prompt, answer = row["prompt"], _whole_answer(row)
    messages = [{"role": "user", "content": instruction}] if isinstance(prompt, str) else list(prompt)
    messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    plain = _CODE.sub("", answer)
    levels = [len(hashes) for hashes in _HEADER.findall(plain)]
    counts = {"header_count": {f"h{level}": levels.count(level) for level in range(1, 7)}} | {
        f"{name}_count": {kind: len(pattern.findall(plain)) for kind, pattern in patterns.items()}
        for name, patterns in (("list", _LISTS), ("bold", _BOLD))
    }
    # Half a surrogate pair is refused where the file is written.
    whole = f"{model_name} {row['id']} {answer}".encode(errors="replace").decode()
    return {
        "uid": row["id"],
        # The same answers have the same ids, so that an export made twice is the same but for its time.
        "ans_id": uuid.uuid5(uuid.NAMESPACE_URL, whole).hex,
        "model": model_name,
        "messages": [*messages, {"role": "assistant", "content": {"answer": answer}}],
        "tstamp": time.time(),
        "metadata": {"token_len": len(row["completion_ids"]), **counts},
    }


#: Formats by the name that `align evaluate --export` takes.
_WRITERS = {"alpaca-eval": _alpaca, "arena-hard": _arena}
