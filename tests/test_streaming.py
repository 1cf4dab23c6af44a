"""Files that do not fit into memory: the same rows, the same output, the same errors as with lists, and memory that does not
grow with the number of rows."""

import json
import os
import tempfile
import tracemalloc
from itertools import cycle, islice

import pyarrow
import pytest
from conftest import random_pairs, tiny_llama
from datasets import Dataset
from transformers import Trainer

from align import RecordFile, read_records, score_entropy, score_reference, train_preference, write_records
from align import records as records_module
from align.errors import AlignError, RecordError, RecordFileError
from align.scoring.pairs import SIDES, score_stage
from align.stages import records_hash, run_in_parts
from align.trainers import row_data
from align.trainers.row_data import dataset_on_disk, lengths_of

#: Bytes of memory that a row may cost: a million of them, beside half a gigabyte of libraries, stay under 2 GiB.
MOST_PER_ROW = 1_000


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_record_file_is_the_list_of_its_rows(tmp_path, ending):
    rows, path = random_pairs(200, columns=("ce_scores",)), tmp_path / f"a.{ending}"
    write_records(path, rows)
    file = RecordFile(path, "pair")
    assert list(file) == read_records(path, "pair") == rows and len(file) == 200
    assert (file[0], file[-1], file[63], file[64]) == (rows[0], rows[-1], rows[63], rows[64])
    assert file[60:70] == rows[60:70] and file[::-50] == rows[::-50]
    assert records_hash(file) == records_hash(rows)
    for beyond in (200, -201):
        with pytest.raises(IndexError):
            file[beyond]


def test_lines_are_found_whatever_ends_them(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\r\n{"id": "ä\\u2028"}\r\n \u00a0 \n{"id": "b"}\r \t{"id": "\u2028c"}\n\n{"id": "☕"}'.encode())
    assert list(RecordFile(path)) == read_records(path) == [{"id": i} for i in ("ä\u2028", "b", "\u2028c", "☕")]


GOOD = json.dumps({"id": "a", "prompt": "p", "chosen": "c", "rejected": "r",
                   "prompt_ids": [1], "chosen_ids": [1], "rejected_ids": [2]})  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[1]",
        b"\xff",
        b'{"id": 1}',
        GOOD.replace("[2]", "[-1]").encode(),
        GOOD.replace('"a"', '""').encode(),
        None,
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_errors_are_those_of_reading_a_list(tmp_path, content, ending):
    path = tmp_path / f"a.{ending}"
    if content is not None:
        path.write_bytes(f"{GOOD}\n".encode() + content)
    errors = []
    for read in (read_records, RecordFile):
        with pytest.raises(AlignError) as error:
            read(path, "pair")
        # pyarrow's two ways of opening a file have words of their own.
        message = str(error.value).partition(" file (" if ending == "parquet" else "\0")[0]
        errors.append((type(error.value), message))
    assert errors[0] == errors[1]


def test_a_file_that_changes_while_it_is_used_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    write_records(path, random_pairs(3))
    file = RecordFile(path)
    path.write_text("{}")
    with pytest.raises(RecordFileError, match="changed"):
        file[2]


def test_a_file_that_is_replaced_while_it_is_used_is_an_error(tmp_path):
    """Its rows have the places of the old ones, and would be taken for them."""
    path, rows = tmp_path / "a.jsonl", random_pairs(3)
    write_records(path, rows)
    file = RecordFile(path)
    other = path.read_bytes().replace(b'"p1"', b'"q1"')
    (tmp_path / "b.jsonl").write_bytes(other)
    os.utime(tmp_path / "b.jsonl", ns=(1, 1))
    (tmp_path / "b.jsonl").replace(path)
    with pytest.raises(RecordFileError, match="changed"):
        file[1]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full, on Linux")
def test_a_parquet_file_is_not_blamed_where_its_copy_has_no_room(tmp_path, monkeypatch):
    write_records(tmp_path / "a.parquet", random_pairs(3))
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/dev/full", "r+b", buffering=0))  # noqa: SIM115
    with pytest.raises(
        RecordFileError, match=r"a\.parquet: its copy in .*TMPDIR.*: No space left on device; free space"
    ):
        RecordFile(tmp_path / "a.parquet")


def test_parquet_is_written_in_groups_with_the_types_of_all_rows(tmp_path, monkeypatch):
    rows = [{"id": str(i), "x": None, "n": [], "y": 1, "m": [{"a": 1}]} for i in range(3)]
    rows += [{"id": "3", "x": "text", "n": [2], "y": 0.5, "m": [{"a": 2}]}]
    write_records(tmp_path / "whole.parquet", rows)
    monkeypatch.setattr(records_module, "ROWS_PER_GROUP", 3)
    write_records(tmp_path / "parts.parquet", rows)
    whole, parts = (pyarrow.parquet.ParquetFile(tmp_path / f"{name}.parquet") for name in ("whole", "parts"))
    assert (whole.num_row_groups, parts.num_row_groups) == (1, 2)
    assert parts.read().equals(whole.read()) and list(RecordFile(tmp_path / "parts.parquet")) == rows


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_parts_are_merged_as_if_all_were_in_memory(tmp_path, ending):
    rows = [{"key": [i % 3, -i], "value": i / 7, "text": "é" * i} for i in range(10)]
    batches = [[3, 1, 9], [0], [8, 2, 7, 4], [6, 5]]
    finished = [{**row, "last": True} for row in rows if row["value"] != 0]
    finished.sort(key=lambda row: row["key"])
    counts = run_in_parts(
        tmp_path / f"out.{ending}", batches, lambda _, part: [rows[i] | {"_row": i} for i in part], stage="t", settings={},
        order=lambda row: (row.pop("_row", 0), row["key"])[1],
        finish=lambda merged: (row | {"last": True} for row in merged if row["value"] != 0),
        count=lambda merged: {"total": sum(row["value"] for row in merged)},
    )  # fmt: skip
    write_records(tmp_path / f"wanted.{ending}", finished)
    assert (tmp_path / f"out.{ending}").read_bytes() == (tmp_path / f"wanted.{ending}").read_bytes()
    assert counts == {"rows": 9, "total": sum(row["value"] for row in finished)}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_scores_of_a_file_are_those_of_its_list(tmp_path, ending):
    rows, model = random_pairs(40), tiny_llama()
    write_records(tmp_path / f"pairs.{ending}", rows)
    for name, pairs in (("list", rows), ("file", RecordFile(tmp_path / f"pairs.{ending}", "pair"))):
        score_reference(model, pairs, tmp_path / f"{name}-ref.jsonl", pad_token_id=0, max_length=20)
        score_entropy(model, pairs, tmp_path / f"{name}-entropy.jsonl", pad_token_id=0, max_length=20)
    for column in ("ref", "entropy"):
        names = (f"{name}-{column}.jsonl" for name in ("list", "file"))
        both = [(tmp_path / name).read_bytes() + (tmp_path / f"{name}.manifest.json").read_bytes() for name in names]
        assert both[0] == both[1]


def test_a_data_set_on_disk_is_that_of_the_list(tmp_path, monkeypatch):
    monkeypatch.setattr(row_data, "ROWS_PER_TABLE", 3)
    monkeypatch.setattr(row_data, "ROWS_PER_MAPPING", 5)
    rows = random_pairs(11, columns=("weights",))
    for row in rows[:6]:  # their type shows only later
        row |= {"chosen_weights": [1] * len(row["chosen_ids"]), "note": None}
    rows[6]["note"] = "text"
    wanted, found = Dataset.from_list(rows), dataset_on_disk(rows, tmp_path / "rows.arrow")
    assert found.features == wanted.features and found.to_list() == wanted.to_list()
    for dataset in (found, found.select([7, 2, 5]), wanted):
        assert lengths_of(dataset, ["chosen_ids"])["chosen_ids"].tolist() == [len(ids) for ids in dataset["chosen_ids"]]
    with pytest.raises(RecordError, match="rows 0 to 1: chosen_ids"):
        dataset_on_disk([{"chosen_ids": [1]}, {"chosen_ids": "x"}], tmp_path / "bad.arrow")


def held(work) -> int:
    """Most bytes that Python held while `work` ran, and those that Arrow still holds."""
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    try:
        kept = work()  # noqa: F841 (held until it is counted)
        return tracemalloc.get_traced_memory()[1] + pyarrow.total_allocated_bytes() - before
    finally:
        tracemalloc.stop()


def written(tmp_path, n: int):
    """A file of n pairs with 150 ids and 200 numbers each."""
    rows = []
    for row in random_pairs(50):
        row |= {"prompt_ids": [5] * 50} | {
            f"{side}_ids": [7 + k + i for i in range(50)] for k, side in enumerate(SIDES)
        }
        row |= {f"{side}_{c}": [(i + 1) / 99 for i in range(50)] for side in SIDES for c in ("ce_scores", "ref_logps")}
        rows.append(row)
    path = tmp_path / f"{n}.jsonl"
    write_records(path, ({**row, "id": f"p{i}"} for i, row in enumerate(islice(cycle(rows), n))))
    return path


def test_memory_of_scoring_does_not_grow_with_the_rows(tmp_path):
    model = tiny_llama()

    def compute(_number, part):
        return [{f"{side}_new": [0.123 + i for i in range(50)] for side in SIDES} for _ in part]

    def score(n: int) -> int:
        path = written(tmp_path, n)
        return held(
            lambda: score_stage(
                RecordFile(path, "pair"), tmp_path / f"out-{n}.jsonl", compute, model=model, max_length=None, stage="t",
                settings={}, per_part=50, count=lambda rows: {"sum": sum(row["chosen_new"][0] for row in rows)},
            )
        )  # fmt: skip

    score(10)  # what is made once
    small, large = score(100), score(500)
    assert (large - small) / 400 < MOST_PER_ROW


class _FirstStep(Exception):
    pass


def test_memory_of_setting_a_training_up_does_not_grow_with_the_rows(tmp_path, model_dir, monkeypatch):
    def stop(*_args, **_kwargs):
        raise _FirstStep

    monkeypatch.setattr(Trainer, "training_step", stop)
    monkeypatch.setattr(row_data, "ROWS_PER_TABLE", 50)
    args = {"max_steps": 1, "per_device_train_batch_size": 2, "max_tokens_per_batch": 256, "max_length": 512}

    def train(n: int) -> int:
        path = written(tmp_path, n)

        def work():
            with pytest.raises(_FirstStep) as error:
                model = {"path": model_dir, "dtype": "float32"}
                train_preference(
                    "cdpo", model, RecordFile(path, "pair"), tmp_path / f"out-{n}", args=args, lora={"r": 2}
                )
            return error  # its frames hold the trainer and its data

        return held(work)

    train(10)  # what is made once
    small, large = train(100), train(500)
    assert (large - small) / 400 < MOST_PER_ROW


def test_a_bad_row_far_down_is_named(tmp_path, model_dir):
    rows = read_records(written(tmp_path, 1_300))
    rows[1_204]["chosen_ce_scores"][3] = 1.5
    with pytest.raises(RecordError, match=r"row 1204 \(id 'p1204'\): chosen_ce_scores\[3\] = 1.5 is no probability"):
        train_preference("cdpo", {"path": model_dir, "dtype": "float32"}, rows, tmp_path / "out", lora={"r": 2})
