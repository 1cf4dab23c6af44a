"""Record files: whole or not at all, and errors that name the row."""

import json

import pytest
from conftest import random_pairs

from align.errors import AlignError, MissingColumnError, RecordError, RecordFileError
from align.problems import load_problems
from align.records import check_records, read_records, write_records
from align.stages import is_complete, run_in_parts


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_round_trip(tmp_path, ending):
    rows = random_pairs(5, columns=("ce_scores", "ref_logps"))
    write_records(tmp_path / f"a.{ending}", rows)
    assert read_records(tmp_path / f"a.{ending}", "pair") == rows


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.jsonl"
    write_records(path, [{"id": "old"}])
    with pytest.raises(RecordError, match="row 1 \\(id 'bad'\\)"):
        write_records(path, [{"id": "new"}, {"id": "bad", "x": float("nan")}])
    assert read_records(path) == [{"id": "old"}]
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordFileError, match="cannot be written"):
        write_records(tmp_path / "file" / "b.jsonl", [])


@pytest.mark.parametrize(
    "content, error, words",
    [
        (b'{"id": "a"}\nnot json\n', RecordError, "line 2"),
        (b"[1, 2]\n", RecordError, "line 1.*no JSON object"),
        (b"\xff\xfe", RecordFileError, "UTF-8"),
        (b"[" * 100_000, RecordError, "line 1"),
    ],
)
def test_unreadable_files(tmp_path, content, error, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(error, match=words):
        read_records(path)
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(RecordFileError, match="Parquet"):
        read_records(tmp_path / "a.parquet")
    with pytest.raises(RecordFileError, match="no such file"):
        read_records(tmp_path / "missing.jsonl")
    with pytest.raises(RecordFileError, match="ending"):
        read_records(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"id": 3}, RecordError, "id 3 must be"),
        ({"chosen_ids": [1, True]}, RecordError, r"chosen_ids\[1\]"),
        ({"chosen_ids": "12"}, RecordError, "list of token ids"),
        ({"prompt": 5}, RecordError, "prompt 5"),
        ({"rejected_weights": [float("inf")]}, RecordError, "rejected_weights"),
    ],
)
def test_bad_pairs_are_named(change, error, words):
    rows = random_pairs(3)
    rows[1] |= change
    with pytest.raises(error, match=f"row 1.*{words}"):
        check_records(rows, "pair")
    del rows[2]["chosen_ids"]
    with pytest.raises(MissingColumnError, match="chosen_ids"):
        check_records(rows[2:], "pair")
    assert (
        issubclass(RecordError, ValueError)
        and issubclass(MissingColumnError, KeyError)
        and issubclass(MissingColumnError, AlignError)
    )


def test_problems_are_mapped_from_public_layouts(tmp_path):
    layouts = {
        "gsm8k": ({"question": "2+2?", "answer": "2+2=4\n#### 4"}, "4", "2+2=4\n#### 4"),
        "math": ({"problem": "2+2?", "solution": r"so \boxed{\frac{8}{2}}"}, r"\frac{8}{2}", r"so \boxed{\frac{8}{2}}"),
        "ours": ({"id": "x", "prompt": "2+2?", "answer": 4}, "4", None),
    }
    for name, (row, answer, solution) in layouts.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        (problem,) = load_problems(str(path), prompt_template="Q: {prompt}\nA:")
        assert (problem["prompt"], problem["answer"], problem.get("solution")) == ("Q: 2+2?\nA:", answer, solution)
    (problem,) = load_problems(str(tmp_path / "ours.jsonl"), chat=True, system_prompt="Think.")
    assert [m["role"] for m in problem["prompt"]] == ["system", "user"]
    (tmp_path / "bad.jsonl").write_text('{"question": "2+2?"}\n')
    with pytest.raises(MissingColumnError, match="row 0: no answer"):
        load_problems(str(tmp_path / "bad.jsonl"))


def test_an_interrupted_stage_goes_on_where_it_stopped(tmp_path):
    path, computed, interrupted = tmp_path / "out.jsonl", [], []

    def compute(number, batch):
        if number == 2 and not interrupted:
            interrupted.append(number)
            raise KeyboardInterrupt
        computed.append(number)
        return [{"id": str(x), "value": x} for x in batch]

    def run(**settings):
        return run_in_parts(
            path, [[5, 4], [3, 2], [1, 0]], compute, stage="test", settings=settings, order=lambda row: row["value"]
        )

    with pytest.raises(KeyboardInterrupt):
        run(seed=1)
    assert not path.exists()
    assert run(seed=1) == {"rows": 6}
    assert computed == [0, 1, 2]  # nothing twice
    assert [row["value"] for row in read_records(path)] == [0, 1, 2, 3, 4, 5]
    assert is_complete(path, "test", {"seed": 1}) and not is_complete(path, "test", {"seed": 2})
    run(seed=1)
    assert computed == [0, 1, 2]
    run(seed=2)
    assert computed == [0, 1, 2, 0, 1, 2]
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".lock") == ["out.jsonl", "out.jsonl.manifest.json"]


def test_a_stage_killed_before_its_manifest_is_not_complete_for_older_settings(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"

    def run(value):
        rows = [{"id": "a", "value": value}]
        return run_in_parts(
            path, [0], lambda *_: rows, stage="test", settings={"v": value}, order=lambda row: row["id"]
        )

    run(1)
    with monkeypatch.context() as killed:
        killed.setattr("align.stages.write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(2)
    assert not is_complete(path, "test", {"v": 1})
    run(1)
    assert read_records(path)[0]["value"] == 1


@pytest.mark.parametrize("name", ["out.json", "folder.jsonl"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, name):
    (tmp_path / "folder.jsonl").mkdir()
    worked = []
    with pytest.raises(RecordFileError, match="unknown ending|is a folder"):
        run_in_parts(tmp_path / name, [0], lambda *_: worked.append(1), stage="t", settings={}, order=str)
    assert not worked
