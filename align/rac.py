"""Reference-answer-based correction: generations of a policy, and the examples that correct them (Cen et al., TMLR 2025,
arXiv 2410.14655)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .checks import check_share, check_whole
from .errors import ConfigError, RecordError
from .logps import batches_by_length
from .mix import IGNORED, Example, confirmation, correction, draw_prefix_length, row_generator
from .progress import watched
from .records import Record
from .sample import SampleConfig, derived_seed, end_token_ids, generate
from .verify import answers_equal, extract_answer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


#: Rules by which an answer is surely one, see `align.verify.extract_answer`.
MARKED = {"hash", "boxed", "answer_is"}


@dataclass(frozen=True)
class CorrectionSettings:
    """How corrections are made. No figure but the idea is published; defaults are ours.

    Args:
        cue: text that stands between the policy's own tokens and the reference, and with which the model learns to begin a
            correction; tokenized on its own.
        prefix_fraction: k, the number of own tokens, is drawn between these two shares of the generation's length.
        keep_correct_share: chance that a generation which has the reference's answer is left uncorrected: the model then learns
            to end there. The answer is what stands behind `####`, in `\\boxed{}` or after "the answer is"; where either has none
            that is marked so, the texts must be equal (two essays that end in one number are not one answer).
        max_new_tokens: longest generation.
        temperature: of the generations; 0 is greedy decoding.
        max_length: of an example; see `align.mix.correction`.
        max_tokens_per_batch: budget of a batch of generations, padding and what is generated included.
    """

    cue: str = "\nWait, that is not right. Once more:\n"
    prefix_fraction: tuple[float, float] = (0.0, 1.0)
    keep_correct_share: float = 0.5
    max_new_tokens: int = 512
    temperature: float = 1.0
    max_length: int | None = None
    max_tokens_per_batch: int = 16384

    def __post_init__(self) -> None:
        fraction = self.prefix_fraction
        if len(fraction) != 2 or not 0 <= fraction[0] <= fraction[1] <= 1:
            raise ConfigError(f"prefix_fraction = {fraction} must be two numbers, 0 ≤ least ≤ largest ≤ 1")
        check_share("keep_correct_share", self.keep_correct_share)
        check_whole("max_tokens_per_batch", self.max_tokens_per_batch, 1)
        if self.max_length is not None:
            check_whole("max_length", self.max_length, 1)
        self.sampling()

    def sampling(self) -> SampleConfig:
        """The generations' settings."""
        return SampleConfig(temperature=self.temperature, max_new_tokens=self.max_new_tokens)

    @property
    def generates(self) -> bool:
        """Whether any example depends on a generation."""
        return self.prefix_fraction[1] > 0 or self.keep_correct_share > 0


@dataclass
class Corrections:
    """Examples as records (`input_ids`, `labels`, `generated_ids`, `own_tokens`, `matches`, `kept`), and what was counted."""

    rows: list[Record]
    metrics: dict[str, float]


def split_source(source: Example, name: str) -> tuple[list[int], list[int]]:
    """Prompt and reference of an SFT example.

    Raises:
        RecordError: there is no prompt, or what is learned is not one piece at the end.
    """
    start = next((i for i, label in enumerate(source.labels) if label != IGNORED), len(source.labels))
    if start == 0 or start == len(source.labels) or source.input_ids[start:] != source.labels[start:]:
        raise RecordError(
            f"{name}: RAC corrects one answer to one prompt, but its labels are not a prompt without and a completion with; "
            "give prompt and completion (completion_only_loss=True), and conversations with one answer, the last"
        )
    return source.input_ids[:start], source.input_ids[start:]


def draw_corrections(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Example],
    keys: Sequence[tuple[int, int]],
    settings: CorrectionSettings,
    seed: int,
    *,
    take: Callable[[int], bool] = lambda number: True,
    gather: Callable[[list], list] = lambda own: own,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    done: Callable[[int], Any] = lambda count: None,
) -> Corrections:
    """Generates an answer to every prompt and makes an example of it.

    Args:
        model: causal LM, as it is to generate: where it has an adapter, that is on. Dropout is off while it does.
        sources: SFT examples.
        keys: of every source, the update it is for and its place there; with `seed` they decide all choices.
        take, autocast, done: see `align.contexts.draw_contexts`.
        gather: puts lists of several processes together.

    Raises:
        RecordError: see `split_source`.
    """
    halves = [split_source(s, f"update {step}, row {place}") for s, (step, place) in zip(sources, keys, strict=True)]
    prompts = [prompt for prompt, _ in halves]
    generated: dict[int, tuple[list[int], bool]] = {}
    ends = set(end_token_ids(model, tokenizer.eos_token_id))
    if settings.generates and sources:
        first = derived_seed(seed, keys[0][0])
        mine = _generate(model, tokenizer, prompts, settings, first, take, autocast, done)
        # Judged where it was generated: a comparison is given up after some seconds, which processes need not agree on.
        judged = [
            (i, ids, ids[-1] in ends and _same_answer(tokenizer, ids[:-1], halves[i][1]))
            for i, ids in mine.items()
            if ids
        ]
        generated = {i: (ids, same) for i, ids, same in gather(judged)}
    cue_ids, rows = _cue_ids(tokenizer, settings), []
    for index, ((prompt, reference), (step, place)) in enumerate(zip(halves, keys, strict=True)):
        full, matches = generated.get(index, ([], False))
        ended = bool(full) and full[-1] in ends
        own, generator = full[: len(full) - ended], row_generator(seed, step, place)
        end_ids = reference[max((i for i, token in enumerate(reference) if token in ends), default=len(reference)) :]
        k = draw_prefix_length(len(own), settings.prefix_fraction, generator)
        kept = matches and bool(end_ids) and generator.random() < settings.keep_correct_share
        if settings.max_length is not None and len(prompt) + len(own) + len(end_ids) > settings.max_length:
            kept = False
        if kept:
            example = confirmation(prompt, own, end_ids)
        else:
            example = correction(prompt, own, k, cue_ids, reference, settings.max_length)
        before = sum(label == IGNORED for label in example.labels) - len(prompt)
        rows.append(
            {"input_ids": example.input_ids, "labels": example.labels, "generated_ids": full, "own_tokens": before,
             "ended": ended, "matches": matches, "kept": kept}
        )  # fmt: skip
    names = ("own_tokens", "ended", "matches", "kept")
    return Corrections(rows, {name: fmean(float(row[name]) for row in rows) for name in names} if rows else {})


def longest_correction(
    tokenizer: PreTrainedTokenizerBase, source: Example, name: str, settings: CorrectionSettings
) -> Example:
    """An example as long as any that `draw_corrections` can make of a source, but for what a chat template puts behind an
    end token; in place of own tokens it has the prompt's last.

    Args:
        name: of the source, for messages.

    Raises:
        RecordError: see `split_source`.
    """
    prompt, reference = split_source(source, name)
    own = [prompt[-1]] * settings.max_new_tokens
    most = math.floor(settings.prefix_fraction[1] * len(own))
    corrected = correction(prompt, own, most, _cue_ids(tokenizer, settings), reference, settings.max_length)
    kept = confirmation(prompt, own, reference[-1:])
    # One that does not fit is corrected.
    fits = settings.max_length is None or len(kept.input_ids) <= settings.max_length
    longer = fits and settings.keep_correct_share > 0 and len(kept.input_ids) > len(corrected.input_ids)
    return kept if longer else corrected


def _cue_ids(tokenizer: PreTrainedTokenizerBase, settings: CorrectionSettings) -> list[int]:
    return list(tokenizer(settings.cue, add_special_tokens=False)["input_ids"]) if settings.cue else []


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: CorrectionSettings,
    seed: int,
    take: Callable[[int], bool],
    autocast: Callable[[], AbstractContextManager],
    done: Callable[[int], Any],
) -> dict[int, list[int]]:
    """Index -> generation, end token included, of the prompts in the batches taken."""
    lengths = [len(prompt) + settings.max_new_tokens for prompt in prompts]
    found: dict[int, list[int]] = {}
    was_training = model.training
    model.eval()
    try:
        with autocast():
            for number, batch in enumerate(batches_by_length(lengths, settings.max_tokens_per_batch)):
                if take(number):
                    asked = [prompts[i] for i in batch]
                    drawn = generate(model, tokenizer, asked, settings.sampling(), derived_seed(seed, number))
                    found |= {i: ids for i, [(ids, _)] in zip(batch, drawn, strict=True)}
                done(len(batch))
    finally:
        model.train(was_training)
    return found


def _same_answer(tokenizer: PreTrainedTokenizerBase, generated: Sequence[int], reference: Sequence[int]) -> bool:
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (generated, reference)]
    (found, rule), (wanted, wanted_rule) = (extract_answer(text) for text in texts)
    if not {rule, wanted_rule} <= MARKED:
        return texts[0] == texts[1]
    return answers_equal(found, wanted)


def correction_report(rows: Sequence[dict[str, Any]], cue: str) -> dict[str, Any]:
    """How often a model corrects itself.

    Args:
        rows: verdict records.
        cue: the text that begins a correction.

    Returns:
        `n` completions; `corrected`, the share with a cue; among those, `unanswered_before`, the share whose cue comes before any
        answer (behind `####`, in `\\boxed{}`, after "the answer is"), and of the others, by the answer before the first cue and the
        final one, the shares `wrong_to_right`, `right_to_wrong`, `stays_right`, `stays_wrong`; and `accuracy_before` and
        `accuracy`, of all completions, an answer before the cue counting where there is one, and none counting as wrong.

    Raises:
        ConfigError: an empty cue.
    """
    from .verify import verify_completion

    if not cue.strip():
        raise ConfigError("the cue is empty, so no correction can be told from any other text; give the training's cue")
    outcomes = dict.fromkeys(("wrong_to_right", "right_to_wrong", "stays_right", "stays_wrong", "unanswered_before"), 0)
    before_right = 0
    for row in watched(rows, "evaluate corrections"):
        before, separator, _ = row["completion"].partition(cue.strip())
        verdict = verify_completion(before, row["answer"]) if separator else None
        if verdict is not None and verdict.rule not in MARKED:
            outcomes["unanswered_before"] += 1
            continue
        right = row["correct"] if verdict is None else verdict.correct
        before_right += right
        if separator:
            change = {(False, True): "wrong_to_right", (True, False): "right_to_wrong", (True, True): "stays_right"}
            outcomes[change.get((right, row["correct"]), "stays_wrong")] += 1
    count, corrected = len(rows), sum(outcomes.values())
    return {
        "n": count, "corrected": corrected / count, **{k: v / corrected if corrected else 0.0 for k, v in outcomes.items()},
        "accuracy_before": before_right / count, "accuracy": sum(row["correct"] for row in rows) / count,
    }  # fmt: skip
