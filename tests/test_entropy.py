"""Entropies against loops, weights against a sort of all of them."""

import math

import pytest
import torch
from conftest import random_pairs, tiny_llama

from align.errors import ConfigError, RecordError
from align.losses import entropies
from align.records import read_records
from align.scoring.entropy import score_entropy, token_entropies


def entropy(logits) -> float:
    """−Σ p log p, in float64, one number after the other."""
    top = max(logits)
    weights = [math.exp(z - top) for z in logits]
    return -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights if w)


def test_entropies_equal_a_loop_and_survive_impossible_tokens():
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) * 5
    logits[3, 10:] = -torch.inf
    assert entropies(logits).tolist() == pytest.approx([entropy(row) for row in logits.double().tolist()], abs=1e-5)
    assert entropies(torch.zeros(1, 64)).item() == pytest.approx(math.log(64), abs=1e-6)


@pytest.mark.parametrize("budget", [1, 10_000])
def test_token_entropies_are_of_the_place_before_the_token(budget):
    model, exact = tiny_llama(), tiny_llama().double()
    rows = [(pair["prompt_ids"], pair[f"{side}_ids"]) for pair in random_pairs(5) for side in ("chosen", "rejected")]
    found = token_entropies(model, rows, pad_token_id=0, max_tokens_per_batch=budget)
    for (prompt, completion), values in zip(rows, found, strict=True):
        logits = exact(torch.tensor([[*prompt, *completion]])).logits[0].tolist()
        expected = [entropy(logits[len(prompt) - 1 + t]) for t in range(len(completion))]
        assert values == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("top", [0.2, 0.5, 1.0])
def test_the_top_share_of_all_tokens_keeps_its_weight(tmp_path, top):
    pairs = random_pairs(9, columns=("ref_logps",))
    counts = score_entropy(tiny_llama(), pairs, tmp_path / "out.jsonl", pad_token_id=0, top=top)
    rows = read_records(tmp_path / "out.jsonl", "pair")
    tokens = [
        (value, weight)
        for row in rows
        for side in ("chosen", "rejected")
        for value, weight in zip(row[f"{side}_entropies"], row[f"{side}_weights"], strict=True)
    ]
    kept = math.ceil(top * len(tokens))
    tokens.sort(key=lambda item: -item[0])
    assert [weight for _, weight in tokens] == [1.0] * kept + [0.0] * (len(tokens) - kept)
    assert counts["kept"] == kept and counts["tokens"] == len(tokens)
    assert counts["threshold"] == tokens[kept - 1][0]
    assert rows[0]["chosen_ref_logps"] == pairs[0]["chosen_ref_logps"]


def test_what_is_refused(tmp_path):
    for top in (0, 1.5):
        with pytest.raises(ConfigError, match=f"top = {top}"):
            score_entropy(tiny_llama(), random_pairs(2), tmp_path / "out.jsonl", pad_token_id=0, top=top)
    with pytest.raises(
        RecordError, match="has chosen_weights, rejected_weights already, which score entropy would replace"
    ):
        score_entropy(tiny_llama(), random_pairs(2, columns=("weights",)), tmp_path / "out.jsonl", pad_token_id=0)
    assert not list(tmp_path.iterdir())
