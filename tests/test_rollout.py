"""Rollouts against exhaustive enumeration, continuations from shared keys against continuations from scratch."""

import itertools
import math
from collections import Counter

import pytest
import torch
from conftest import random_pairs, tiny_llama
from transformers import MistralConfig, MistralForCausalLM

from align.continuations import Continuations, Fork, sampling_probs
from align.errors import ConfigError, MissingColumnError, RecordError
from align.records import read_records
from align.sample import SampleConfig
from align.scoring import rollout
from align.scoring.rollout import Rollout, RolloutConfig, _critical, roll_out, rollout_columns, score_rollout

ROWS = [([5, 6, 7], [8, 9, 10, 11, 12]), ([9, 4], [7, 7, 30]), ([3, 3, 3, 3, 3, 3], [21, 22, 23, 24, 25, 26, 27])]


class Enumerable:
    """A task small enough to enumerate: 4 tokens, completions of 3, right where the ids sum to an odd number."""

    vocabulary, longest = 4, 3

    def __init__(self):
        self.model = tiny_llama(vocab_size=self.vocabulary, seed=1, eos_token_id=None)
        with torch.no_grad():  # a model that prefers some tokens
            for parameter in self.model.parameters():
                parameter.mul_(2 if parameter.dim() > 1 else 1)
        self.tokenizer = type("T", (), {"pad_token_id": 0, "eos_token_id": 99})()

    def values(self, prompt, completion):
        """V_0 … V_{T-1}: by all 64 completions and their probabilities, in float64."""
        model, values = self.model.double(), []
        whole = {}
        for ids in itertools.product(range(self.vocabulary), repeat=self.longest):
            with torch.no_grad():
                logps = model(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
            whole[ids] = [logps[len(prompt) - 1 + t, token].item() for t, token in enumerate(ids)]
        for t in range(self.longest):
            same = {ids: p for ids, p in whole.items() if list(ids[:t]) == completion[:t]}
            values.append(sum(math.exp(sum(p[t:])) for ids, p in same.items() if sum(ids) % 2))
        self.model.float()
        return values


@pytest.fixture
def enumerable(monkeypatch):
    monkeypatch.setattr(rollout, "decode_completion", lambda _tokenizer, ids: " ".join(map(str, ids)))
    verdict = lambda text, _answer: type("V", (), {"correct": sum(map(int, text.split())) % 2 == 1})()  # noqa: E731
    monkeypatch.setattr(rollout, "verify_completion", verdict)
    return Enumerable()


@pytest.mark.parametrize(("search", "share"), [("all", True), ("all", False), ("bisection", True)])
def test_values_are_those_of_all_completions(enumerable, search, share):
    """Each count is binomial with the enumerated value: within 4.5 standard deviations at n = 1,500."""
    prompt, completion, n = [1, 2], [2, 3, 1], 1500
    expected = enumerable.values(prompt, completion)
    assert 0.02 < min(expected) < max(expected) < 0.98 and len({round(v, 2) for v in expected}) == 3
    config = RolloutConfig(n=n, max_new_tokens=3, batch_size=1024, search=search)
    (found,) = roll_out(enumerable.model, enumerable.tokenizer, [(prompt, completion)], ["1"], config, 5, share)
    for state, value in enumerate(expected):
        if search == "all" or state in found.correct:
            spread = math.sqrt(value * (1 - value) / n)
            assert abs(found.correct[state] / n - value) < 4.5 * spread, (state, found.correct[state] / n, value)
    assert found.correct[3] == 0 and found.values()[-1] == 0.0


def test_draws_without_the_critical_token(enumerable):
    """Those that forked there and those drawn on purpose have one distribution: the policy's, the token left out."""
    prompt, completion, n = [1, 2], [2, 3, 1], 1500
    config = RolloutConfig(n=n, max_new_tokens=3, batch_size=1024, ks=(1,))
    (found,) = roll_out(enumerable.model, enumerable.tokenizer, [(prompt, completion)], ["1"], config, 7)
    c, values = found.critical, [*enumerable.values(prompt, completion), 0.0]
    assert c == 2  # only the last token decides whether the sum is even
    follow = Continuations(
        enumerable.model, enumerable.tokenizer, [(prompt, completion)], config.sampling, 0
    ).next_tokens[0]
    p = follow.follow[c]
    value = (values[c] - p * values[c + 1]) / (1 - p)
    assert abs(found.without / n - value) < 4.5 * math.sqrt(value * (1 - value) / n) + 1e-9


@pytest.mark.parametrize("batch_size", [3, 64])
def test_continuations_from_shared_keys_equal_those_from_scratch(tokenizer, batch_size):
    """At a temperature that leaves no choice."""
    model = tiny_llama(vocab_size=len(tokenizer))
    config = SampleConfig(n=2, temperature=1e-6, max_new_tokens=16, batch_size=batch_size)
    forks = [Fork(row, t, 40 + t) for row, (_, completion) in enumerate(ROWS) for t in range(len(completion))]
    shared = Continuations(model, tokenizer, ROWS, config, 0, share=True)
    apart = Continuations(model, tokenizer, ROWS, config, 0, share=False)
    found = shared.complete(forks)
    assert found == apart.complete(forks)
    for fork, ids in zip(forks, found, strict=True):
        ids_so_far = [*ROWS[fork.row][0], *ROWS[fork.row][1][: fork.position], fork.token]
        expected = [*ROWS[fork.row][1][: fork.position], fork.token]
        with torch.no_grad():
            while len(expected) < 16 and expected[-1] != tokenizer.eos_token_id:
                token = int(model(torch.tensor([ids_so_far])).logits[0, -1].argmax())
                ids_so_far.append(token)
                expected.append(token)
        assert ids == expected
    assert shared.forward_tokens < apart.forward_tokens
    fed = sum(len(p) + len(c) for p, c in ROWS) + sum(
        len(i) - f.position - 1 for f, i in zip(forks, found, strict=True)
    )
    assert shared.forward_tokens == fed


def test_a_fork_to_the_end_is_not_continued_and_a_model_with_windows_shares_nothing(tokenizer):
    config = SampleConfig(n=1, max_new_tokens=12)
    windowed = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=4,
        )
    ).eval()  # fmt: skip
    for model in (tiny_llama(vocab_size=len(tokenizer)), windowed):
        continuations = Continuations(model, tokenizer, ROWS, config, 0)
        assert continuations.share == (model is not windowed)
        before = continuations.forward_tokens
        assert continuations.complete([Fork(0, 2, tokenizer.eos_token_id)]) == [[8, 9, tokenizer.eos_token_id]]
        assert continuations.forward_tokens == before
        (long,) = continuations.complete([Fork(2, 6, 30)])
        assert long[:7] == [21, 22, 23, 24, 25, 26, 30] and len(long) <= 12


def test_next_tokens_are_drawn_as_generate_draws():
    logits = torch.randn(400, 9, generator=torch.Generator().manual_seed(0))
    config = SampleConfig(temperature=0.7, top_p=0.8, top_k=5)
    probs = sampling_probs(logits, config)
    for row, found in zip(logits.double(), probs, strict=True):
        order = row.argsort(descending=True)[:5]
        p = (row[order] / 0.7).softmax(-1)
        kept = int((p.cumsum(-1) < 0.8).sum()) + 1
        expected = torch.zeros(9, dtype=torch.double)
        expected[order[:kept]] = p[:kept] / p[:kept].sum()
        assert torch.allclose(found.double(), expected, atol=1e-6)


def test_draws_of_other_tokens(tokenizer):
    model = tiny_llama(vocab_size=len(tokenizer))
    continuations = Continuations(model, tokenizer, ROWS, SampleConfig(n=4000, top_k=3), 1)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7, 8]])).logits[0, -1]
    own, drawn = 9, continuations.next_tokens[0]
    top = logits.topk(3)
    probs = dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))
    assert drawn.follow[1] == pytest.approx(probs.pop(own, 0.0), abs=1e-6)
    counts, total = Counter(drawn.others[1]), sum(probs.values())
    assert set(counts) == set(probs)
    for token, p in probs.items():
        assert abs(counts[token] / 4000 - p / total) < 4.5 * math.sqrt(p / total * (1 - p / total) / 4000)
    certain = Continuations(model, tokenizer, ROWS, SampleConfig(n=3, top_k=1), 1).next_tokens[0]
    assert all(bool(others) == (follow < 1) for others, follow in zip(certain.others, certain.follow, strict=True))


def found(correct, n=20, **kwargs):
    states = dict(enumerate(correct)) if isinstance(correct, list) else correct
    fields = {"critical": None, "without": None, "forward_tokens": 0.0, "independent_tokens": 0, **kwargs}
    return Rollout(states, n, max(states), **fields)


def test_the_critical_token_and_the_weights():
    config = RolloutConfig(n=20, threshold=0.05)
    critical = lambda counts: _critical(dict(enumerate(counts)), len(counts) - 1, config)  # noqa: E731
    assert critical([10, 12, 0, 1, 0]) == 1  # first 0, at most 5 % after it
    assert critical([10, 0, 2, 0, 0]) == 2  # 10 % after the first 0: it was not lost yet
    assert critical([1, 0, 0]) is None  # lost before it began
    assert critical([10, 20, 20]) is None  # right
    rejected = found([10, 12, 2, 4, 0], critical=3)
    columns = rollout_columns("rejected", rejected, config)
    assert columns["rejected_rollout_values"] == [0.6, 0.1, 0.2, 0.0]
    assert columns["rejected_weights"] == pytest.approx([0.0, 0.5, 0.0, 0.2])
    only = rollout_columns("rejected", rejected, RolloutConfig(n=20, rule="critical"))
    assert only["rejected_weights"] == [0.0, 0.0, 0.0, 1.0]
    assert rollout_columns("chosen", rejected, config)["chosen_weights"] == [1.0] * 4
    gains = rollout_columns("chosen", rejected, RolloutConfig(n=20, weight_chosen=True))
    assert gains["chosen_weights"] == pytest.approx([0.1, 0.0, 0.1, 0.0])
    halved = found({0: 10, 2: 8, 3: 0, 4: 0}, critical=2)
    columns = rollout_columns("rejected", halved, RolloutConfig(n=20, search="bisection"))
    assert columns["rejected_rollout_values"] == [0.5, 0.4, 0.0, 0.0]
    assert columns["rejected_weights"] == pytest.approx([0.0, 0.0, 0.4, 0.0])


def test_bisection_looks_at_few_states(enumerable):
    prompt, completion = [1, 2], [2, 0, 0]
    config = RolloutConfig(n=200, max_new_tokens=3, batch_size=512, search="bisection", threshold=0.0)
    (result,) = roll_out(enumerable.model, enumerable.tokenizer, [(prompt, completion)], ["1"], config)
    assert result.critical is not None and result.critical + 1 in result.correct and result.critical in result.correct
    assert result.correct[result.critical] > 0 == result.correct[result.critical + 1]


def test_the_stage(tmp_path, tokenizer):
    model = tiny_llama(vocab_size=len(tokenizer))
    pairs = [{**pair, "answer": "1"} for pair in random_pairs(5, vocab_size=len(tokenizer))]
    config = RolloutConfig(n=4, max_new_tokens=8, batch_size=8, ks=(2,))
    counts = score_rollout(model, tokenizer, pairs, tmp_path / "a.jsonl", config)
    rows = read_records(tmp_path / "a.jsonl", "pair")
    assert [row["id"] for row in rows] == [pair["id"] for pair in pairs] and counts["rows"] == 5
    for row in rows:
        assert len(row["rejected_weights"]) == len(row["rejected_rollout_values"]) == len(row["rejected_ids"])
        assert row["chosen_weights"] == [1.0] * len(row["chosen_ids"]) and "chosen_rollout_values" not in row
        assert not any(key.startswith("_") for key in row)
    score_rollout(model, tokenizer, pairs, tmp_path / "b.jsonl", config)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()  # the seed decides
    with pytest.raises(MissingColumnError, match=r"row 2 \(id 'p2'\): no answer"):
        score_rollout(model, tokenizer, [*pairs[:2], {**pairs[2], "answer": ""}], tmp_path / "c.jsonl", config)
    with pytest.raises(RecordError, match="row 0 .*has chosen_weights, rejected_weights already"):
        score_rollout(model, tokenizer, rows, tmp_path / "c.jsonl", config)
    assert not (tmp_path / "c.jsonl").exists()


def test_settings_that_make_no_sense():
    for settings, words in (
        ({"search": "some"}, "search = 'some' is unknown"),
        ({"rule": "x"}, "rule = 'x' is unknown"),
        ({"temperature": 0}, "temperature = 0 draws the same"),
        ({"threshold": 1.0}, "threshold = 1.0"),
        ({"n": 4, "ks": (5,)}, "pass@5 needs n of at least 5"),
        ({"search": "bisection", "weight_chosen": True}, "needs search 'all'"),
        ({"n": 0}, "n = 0 must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            RolloutConfig(**settings)
