"""Interleaving, schedules and corrections, as functions over ids."""

import math
import random

import pytest

from align.errors import ConfigError
from align.mix import (
    IGNORED,
    choose_own,
    confirmation,
    correction,
    draw_prefix_length,
    epsilon_at,
    interleave,
    row_generator,
)


def test_schedules():
    assert [epsilon_at(step, 10, 0.3) for step in range(10)] == [0.3] * 10
    linear = [epsilon_at(step, 11, 0.5, "linear") for step in range(11)]
    assert linear == pytest.approx([0.05 * step for step in range(11)])
    sigmoid = [epsilon_at(step, 101, 0.8, "inverse_sigmoid") for step in range(101)]
    assert sigmoid == sorted(sigmoid) and sigmoid[0] < 0.05 and sigmoid[100] > 0.75
    assert epsilon_at(50, 100, 0.8, "inverse_sigmoid") == pytest.approx(0.4)
    # Bengio et al.: ground truth with probability k / (k + exp(i / k)), here with k ln k = 50.
    k = next(k / 1e4 for k in range(10_000, 10**6) if k / 1e4 * math.log(k / 1e4) >= 50)
    assert epsilon_at(70, 100, 1.0, "inverse_sigmoid") == pytest.approx(1 - k / (k + math.exp(70 / k)), rel=1e-4)
    assert epsilon_at(0, 1, 1.0, "inverse_sigmoid") <= 0.5 and epsilon_at(0, 1, 0.4, "linear") == 0.0
    assert 0.999 < epsilon_at(10**6, 10**6, 1.0, "inverse_sigmoid") <= 1.0
    for bad, words in (
        ((0, 9, 1.5), "1.5 must lie in"),
        ((0, 9, 0.5, "cosine"), "'cosine' is unknown; there are constant"),
    ):
        with pytest.raises(ConfigError, match=words):
            epsilon_at(*bad)


def test_own_tokens_stand_where_something_is_learned():
    labels = [IGNORED, IGNORED, 5, 6, IGNORED, 7]
    assert choose_own(labels, 1.0, random.Random(0)) == [False, False, True, True, False, True]
    assert choose_own([4, 5], 1.0, random.Random(0)) == [False, True]  # nothing predicts a row's first token
    assert not any(choose_own(labels, 0.0, random.Random(0)))
    drawn = [choose_own(labels, 0.3, row_generator(1, 2, i)) for i in range(4000)]
    share = sum(map(sum, drawn)) / (3 * 4000)
    assert abs(share - 0.3) < 4 * math.sqrt(0.21 / 12_000)
    assert drawn[7] == choose_own(labels, 0.3, row_generator(1, 2, 7))
    others = [choose_own(labels, 0.3, row_generator(1, 3, i)) for i in range(4000)]
    assert drawn != others
    assert interleave([1, 2, 3], [7, 8, 9], [False, True, False]) == [1, 8, 3]
    with pytest.raises(ValueError, match="zip"):
        interleave([1, 2, 3], [7, 8], [False, True, False])


def test_corrections_against_a_loop():
    rng = random.Random(0)
    for _ in range(300):
        prompt, own, cue, reference = (
            [base + rng.randrange(100) for _ in range(rng.randint(low, 6))]
            for base, low in ((100, 1), (200, 0), (300, 0), (400, 1))
        )
        k, longest = rng.randint(0, len(own)), rng.choice([None, *range(3, 25)])
        found = correction(prompt, own, k, cue, reference, longest)
        ids, labels = [], []
        room = len(own) if longest is None else longest - len(prompt) - len(cue) - len(reference)
        for token in prompt + own[: max(0, min(k, room))]:
            ids, labels = [*ids, token], [*labels, IGNORED]
        for token in cue + reference:
            ids, labels = [*ids, token], [*labels, token]
        if longest is not None:
            ids, labels = ids[:longest], labels[:longest]
        assert (found.input_ids, found.labels) == (ids, labels)
        assert not any(200 <= label < 300 for label in found.labels)  # a generated token is never a label
    assert correction([1], [2, 3], 0, [], [4, 5]).labels == [IGNORED, 4, 5]


def test_confirmations_end():
    found = confirmation([1, 2], [3, 4], [0, 9])
    assert found.input_ids == [1, 2, 3, 4, 0, 9] and found.labels == [IGNORED] * 4 + [0, 9]


def test_prefix_lengths():
    drawn = [draw_prefix_length(10, (0.25, 0.75), row_generator(0, 0, i)) for i in range(3000)]
    assert set(drawn) == {3, 4, 5, 6, 7}
    assert sum((drawn.count(k) - 600) ** 2 / 600 for k in range(3, 8)) < 18.5  # χ² of 4 degrees of freedom, p = 0.001
    assert draw_prefix_length(0, (0.0, 1.0), random.Random(0)) == 0
    assert draw_prefix_length(3, (0.5, 0.5), random.Random(0)) == 1
    assert draw_prefix_length(7, (1.0, 1.0), random.Random(0)) == 7
