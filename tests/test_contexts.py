"""Own tokens against exact probabilities, and the two ways of drawing them against each other."""

import itertools
import random

import pytest
import torch
from conftest import tiny_llama

from align.contexts import MixedRow, OwnTokens, draw_contexts, draw_tokens
from align.errors import ConfigError

V = 6
ROWS = 6000


def tiny(seed: int = 0, **kwargs):
    return tiny_llama(seed, vocab_size=V, initializer_range=0.6, **kwargs)


def p_value(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Of a χ² test; cells that expect less than 5 are put together."""
    counts, expected = counts.double(), expected.double()
    rare = expected < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


def next_probabilities(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)


def rows(ids: list[int], own: list[bool], count: int = ROWS, seed: int = 0) -> list[MixedRow]:
    draw = random.Random(seed)
    return [MixedRow(ids, own, [draw.random() for _ in ids]) for _ in range(count)]


def draw(model, those: list[MixedRow], **settings) -> list[list[int]]:
    found = draw_contexts(model, those, OwnTokens(**settings), 0)
    return [found.get(index, row.context) for index, row in enumerate(those)]


IDS, OWN = [1, 2, 3, 4, 5, 2], [False, False, True, True, False, True]


def test_parallel_draws_are_given_the_ground_truth():
    model = tiny()
    contexts = torch.tensor(draw(model, rows(IDS, OWN)))
    assert (contexts[:, [0, 1, 4]] == torch.tensor([1, 2, 5])).all()
    cells = torch.zeros(V, V, V)
    for a, b, c in contexts[:, [2, 3, 5]].tolist():
        cells[a, b, c] += 1
    first, second, third = (next_probabilities(model, IDS[:t]) for t in (2, 3, 5))
    exact = torch.einsum("a,b,c->abc", first, second, third) * ROWS
    assert p_value(cells.flatten(), exact.flatten()) > 0.001
    # The test sees an error of one position.
    shifted = torch.einsum("a,b,c->abc", *(next_probabilities(model, IDS[:t]) for t in (1, 2, 4))) * ROWS
    assert p_value(cells.flatten(), shifted.flatten()) < 1e-12


def test_autoregressive_draws_are_given_the_mixed_prefix():
    model = tiny()
    contexts = torch.tensor(draw(model, rows(IDS, OWN), generation="autoregressive"))
    assert (contexts[:, [0, 1, 4]] == torch.tensor([1, 2, 5])).all()
    cells, exact, parallel = (torch.zeros(V, V, V).double() for _ in range(3))
    for a, b, c in contexts[:, [2, 3, 5]].tolist():
        cells[a, b, c] += 1
    first, truth = next_probabilities(model, [1, 2]), [next_probabilities(model, IDS[:t]) for t in (3, 5)]
    for a, b in itertools.product(range(V), range(V)):
        second, third = next_probabilities(model, [1, 2, a]), next_probabilities(model, [1, 2, a, b, 5])
        exact[a, b] = first[a] * second[b] * third * ROWS
        parallel[a, b] = first[a] * truth[0][b] * truth[1] * ROWS
    assert p_value(cells.flatten(), exact.flatten()) > 0.001
    assert p_value(cells.flatten(), parallel.flatten()) < 1e-12  # the test sees the other way's conditions


def test_passes_come_to_rest_at_the_autoregressive_draws():
    model, draws = tiny(1), random.Random(5)
    those = []
    for _ in range(40):
        ids = [draws.randrange(V) for _ in range(draws.randint(2, 14))]
        those.append(([*ids], [False, *(draws.random() < 0.7 for _ in ids[1:])], [draws.random() for _ in ids]))

    def fresh():
        return [MixedRow(*row) for row in those]

    in_order = draw(model, fresh(), generation="autoregressive")
    assert draw(model, fresh(), passes=14) == in_order
    once, twice = (draw(model, fresh(), passes=n) for n in (1, 2))
    assert once != twice != in_order
    # Neither batches nor the order of rows matter.
    for settings in ({"generation": "autoregressive"}, {"passes": 2}):
        whole, pieces = (draw(model, fresh(), max_tokens_per_batch=n, **settings) for n in (9999, 20))
        assert whole == pieces


def test_numbers_decide_tokens():
    logits = torch.tensor([[0.0, float("-inf"), 1.0, 2.0]]).repeat(5, 1)
    p = logits[0].softmax(-1)
    uniforms = torch.tensor([0.0, p[0] - 1e-4, p[0] + 1e-4, p[0] + p[2] + 1e-4, 1 - 1e-9], dtype=torch.float64)
    assert draw_tokens(logits, uniforms, 1.0).tolist() == [0, 0, 2, 3, 3]
    assert draw_tokens(logits, uniforms, 0).tolist() == [3] * 5
    assert draw_tokens(logits[1:], uniforms[1:], 0.01).tolist() == [3] * 4


def test_dropout_is_off_and_comes_back():
    model = tiny(2, attention_dropout=0.5)
    expected = draw(model, rows(IDS, OWN, 200))
    model.train()
    assert draw(model, rows(IDS, OWN, 200)) == expected and model.training
    generation_config = model.generation_config
    draw(model, rows(IDS, OWN, 20), generation="autoregressive")
    assert model.training and model.generation_config is generation_config


def test_rows_without_own_tokens_cost_nothing():
    model = tiny()
    model.forward = None  # would fail
    row = MixedRow(IDS, [False] * len(IDS), [0.5] * len(IDS))
    assert draw_contexts(model, [row], OwnTokens(), 0) == {} and row.context == IDS


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"generation": "beam"}, "'beam' is unknown; there are parallel, autoregressive"),
        ({"passes": 0}, "passes = 0 must be at least 1"),
        ({"passes": 2, "generation": "autoregressive"}, "belongs to generation 'parallel'"),
        ({"temperature": -1}, "temperature = -1 must be at least 0"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch = 0"),
    ],
)
def test_settings_that_mean_nothing(settings, words):
    with pytest.raises(ConfigError, match=words):
        OwnTokens(**settings)
