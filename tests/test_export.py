"""Exports in the fields that the judges' own code reads (AlpacaEval `main.evaluate`, Arena-Hard-Auto `gen_judgment.py`)."""

import json

import pytest

from align.errors import ConfigError, MissingColumnError, RecordError
from align.export import export_completions
from align.verify import verify_records

ANSWER = "# Title\n\n## Part\n1. one\n2. **two**\n- three\n```\n# code\n- code\n```\nend"


def sample(**kwargs):
    return {
        "id": "u1", "prompt": [{"role": "user", "content": "T: Say hello."}], "answer": "", "sample": 0, "prompt_ids": [1],
        "completion_ids": [2, 3, 4], "completion": ANSWER, "finish_reason": "stop", "instruction": "Say hello.",
        "dataset": "helpful", **kwargs,
    }  # fmt: skip


def test_alpaca_eval(tmp_path):
    rows = [sample(), sample(id="u2", prompt="Plain?", instruction=None, completion=" Yes.\n", finish_reason="length")]
    del rows[1]["instruction"], rows[1]["dataset"]
    counts = export_completions(rows, tmp_path / "out.json", "alpaca-eval", "mine")
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"dataset": "helpful", "instruction": "Say hello.", "output": ANSWER, "generator": "mine"},
        {"instruction": "Plain?", "output": "Yes.", "generator": "mine"},
    ]
    assert counts == {"rows": 2, "cut": 1, "empty": 0}


def test_arena_hard(tmp_path):
    export_completions([sample()], tmp_path / "mine.jsonl", "arena-hard", "mine")
    (row,) = map(json.loads, (tmp_path / "mine.jsonl").read_text().splitlines())
    assert row["uid"] == "u1" and row["model"] == "mine" and row["ans_id"] and row["tstamp"] > 0
    assert row["messages"][-1] == {"role": "assistant", "content": {"answer": ANSWER}}
    assert row["messages"][0]["role"] == "user"
    assert row["metadata"] == {
        "token_len": 3,
        "header_count": {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 2, "unordered": 1},
        "bold_count": {"**": 1, "__": 0},
    }


def test_what_is_refused(tmp_path):
    out = tmp_path / "out.json"
    with pytest.raises(ConfigError, match="'mt-bench' is unknown; there are alpaca-eval, arena-hard"):
        export_completions([sample()], out, "mt-bench", "mine")
    with pytest.raises(ConfigError, match="model's name"):
        export_completions([sample()], out, "alpaca-eval", "")
    with pytest.raises(RecordError, match="a second draw of this prompt"):
        export_completions([sample(), sample(sample=1)], out, "alpaca-eval", "mine")
    with pytest.raises(RecordError, match="no samples"):
        export_completions([], out, "alpaca-eval", "mine")
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    row = sample(prompt=turns)
    del row["instruction"]
    with pytest.raises(MissingColumnError, match="has 2 user messages; give a column `instruction`"):
        export_completions([row], out, "alpaca-eval", "mine")
    with pytest.raises(RecordError, match="no reference answer to compare with.*--export"):
        verify_records([sample()])
    assert not out.exists()


@pytest.mark.parametrize("kind, shown", [("alpaca-eval", "output"), ("arena-hard", "messages")])
def test_an_answer_that_begins_in_the_prompt_is_exported_whole(tmp_path, kind, shown):
    """A prefilled turn is the assistant's; messages of tool calls have no content."""
    prompt = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hel"}]
    out = tmp_path / ("out.json" if kind == "alpaca-eval" else "out.jsonl")
    export_completions([sample(prompt=prompt, completion="lo.")], out, kind, "mine")
    (row,) = json.loads(out.read_text()) if kind == "alpaca-eval" else [json.loads(out.read_text())]
    answer = [prompt[0], {"role": "assistant", "content": {"answer": "Hello."}}]
    assert row[shown] == ("Hello." if kind == "alpaca-eval" else answer)
    called = [prompt[0], {"role": "assistant", "tool_calls": []}, {"role": "tool", "content": "x"}]
    bare = sample(prompt=called)
    del bare["instruction"]
    export_completions([bare], out, kind, "mine")
