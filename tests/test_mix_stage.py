"""`align mix`, `align merge`, corrections counted, and the recipes of BASH and RAC, as a user runs them."""

import json

import pytest
import torch
from conftest import tiny_llama
from test_recipes import ROOT, align, python

from align.config import read_config
from align.demonstrations import load_demonstrations, tokenize_demonstrations
from align.errors import ConfigError, MissingColumnError, RecordError
from align.merge import merge_adapter
from align.mix import IGNORED
from align.models import load_model, load_tokenizer
from align.pipeline import Chain
from align.problems import load_problems
from align.rac import correction_report
from align.records import read_records, write_records

MODEL = ["--model", "data/tiny-arithmetic/model", "--dtype", "float32"]
TRAIN = str(ROOT / "data/tiny-arithmetic/train.jsonl")


def test_mix_bash(tmp_path):
    out = tmp_path / "mixed.jsonl"
    flags = [*MODEL, "--limit", "30", "--epsilon", "0.5", "--seed", "4"]
    counts = json.loads(align("mix", "bash", TRAIN, out, *flags).stdout)
    rows = read_records(out)
    assert counts["rows"] == len(rows) == 30 and 0 < counts["differ"] < counts["own"]
    assert 0.4 < counts["own"] / counts["tokens"] < 0.6
    for row in rows:
        prompt = sum(label == IGNORED for label in row["labels"])
        assert row["labels"][prompt:] == row["source_ids"][prompt:]
        places = {i for i, (a, b) in enumerate(zip(row["input_ids"], row["source_ids"], strict=True)) if a != b}
        assert places <= set(row["own"]) and min(row["own"]) >= prompt
    # From a file that has ids, the same contexts come out.
    tokenizer = load_tokenizer(str(ROOT / "data/tiny-arithmetic/model"))
    ids = tmp_path / "demonstrations.jsonl"
    assert tokenize_demonstrations(load_problems(TRAIN, limit=30), tokenizer, ids)["rows"] == 30
    align("mix", "bash", ids, tmp_path / "again.jsonl", *flags)
    assert [r["input_ids"] for r in read_records(tmp_path / "again.jsonl")] == [r["input_ids"] for r in rows]


def test_mix_rac(tmp_path):
    out = tmp_path / "mixed.jsonl"
    flags = [*MODEL, "--limit", "40", "--cue", " Wait.", "--max-new-tokens", "80", "--keep-correct-share", "1"]
    counts = json.loads(align("mix", "rac", TRAIN, out, *flags).stdout)
    rows = read_records(out)
    assert 5 < counts["matches"] == counts["kept"] < 35  # the base is right on some two fifths of the problems
    tokenizer = load_tokenizer(str(ROOT / "data/tiny-arithmetic/model"))
    for row in rows:
        learned = [label for label in row["labels"] if label != IGNORED]
        text = tokenizer.decode(learned)
        assert text == "<eos>" if row["kept"] else text.startswith(" Wait.") and text.endswith("<eos>")


def test_demonstrations_need_solutions(tmp_path):
    path = tmp_path / "problems.jsonl"
    write_records(path, [{"id": "a", "prompt": "1+1?", "answer": "2"}])
    tokenizer = load_tokenizer(str(ROOT / "data/tiny-arithmetic/model"))
    with pytest.raises(MissingColumnError, match=r"row 0 \(id 'a'\): no solution to learn from"):
        load_demonstrations(str(path), tokenizer)
    with pytest.raises(MissingColumnError, match=r"row 0 \(id 'a'\): no solution to learn from"):
        tokenize_demonstrations(load_problems(str(path)), tokenizer, tmp_path / "out.jsonl")
    with pytest.raises(RecordError, match="none of the 5 prompts fits max_prompt_length = 3"):
        tokenize_demonstrations(load_problems(TRAIN, limit=5), tokenizer, tmp_path / "o.jsonl", max_prompt_length=3)
    longest = sorted(len(tokenizer(p["prompt"])["input_ids"]) for p in load_problems(TRAIN, limit=5))[2]
    counts = tokenize_demonstrations(
        load_problems(TRAIN, limit=5), tokenizer, tmp_path / "p.jsonl", max_prompt_length=longest
    )
    assert counts["rows"] + counts["prompt_too_long"] == 5 == counts["source_rows"] and counts["prompt_too_long"] > 0


def test_merge(tmp_path, model_dir):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(model_dir, str(tmp_path / "adapter"), tmp_path / "merged", dtype="float32")
    ids = torch.tensor([[5, 6, 7]])
    merged, adapted = load_model(str(tmp_path / "merged"), dtype="float32"), model.eval()
    assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-5)
    assert load_tokenizer(str(tmp_path / "merged")).eos_token_id == load_tokenizer(model_dir).eos_token_id
    weights = tmp_path / "merged" / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    merge_adapter(model_dir, str(tmp_path / "adapter"), tmp_path / "merged", dtype="float32")
    assert weights.stat().st_mtime_ns == stamp  # complete already
    with pytest.raises(ConfigError, match="merged exists already"):
        merge_adapter(model_dir, str(tmp_path / "adapter"), tmp_path / "merged")
    names = {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"}
    assert names == {"adapter", "merged", "merged.manifest.json"}


def verdict(number: int, completion: str, correct: bool) -> dict:
    return {
        "id": str(number), "prompt": "x", "answer": "7", "sample": 0, "prompt_ids": [1], "completion_ids": [2],
        "completion": completion, "finish_reason": "stop", "extracted": "7", "correct": correct,
    }  # fmt: skip


def test_corrections_are_counted(tmp_path):
    texts = [
        ("#### 7", True), ("#### 8", False), ("#### 8 No. #### 7", True), ("#### 7 No. #### 8", False),
        ("#### 7 No. #### 7", True), ("#### 8 No. #### 9 No. #### 7", True), ("No. #### 9", False),
    ]  # fmt: skip
    rows = [verdict(i, *text) for i, text in enumerate(texts)]
    report = correction_report(rows, " No. ")
    assert report == {
        "n": 7, "corrected": 5 / 7, "wrong_to_right": 2 / 5, "right_to_wrong": 1 / 5, "stays_right": 1 / 5,
        "stays_wrong": 0.0, "unanswered_before": 1 / 5, "accuracy_before": 3 / 7, "accuracy": 4 / 7,
    }  # fmt: skip
    assert correction_report(rows[:2], "No.")["corrected"] == 0
    with pytest.raises(ConfigError, match="the cue is empty"):
        correction_report(rows, "\n")
    write_records(tmp_path / "verdicts.jsonl", rows)
    out = align("evaluate", tmp_path / "verdicts.jsonl", "--corrections", " No.").stdout
    assert "| wrong to right    | 40.0 |" in out and "| pass@1" in out
    as_json = json.loads(align("evaluate", tmp_path / "verdicts.jsonl", "--corrections", "No.", "--json").stdout)
    assert as_json["corrections"] == report


@pytest.mark.parametrize("method", ["bash", pytest.param("rac", marks=pytest.mark.slow)])
def test_the_recipe(tmp_path, method):
    config = f"recipes/configs/{method}/tiny-arithmetic.yaml"
    small = ["train.limit=40", "test.limit=16", f"methods.{method}.args.max_steps=2", "methods.sft.args.max_steps=1"]
    small += ["methods.bash_autoregressive.args.max_steps=1"] if method == "bash" else []
    flags = [word for value in small for word in ("--set", value)]
    command = [f"recipes/{method}.py", "--config", config, "--output", str(tmp_path / "run"), *flags]
    printed = python(*command).stdout
    assert f"| {method.upper()} " in printed and "| SFT " in printed and "pairs.html" not in printed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["counts"]["demonstrations"]["rows"] == 40 and "sample" not in summary["counts"]
    assert ("corrections" in summary["scores"][method]) == (method == "rac")
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    assert list((tmp_path / "run" / method / "contexts").glob("step-*.jsonl"))  # they stay to be looked at
    again = python(*command).stdout
    assert "train_loss" in printed and "train_loss" not in again and printed.endswith(again)  # nothing is done twice


def test_what_a_configuration_may_learn_from(tmp_path):
    path = ROOT / "recipes/configs/bash/tiny-arithmetic.yaml"
    with pytest.raises(ConfigError, match="demonstrations: 'gold' must be one of positive, solutions"):
        Chain(read_config(path, ["demonstrations=gold"]), tmp_path)
    with pytest.raises(ConfigError, match="section 'sample' is missing"):
        Chain(read_config(path, ["demonstrations=positive"]), tmp_path)
    with pytest.raises(ConfigError, match="epsilon = 3 must lie in"):
        Chain(read_config(path, ["methods.bash.args.epsilon=3"]), tmp_path)
    with pytest.raises(ConfigError, match="lookahead: no field of BASHConfig"):
        Chain(read_config(path, ["methods.bash.args.lookahead=3"]), tmp_path)
