"""The embedded task: short stories whose solutions are chains of steps, each step a decision and a calculation.

A story tells what happens to one person's things. For some kinds of event the demonstrations that the base model is
trained on decide wrongly more often than not, and then calculate correctly with the wrong decision. So the base model's
errors are errors of decision, not of ability: what preference training can mend. Every problem has exactly one correct
solution text; where a solution first differs from it, there is its first error.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

NAMES = ("Tom", "Anna", "Ben", "Mia", "Leo", "Zoe", "Max", "Eva")
THINGS = ("apples", "pears", "coins", "books", "shells", "cards", "pens", "stamps")

#: Chance that a demonstration takes the wrong decision at a tricky event: more often than not.
WRONG_RATE = 0.55
#: Chances of a problem having no, one or two tricky events.
TRICKY_COUNTS = (0.12, 0.73, 0.15)
#: Events of a problem: fewest, most.
STEPS = (3, 5)
HIGHEST = 99


@dataclass(frozen=True)
class Event:
    """One sentence of a story, and what it does to the count of the asked things.

    Args:
        text: the sentence.
        verb: how the solution names the step.
        right, wrong: (operator, operand) of the right and of the usual wrong decision; operand `None` is the count
            itself. Events that are not tricky have none that is wrong.
    """

    text: str
    verb: str
    right: tuple[str, int | None]
    wrong: tuple[str, int | None] | None = None


def _event(kind: str, rng: random.Random, name: str, other: str, thing: str, other_thing: str) -> Event:
    n, m = rng.sample(range(2, 10), 2)
    if kind == "buys":
        return Event(f"{name} buys {n} {thing}.", "buys", ("+", n))
    if kind == "eats":
        return Event(f"{name} loses {n} {thing}.", "loses", ("-", n))
    if kind == "lends":  # wrong operation: lending taken for getting
        return Event(f"{name} lends {n} {thing} to {other}.", "lends", ("-", n), ("+", n))
    if kind == "finds":  # wrong number: the other things are counted instead
        return Event(f"{name} finds {n} {thing} and {m} {other_thing}.", "finds", ("+", n), ("+", m))
    if kind == "wins":  # wrong person: what somebody else wins changes nothing
        return Event(f"{other} wins {n} {thing}.", "wins", ("+", 0), ("+", n))
    # wrong meaning: doubling taken for getting two
    return Event(f"{name} doubles the {thing}.", "doubles", ("+", None), ("+", 2))


EASY = ("buys", "eats")
TRICKY = ("lends", "finds", "wins", "doubles")


def _calculate(count: int, decision: tuple[str, int | None]) -> tuple[str, int]:
    """The calculation of a step as text, and the new count."""
    operator, operand = decision
    operand = count if operand is None else operand
    result = count + operand if operator == "+" else count - operand
    return f"{count}{operator}{operand}={result}", result


def _solve(start: int, events: Sequence[Event], wrong: Sequence[bool]) -> tuple[str, list[int]]:
    """Text of a solution that decides wrongly at the marked events, and the count after every step."""
    count, counts, lines = start, [], []
    for event, mistaken in zip(events, wrong, strict=True):
        text, count = _calculate(count, event.wrong if mistaken and event.wrong else event.right)
        lines.append(f" {event.verb}: {text};")
        counts.append(count)
    return "".join(lines) + f" #### {count}", counts


def _draw_story(rng: random.Random) -> tuple[str, int, list[Event]]:
    """A story, its first count, and its events, such that no way of deciding leaves 0 … HIGHEST."""
    while True:
        name, other = rng.sample(NAMES, 2)
        thing, other_thing = rng.sample(THINGS, 2)
        start = rng.randrange(10, 45)
        steps = rng.randint(*STEPS)
        tricky = rng.choices(range(len(TRICKY_COUNTS)), weights=TRICKY_COUNTS)[0]
        kinds = [rng.choice(EASY) for _ in range(steps - tricky)] + rng.sample(TRICKY, tricky)
        rng.shuffle(kinds)
        events = [_event(kind, rng, name, other, thing, other_thing) for kind in kinds]
        ways = [[False] * steps, [True] * steps, *([i == j for i in range(steps)] for j in range(steps))]
        if all(0 <= count <= HIGHEST for wrong in ways for count in _solve(start, events, wrong)[1]):
            story = " ".join([f"{name} has {start} {thing}.", *(event.text for event in events)])
            return f"{story} How many {thing} does {name} have?\nAnswer:", start, events


def make_problems(n: int, seed: int, split: str) -> list[dict[str, Any]]:
    """Problems with their one correct solution.

    Args:
        n: how many.
        seed: decides them. A prompt belongs to `test` or `train` by its own text, so splits share no prompt.
        split: `train` or `test`.

    Returns:
        Records of `id`, `prompt`, `answer`, `solution`.
    """
    rng = random.Random(f"{split}-{seed}")
    problems: dict[str, dict[str, Any]] = {}
    while len(problems) < n:
        prompt, start, events = _draw_story(rng)
        if _is_test(prompt) != (split == "test"):
            continue
        solution, counts = _solve(start, events, [False] * len(events))
        row = {"id": f"tiny-{split}-{len(problems)}", "prompt": prompt, "answer": str(counts[-1]), "solution": solution}
        problems.setdefault(prompt, row)
    return list(problems.values())


def _is_test(prompt: str) -> bool:
    return random.Random(prompt).random() < 0.1


def draw_demonstration(rng: random.Random) -> tuple[str, str]:
    """Prompt and solution of a demonstration as the base model is trained on: wrong at tricky events, at `WRONG_RATE`.

    Prompts of the test split are never drawn.
    """
    while True:
        prompt, start, events = _draw_story(rng)
        if not _is_test(prompt):
            wrong = [event.wrong is not None and rng.random() < WRONG_RATE for event in events]
            return prompt, _solve(start, events, wrong)[0]


#: Other ways to write ` loses: 37-7=30;`, in which the base was never taught: result first, and without the event.
STYLES = (" {verb}: {result}={left}", " {left}={result}")


def restyle(solution: str, rng: random.Random, rate: float = 0.5) -> str:
    """The same solution as a teacher with a hand of its own writes it.

    Args:
        solution: as `make_problems` writes them.
        rate: chance of a step to be written in one of `STYLES`.
    """
    *steps, answer = solution.split(";")
    written = []
    for step in steps:
        verb, _, calculation = step.strip().partition(": ")
        left, _, result = calculation.partition("=")
        other = rng.choice(STYLES).format(verb=verb, left=left, result=result)
        written.append(other if rng.random() < rate else step)
    return ";".join([*written, answer])


def miscalculations(solution: str) -> int:
    """Number of steps of a solution whose calculation is wrong or not a calculation at all, whatever was decided."""
    wrong = 0
    for step in solution.split("####")[0].split(";")[:-1]:
        left, _, result = step.split(":")[-1].strip().partition("=")
        operator = "+" if "+" in left else "-"
        first, _, second = left.partition(operator)
        numbers = (first, second, result)
        if not all(number.isdigit() for number in numbers) or _calculate(int(first), (operator, int(second)))[1] != int(
            result
        ):
            wrong += 1
    return wrong


def first_error(completion_ids: Sequence[int], solution_ids: Sequence[int]) -> int | None:
    """Index of the first id that differs from the one correct solution's; `None` where none does.

    A completion that ends early differs at its last id, its EOS.
    """
    for index, (given, right) in enumerate(zip(completion_ids, solution_ids, strict=False)):
        if given != right:
            return index
    if len(completion_ids) == len(solution_ids):
        return None
    return min(len(completion_ids), len(solution_ids)) - (len(completion_ids) < len(solution_ids))


def mark_first_errors(pairs: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, float]]:
    """Adds `first_error`, the index of the first rejected id that differs from the problem's one solution.

    Returns:
        `n`, and `share` of rejected completions where it is found by the lowest contrastive score, and by the critical
        token of rollouts, as far as the pairs have these.
    """
    from .tokens import encode_completion

    hits: dict[str, list[bool]] = {}
    for row in pairs:
        solution = encode_completion(
            tokenizer, row["prompt"], row["solution"], row["prompt_ids"], f"pair {row['id']!r}: solution"
        )
        error = row["first_error"] = first_error(row["rejected_ids"], solution)
        if scores := row.get("rejected_ce_scores"):
            hits.setdefault("lowest score is the first error", []).append(scores.index(min(scores)) == error)
        if "critical" in row:
            hits.setdefault("critical token is the first error", []).append(row["critical"] == error)
    return {name: {"share": sum(those) / len(those), "n": len(those)} for name, those in hits.items()}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on stories: a word is one token, a digit is one token, any other text falls to bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=20,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random(0)
    tokenizer.train_from_iterator(("".join(draw_demonstration(rng)) for _ in range(2000)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def build_config(vocabulary: int) -> LlamaConfig:
    """Shape of the base model: a Llama of about 0.54 million parameters."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
