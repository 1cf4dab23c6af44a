"""Scores of traces against independent loops, and the case that mean log-probability is fooled by."""

import json
import math

import pytest
import torch
from conftest import tiny_llama
from test_recipes import align

from align.errors import ConfigError, MissingColumnError, RecordError
from align.records import read_records, write_records
from align.select import (
    SelectConfig,
    debiased_means,
    first_of_steps,
    keep,
    mean_without_first,
    rank_surprisal_ratio,
    select_traces,
)


def traces(tokenizer, texts: list[str], problems: int = 2) -> list[dict]:
    rows = []
    for i, text in enumerate(texts):
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        row = {"id": f"p{i % problems}", "prompt": "x", "prompt_ids": [5, 6 + i % problems], "completion_ids": ids}
        rows.append(row | {"completion": text, "correct": True})
    return rows


def test_scores_against_loops(tmp_path, tokenizer):
    model = tiny_llama(vocab_size=len(tokenizer))
    rows = traces(tokenizer, ["one two\nthree", "four\nfive\nsix seven", "eight", "nine ten\n\neleven"])
    counts = select_traces(model, tokenizer, rows, tmp_path / "out.jsonl", SelectConfig(keep_share=1.0))
    assert counts == {"rows": 4, "traces": 4, "empty": 0, "wrong": 0, "unended": 0, "mostly_student": 0, "problems": 2}
    found, shares, means = read_records(tmp_path / "out.jsonl"), [], []
    for row, scored in zip(rows, found, strict=True):
        ids, prompt = row["completion_ids"], row["prompt_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0].double()
        logps, ranks, first, text = [], [], [], ""
        for t, token in enumerate(ids):
            line = logits[len(prompt) - 1 + t]
            logps.append(float(line[token]) - math.log(sum(math.exp(float(v)) for v in line)))
            ranks.append(1 + sum(float(v) > float(line[token]) for v in line))
            first.append(t == 0 or text.endswith("\n"))
            text = tokenizer.decode(ids[: t + 1])
        assert scored["rank_surprisal_ratio"] == pytest.approx(
            (sum(ranks) / len(ids)) / (-sum(logps) / len(ids)), rel=1e-5
        )
        assert scored["mean_logp"] == pytest.approx(sum(logps) / len(ids), rel=1e-5)
        rest = [logp for logp, begins in zip(logps, first, strict=True) if not begins]
        assert scored["mean_logp_without_first"] == pytest.approx(sum(rest) / len(rest), rel=1e-5)
        shares.append(sum(first) / len(ids))
        means.append(sum(logps) / len(ids))
        assert scored["first_token_share"] == pytest.approx(shares[-1])
    # Least squares by the normal equations.
    x = torch.stack([torch.ones(4).double(), torch.tensor(shares).double()], 1)
    slope = torch.linalg.lstsq(x, torch.tensor(means).double()[:, None]).solution[1, 0].item()
    for mean, share, scored in zip(means, shares, found, strict=True):
        assert scored["mean_logp_debiased"] == pytest.approx(mean - slope * (share - sum(shares) / 4), rel=1e-4)


def test_mean_logp_is_fooled_by_long_steps_and_aslec_is_not():
    """Two ways of solving: good tokens at -0.5 in short steps, bad ones at -0.7 in long steps; a step begins at -4."""

    def trace(token: float, length: int, steps: int):
        return [logp for _ in range(steps) for logp in [-4.0, *[token] * (length - 1)]], (
            [True] + [False] * (length - 1)
        ) * steps

    good, bad = [trace(-0.5, n, 6) for n in (4, 5, 6)], [trace(-0.7, n, 3) for n in (20, 25, 30)]
    mean = [sum(logps) / len(logps) for logps, _ in good + bad]
    assert max(mean[:3]) < min(mean[3:])  # the plain mean prefers every bad one
    dropped = [mean_without_first(*pair) for pair in good + bad]
    assert dropped == pytest.approx([-0.5] * 3 + [-0.7] * 3)
    # Among many traces whose quality has nothing to do with the length of their steps, the line finds what the length does.
    mixed = [trace(token, n, 4) for n in (4, 5, 6, 20, 25, 30) for token in (-0.5, -0.7)]
    means = [sum(logps) / len(logps) for logps, _ in mixed]
    debiased = debiased_means(means, [sum(first) / len(first) for _, first in mixed])
    assert min(debiased[::2]) > max(debiased[1::2]) and min(means[::2]) < max(means[1::2])
    assert debiased_means([1.0, 2.0], [0.5, 0.5]) == [1.0, 2.0]
    assert mean_without_first([-1.0, -3.0], [True, True]) == -2.0


def test_ratio():
    assert rank_surprisal_ratio([-1.0, -3.0], [1, 5]) == 1.5
    assert rank_surprisal_ratio([0.0], [1]) == float("inf")


def test_steps_begin_behind_separators(tokenizer):
    ids = tokenizer("a b\nc\n\nd é")["input_ids"]
    first = first_of_steps(tokenizer, ids, "\n")
    begins = "".join("|" * mark + tokenizer.decode([token]) for token, mark in zip(ids, first, strict=True))
    assert begins.replace("�", "").startswith("|a b") and begins.count("|") in (3, 4)
    assert first_of_steps(tokenizer, ids, "zzz") == [True] + [False] * (len(ids) - 1)


def test_what_is_kept():
    rows = [
        {"id": f"p{i % 2}", "rank_surprisal_ratio": r, "mean_logp": -r} for i, r in enumerate([3.0, 1.0, 2.0, 1.0, 5.0])
    ]
    for config, kept in (
        (SelectConfig(keep_share=0.4), [1, 3]),
        (SelectConfig(keep_per_problem=1), [1, 2]),
        (SelectConfig(keep_per_problem=2), [0, 1, 2, 3]),
        (SelectConfig(rule="mean-logp", keep_share=0.2), [1]),
        (SelectConfig(keep_share=1e-9), [1]),
    ):
        assert keep(rows, config) == [rows[i] for i in kept]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"rule": "best", "keep_share": 1}, "'best' is unknown; there are rsr, aslec-drop"),
        ({}, "give one of keep_share and keep_per_problem"),
        ({"keep_share": 0.5, "keep_per_problem": 1}, "give one of"),
        ({"keep_share": 0}, "keep_share = 0 must lie in"),
        ({"keep_per_problem": 0}, "keep_per_problem = 0"),
        ({"keep_share": 1, "step_separator": ""}, "step_separator is empty"),
    ],
)
def test_settings_that_mean_nothing(settings, words):
    with pytest.raises(ConfigError, match=words):
        SelectConfig(**settings)


def test_the_command(tmp_path, tokenizer, model_dir):
    rows = traces(tokenizer, ["one", "two\nthree", "four", "five six"])
    rows[2]["correct"], rows[3]["completion_ids"] = False, []
    write_records(tmp_path / "traces.jsonl", rows)
    flags = ["--model", model_dir, "--dtype", "float32", "--rule", "aslec-drop", "--keep-per-problem", "1"]
    command = ["select", tmp_path / "traces.jsonl", tmp_path / "out.jsonl", *flags]
    counts = json.loads(align(*command).stdout)
    assert counts == {"rows": 2, "traces": 4, "empty": 1, "wrong": 1, "unended": 0, "mostly_student": 0, "problems": 2}
    assert json.loads(align(*command).stdout) == counts
    assert [row["completion"] for row in read_records(tmp_path / "out.jsonl")] == ["one", "two\nthree"]
    model = tiny_llama()
    with pytest.raises(RecordError, match="none of 1 traces can be kept: 1 have tokens; refused: .*'wrong': 1"):
        select_traces(model, tokenizer, rows[2:3], tmp_path / "no.jsonl", SelectConfig(keep_share=1.0))
    del rows[1]["correct"]
    with pytest.raises(MissingColumnError, match=r"row 1 \(id 'p1'\): no column correct"):
        select_traces(model, tokenizer, rows, tmp_path / "no.jsonl", SelectConfig(keep_share=1.0))


def test_traces_that_were_cut_or_are_mostly_the_students_are_left_out(tmp_path, tokenizer):
    model, rows = tiny_llama(vocab_size=len(tokenizer)), traces(tokenizer, ["one", "two", "three", "four"], problems=4)
    rows[0]["finish_reason"], rows[1]["finish_reason"], rows[2]["student_share"] = "length", "stop", 0.9
    counts = select_traces(model, tokenizer, rows, tmp_path / "out.jsonl", SelectConfig(keep_per_problem=1))
    assert (counts["rows"], counts["unended"], counts["mostly_student"], counts["wrong"]) == (2, 1, 1, 0)
    lenient = SelectConfig(keep_per_problem=1, only_ended=False, max_student_share=1.0)
    assert select_traces(model, tokenizer, rows, tmp_path / "all.jsonl", lenient)["rows"] == 4
