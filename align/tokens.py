"""Where a prompt meets a completion: tokenizing once, the boundary, EOS, and the shift by one.

Nothing else in `align` adds an EOS, cuts ids at the boundary, or shifts positions. Layout of one row of width L:

    position   0 … P-1          P … P+C-1            …  L-1
    content    prompt_ids       completion_ids           padding

The logits at position i predict the token at i + 1, so label position i of the shifted row (width L-1) holds what
belongs to token i + 1; completion token j is found at label position P - 1 + j.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, MissingColumnError, RecordError
from .prompts import check_template, template_arguments, with_content, without_nulls
from .records import REASONING, SAID, check_ids, check_prompt, is_empty, row_name

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerBase

#: Stands for an answer's text where only what a chat template writes around it matters.
_MARK = "ANSWERTEXTMARK"


# What a completion ends with ------------------------------------------------------------------------------------------


@dataclass
class CompletionRule:
    """What completions are made of, and what they end with: one rule for all rows of a run.

    A completion is what `align sample` would have drawn: the model's own turn, up to and including its first end token.
    What a chat template writes after that token (a line break, say) is cut. Where there is no end token, EOS is added;
    for a chat template, one warning a run says so.

    Args:
        end_ids: the tokens that end a turn; see `end_ids_of`.
        eos_token_id: the one that is added; `None` adds nothing.
        trl: makes completions as TRL does. All that a chat template writes after the prompt is the completion, turns of
            others included. Text gets EOS unless it ends with it.
    """

    end_ids: Sequence[int]
    eos_token_id: int | None
    trl: bool = False
    _said: list[str] = field(default_factory=list, repr=False)

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        checkpoint: GenerationConfig | str | None = None,
        trl: bool = False,
        source: Mapping[str, Any] | None = None,
    ) -> CompletionRule:
        """The rule of a tokenizer and its checkpoint.

        Args:
            checkpoint: generation settings of the model that is trained, or where it is loaded from; by default where the
                tokenizer is from.
            source: which of its revisions; see `align.hub.Source`. By default that of `align.load_tokenizer`.
        """
        eos, checkpoint = tokenizer.eos_token_id, checkpoint or tokenizer.name_or_path
        source = source if source is not None else getattr(tokenizer, "align_source", {})
        settings = generation_config_of(checkpoint, source) if isinstance(checkpoint, str) else checkpoint
        return cls([] if eos is None else end_ids_of(eos, settings), eos, trl)

    def check_unused(self, name: str) -> None:
        """Raises a ConfigError where rows have ids already, and the option would do nothing."""
        if self.trl:
            raise ConfigError(
                f"{name}: trl_completions = True has no effect on ids; unset it, and give it where the ids are made (`align tokenize`)"
            )

    def say(self, what: str, message: str) -> None:
        """Warns of `what`, once a run, in the words of its first row."""
        if what not in self._said:
            self._said.append(what)
            warnings.warn(message, stacklevel=2)


def generation_config_of(path: str, source: Mapping[str, Any] | None = None) -> GenerationConfig | None:
    """A checkpoint's generation settings, from its files alone; `None` where there are none."""
    from transformers import AutoConfig, GenerationConfig

    if not path:  # a tokenizer that was made on the spot
        return None
    source = source or {}
    try:
        of_code = ("trust_remote_code", "code_revision")
        return GenerationConfig.from_pretrained(path, **{k: v for k, v in source.items() if k not in of_code})
    except (OSError, ValueError):
        pass
    try:
        return GenerationConfig.from_model_config(
            AutoConfig.from_pretrained(path, **{**source, "trust_remote_code": False})
        )
    except (OSError, ValueError):  # a folder with a tokenizer alone, or a model with code of its own
        return None


def end_ids_of(eos: int, generation_config: GenerationConfig | None) -> list[int]:
    """EOS, and the end tokens that a checkpoint's generation settings name, in order (chat models often have several)."""
    own = None if generation_config is None else generation_config.eos_token_id
    own = [] if own is None else [own] if isinstance(own, int) else list(own)
    return sorted({eos, *own})


def first_end(ids: Sequence[int], end_ids: Iterable[int], start: int = 0) -> int | None:
    """How many of `ids` there are up to and including the first end token from `start` on; `None` without one."""
    return next((place + 1 for place in range(start, len(ids)) if ids[place] in end_ids), None)


def add_eos(ids: Sequence[int], eos_token_id: int | None) -> list[int]:
    """`ids` with EOS at the end, once."""
    ids = list(ids)
    return ids if eos_token_id is None or (ids and ids[-1] == eos_token_id) else [*ids, eos_token_id]


def _ended(tokenizer, ids: list[int], rule: CompletionRule, name: str, chat: bool) -> list[int]:
    """`ids` as the rule ends them.

    Raises:
        RecordError: text follows the first end token, which no model that stops there would write.
    """
    if rule.trl:
        return ids if chat else add_eos(ids, rule.eos_token_id)
    end = first_end(ids, rule.end_ids)
    if end is None:
        if chat:
            rule.say("no end", _without_end(tokenizer, ids, rule))
        return add_eos(ids, rule.eos_token_id)
    if tokenizer.decode(ids[end:], skip_special_tokens=True).strip():
        raise RecordError(
            f"{name}: text follows its first end token, {tokenizer.decode(ids[end - 1 : end])!r}: "
            f"{_decode(tokenizer, ids[end:])[:80]!r}; end the completion there, or make rows of its turns"
        )
    return ids[:end]


def _without_end(tokenizer, ids: Sequence[int], rule: CompletionRule) -> str:
    ends = ", ".join(repr(tokenizer.decode([token])) for token in rule.end_ids)
    return (
        f"the chat template ends answers with {_decode(tokenizer, ids[-3:])!r}, not with an end token ({ends or 'there is none'}); "
        f"{tokenizer.eos_token!r} is added, as sampled completions have it. Where another token ends turns, name it as the "
        "tokenizer's eos_token or in the model's generation_config; trl_completions leaves answers as the template writes them"
    )


# Text ------------------------------------------------------------------------------------------------------------------


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict],
    name: str = "prompt",
    template: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of a prompt as the model sees it when it generates: BOS where the tokenizer adds one, or the chat template
    with its generation prompt.

    Messages that end with an assistant's turn are not answered by another turn: this one goes on where its text ends, as
    with transformers' `continue_final_message`.

    Args:
        tokenizer: any transformers tokenizer.
        prompt: text, or chat messages.
        name: how an error names the row.
        template: further arguments of the chat template, `tools` among them.

    Raises:
        RecordError: no ids come out (an empty prompt without BOS), messages without a chat template, or a last turn that
            cannot go on.
    """
    return _prompt_as_seen(tokenizer, prompt, name, template or {})[1]


def _prompt_as_seen(tokenizer, prompt, name: str, template: Mapping[str, Any]) -> tuple[str, list[int]]:
    """A prompt's text and ids as the model sees them when it generates."""
    check_prompt(prompt, name)
    if isinstance(prompt, str):
        text, ids = prompt, _text_ids(tokenizer, prompt, name)
        if ids and not prompt.endswith(tokenizer.eos_token or "\0") and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]  # some tokenizers close every text with EOS; a prompt goes on
    else:
        text = _before(tokenizer, without_nulls(prompt), name, template)
        ids = _rendered_ids(tokenizer, text, name)
        if template:
            check_template(
                tokenizer.get_chat_template(template.get("chat_template"), template.get("tools")), template, name
            )
    if not ids:
        raise RecordError(f"{name}: the prompt {prompt!r} gives no tokens, so nothing predicts the first one; add text")
    return text, ids


def _text_ids(tokenizer, text: str, name: str, **kwargs) -> list[int]:
    try:
        ids = list(tokenizer(text, **kwargs)["input_ids"])
    except (TypeError, UnicodeEncodeError):  # which of the two is the tokenizers library's choice
        raise RecordError(f"{name}: {text[:80]!r} is no Unicode text; remove the half of a surrogate pair") from None
    # Text that was rendered before begins with BOS; the tokenizer adds another one.
    bos = tokenizer.bos_token_id
    twice = bos is not None and ids[:2] == [bos, bos] and text.startswith(tokenizer.bos_token)
    return ids[1:] if twice else ids


def _whole_text_ids(tokenizer, prompt: str, completion: str, name: str) -> list[int]:
    together = _text_ids(tokenizer, prompt + completion, name)
    if together[-1:] == [tokenizer.eos_token_id] and not completion.endswith(tokenizer.eos_token):
        together = together[:-1]
    return together


def _text_completion_ids(tokenizer, prompt: str, completion: str, prompt_ids: list[int], name: str) -> list[int]:
    together = _whole_text_ids(tokenizer, prompt, completion, name)
    return _apart(tokenizer, prompt_ids, prompt, completion, together, name)


def _shared_text(
    tokenizer, prompt: str, prompt_ids: list[int], completions: Mapping[str, str], names: Mapping[str, str]
) -> list[int]:
    """The first ids of a text prompt, as many as the ids of every whole text begin with."""
    wholes = [_whole_text_ids(tokenizer, prompt, one, names[side]) for side, one in completions.items()]
    return commonprefix([prompt_ids, *wholes])


def _shortened(tokenizer, rest: Sequence[int]) -> str:
    return (
        f"tokens merge across the end of a text prompt, {_decode(tokenizer, rest)!r}, so some prompts end before it, as in TRL; end "
        "prompts on a token boundary, or unset trl_completions"
    )


def _apart(tokenizer, prompt_ids: list[int], prompt: str, completion: str, together: list[int], name: str) -> list[int]:
    """Tokenize a completion so that `prompt_ids` and its ids decode to what `together`, the ids of the whole text, decode to.

    The ids are the rest of `together` where that begins with `prompt_ids`. Where tokens merge across the boundary, the
    completion is tokenized on its own.
    """
    text = _decode(tokenizer, together)
    candidates = [together[len(prompt_ids) :]] if together[: len(prompt_ids)] == prompt_ids else []
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


# Chat messages ---------------------------------------------------------------------------------------------------------


def _render(tokenizer, messages: list[dict], name: str, template: Mapping[str, Any], **kwargs) -> str:
    """What a chat template writes; messages without content (tool calls) get an empty one, which templates ask for."""
    if not tokenizer.chat_template:
        raise RecordError(
            f"{name}: chat messages need a tokenizer with a chat template; set `tokenizer.chat_template` or give text"
        )
    try:
        return tokenizer.apply_chat_template(with_content(list(messages)), tokenize=False, **template, **kwargs)
    except Exception as error:  # noqa: BLE001 - a template is a program of its own, and raises what it likes
        raise RecordError(
            f"{name}: the chat template cannot render {str(messages)[:200]} ({type(error).__name__}: {error}); fix the messages"
        ) from error


def _rendered_ids(tokenizer, text: str, name: str) -> list[int]:
    return _text_ids(tokenizer, text, name, add_special_tokens=False)  # the template has written BOS


def _is_prefilled(prompt: Sequence[Mapping[str, Any]]) -> bool:
    return prompt[-1]["role"] == "assistant"


def _before(tokenizer, prompt: list[dict], name: str, template: Mapping[str, Any]) -> str:
    """What the model sees when it is to answer `prompt`."""
    _check_rendered(tokenizer, prompt, 0, ("tool_calls",), name, template)
    if not _is_prefilled(prompt):
        return _render(tokenizer, prompt, name, template, add_generation_prompt=True)
    if not prompt[-1].get("content") or prompt[-1].get("tool_calls"):
        raise RecordError(
            f"{name}: its last message, the assistant's, must be text that goes on, without tool calls; move the message to "
            "the completions, or add what follows it"
        )
    return _render(tokenizer, prompt, name, template, continue_final_message=True)


def _joined(prompt: list[dict], completion: list[dict], name: str) -> list[dict]:
    """The messages of a conversation; a completion's first one goes on with a prefilled turn."""
    if not _is_prefilled(prompt):
        return [*prompt, *completion]
    begun, rest = prompt[-1]["content"], completion[0].get("content")
    rest = type(begun)() if rest is None else rest
    if type(begun) is not type(rest):
        raise RecordError(
            f"{name}: its first message goes on with the prompt's last, so both must be text or both lists; give them alike"
        )
    return [*prompt[:-1], {**prompt[-1], **completion[0], "content": begun + rest}, *completion[1:]]


def _check_roles(completion: Sequence[Mapping[str, Any]], name: str) -> None:
    """Raises a RecordError where a completion has turns that are not the assistant's: they would be trained on."""
    for number, message in enumerate(completion):
        if message["role"] != "assistant":
            raise RecordError(
                f"{name}: message {number}: role = {message['role']!r} must be 'assistant', since all of a completion is trained "
                "on; end the completion before it, and make a row of each later answer, what precedes it being the prompt "
                "(trl_completions trains on it, as TRL does)"
            )


def _check_rendered(
    tokenizer, messages: list[dict], start: int, keys: Sequence[str], name: str, template: Mapping[str, Any]
) -> None:
    """Raises a RecordError where the template leaves out what one of the messages from `start` on has under these keys."""
    for place in range(start, len(messages)):
        if found := [key for key in keys if messages[place].get(key)]:
            without = {key: value for key, value in messages[place].items() if key not in keys}
            whole = _render(tokenizer, messages, name, template)
            try:
                rest = _render(tokenizer, [*messages[:place], without, *messages[place + 1 :]], name, template)
            except RecordError:  # a template that refuses a message without them
                continue
            if rest == whole:
                raise RecordError(
                    f"{name}: the chat template leaves {found[0]} = {str(messages[place][found[0]])[:80]!r} out; write it into "
                    "`content` as the model is to write it, or use a chat template that renders it"
                )


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _texts(message: Mapping[str, Any]) -> list[str]:
    content = message.get("content") or ""
    parts = content if isinstance(content, list) else [{"text": content}]
    return [part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]


def _conversation(
    tokenizer, prompt: list[dict], completion: list[dict], before: str, name: str, template: Mapping[str, Any]
) -> str:
    """A prompt and its answer as the model sees them.

    That is what the chat template renders, with two exceptions.

    1. The model writes its answer after the generation prompt. So where the template leaves a part of the answer out
       (reasoning before `</think>`, which it removes from history), or where the answer closes a tag that the generation
       prompt opens, the text is the generation prompt, the answer as it is, and what the template writes after answers.
       Where the answer begins with the generation prompt's end (`<think>`), that stands once.
    2. The template renders earlier turns otherwise when an answer follows. The model sees them as they are before the
       answer, so the text is the prompt with its generation prompt, and of the whole what follows the last message.

    Args:
        before: the prompt with its generation prompt.

    Raises:
        RecordError: no text has both the prompt as the model sees it and all of the answer.
    """
    messages = _joined(prompt, completion, name)
    whole = _render(tokenizer, messages, name, template)
    start = len(messages) - len(completion)
    for keys in (("tool_calls",), REASONING):
        _check_rendered(tokenizer, messages, start, keys, name, template)
    earlier = prompt[:-1] if _is_prefilled(prompt) else prompt
    turns = _render(tokenizer, earlier, name, template) if earlier else ""
    answer = _squeezed(whole[len(commonprefix([turns, whole])) :])
    there = all(_squeezed(text) in answer for message in messages[start:] for text in _texts(message))
    content = completion[0].get("content")
    lone = len(completion) == 1 and isinstance(content, str) and not any(completion[0].get(key) for key in SAID[1:])
    tag, closing = _open_tag(before[len(turns) :]) if before.startswith(turns) else ("", "")
    if lone and (not there or (tag and closing in content)):
        # What an answer may repeat of the generation prompt's end: the tag, and all that the whole does not have.
        least = min(len(commonprefix([before, whole])), before.rindex(tag) if tag else len(before))
        repeats = before[least:].strip() and not _is_prefilled(prompt)
        places = range(len(turns), least + 1) if repeats else range(0)
        return _going_on(before, content, places) + _after_answers(tokenizer, earlier, name, template)
    if not there:
        raise RecordError(
            f"{name}: the chat template leaves a part of {str(completion)[:80]!r} out; give the answer as one message of text, or "
            "use a chat template that renders all of it"
        )
    return whole if whole.startswith(turns) else _with_prompt(prompt, completion, before, whole, name)


def _going_on(before: str, content: str, places: Iterable[int]) -> str:
    """Append an answer to its prompt. Where the answer repeats the prompt's end, from one of `places` on, that stands once."""
    for place in places:
        if content.lstrip().startswith(before[place:].rstrip()):
            return before[:place] + content.lstrip()
    return before + content


def _open_tag(text: str) -> tuple[str, str]:
    """Find the last tag that `text` opens and does not close, and what closes it; both are empty where there is none."""
    for tag in reversed(re.findall(r"<\w+>|\[\w+\]", text)):
        closing = f"{tag[0]}/{tag[1:]}"
        if text.count(tag) > text.count(closing):
            return tag, closing
    return "", ""


def _after_answers(tokenizer, earlier: list[dict], name: str, template: Mapping[str, Any]) -> str:
    """Find what the chat template writes after an answer."""
    marked = _render(tokenizer, [*earlier, {"role": "assistant", "content": _MARK}], name, template)
    _, found, after = marked.rpartition(_MARK)
    if not found:
        raise RecordError(f"{name}: the chat template leaves the answer out; use one that renders assistant messages")
    return after


def _with_prompt(prompt: list[dict], completion: list[dict], before: str, whole: str, name: str) -> str:
    """Append to the prompt, as the model sees it, what the whole conversation has after the last message of the prompt."""
    texts = [text.strip() for message in completion for text in _texts(message)]
    last = next(iter(reversed(_texts(prompt[-1]))), "").strip()
    place = before.rfind(last) if last else -1
    shared = before[place:]  # both texts agree from the last message on
    start = whole.rfind(shared, 0, whole.rfind(texts[0]) if texts else None) if place >= 0 else -1
    answer = whole[start + len(shared) :]
    all_there = start >= 0 and all(_squeezed(text) in _squeezed(answer) for text in texts)
    # Without a generation prompt, the model would have to write the opening of its turn.
    opened = shared != last or not (texts and answer.partition(texts[0])[0].strip())
    if not (all_there and opened):
        raise RecordError(
            f"{name}: the chat template renders the prompt differently when an answer follows (or leaves the answer "
            "out), so there is no boundary between them; use a template whose generation prompt is a prefix of the "
            "whole conversation, or give prompt and completions as text"
        )
    return before + answer


# Rows -----------------------------------------------------------------------------------------------------------------


def encode_row(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict],
    completions: Mapping[str, str | list[dict]],
    name: str,
    template: Mapping[str, Any] | None = None,
    rule: CompletionRule | None = None,
    implicit: bool = False,
) -> tuple[list[int], dict[str, list[int]]]:
    """Ids of a prompt and of completions that follow it, ended by the rule.

    The prompt's ids are what the model sees when it generates, and ids of prompt and completion decode to the text of
    both. Where prompt and completion together are tokenized to an extension of the prompt, the completion is the rest.
    Where tokens would merge across the boundary, the completion is tokenized on its own.

    The generation prompt of some chat templates has more than conversations with an answer: `<think>`, where an answer
    has no reasoning. Then the prompt's ids end before it, as in TRL, and the run logs one warning.

    Args:
        prompt: text or messages; see `encode_prompt`.
        completions: by name; text or messages.
        name: how an error names the row.
        template: see `encode_prompt`.
        rule: what completions end with; by default the tokenizer's own, see `CompletionRule.of`.
        implicit: the prompt is what both texts begin with, which may end within a word. Then its ids end where those of
            the whole texts part, as in TRL. With `trl_completions`, they always do.

    Raises:
        RecordError: a completion is empty, has turns of others than the assistant, or goes on after its end; no ids decode
            to the text; or the chat template leaves out what is given.
    """
    rule, template, prompt = rule or CompletionRule.of(tokenizer), template or {}, without_nulls(prompt)
    before, prompt_ids = _prompt_as_seen(tokenizer, prompt, f"{name}: prompt", template)
    names = {side: f"{name}: {side}" for side in completions}
    completions = {side: _checked(prompt, one, names[side], rule) for side, one in completions.items()}
    if isinstance(prompt, str):
        if implicit or rule.trl:
            whole_ids, prompt_ids = prompt_ids, _shared_text(tokenizer, prompt, prompt_ids, completions, names)
            if not implicit and len(prompt_ids) < len(whole_ids):
                rule.say("shorter prompt", _shortened(tokenizer, whole_ids[len(prompt_ids) :]))
        found = {
            s: _text_completion_ids(tokenizer, prompt, one, prompt_ids, names[s]) for s, one in completions.items()
        }
        return prompt_ids, {side: _ended(tokenizer, ids, rule, names[side], chat=False) for side, ids in found.items()}
    wholes = {}
    for side, one in completions.items():
        if rule.trl:
            wholes[side] = _render(tokenizer, _joined(prompt, one, names[side]), names[side], template)
        else:
            wholes[side] = _conversation(tokenizer, prompt, one, before, names[side], template)
    together = {side: _rendered_ids(tokenizer, whole, names[side]) for side, whole in wholes.items()}
    if not all(whole.startswith(before) for whole in wholes.values()):
        prompt_ids = _shared(tokenizer, prompt_ids, list(together.values()), rule, name)
    found = {}
    for side, ids in together.items():
        if ids[: len(prompt_ids)] != prompt_ids:
            ids = [*prompt_ids, *_apart(tokenizer, prompt_ids, before, wholes[side][len(before) :], ids, names[side])]
        if len(ids) == len(prompt_ids):
            raise RecordError(f"{names[side]}: the chat template leaves the answer out; use one that renders it")
        found[side] = _ended(tokenizer, ids[len(prompt_ids) :], rule, names[side], chat=True)
    return prompt_ids, found


def _checked(prompt, completion, name: str, rule: CompletionRule):
    """A completion as its prompt is: text, or messages of the assistant."""
    if not completion:
        raise RecordError(f"{name} is empty; remove the row or give it text")
    check_prompt(completion, name, "completion")
    if is_empty(completion):
        raise RecordError(f"{name} is empty: {str(completion)[:80]} says nothing; remove the row or give it text")
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise RecordError(
                f"{name} is chat messages, but its prompt is text; give both alike (`align tokenize` makes pairs of conversations that "
                "begin with the prompt)"
            )
        return completion
    if isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    if not rule.trl:
        _check_roles(completion, name)
    return without_nulls(completion)


def _shared(
    tokenizer, prompt_ids: list[int], together: Sequence[list[int]], rule: CompletionRule, name: str
) -> list[int]:
    """What a prompt with its generation prompt has in common with conversations that do not go on from it."""
    shared = commonprefix([prompt_ids, *together])
    if not shared:
        raise RecordError(
            f"{name}: the chat template renders the prompt differently when an answer follows, from its first token on, so "
            "there is no boundary between them; use another chat template, or give prompt and completions as text"
        )
    rest = _decode(tokenizer, prompt_ids[len(shared) :])
    rule.say(
        "shorter prompt",
        f"the chat template's generation prompt ends with {rest!r}, which conversations with some of these answers do not have; "
        "their prompts end before it. To train on what the model sees when it generates, give answers as it writes them after "
        f"{rest!r}",
    )
    return list(shared)


def encode_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict],
    completion: str | list[dict],
    prompt_ids: Sequence[int],
    name: str = "completion",
    template: Mapping[str, Any] | None = None,
    rule: CompletionRule | None = None,
) -> list[int]:
    """Ids of one completion that follow `prompt_ids`, what `encode_prompt` gave; see `encode_row`.

    Raises:
        RecordError: see `encode_row`; or the completion does not follow the whole prompt.
    """
    row, _, side = name.rpartition(": ")
    found, ids = encode_row(tokenizer, prompt, {side: completion}, row or "row", template, rule)
    if found != list(prompt_ids):
        raise RecordError(
            f"{name}: the chat template renders the prompt differently when this answer follows; use `encode_row`, "
            "which cuts the prompt where they differ, or give prompt and completions as text"
        )
    return ids[side]


def encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    row: Mapping[str, Any],
    name: str,
    rule: CompletionRule | None = None,
    implicit: bool = False,
) -> dict[str, list[int]]:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of a preference row of text or messages.

    A row without `prompt` has it as the text or the messages that chosen and rejected begin with (TRL's implicit prompt).
    Its `tools` (a list, or JSON text of one) and `chat_template_kwargs` reach the chat template, as in TRL.

    Args:
        implicit: the row had no prompt before; see `encode_row`.

    Raises:
        MissingColumnError: `chosen` or `rejected` is missing, or a row of text has a column `prompt` that is empty.
        RecordError: see `encode_row`.
    """
    for column in ("chosen", "rejected"):
        if row.get(column) is None:
            raise MissingColumnError(
                f"{name}: column {column!r} is missing; a preference row has prompt, chosen, rejected"
            )
    if row.get("prompt") is None:
        row, implicit = {**row, **with_prompt(row, name)}, True
    completions = {side: row[side] for side in ("chosen", "rejected")}
    template = template_arguments(row, name)
    prompt_ids, ids = encode_row(tokenizer, row["prompt"], completions, name, template, rule, implicit)
    return {"prompt_ids": prompt_ids, **{f"{side}_ids": ids[side] for side in completions}}


def with_prompt(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`prompt`, `chosen` and `rejected` of a row whose texts, or messages, begin with the prompt: TRL's `extract_prompt`.

    Raises:
        MissingColumnError: the row is text, and has an empty column `prompt`: its completions may not begin with it.
        RecordError: the sides are not alike, or do not begin alike.
    """
    from trl.data_utils import extract_prompt

    chosen, rejected = (row[side] for side in ("chosen", "rejected"))
    if isinstance(chosen, str) and "prompt" in row:
        raise MissingColumnError(
            f"{name}: column 'prompt' is empty; fill it, or remove the column if chosen and rejected begin with the prompt"
        )
    for side in ("chosen", "rejected"):
        check_prompt(row[side], name, side)
    if isinstance(chosen, str) != isinstance(rejected, str):
        kinds = ["text" if isinstance(one, str) else "messages" for one in (chosen, rejected)]
        raise RecordError(f"{name}: chosen is {kinds[0]}, rejected is {kinds[1]}; give both alike")
    if not chosen or not rejected or chosen[0] != rejected[0]:
        raise RecordError(
            f"{name}: chosen and rejected must begin with the same prompt, but their first characters or messages differ; "
            "give a column 'prompt'"
        )
    return extract_prompt({"chosen": chosen, "rejected": rejected})


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
