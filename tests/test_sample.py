"""Sampling: distributed as the model says, cut where it ends, the same rows however the work is shared."""

import math
from collections import Counter

import pytest
import torch
from conftest import byte_level_tokenizer, tiny_llama

from align.errors import ConfigError, RecordError
from align.records import read_records
from align.sample import SampleConfig, generate, sample_completions

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
