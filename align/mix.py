"""Contexts that hold a model's own tokens: BASH and RAC (Cen et al., TMLR 2025, arXiv 2410.14655).

Pure functions over ids. The target stays the ground truth: a generated token may stand in a context, and
is never a label.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import ConfigError

#: What a label is where there is none, as in transformers.
IGNORED = -100

SCHEDULES = ("constant", "linear", "inverse_sigmoid")


def epsilon_at(step: int, total_steps: int, epsilon: float, schedule: str = "constant") -> float:
    """Share of own tokens at an update.

    Args:
        step: updates done, 0 … total_steps − 1.
        total_steps: updates of the whole training.
        epsilon: the share that `constant` has always and the others reach at the end.
        schedule: `constant`; `linear` from 0 at the first update to `epsilon` at the last; `inverse_sigmoid`, by which a token
            is ground truth with probability 1 − ε + ε · k / (k + exp(i / k)) at update i (Bengio et al. 2015, section 2.4, for
            ε = 1). k is such that half of `epsilon` is reached halfway: k ln k = total_steps / 2.

    Raises:
        ConfigError: another schedule, or numbers that mean nothing.
    """
    if not 0 <= epsilon <= 1:
        raise ConfigError(f"epsilon = {epsilon} must lie in [0, 1]; it is the chance of an own token")
    if schedule == "constant":
        return epsilon
    if schedule == "linear":
        return epsilon * min(1.0, step / max(1, total_steps - 1))
    if schedule == "inverse_sigmoid":
        k = _inverse_sigmoid_speed(total_steps / 2)
        return epsilon * (1 - k / (k + math.exp(min(step / k, 700.0))))
    raise ConfigError(f"epsilon_schedule {schedule!r} is unknown; there are {', '.join(SCHEDULES)}")


def _inverse_sigmoid_speed(halfway: float) -> float:
    """k > 1 with k ln k = halfway, by Newton's method; what is below 1 update counts as 1."""
    halfway = max(1.0, halfway)
    k = halfway + 1
    for _ in range(60):
        k -= (k * math.log(k) - halfway) / (math.log(k) + 1)
    return k


def row_generator(seed: int, step: int, position: int) -> random.Random:
    """Generator of one example's choices: of what update and where in its global batch it is, and of nothing else, so that
    they are the same in any number of processes, in any order, and after an interruption."""
    return random.Random(f"{seed}-{step}-{position}")


def choose_own(labels: Sequence[int], epsilon: float, generator: random.Random) -> list[bool]:
    """At which positions an own token stands: each labelled one with probability `epsilon`.

    Position 0 never has one, since nothing precedes it that could predict it.
    """
    return [index > 0 and label != IGNORED and generator.random() < epsilon for index, label in enumerate(labels)]


def interleave(target_ids: Sequence[int], own_ids: Sequence[int], own: Sequence[bool]) -> list[int]:
    """BASH's context: c_t = ŷ_t where `own`, y_t elsewhere.

    Args:
        target_ids, own_ids, own: ground truth y, the policy's ŷ (read only where `own`) and the choice, of one length.
    """
    return [ours if is_own else given for given, ours, is_own in zip(target_ids, own_ids, own, strict=True)]


@dataclass(frozen=True)
class Example:
    """What is trained on.

    Args:
        input_ids: the context.
        labels: beside each id what is to be predicted there, shifted by the model as usual; `IGNORED` where nothing is.
    """

    input_ids: list[int]
    labels: list[int]


def draw_prefix_length(length: int, fraction: tuple[float, float], generator: random.Random) -> int:
    """RAC's k: uniform among the whole numbers between the two fractions of a generation of `length` tokens."""
    low, high = math.ceil(fraction[0] * length), math.floor(fraction[1] * length)
    return generator.randint(min(low, high), high)


def correction(
    prompt_ids: Sequence[int],
    generated_ids: Sequence[int],
    k: int,
    cue_ids: Sequence[int],
    reference_ids: Sequence[int],
    max_length: int | None = None,
) -> Example:
    """RAC's example: the prompt, ŷ_<k, the cue, the reference; labels on cue and reference alone.

    With k = 0 and an empty cue it is the SFT example.

    Args:
        generated_ids: ŷ, without its end token.
        max_length: of the example; k is lowered until everything fits, and where even k = 0 does not, the end is cut off, as
            SFT does.
    """
    taught = [*cue_ids, *reference_ids]
    if max_length is not None:
        k = max(0, min(k, max_length - len(prompt_ids) - len(taught)))
    before = [*prompt_ids, *generated_ids[:k]]
    return Example([*before, *taught][:max_length], ([IGNORED] * len(before) + taught)[:max_length])


def confirmation(prompt_ids: Sequence[int], generated_ids: Sequence[int], end_ids: Sequence[int]) -> Example:
    """RAC's example of a generation that is right already: nothing is corrected, and the one label is the reference's end,
    so that the model learns to stop there rather than to begin a correction.

    Args:
        generated_ids: ŷ, without its end token.
        end_ids: how the reference ends: its end token, and what a chat template puts behind it.
    """
    before = [*prompt_ids, *generated_ids]
    return Example([*before, *end_ids], [IGNORED] * len(before) + list(end_ids))
