"""Sampling: distributed as the model says, cut where it ends, the same rows however the work is shared."""

import itertools
import math
from collections import Counter

import pytest
import torch
from conftest import byte_level_tokenizer, tiny_llama

from align.continuations import Continuations, Fork
from align.errors import ConfigError, RecordError
from align.records import read_records
from align.sample import SampleConfig, cut_at_end, derived_seed, generate, sample_completions

TOKENIZER = byte_level_tokenizer()


def problems(n):
    return [{"id": f"p{i}", "prompt": "How many apples" + " and" * (i % 3) + "?", "answer": "1"} for i in range(n)]


def test_draws_follow_the_model(tmp_path):
    model = tiny_llama(initializer_range=0.5)
    prompt = TOKENIZER("the answer")["input_ids"]
    config = SampleConfig(n=3000, max_new_tokens=1)
    (drawn,) = generate(model, TOKENIZER, [prompt], config, seed=1)
    exact = torch.softmax(model(input_ids=torch.tensor([prompt])).logits[0, -1].double(), -1)
    counts = Counter(ids[0] for ids, _ in drawn)
    likely = [token for token in range(len(exact)) if exact[token] * 3000 >= 5]
    rest = 3000 - sum(counts[token] for token in likely), 3000 * (1 - sum(exact[token].item() for token in likely))
    cells = [(counts[token], 3000 * exact[token].item()) for token in likely] + [rest]
    chi2 = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    freedom = len(cells) - 1
    # Wilson-Hilferty: chi-square's cube root is near normal; 3.3 is a one-sided p of 0.0005.
    z = ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert freedom > 5 and z < 3.3


def test_stage(tmp_path):
    model = tiny_llama()
    config = SampleConfig(n=3, max_new_tokens=5, batch_size=6, seed=4)
    counts = sample_completions(model, TOKENIZER, problems(7), tmp_path / "a.jsonl", config)
    rows = read_records(tmp_path / "a.jsonl", "sample")
    assert [(row["id"], row["sample"]) for row in rows] == [(f"p{i}", k) for i in range(7) for k in range(3)]
    assert counts["rows"] == 21 and counts["stop"] + counts["length"] == 21
    for row in rows:
        assert row["prompt_ids"] == TOKENIZER(row["prompt"])["input_ids"]
        assert 1 <= len(row["completion_ids"]) <= 5
        assert (row["completion_ids"][-1] in (0, 2)) == (row["finish_reason"] == "stop")
        assert row["completion"] == TOKENIZER.decode(row["completion_ids"], skip_special_tokens=True)
    sample_completions(model, TOKENIZER, problems(7), tmp_path / "b.jsonl", config)
    assert read_records(tmp_path / "b.jsonl") == rows
    sample_completions(
        model, TOKENIZER, problems(7), tmp_path / "c.jsonl", SampleConfig(n=3, max_new_tokens=5, batch_size=6, seed=5)
    )
    assert read_records(tmp_path / "c.jsonl") != rows


def test_greedy_equals_argmax_whatever_shares_the_batch():
    model = tiny_llama(initializer_range=0.5)
    prompts = [TOKENIZER(p["prompt"])["input_ids"] for p in problems(3)]
    drawn = generate(model, TOKENIZER, prompts, SampleConfig(temperature=0, max_new_tokens=6), seed=0)
    for prompt, [(ids, _)] in zip(prompts, drawn, strict=True):
        for t, token in enumerate(ids):
            logits = model(input_ids=torch.tensor([prompt + ids[:t]])).logits[0, -1]
            assert token == logits.argmax().item()


def test_a_checkpoints_own_sampling_settings_do_not_slip_in():
    model = tiny_llama(initializer_range=0.5)
    prompt = [TOKENIZER("the answer")["input_ids"]]
    plain = generate(model, TOKENIZER, prompt, SampleConfig(n=20, max_new_tokens=4), seed=0)
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 5.0
    assert generate(model, TOKENIZER, prompt, SampleConfig(n=20, max_new_tokens=4), seed=0) == plain
    assert model.generation_config.top_k == 1  # and they are left as they were


def test_stop_text_is_cut_and_closed_with_eos():
    model = tiny_llama(initializer_range=0.5)
    prompt = [TOKENIZER("the answer")["input_ids"]]
    greedy = SampleConfig(temperature=0, max_new_tokens=8)
    [[(ids, _)]] = generate(model, TOKENIZER, prompt, greedy, seed=0)
    text = TOKENIZER.decode(ids)
    stop = TOKENIZER.decode(ids[3:5])
    [[(cut, reason)]] = generate(
        model, TOKENIZER, prompt, SampleConfig(temperature=0, max_new_tokens=8, stop=(stop,)), seed=0
    )
    assert reason == "stop" and cut[-1] == TOKENIZER.eos_token_id
    assert cut[:-1] == ids[: len(cut) - 1] and len(cut) - 1 <= 3
    assert text.startswith(TOKENIZER.decode(cut[:-1])) and stop not in TOKENIZER.decode(cut[:-1])


def test_a_stop_text_counts_where_it_ends_beyond_what_was_given():
    eos = TOKENIZER.eos_token_id
    one = lambda text: [token for char in text for token in TOKENIZER(char)["input_ids"]]  # noqa: E731
    cut = lambda text, stop, **kwargs: cut_at_end([eos], TOKENIZER, one(text), SampleConfig(stop=stop), **kwargs)  # noqa: E731
    assert cut("a;bc;d", ";") == ([*one("a"), eos], "stop")
    assert cut("a;bc;d", ";", given=2) == ([*one("a;bc"), eos], "stop")
    assert cut("a;bc;d", ";", given=5) == (one("a;bc;d"), "length")
    assert cut("abcd", ("cd", "bc"), given=2) == ([*one("a"), eos], "stop")  # begins in what was given
    assert cut("abcd", ("abcd", "bc")) == ([*one("a"), eos], "stop")  # the longer one is not there yet
    assert cut("abc", ("xa", "xab"), context=one("wx")) == ([eos], "stop")  # begins in the prompt
    assert cut("abc", "wx", context=one("wx")) == (one("abc"), "length")
    bytes_of = one("☕")
    assert len(bytes_of) == 2  # one character in two tokens, one of them given
    found = cut_at_end([eos], TOKENIZER, [*one("a"), *bytes_of], SampleConfig(stop="☕"), given=2)
    assert found == ([*one("a"), eos], "stop")
    assert cut_at_end([eos], TOKENIZER, [5, eos, 6, eos, 7], SampleConfig(), given=2) == ([5, eos, 6, eos], "stop")
    assert cut_at_end([eos], TOKENIZER, [5, eos, 6], SampleConfig(), given=2) == ([5, eos, 6], "length")


def test_a_stop_text_that_begins_in_the_prompt_leaves_eos_alone():
    model = tiny_llama(initializer_range=0.5)
    prompt = TOKENIZER("the answer")["input_ids"]
    greedy = SampleConfig(temperature=0, max_new_tokens=8)
    [[(ids, _)]] = generate(model, TOKENIZER, [prompt], greedy, seed=0)
    stop = TOKENIZER.decode([prompt[-1], ids[0]])
    settings = SampleConfig(temperature=0, max_new_tokens=8, stop=(stop,))
    assert generate(model, TOKENIZER, [prompt], settings, seed=0) == [[([TOKENIZER.eos_token_id], "stop")]]


def greedy_ids(model, prompt, length, stop=()):
    config = SampleConfig(temperature=0, max_new_tokens=length, stop=stop)
    return generate(model, TOKENIZER, [prompt], config, 0)[0][0]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_stop_texts_across_a_fork_are_cut_as_in_sampling(batch_size):
    """At a temperature that leaves no choice: with a stop text of three tokens, a fork before, in or at its end gives what
    sampling from the prompt gives; one behind it does not see it."""
    model = tiny_llama(vocab_size=len(TOKENIZER), initializer_range=0.5)
    prompts = [[5, 6, 7], list(range(40, 51)), [9, 4]]
    rows = [(prompt, greedy_ids(model, prompt, 10)[0]) for prompt in prompts]
    forks = [Fork(row, t, token) for row, (_, ids) in enumerate(rows) for t, token in enumerate(ids)]
    seen = set()
    for row, start in itertools.product(range(3), range(-1, 7)):
        prompt, ids = rows[row]
        whole = [*prompt, *ids]
        stop = TOKENIZER.decode(whole[len(prompt) + start : len(prompt) + start + 3])
        if "\ufffd" in stop or TOKENIZER.decode(whole).count(stop) != 1:
            continue
        seen.add(start)
        settings = {"temperature": 1e-6, "max_new_tokens": 10, "stop": (stop,), "batch_size": batch_size}
        found = [Continuations(model, TOKENIZER, rows, SampleConfig(**settings), 0, share) for share in (True, False)]
        shared, apart = (continuations.complete(forks) for continuations in found)
        assert shared == apart
        ends = {fork: end for fork, end in zip(forks, shared, strict=True) if fork.row == row}
        cut = [*ids[: max(start, 0)], TOKENIZER.eos_token_id]
        assert greedy_ids(model, prompt, 10, (stop,)) == (cut, "stop")
        for fork, end in ends.items():
            assert end == (cut if fork.position < start + 3 else ids), (start, fork)
    assert -1 in seen and len(seen) > 4


def test_generation_sees_stop_texts_in_what_precedes_a_fork_and_not_in_what_it_leaves():
    """Forks of many places share a batch, and the keys of one completion."""
    model = tiny_llama(vocab_size=len(TOKENIZER), initializer_range=0.5)
    prompt, ids = [5, 6, 7], [70, 71, 72, 73, 74, 75, 76, 77]
    forks = [Fork(0, 2, 83), Fork(0, 6, 83)]
    after = [greedy_ids(model, [*prompt, *ids[: f.position], f.token], 10)[0] for f in forks]

    def complete(*stop):
        config = SampleConfig(temperature=1e-6, max_new_tokens=12, stop=stop)
        continuations, passes = Continuations(model, TOKENIZER, [(prompt, ids)], config, 0, share=True), []
        hook = model.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
        found = continuations.complete(forks)
        hook.remove()
        return found, len(passes)

    left = TOKENIZER.decode([ids[5], 83, after[0][0]])  # what the late fork has before it
    assert complete(left)[0][0] == [*ids[:2], 83, *after[0]][:12] and len(after[0]) > 2
    seen = [TOKENIZER.decode([ids[f.position - 1], f.token, then[0]]) for f, then in zip(forks, after, strict=True)]
    eos = TOKENIZER.eos_token_id
    assert complete(*seen) == ([[*ids[:1], eos], [*ids[:5], eos]], 1)  # both end after one more token


@pytest.mark.parametrize("seed", [3, 20240101, 2**70])
def test_every_batch_has_a_seed_of_its_own_however_large(tmp_path, seed):
    same = [{"id": f"p{i}", "prompt": "How many?", "answer": "1"} for i in range(8)]
    config = SampleConfig(n=2, max_new_tokens=6, batch_size=2, seed=seed)
    sample_completions(tiny_llama(), TOKENIZER, same, tmp_path / "a.jsonl", config)
    rows = read_records(tmp_path / "a.jsonl", "sample")
    assert len({str([row["completion_ids"] for row in rows[i : i + 2]]) for i in range(0, 16, 2)}) == 8
    assert derived_seed(7, 3) == 7_000_024  # small seeds draw what they always drew
    assert 0 <= derived_seed(derived_seed(seed, 5), 6) < 2**63


def test_settings_and_problems_are_checked(tmp_path):
    for wrong in ({"n": 0}, {"top_p": 0}, {"temperature": -1}, {"temperature": 0, "n": 2}, {"max_new_tokens": 0}):
        with pytest.raises(ConfigError):
            SampleConfig(**wrong)
    with pytest.raises(RecordError, match="max_prompt_length = 1"):
        sample_completions(
            tiny_llama(), TOKENIZER, problems(2), tmp_path / "a.jsonl", SampleConfig(max_prompt_length=1)
        )
    with pytest.raises(RecordError, match="the id occurs twice"):
        sample_completions(tiny_llama(), TOKENIZER, problems(1) * 2, tmp_path / "a.jsonl", SampleConfig())
    with pytest.raises(RecordError, match="do not match"):
        sample_completions(tiny_llama(vocab_size=50), TOKENIZER, problems(1), tmp_path / "a.jsonl", SampleConfig())


def test_many_draws_are_split_among_batches(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "align.sample.generate",
        lambda model, tokenizer, prompts, config, seed: (
            sizes.append(config.n * len(prompts)) or generate(model, tokenizer, prompts, config, seed)
        ),
    )
    config = SampleConfig(n=7, max_new_tokens=6, batch_size=3)
    sample_completions(tiny_llama(initializer_range=0.5), TOKENIZER, problems(2), tmp_path / "a.jsonl", config)
    rows = read_records(tmp_path / "a.jsonl", "sample")
    assert [(row["id"], row["sample"]) for row in rows] == [(f"p{i}", k) for i in range(2) for k in range(7)]
    assert sizes == [3, 3, 1] * 2 and len({tuple(row["completion_ids"]) for row in rows}) > 7


def test_one_stop_text_is_one_text():
    assert SampleConfig(stop="END").stop == ("END",)
