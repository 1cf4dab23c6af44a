"""Preference data sets of every shape become pairs; what is left out is counted."""

import json

import pytest
from conftest import byte_level_tokenizer

from align.errors import ConfigError, MissingColumnError, RecordError
from align.preferences import tokenize_pairs
from align.problems import load_problems
from align.records import read_records, write_records

TEXT = [
    {"instruction": "How many apples?", "chosen": " There are 19.", "rejected": " There are 12."},
    {"instruction": "Six times seven?", "chosen": " 42", "rejected": " 42"},
    {"instruction": "Ducks?", "chosen": " 9", "rejected": ""},
    {"instruction": "How many apples are there? " * 20, "chosen": " 1", "rejected": " 2"},
]


def test_text(tmp_path, tokenizer):
    write_records(tmp_path / "in.jsonl", TEXT)
    counts = tokenize_pairs(str(tmp_path / "in.jsonl"), tokenizer, tmp_path / "out.jsonl", max_prompt_length=40)
    assert counts == {"rows": 1, "source_rows": 4, "prompt_too_long": 1, "equal": 1, "empty": 1}
    (row,) = read_records(tmp_path / "out.jsonl", "pair")
    assert row["id"] == "train-0" and row["prompt"] == "How many apples?"
    assert tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]) == "How many apples? There are 19.<|endoftext|>"


def test_text_through_the_chat_template_equals_messages(tmp_path):
    tokenizer = byte_level_tokenizer(chat=True)
    messages = [
        {
            "prompt_id": "a",
            "prompt": TEXT[0]["instruction"],
            **{
                side: [
                    {"role": "system", "content": "Be short."},
                    {"role": "user", "content": TEXT[0]["instruction"]},
                    {"role": "assistant", "content": TEXT[0][side]},
                ]
                for side in ("chosen", "rejected")
            },
        }
    ]
    write_records(tmp_path / "messages.jsonl", messages)
    (tmp_path / "text.json").write_text(json.dumps(TEXT[:1]))
    tokenize_pairs(str(tmp_path / "messages.jsonl"), tokenizer, tmp_path / "a.jsonl")
    tokenize_pairs(str(tmp_path / "text.json"), tokenizer, tmp_path / "b.jsonl", chat=True, system_prompt="Be short.")
    (a,), (b,) = (read_records(tmp_path / f"{name}.jsonl", "pair") for name in "ab")
    for column in ("prompt", "chosen", "prompt_ids", "chosen_ids", "rejected_ids"):
        assert a[column] == b[column], column
    assert a["id"] == "a" and len(a["prompt"]) == 2
    assert tokenizer.decode(a["prompt_ids"]).startswith("<|start|>system\nBe short.<|end|>")


def test_resuming_and_other_settings(tmp_path, tokenizer):
    source, out = str(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    write_records(source, TEXT)
    tokenize_pairs(source, tokenizer, out)
    stamp = out.stat().st_mtime_ns
    tokenize_pairs(source, tokenizer, out)
    assert out.stat().st_mtime_ns == stamp
    assert tokenize_pairs(source, tokenizer, out, limit=1)["source_rows"] == 1
    write_records(source, [*TEXT, {"prompt": "And?", "chosen": " yes", "rejected": " no"}])
    assert tokenize_pairs(source, tokenizer, out)["rows"] == 3


def test_what_is_refused(tmp_path, tokenizer):
    source, out = str(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    for rows, error, words in (
        ([{"prompt": "x", "chosen": "y"}], MissingColumnError, "row 0: no rejected"),
        ([{"chosen": "y", "rejected": "z"}], RecordError, "row 0: chosen and rejected must begin with the same prompt"),
        (
            [{"prompt": None, "chosen": "y", "rejected": "z"}],
            MissingColumnError,
            "row 0: no prompt; one of the columns",
        ),
        (TEXT[1:3], RecordError, "none of its 2 rows can be used"),
    ):
        write_records(source, rows)
        with pytest.raises(error, match=words):
            tokenize_pairs(source, tokenizer, out)
    with pytest.raises(ConfigError, match="needs chat: true"):
        tokenize_pairs(source, tokenizer, out, system_prompt="x")
    with pytest.raises(ConfigError, match="limit = 0"):
        tokenize_pairs(source, tokenizer, out, limit=0)
    with pytest.raises(OSError, match="no such file"):
        tokenize_pairs(str(tmp_path / "none.json"), tokenizer, out)
    with pytest.raises(ConfigError, match="nor a data set that loads"):
        tokenize_pairs("nobody/nothing", tokenizer, out)
    assert not out.exists()


def test_open_ended_prompts(tmp_path):
    rows = [{"uid": "q1", "prompt": "Say hello.", "category": "hard"}, {"instruction": "Sing.", "dataset": "helpful"}]
    write_records(tmp_path / "in.jsonl", rows)
    one, two = load_problems(str(tmp_path / "in.jsonl"), answers=False, prompt_template="Q: {prompt}", chat=True)
    assert one == {
        "id": "q1", "prompt": [{"role": "user", "content": "Q: Say hello."}], "answer": "", "instruction": "Say hello.",
        "category": "hard",
    }  # fmt: skip
    assert two["id"] == "train-1" and two["dataset"] == "helpful" and two["instruction"] == "Sing."
    with pytest.raises(MissingColumnError, match="no answer"):
        load_problems(str(tmp_path / "in.jsonl"))
