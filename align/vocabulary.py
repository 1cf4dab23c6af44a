"""Whether two tokenizers give the same ids to the same tokens, and a mapping where only special tokens differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .errors import ModelMismatchError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: How many differences an error shows.
SHOWN = 5


def token_differences(
    one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase
) -> list[tuple[int, str | None, str | None]]:
    """Ids that are not the same token for both, with both tokens (`None` where a tokenizer has none)."""
    # Ids may have gaps: the number of tokens says nothing of the highest id.
    ids = list(range(1 + max(max(t.get_vocab().values(), default=-1) for t in (one, other))))
    pairs = zip(ids, *(tokenizer.convert_ids_to_tokens(ids) for tokenizer in (one, other)), strict=True)
    return [(index, ours, theirs) for index, ours, theirs in pairs if ours != theirs]


def shared_ids(
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    mapping: Mapping[str, str] | None = None,
    never: Sequence[str] = (),
) -> dict[int, int]:
    """What the teacher calls the student's ids, where the two differ.

    Args:
        teacher, student: their tokenizers.
        mapping: token of the teacher -> token of the student, for special tokens under other names or ids.
        never: tokens that one of the two does not have, and that shall not be drawn (`Policy.never`).

    Returns:
        Student's id -> teacher's id, of those that differ: empty where the vocabularies are one.

    Raises:
        ModelMismatchError: an id is another token, EOS is another, or the mapping names a token that is not there, is no
            special token, leaves a difference, or maps two tokens to one.
    """
    mapping = dict(mapping or {})
    if other := [token for token in (*mapping, *mapping.values(), *never) if not isinstance(token, str)]:
        raise ModelMismatchError(f"special tokens: {other[0]!r} is no token; give tokens as text")
    if len(set(mapping.values())) != len(mapping):
        raise ModelMismatchError(f"special tokens {mapping}: two of the teacher's map to one of the student's")
    found: dict[int, int] = {}
    for theirs, ours in mapping.items():
        ids = []
        for tokenizer, token, role in ((teacher, theirs, "teacher"), (student, ours, "student")):
            index = tokenizer.get_vocab().get(token)
            if index is None or index not in _special(tokenizer):
                raise ModelMismatchError(
                    f"special tokens: the {role} has {'a' if index is not None else 'no'} token {token!r}"
                    f"{', but it is not special' if index is not None else ''}; map special tokens to special tokens"
                )
            ids.append(index)
        found[ids[1]] = ids[0]
    for token in never:
        if token in (teacher.eos_token, student.eos_token):
            raise ModelMismatchError(f"never draw {token!r}: it ends an answer; map it to the other's end")
        if (there := [t.get_vocab().get(token) for t in (teacher, student)]).count(None) != 1:
            whose = "none of the two has it" if there == [None, None] else "both have it: it can be drawn"
            raise ModelMismatchError(f"never draw {token!r}: {whose}")
    # A token may stand alone at its id where it is mapped to another one.
    different = [
        (i, of_teacher, of_student)
        for i, of_teacher, of_student in token_differences(teacher, student)
        if not (of_student in (None, *never) or i in found) or not (of_teacher in (None, *never) or i in found.values())
    ]
    if different:
        shown = "; ".join(f"id {i} is {a!r} for the teacher, {b!r} for the student" for i, a, b in different[:SHOWN])
        raise ModelMismatchError(
            f"teacher and student have other tokenizers: {shown} ({len(different)} ids differ). Take two models of one "
            "family; where special tokens alone differ, map the teacher's to the student's, or say that those which one "
            "of them lacks are never to be drawn"
        )
    end = found.get(student.eos_token_id, student.eos_token_id)
    if end != teacher.eos_token_id:
        raise ModelMismatchError(
            f"the teacher ends with {teacher.eos_token!r} (id {teacher.eos_token_id}), the student with "
            f"{student.eos_token!r} (id {student.eos_token_id}); map the one to the other"
        )
    return {ours: theirs for ours, theirs in found.items() if ours != theirs}


def never_ids(tokenizer: PreTrainedTokenizerBase, never: Sequence[str]) -> tuple[int, ...]:
    """Ids of those of the tokens that a tokenizer has."""
    known = tokenizer.get_vocab()
    return tuple(known[token] for token in never if token in known)


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)
