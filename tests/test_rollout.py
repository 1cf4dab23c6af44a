"""Rollouts against exhaustive enumeration, continuations from shared keys against continuations from scratch."""

import itertools
import math
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from conftest import byte_level_tokenizer, random_pairs, tiny_llama
from transformers import MistralConfig, MistralForCausalLM

from align import continuations
from align.continuations import Continuations, Fork, sampling_probs
from align.errors import ConfigError, MissingColumnError, RecordError
from align.records import read_records
from align.sample import SampleConfig, generate
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


@pytest.mark.parametrize("search", ["all", "bisection"])
def test_counts_with_and_without_the_critical_token_are_fresh(enumerable, search):
    """Many searches with few draws each blame any token; what is counted then has the enumerated probabilities, to 4.5
    standard deviations. The search's own draws would give 0 with the token, and too many without."""
    prompt, completion, n, many = [1, 2], [2, 2, 0], 2, 2000
    rows, answers = [(prompt, completion)] * many, ["1"] * many
    settings = {"n": n, "max_new_tokens": 3, "batch_size": 1024, "search": search, "threshold": 0.0}
    found = roll_out(enumerable.model, enumerable.tokenizer, rows, answers, RolloutConfig(ks=(1,), **settings), 7)
    values = [*enumerable.values(prompt, completion), 0.0]
    config = SampleConfig(n=1, max_new_tokens=3)
    follow = Continuations(enumerable.model, enumerable.tokenizer, rows[:1], config, 0).next_tokens[0].follow
    for c in range(3):
        blamed = [f for f in found if f.critical == c]
        total = len(blamed) * n
        assert total > 80
        without = (values[c] - follow[c] * values[c + 1]) / (1 - follow[c])
        for name, value in (("with_critical", values[c + 1]), ("without", without)):
            share = sum(getattr(f, name) for f in blamed) / total
            assert abs(share - value) <= 4.5 * math.sqrt(value * (1 - value) / total) + 1e-9, (c, name, value)
        assert (sum(f.with_critical for f in blamed) > 0) == (
            c < 2
        )  # the last token decides: nothing is drawn after it
    plain = roll_out(enumerable.model, enumerable.tokenizer, rows, answers, RolloutConfig(**settings), 7)
    assert [(f.correct, f.critical) for f in plain] == [(f.correct, f.critical) for f in found]
    assert {f.without for f in plain} == {None}
    assert all(f.with_critical == (None if f.critical is None else f.correct[f.critical + 1]) for f in plain)
    assert sum(f.forward_tokens for f in plain) < sum(f.forward_tokens for f in found)
    assert sum(f.independent_tokens for f in plain) < sum(f.independent_tokens for f in found)


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
    none = dict.fromkeys(("critical", "with_critical", "without"))
    fields = {**none, "cut": 0, "forward_tokens": 0.0, "independent_tokens": 0, **kwargs}
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
    config = RolloutConfig(n=4, max_new_tokens=16, batch_size=8, ks=(2,))
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


def bigrams(tokenizer, follow):
    """A Llama that draws each character by the one before it: one-hot embeddings, layers that add nothing, and a head that
    is a table of log-probabilities."""
    size = len(tokenizer) + -len(tokenizer) % 8  # a multiple of the heads
    model = tiny_llama(vocab_size=size, hidden_size=size, eos_token_id=None)
    one = lambda char: tokenizer.eos_token_id if char == "$" else tokenizer(char)["input_ids"][0]  # noqa: E731
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.fill_(-40 / size**0.5)  # RMSNorm makes sqrt(size) of a one
        for before, after in follow.items():
            for char, p in after.items():
                model.lm_head.weight[one(char), one(before)] = math.log(p) / size**0.5
    return model, one


@pytest.mark.parametrize(("search", "share"), [("all", True), ("all", False), ("bisection", True)])
def test_a_fork_to_a_stop_text_ends_there_as_in_sampling(tokenizer, monkeypatch, search, share):
    """After 4 the policy draws the stop text, never EOS, which sampling put there; what it would say behind it is right."""
    follow = {"A": {"x": 1}, "x": {"=": 1}, "=": {"2": 1}, "2": {"4": 0.5, "9": 0.5}, "4": {";": 1}, ";": {"9": 1}}
    model, one = bigrams(tokenizer, follow | {"9": {"$": 1}})
    verdict = lambda text, _answer: type("V", (), {"correct": text.endswith("9")})()  # noqa: E731
    monkeypatch.setattr(rollout, "verify_completion", verdict)
    prompt, completion, n = [one("A")], [one(char) for char in "x=24$"], 400
    config = RolloutConfig(n=n, search=search, max_new_tokens=9, stop=(";",), batch_size=512)
    (result,) = roll_out(model, tokenizer, [(prompt, completion)], ["9"], config, share=share)
    for state in range(5):
        (drawn,) = generate(model, tokenizer, [[*prompt, *completion[:state]]], config.sampling, seed=state)
        given = tokenizer.decode(completion[:state])
        sampled = sum((given + tokenizer.decode(ids, skip_special_tokens=True)).endswith("9") for ids, _ in drawn)
        assert sampled / n == pytest.approx(0.5 * (state < 4), abs=4.5 * 0.5 / math.sqrt(n))
        if state in result.correct:
            both = 4.5 * 0.5 * math.sqrt(2 / n) * (state < 4)
            assert abs(result.correct[state] - sampled) / n <= both, (state, result.correct[state], sampled)
    assert result.correct[4] == 0 and result.critical == 3 and result.cut == 0
    # Where the completion itself runs on behind the stop text, which makes it right, draws do not.
    (beyond,) = roll_out(model, tokenizer, [(prompt, [one(c) for c in "x=24;9$"])], ["9"], config, share=share)
    assert beyond.correct[0] / n == pytest.approx(0.5, abs=4.5 * 0.5 / math.sqrt(n)) and beyond.values()[-1] == 1.0


@contextmanager
def fed(model, pad, monkeypatch):
    """Counts tokens that reach the embedding, without padding, to which belongs the end of a row whose batch goes on."""
    counts, run = [], continuations.run_generate

    def run_and_see(*args, **kwargs):
        output = run(*args, **kwargs)
        counts.append(-int((output[:, -1] == pad).sum()))
        return output

    embed, head = model.get_input_embeddings(), model.lm_head
    hooks = (
        embed.register_forward_hook(lambda _module, args, _out: counts.append(int((args[0] != pad).sum()))),
        head.register_forward_hook(lambda _module, _args, out: out.index_fill(-1, torch.tensor([pad]), -1e9)),
    )  # what is drawn is no padding
    with monkeypatch.context() as patch:
        patch.setattr(continuations, "run_generate", run_and_see)
        yield counts
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("stop", [(), tuple(a + b for a in "aeinost" for b in "aeinost")])
def test_tokens_are_counted_as_they_are_fed_and_sharing_halves_them(enumerable, monkeypatch, stop):
    tokenizer, n = byte_level_tokenizer(chat=True), 8
    model = tiny_llama(vocab_size=len(tokenizer), eos_token_id=None)
    ids = torch.randint(3, 390, (3, 60), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [(line[:length], line[-12:]) for line, length in zip(ids, (30, 24, 41), strict=True)]
    config = RolloutConfig(n=n, max_new_tokens=20, batch_size=16, stop=stop, ks=(1,))
    costs = {}
    for share in (True, False):
        with fed(model, tokenizer.pad_token_id, monkeypatch) as counts:
            found = roll_out(model, tokenizer, rows, ["1"] * 3, config, 1, share)
        costs[share] = sum(counts)
        assert sum(r.forward_tokens for r in found) == pytest.approx(costs[share])
    assert costs[True] <= costs[False] / 2 and costs[True] <= sum(r.independent_tokens for r in found) / 2
    with fed(model, tokenizer.pad_token_id, monkeypatch) as counts:  # every continuation of every state on its own
        for prompt, completion in rows:
            for state in range(12):
                settings = SampleConfig(n=n, max_new_tokens=20 - state, stop=stop)
                generate(model, tokenizer, [[*prompt, *completion[:state]]], settings, state)
    assert costs[True] <= sum(counts) / 2


def test_every_batch_and_every_seed_draws_anew(tokenizer):
    model, config = tiny_llama(vocab_size=len(tokenizer)), SampleConfig(n=2, max_new_tokens=12, batch_size=4)
    forks = [Fork(0, 2, 30)] * 32
    for share in (True, False):
        one, other, again = (Continuations(model, tokenizer, ROWS[:1], config, s, share) for s in (0, 2**70 + 1, 0))
        found = [*one.complete(forks), *one.complete(forks), *other.complete(forks)]
        assert len({str(found[start : start + 4]) for start in range(0, len(found), 4)}) == 24
        assert again.complete(forks) == found[:32]


def same_pairs(n, rejected):
    pair = {"prompt": "x", "chosen": "y", "rejected": "z", "answer": "1", "prompt_ids": [1, 2], "chosen_ids": [1]}
    return [{"id": f"p{i}", **pair, "rejected_ids": rejected} for i in range(n)]


@pytest.mark.parametrize("seed", [0, 20240101, 2**62, 2**70])
def test_every_part_has_a_seed_of_its_own_however_large(enumerable, tmp_path, seed):
    settings = {"n": 40, "max_new_tokens": 3, "batch_size": 40}

    def score(name, **more):
        config, pairs = RolloutConfig(**settings, **more), same_pairs(8, [2, 2, 0])
        counts = score_rollout(enumerable.model, enumerable.tokenizer, pairs, tmp_path / name, config)
        return counts, read_records(tmp_path / name)

    _, rows = score("a.jsonl", seed=seed)
    assert len({str(row["rejected_rollout_values"]) for row in rows}) > 4
    assert {row["critical_with"] for row in rows} <= {0, None} == {row["critical_without"] for row in rows} | {0}
    counts, others = score("b.jsonl", seed=seed + 1, ks=(1,))
    assert [row["rejected_rollout_values"] for row in rows] != [row["rejected_rollout_values"] for row in others]
    for name in ("with", "without"):
        found = [row[f"critical_{name}"] / 40 for row in others if row["critical"] is not None]
        assert found and counts[f"pass@1 {name}"] == pytest.approx(sum(found) / len(found))


def test_completions_longer_than_the_budget_are_refused_and_cut_continuations_counted(enumerable, tmp_path):
    pairs = [*same_pairs(2, [2, 3, 1]), *({**p, "id": "long"} for p in same_pairs(1, [1, 2, 3, 3, 2]))]
    words = r"row 2 \(id 'long'\): rejected has 5 tokens, more than max_new_tokens = 4.*Set max_new_tokens to 5 or more"
    with pytest.raises(ConfigError, match=words):  # no model is asked
        score_rollout(None, None, pairs, tmp_path / "a.jsonl", RolloutConfig(n=4, max_new_tokens=4))
    turned = [{**pair, "chosen_ids": pair["rejected_ids"], "rejected_ids": [1]} for pair in pairs]
    with pytest.raises(ConfigError, match="'long'.*: chosen has 5 tokens"):
        score_rollout(None, None, turned, tmp_path / "a.jsonl", RolloutConfig(max_new_tokens=4, weight_chosen=True))
    model, tokenizer = enumerable.model, enumerable.tokenizer
    with pytest.raises(ConfigError, match="row 0: the completion has 5 tokens"):
        roll_out(model, tokenizer, [([1], [1] * 5)], ["1"], RolloutConfig(max_new_tokens=4))
    config = RolloutConfig(n=4, max_new_tokens=3, search="bisection", threshold=0.0)
    counts = score_rollout(model, tokenizer, pairs, tmp_path / "a.jsonl", config, max_length=5)
    assert counts["rows"] == 2 and counts["too_long"] == 1
    (result,) = roll_out(model, tokenizer, [([1, 2], [2, 3, 1])], ["1"], config)
    assert result.cut == 4 * (len(result.correct) - 1)  # a model without EOS: every draw; the completion is none
    counts = score_rollout(model, tokenizer, turned[:2], tmp_path / "b.jsonl", RolloutConfig(n=400, max_new_tokens=3))
    assert 400 < counts["cut"] <= 800  # all but those that draw the one token of these completions


def test_bisection_of_a_right_completion_looks_at_its_start_alone(enumerable, tmp_path):
    right, n = [2, 3, 2], 600
    config = RolloutConfig(n=n, max_new_tokens=3, batch_size=1024, search="bisection")
    (result,) = roll_out(enumerable.model, enumerable.tokenizer, [([1, 2], right)], ["1"], config)
    value = enumerable.values([1, 2], right)[0]
    assert set(result.correct) == {0, 3} and result.correct[3] == n and result.critical is None
    assert abs(result.correct[0] / n - value) < 4.5 * math.sqrt(value * (1 - value) / n)
    assert result.values() == [result.correct[0] / n] * 3 + [1.0] and result.independent_tokens == n * 4
    counts = score_rollout(enumerable.model, enumerable.tokenizer, same_pairs(2, right), tmp_path / "a.jsonl", config)
    assert counts["lost_from_start"] == counts["critical"] == 0


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
