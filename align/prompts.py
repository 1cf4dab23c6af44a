"""From the columns of a row to the prompt that a model reads: one rule for problems, preferences and demonstrations.

**Nothing that is given is ignored.** A column or an option is in the prompt, or an error names it:

| given | text prompt | text prompt with `chat` | messages |
|---|---|---|---|
| `input` or `context` beside `instruction` | instruction, line break, input (LLaMA-Factory's rule for Alpaca rows) | the same | error |
| `system` or `system_prompt` column, `system_prompt` option | error | system message in front | system message in front; error where there is another |
| `history`: pairs of user and assistant | error | earlier turns | error |
| `prompt_template` option | applied | applied | error |
| `tools`, `chat_template_kwargs` | error | arguments of the chat template | arguments of the chat template |
| `chat_template_kwargs` option | error | below the row's own, key by key | below the row's own, key by key |
| `image`, `images`, `video`, `videos`, `audio`, `audios` | error | error | error |

A column whose text is already in the prompt is not an error: some data sets keep the rendered prompt beside its parts. A
template must read the arguments that it gets. Columns of other names are not a prompt's, and are left as they are.
Commands and `load_problems` apply the table. Trainers take prompts as TRL does; they apply `tools` and
`chat_template_kwargs`, and refuse the other columns where their text is not in the prompt.

**A key without a value is a key that is missing.** Arrow (Parquet, `datasets`) gives all objects of a column the same
keys and fills the gaps with null, so a null that was written and one that was filled in cannot be told apart. In messages,
tools and arguments of the template, keys with null are therefore left out, whichever file the row comes from; nulls in
lists stay. JSON text is taken as it is: who needs a null gives `tools`, or a call's `arguments`, as JSON text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError, RecordError
from .records import Record, check_prompt

#: Names under which public data sets keep a prompt; the first one found is used.
PROMPT_COLUMNS = ("prompt", "question", "problem", "instruction")

#: What an instruction is about: Alpaca's and Dolly's names.
INPUT_COLUMNS = ("input", "context")
SYSTEM_COLUMNS = ("system", "system_prompt")
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")

#: Columns that a model should read. Each is in the prompt, or an error.
READ_COLUMNS = ("instruction", *INPUT_COLUMNS, *SYSTEM_COLUMNS, "history", *MEDIA_COLUMNS)

#: What `align` itself gives the chat template, or its tokenizer.
_RESERVED = (
    *("conversation", "messages", "tokenizer", "name", "add_generation_prompt", "continue_final_message", "tokenize"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    "tokenizer_kwargs",
)

#: Arguments that transformers reads, not the template.
_NOT_OF_THE_TEMPLATE = ("chat_template",)


@dataclass(frozen=True)
class Phrasing:
    """How commands put prompts.

    Args:
        chat: makes a text prompt a user message.
        prompt_template: text with `{prompt}` in it, for text prompts.
        system_prompt: text of a system message.
        chat_template_kwargs: arguments of the chat template, such as `{"enable_thinking": False}`.

    Raises:
        ConfigError: a value of the wrong kind.
    """

    chat: bool = False
    prompt_template: str | None = None
    system_prompt: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise ConfigError(f"prompt_template {self.prompt_template!r} has no {{prompt}} in it")
        if self.chat_template_kwargs is not None:
            _check_arguments(self.chat_template_kwargs, "chat_template_kwargs", ConfigError)


def phrase(row: Mapping[str, Any], prompt: Any, name: str, how: Phrasing, column: str = "prompt") -> Record:
    """Put a row's prompt into the words that the model reads.

    Args:
        row: all columns of the row.
        prompt: its prompt, text or messages.
        name: how an error names the row.
        column: the column that the prompt comes from.

    Returns:
        `prompt`, and `tools` and `chat_template_kwargs` where there are any.

    Raises:
        RecordError: a column has no place in the prompt.
        ConfigError: an option has none.
    """
    check_prompt(prompt, name)
    asked = ""
    if isinstance(prompt, str):
        prompt = asked = with_input(row, prompt, column)
        prompt = prompt if how.prompt_template is None else how.prompt_template.replace("{prompt}", prompt)
        if how.chat:
            prompt = [*_history(row, name), {"role": "user", "content": prompt}]
    elif how.prompt_template is not None:
        raise ConfigError(
            f"{name}: prompt_template needs text, and the prompt is messages; leave the option out, or give the prompt as text"
        )
    prompt = _with_system(row, without_nulls(prompt), name, how.system_prompt)
    found = template_columns(row, name, how.chat_template_kwargs)
    if found and isinstance(prompt, str):
        raise ConfigError(
            f"{name}: {' and '.join(found)} need a chat template, and the prompt is text; set chat, or give messages"
        )
    check_used(row, [asked, prompt], name)
    return {"prompt": prompt, **found}


def with_input(row: Mapping[str, Any], prompt: str, column: str) -> str:
    """Put Alpaca's input below its instruction: `instruction`, a line break, `input`."""
    more = [row[name] for name in INPUT_COLUMNS if isinstance(row.get(name), str) and row[name].strip()]
    return "\n".join([prompt, *more]) if column == "instruction" else prompt


def _history(row: Mapping[str, Any], name: str) -> list[Record]:
    """Earlier turns of a row: Alpaca's `history`, pairs of what the user and the assistant wrote."""
    history = row.get("history") or []
    pairs = isinstance(history, Sequence) and not isinstance(history, str)
    if not pairs or not all(_is_pair(pair) for pair in history):
        raise RecordError(
            f"{name}: history = {str(history)[:80]!r} must be a list of pairs of user's and assistant's text; "
            "give earlier turns so, or as messages"
        )
    return [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _with_system(row: Mapping[str, Any], prompt: Any, name: str, option: str | None) -> Any:
    """Put the system message of a column, or of the option, in front of messages."""
    given = [row[column] for column in SYSTEM_COLUMNS if isinstance(row.get(column), str) and row[column].strip()]
    if isinstance(prompt, str):
        if option is not None:
            raise ConfigError(f"{name}: system_prompt needs chat: true, or a prompt of messages; the prompt is text")
        return prompt
    given = list(dict.fromkeys(given if option is None else [option, *given]))
    there = [message.get("content") for message in prompt if message["role"] in ("system", "developer")]
    wanted = [text for text in given if text not in there]
    if len(wanted) > 1 or (wanted and there):
        found = [*there, *wanted]
        raise RecordError(
            f"{name}: there are two system prompts, {str(found[0])[:60]!r} and {str(found[1])[:60]!r}; keep one of them"
        )
    return [*({"role": "system", "content": text} for text in wanted), *prompt]


def template_columns(row: Mapping[str, Any], name: str, option: Mapping[str, Any] | None = None) -> Record:
    """The columns `tools` and `chat_template_kwargs` of a row, where they hold anything; its own keys win over the option's."""
    arguments = {**(option or {}), **_json(row, "chat_template_kwargs", Mapping, name)}
    _check_arguments(arguments, f"{name}: chat_template_kwargs", RecordError)
    tools = _json(row, "tools", list, name)
    if tools and "tools" in arguments:
        raise RecordError(f"{name}: tools stands in chat_template_kwargs, too; keep one of them")
    # JSON text stays text in records: its nulls were meant, and would be taken for gaps.
    return ({"tools": row["tools"] if isinstance(row["tools"], str) else tools} if tools else {}) | (
        {"chat_template_kwargs": arguments} if arguments else {}
    )


def template_arguments(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Arguments of the chat template that a row brings along: its `tools` (a list, or JSON of one) and its
    `chat_template_kwargs` (an object, or JSON of one).

    Raises:
        RecordError: they are something else, or the row's `prompt` is text, which no template renders.
    """
    found = template_columns(row, name)
    if found and isinstance(row.get("prompt"), str):
        raise RecordError(
            f"{name}: {' and '.join(found)} need a chat template, and the prompt is text; give messages, or remove the column"
        )
    tools = {"tools": _json(row, "tools", list, name)} if "tools" in found else {}
    return {**tools, **found.get("chat_template_kwargs", {})}


def _json(row: Mapping[str, Any], column: str, kind: type, name: str) -> Any:
    """A column's value, or the value of its JSON text; empty where it has none."""
    value = row.get(column)
    if value in (None, "") or (isinstance(value, str) and not value.strip()):
        return kind() if kind is list else {}
    try:
        found = json.loads(value) if isinstance(value, str) else without_nulls(value)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, kind):
        what = "a list" if kind is list else "an object"
        raise RecordError(f"{name}: {column} = {str(value)[:80]!r} must be {what}, or JSON of one; fix or remove it")
    return found


def _check_arguments(arguments: Any, name: str, error: type) -> None:
    if not isinstance(arguments, Mapping) or any(not isinstance(key, str) for key in arguments):
        raise error(f"{name} = {str(arguments)[:80]!r} must be an object; give it as {{name: value}}")
    if reserved := [key for key in arguments if key in _RESERVED]:
        raise error(f"{name}: {reserved[0]} is set by align; leave it out")


def check_template(chat_template: Any, arguments: Mapping[str, Any], name: str) -> None:
    """Check that a chat template reads its arguments; one that it does not read would change nothing, without a word.

    Args:
        chat_template: its text, as `tokenizer.get_chat_template` gives it.
        arguments: what `template_arguments` gave.

    Raises:
        RecordError: names the argument.
    """
    words = set(re.findall(r"\w+", chat_template)) if isinstance(chat_template, str) else set()
    unread = [key for key in arguments if key not in words and key not in _NOT_OF_THE_TEMPLATE]
    if unread and words:
        raise RecordError(
            f"{name}: the chat template does not read {unread[0]}, so it would change nothing; leave it out, or use a tokenizer "
            "whose template reads it"
        )


def check_used(row: Mapping[str, Any], prompt: Any, name: str) -> None:
    """Check that columns which a model should read are in the prompt.

    Raises:
        RecordError: names the column, its value and the remedy.
    """
    text = "\n".join(leaf for leaf in _leaves(prompt) if isinstance(leaf, str))
    for column in READ_COLUMNS:
        leaves = list(_leaves(row.get(column)))
        if all(isinstance(leaf, str) and _stands_in(leaf.strip(), text) for leaf in leaves):
            continue
        remedy = (
            "align reads text alone; remove the column"
            if column in MEDIA_COLUMNS
            else "set chat, or write it into the prompt, or remove the column"
        )
        raise RecordError(f"{name}: {column} = {str(row[column])[:80]!r} must be in the prompt; {remedy}")


def _stands_in(part: str, text: str) -> bool:
    """Whether a prompt holds a column's text: as whole lines or, where it has several words, within a line.

    A single word or number may be in a line by chance.
    """
    whole = re.escape(part)
    between = rf"|(?<!\w){whole}(?!\w)" if len(part.split()) > 1 else ""
    return not part or re.search(rf"(?:^|\n)[ \t]*{whole}[ \t]*(?=\n|$){between}", text) is not None


def with_content(messages: Any) -> Any:
    """Messages with an empty content where they have none (tool calls), which chat templates ask for."""
    if not isinstance(messages, list):
        return messages
    return [{**one, "content": ""} if "role" in one and one.get("content") is None else one for one in messages]


def _leaves(value: Any) -> Iterator[Any]:
    """What a nested value holds besides lists, objects and nulls."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)
    elif value is not None:
        yield value


def without_nulls(value: Any) -> Any:
    """Leave out keys whose value is null, at any depth; a message keeps its `content`, and lists keep their nulls."""
    if isinstance(value, Mapping):
        return {
            key: without_nulls(part)
            for key, part in value.items()
            if part is not None or (key == "content" and "role" in value)
        }
    return [without_nulls(part) for part in value] if isinstance(value, (list, tuple)) else value
