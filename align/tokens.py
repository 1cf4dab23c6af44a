"""Where a prompt meets a completion: tokenizing once, the boundary, EOS, and the shift by one.

Nothing else in `align` adds an EOS, cuts ids at the boundary, or shifts positions. Layout of one row of width L:

    position   0 … P-1          P … P+C-1            …  L-1
    content    prompt_ids       completion_ids           padding

The logits at position i predict the token at i + 1, so label position i of the shifted row (width L-1) holds what
belongs to token i + 1; completion token j is found at label position P - 1 + j.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import MissingColumnError, RecordError
from .prompts import check_template, template_arguments, without_nulls
from .records import check_ids, check_prompt, row_name

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict],
    name: str = "prompt",
    template: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of a prompt as the model sees it when it generates: BOS where the tokenizer adds one, or the chat template
    with its generation prompt.

    Args:
        tokenizer: any transformers tokenizer.
        prompt: text, or chat messages.
        name: how an error names the row.
        template: further arguments of the chat template, `tools` among them.

    Raises:
        RecordError: no ids come out (an empty prompt without BOS), or messages without a chat template.
    """
    check_prompt(prompt, name)
    if isinstance(prompt, str):
        ids = _text_ids(tokenizer, prompt, name)
        if ids and not prompt.endswith(tokenizer.eos_token or "\0") and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]  # some tokenizers close every text with EOS; a prompt goes on
    else:
        ids = _chat_ids(tokenizer, without_nulls(prompt), name, add_generation_prompt=True, **(template or {}))
        if template:
            check_template(
                tokenizer.get_chat_template(template.get("chat_template"), template.get("tools")), template, name
            )
    if not ids:
        raise RecordError(f"{name}: the prompt {prompt!r} gives no tokens, so nothing predicts the first one; add text")
    return ids


def _chat_ids(tokenizer, messages: list[dict], name: str, **kwargs) -> list[int]:
    if not tokenizer.chat_template:
        raise RecordError(
            f"{name}: chat messages need a tokenizer with a chat template; set `tokenizer.chat_template` or give text"
        )
    try:
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)["input_ids"])
    except Exception as error:  # noqa: BLE001 - a template is a program of its own, and raises what it likes
        raise RecordError(
            f"{name}: the chat template cannot render {str(messages)[:200]} ({type(error).__name__}: {error}); mend the messages"
        ) from error


def _text_ids(tokenizer, text: str, name: str, **kwargs) -> list[int]:
    try:
        return list(tokenizer(text, **kwargs)["input_ids"])
    except (TypeError, UnicodeEncodeError):  # which of the two is the tokenizers library's choice
        raise RecordError(f"{name}: {text[:80]!r} is no Unicode text; remove the half of a surrogate pair") from None


def encode_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict],
    completion: str | list[dict],
    prompt_ids: Sequence[int],
    name: str = "completion",
    template: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of a completion that follow `prompt_ids`, EOS included.

    The prompt's ids stay what the model sees when it generates. Where prompt and completion together are tokenized to
    an extension of them, the completion is the rest. Where tokens would merge across the boundary, the completion is
    tokenized on its own, and the result is checked to decode to the text.

    Args:
        prompt, completion: both text or both chat messages.
        prompt_ids: what `encode_prompt` gave.
        template: see `encode_prompt`.

    Raises:
        RecordError: the completion is empty, the chat template renders the prompt differently when an answer follows,
            or no ids decode to the text.
    """
    if not completion:
        raise RecordError(f"{name} is empty; remove the row or give it text")
    check_prompt(completion, name, "completion")
    prompt_ids = list(prompt_ids)
    if isinstance(completion, str) and isinstance(prompt, str):
        return add_eos(_text_completion_ids(tokenizer, prompt, completion, prompt_ids, name), tokenizer.eos_token_id)
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if isinstance(prompt, str):
        raise RecordError(f"{name} is chat messages, but its prompt is text; give both as text or both as messages")
    template, prompt, completion = template or {}, without_nulls(prompt), without_nulls(completion)
    ids = _chat_ids(tokenizer, [*prompt, *completion], name, **template)
    if ids[: len(prompt_ids)] == prompt_ids and len(ids) > len(prompt_ids):
        return ids[len(prompt_ids) :]
    # Leading white space of an answer can merge with the template's last line; the rest of the text is then tokenized.
    before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **template)
    whole = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False, **template)
    if not whole.startswith(before) or len(whole) == len(before):
        raise RecordError(
            f"{name}: the chat template renders the prompt differently when an answer follows (or leaves the answer "
            "out), so there is no boundary between them; use a template whose generation prompt is a prefix of the "
            "whole conversation, or give prompt and completions as text"
        )
    return _apart(tokenizer, prompt_ids, before, whole[len(before) :], whole, [], name)


def _text_completion_ids(tokenizer, prompt: str, completion: str, prompt_ids: list[int], name: str) -> list[int]:
    together = _text_ids(tokenizer, prompt + completion, name)
    if together[-1:] == [tokenizer.eos_token_id] and not completion.endswith(tokenizer.eos_token):
        together = together[:-1]
    candidates = [together[len(prompt_ids) :]] if together[: len(prompt_ids)] == prompt_ids else []
    return _apart(tokenizer, prompt_ids, prompt, completion, _decode(tokenizer, together), candidates, name)


def _apart(
    tokenizer, prompt_ids: list[int], prompt: str, completion: str, text: str, candidates: list[list[int]], name: str
) -> list[int]:
    """The first way of tokenizing a completion apart from its prompt that decodes, with the prompt's ids, to `text`."""
    candidates.append(list(tokenizer(completion, add_special_tokens=False)["input_ids"]))
    # Tokenizers that put a space before every text need a first line to hold it.
    held = list(tokenizer("\n" + completion, add_special_tokens=False)["input_ids"])
    first = list(tokenizer("\n", add_special_tokens=False)["input_ids"])
    if held[: len(first)] == first:
        candidates.append(held[len(first) :])
    for ids in candidates:
        if ids and _decode(tokenizer, prompt_ids + ids) == text:
            return ids
    raise RecordError(
        f"{name}: the ids of the prompt, ending in {prompt[-20:]!r}, and of the completion, beginning with "
        f"{completion[:20]!r}, do not decode to their text together; end the prompt on a token boundary "
        "(without a trailing space, say) or give ids"
    )


def _decode(tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def add_eos(ids: Sequence[int], eos_token_id: int | None) -> list[int]:
    """`ids` with EOS at the end, once."""
    ids = list(ids)
    return ids if eos_token_id is None or (ids and ids[-1] == eos_token_id) else [*ids, eos_token_id]


def encode_pair(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], name: str) -> dict[str, list[int]]:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of a preference row of text or messages.

    A conversational row without `prompt` has it as the messages that chosen and rejected begin with (TRL's implicit
    prompt). Its `tools` (a list, or JSON text of one) and `chat_template_kwargs` reach the chat template, as in TRL.

    Raises:
        MissingColumnError: `chosen`, `rejected`, or a text row's `prompt` is missing.
        RecordError: see `encode_prompt` and `encode_completion`.
    """
    for column in ("chosen", "rejected"):
        if row.get(column) is None:
            raise MissingColumnError(
                f"{name}: column {column!r} is missing; a preference row has prompt, chosen, rejected"
            )
    if row.get("prompt") is None:
        if isinstance(row["chosen"], str):
            raise MissingColumnError(f"{name}: column 'prompt' is missing; text completions need it")
        from trl.data_utils import extract_prompt

        for side in ("chosen", "rejected"):
            check_prompt(row[side], name, side)
            if isinstance(row[side], str):
                raise RecordError(f"{name}: chosen is messages, {side} is text; give both alike")
        row = extract_prompt(dict(row))
    template = template_arguments(row, name)
    prompt_ids = encode_prompt(tokenizer, row["prompt"], f"{name}: prompt", template)
    ids = {"prompt_ids": prompt_ids}
    for side in ("chosen", "rejected"):
        where = f"{name}: {side}"
        ids[f"{side}_ids"] = encode_completion(tokenizer, row["prompt"], row[side], prompt_ids, where, template)
    return ids


def encode_problem(tokenizer: PreTrainedTokenizerBase, problem: Mapping[str, Any], name: str) -> list[int]:
    """Ids of a problem's prompt; its `tools` and `chat_template_kwargs` reach the chat template, see `encode_prompt`."""
    return encode_prompt(tokenizer, problem["prompt"], name, template_arguments(problem, name))


def check_pair_ids(row: Mapping[str, Any], index: int, vocab_size: int) -> None:
    """`check_row_ids` of a pair."""
    check_row_ids(row, index, ("prompt_ids", "chosen_ids", "rejected_ids"), vocab_size)


def check_row_ids(row: Mapping[str, Any], index: int, columns: Sequence[str], vocab_size: int) -> None:
    """Checks the ids of a row: in the vocabulary, neither the prompt nor a completion empty.

    Raises:
        MissingColumnError: a column of ids is missing.
        RecordError: names the row, the value and the remedy.
    """
    name = row_name(row, index)
    for column in columns:
        if row.get(column) is None:
            raise MissingColumnError(f"{name}: column {column!r} is missing; the row needs {', '.join(columns)}")
        check_ids(row[column], column, name, vocab_size)
        if len(row[column]) == 0:
            raise RecordError(f"{name}: {column} is empty; remove the row")


def decode_completion(tokenizer: PreTrainedTokenizerBase, completion_ids: Sequence[int]) -> str:
    """Text of a completion, without EOS and other special tokens."""
    return tokenizer.decode(completion_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def label_values(values: Sequence[float], prompt_length: int) -> list[float]:
    """Numbers of completion tokens as a row beside `prompt_ids + completion_ids`: 0 for the prompt's tokens."""
    return [0.0] * prompt_length + list(values)


def truncate(row: Sequence, max_length: int | None, truncation_mode: str = "keep_start") -> Sequence:
    """The part of a row that TRL's collator keeps: its first (`keep_start`) or last (`keep_end`) `max_length` items."""
    if max_length is None:
        return row
    return row[:max_length] if truncation_mode == "keep_start" else row[-max_length:]


def truncate_completion(
    prompt_length: int, completion_ids: Sequence, max_length: int | None, truncation_mode: str = "keep_start"
) -> Sequence:
    """The part of a completion that TRL's collator keeps behind a prompt of some length, see `truncate`."""
    if max_length is not None and truncation_mode == "keep_start":
        max_length = max(0, max_length - prompt_length)
    return truncate(completion_ids, max_length, truncation_mode)


def shift_to_labels(rows: torch.Tensor) -> torch.Tensor:
    """(B, L) values beside input ids -> (B, L-1) values beside the shifted labels, where TRL's log-probabilities lie."""
    return rows[:, 1:]


def pad_rows(rows: Sequence[Sequence], value: float, width: int | None = None) -> torch.Tensor:
    """(B, L) tensor of rows padded on the right with `value`, to the longest or to `width`."""
    import torch

    width = max(map(len, rows)) if width is None else width
    return torch.tensor([list(row) + [value] * (width - len(row)) for row in rows])
