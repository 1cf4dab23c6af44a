"""What text each token of a sequence stands for, such that together they are the decoded text."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Text of each token, such that together they are the decoded text.

    A character spread over several tokens stands at the last of them, special tokens show by name, bytes that are no
    character as U+FFFD.

    Args:
        tokenizer: the one that made the ids.
        ids: token ids of one text.

    Returns:
        One text per id, possibly empty; joined, they equal `tokenizer.decode` of all ids without any clean-up.
    """
    return texts_by(decoder(tokenizer), ids)


def decoder(tokenizer) -> Callable[[Sequence[int]], str]:
    """Decodes ids; short runs, which recur all the time, are decoded once."""
    known: dict[tuple[int, ...], str] = {(): ""}

    def decode(ids: Sequence[int]) -> str:
        key = tuple(ids)
        text = known.get(key)
        if text is None:
            text = tokenizer.decode(list(key), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if len(key) <= 3:
                known[key] = text
        return text

    return decode


def texts_by(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> list[str]:
    """Cuts the decoded text: `ends[k]` is how much of it is certain after token k, so the parts always join to it.

    A token's own decoding is no guide (a leading space is stripped, a partial character is U+FFFD), so each is decoded
    behind its predecessor, `ids[before:clean]`; after `clean` tokens nothing was open and `place` characters were done.
    """
    full = decode(ids)
    ends: list[int] = []
    before = clean = place = 0
    for end in range(1, len(ids) + 1):
        context, text = decode(ids[before:clean]), decode(ids[before:end])
        if end - clean > 16:  # lost, which keeps the window from growing: ask for the whole beginning once
            context, text = full[:place], decode(ids[:end])
        new = text[len(context) :] if text.startswith(context) else ""
        certain = new.rstrip("\ufffd")
        sure = place + len(os.path.commonprefix([certain, full[place : place + len(certain)]]))
        if text.startswith(context) and new == certain and sure == place + len(certain):
            _give_replacements(full, ends, clean)
            before, clean, place = clean, end, sure
        elif end - clean > 16:
            before, clean, place = end - 1, end, max(sure, ends[-1])
        ends.append(max(sure, ends[-1] if ends else 0))
    if ends:
        _give_replacements(full, ends, clean)
        ends[-1] = len(full)
    return [full[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _give_replacements(full: str, ends: list[int], clean: int) -> None:
    """Tokens after `clean` whose bytes turned out to be no character: each is given one U+FFFD, in their order."""
    place = ends[clean - 1] if clean else 0
    for index in range(clean, len(ends)):
        place = max(place, ends[index])
        place += full.startswith("\ufffd", place)
        ends[index] = place
