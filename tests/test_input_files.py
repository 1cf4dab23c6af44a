"""Files of rows as people have them: CSV, TSV, JSON lines under any name, compressed; and what is wrong with damaged ones."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
from conftest import byte_level_tokenizer, random_pairs
from typer.testing import CliRunner

from align.cli import app
from align.demonstrations import load_demonstrations
from align.errors import AlignError, RecordError, RecordFileError
from align.preferences import tokenize_pairs
from align.problems import load_problems
from align.record_file import RecordFile
from align.records import ENDINGS, READABLE, read_records, write_records
from align.sources import load_rows

ROWS = [
    {"id": "a", "prompt": "What is 3 + 4?", "answer": "007"},
    {"id": "b", "prompt": "Say \"é\",\nthen stop.", "answer": "1.50"},
    {"id": "c", "prompt": "Tabs\tand 鴨", "answer": "1e5"},
]  # fmt: skip


def _table(mark: str) -> str:
    """The rows by the rules of RFC 4180, put together by hand."""
    lines = [ROWS[0].keys(), *(row.values() for row in ROWS)]
    return "".join(mark.join('"' + cell.replace('"', '""') + '"' for cell in line) + "\r\n" for line in lines)


TEXTS = {
    ".jsonl": "\n".join(map(json.dumps, ROWS)),
    ".ndjson": "\n\n".join(map(json.dumps, ROWS)) + "\n",
    ".json": json.dumps(ROWS, indent=2),
    ".csv": _table(","),
    ".tsv": _table("\t"),
}
PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def _contents(ending: str, tmp_path) -> bytes:
    if ending in TEXTS:
        return TEXTS[ending].encode()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "plain")
    return (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("upper", [False, True])
def test_every_ending_gives_the_rows_as_they_were_written(tmp_path, ending, packed, upper):
    name = f"rows{ending}{packed}"
    path = tmp_path / (name.upper() if upper else name)
    path.write_bytes(PACK[packed](_contents(ending, tmp_path)))
    assert [dict(row) for row in load_rows(str(path))] == ROWS
    assert read_records(path) == ROWS
    opened = RecordFile(path)
    assert [opened[2], opened[0], opened[-2]] == [ROWS[2], ROWS[0], ROWS[1]] and len(opened) == 3
    assert [problem["answer"] for problem in load_problems(str(path))] == ["007", "1.50", "1e5"]


def test_json_lines_and_lists_under_the_name_json(tmp_path):
    path = tmp_path / "a.json"
    for text in (
        TEXTS[".jsonl"],
        "\ufeff \n" + TEXTS[".jsonl"],
        TEXTS[".json"],
        "\n [" + TEXTS[".jsonl"].replace("\n", ",") + "]",
    ):
        path.write_text(text, encoding="utf-8")
        assert [dict(row) for row in load_rows(str(path))] == ROWS
    path.write_text(json.dumps(ROWS[0]))
    assert [dict(row) for row in load_rows(str(path))] == ROWS[:1]


def test_cells_stay_text_and_empty_ones_are_nothing(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufeff,prompt ,answer,system\n0,q,"1,000",\n1,q,5.0,x\n\n2,q,NaN,null\n', encoding="utf-8")
    read = [dict(row) for row in load_rows(str(path))]
    assert read == [
        {"Unnamed: 0": "0", "prompt": "q", "answer": "1,000", "system": None},
        {"Unnamed: 0": "1", "prompt": "q", "answer": "5.0", "system": "x"},
        {"Unnamed: 0": "2", "prompt": "q", "answer": "NaN", "system": "null"},
    ]


def test_a_cell_may_be_longer_than_pythons_reader_takes_by_default(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,answer\n" + "x" * 200_000 + ",1\n")
    assert len(load_rows(str(tmp_path / "a.csv"))[0]["prompt"]) == 200_000


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.csv", b"id,prompt,answer\na,q,7\n\nb,q\n", r"a.csv, line 4: 2 cells under 3 columns"),
        ("a.csv", b"id,prompt,answer\na,hello, world,7\n", r"a.csv, line 2: 4 cells under 3 columns"),
        ("a.csv", b'id,prompt,answer\na,"one\ntwo",7\nb,q,7,8\n', r"a.csv, line 4: 4 cells"),
        ("a.csv", b'id,prompt,answer\na,"q,7\n', r"a.csv, line \d: cannot be read"),
        ("a.tsv", b'prompt\tanswer\n"hello" world\t7\n', r"a.tsv, line 2: cannot be read"),
        ("a.csv", b"prompt,answer,answer\nq,7,8\n", r"a.csv, line 1: column 'answer' stands twice"),
        ("a.csv", b"id;prompt;answer\na;q;7\n", r"a.csv, line 1: 'id;prompt;answer' is one column"),
        ("a.csv", b"prompt,answer\n\xff,7\n", r"a.csv: not UTF-8 text"),
        ("a.tsv", "prompt\tanswer\nq\t7\n".encode("utf-16"), r"a.tsv: not UTF-8 text"),
        ("a.csv", b"prompt,answer\n", r"a.csv: there are no rows in it"),
        ("a.csv", b"", r"a.csv: there are no rows in it"),
        ("a.json", b"[]", r"a.json: there are no rows in it"),
        ("a.json", b"[1]", r"a.json, row 0: '1' is not a JSON object"),
        ("a.json", b'[{"prompt": "q"}', r"a.json: not JSON"),
        ("a.json", b'{\n"prompt": "q"\n}', r"a.json, line 1: not JSON .*one JSON object per line"),
        ("a.json", b"\xff\xfe[]", r"a.json: not UTF-8 text"),
        ("a.ndjson", b'{"prompt": "q"}\n{', r"a.ndjson, line 2: not JSON"),
        ("a.jsonl.gz", gzip.compress(TEXTS[".jsonl"].encode() * 99)[:-20], r"a.jsonl.gz: cannot be unpacked"),
        ("a.jsonl.gz", TEXTS[".jsonl"].encode(), r"a.jsonl.gz: cannot be unpacked"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "q"}\n{'), r"a.jsonl.gz, line 2: not JSON"),
        ("a.csv.xz", lzma.compress(TEXTS[".csv"].encode())[:-5], r"a.csv.xz: cannot be unpacked"),
        ("a.csv.bz2", bz2.compress(TEXTS[".csv"].encode())[:-5], r"a.csv.bz2: cannot be unpacked"),
        ("a.parquet.gz", gzip.compress(b"PAR1"), r"a.parquet.gz: not a readable Parquet file"),
        ("a.txt", b"x", r"a.txt: cannot be read as rows; name a file that ends in .*\.ndjson.*\.gz"),
        ("a.gz", gzip.compress(b"x"), r"a.gz: cannot be read as rows"),
    ],
    ids=lambda value: None if isinstance(value, str) else "content",  # gzip writes the time
)  # fmt: skip
def test_damaged_files_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((RecordError, RecordFileError), match=words):
        load_rows(str(tmp_path / name))


def test_a_compression_whose_package_is_missing_is_named(tmp_path, monkeypatch):
    from fsspec.compression import compr

    monkeypatch.delitem(compr, "zstd", raising=False)
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    with pytest.raises(RecordFileError, match="a.jsonl.zst: zstd files need the package zstandard"):
        load_rows(str(tmp_path / "a.jsonl.zst"))


def test_preferences_from_csv_are_those_from_jsonl(tmp_path):
    rows = [
        {"prompt": "1 + 1 = ", "chosen": "2", "rejected": "3"},
        {"prompt": "2 + 2 = ", "chosen": "4.0", "rejected": "04"},
    ]
    write_records(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"prompt,chosen,rejected\n1 + 1 = ,2,3\n2 + 2 = ,4.0,04\n"))
    for name in ("a.jsonl", "a.csv.gz"):
        tokenize_pairs(str(tmp_path / name), byte_level_tokenizer(), tmp_path / f"{name}.out.jsonl")
    one, other = (read_records(tmp_path / f"{name}.out.jsonl") for name in ("a.jsonl", "a.csv.gz"))
    assert one == other and len(one) == 2


def test_a_changed_compressed_file_is_read_again(tmp_path):
    path, out = tmp_path / "a.csv.gz", tmp_path / "out.jsonl"
    for answer in ("2", "5"):
        path.write_bytes(gzip.compress(f"prompt,chosen,rejected\n1 + 1 = ,{answer},3\n".encode()))
        tokenize_pairs(str(path), byte_level_tokenizer(), out)
        assert read_records(out)[0]["chosen"] == answer


def test_demonstrations_with_ids_from_a_compressed_file(tmp_path):
    row = {"id": "a", "prompt": "q", "completion": "b", "prompt_ids": [1], "completion_ids": [2]}
    (tmp_path / "a.NDJSON.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    assert load_demonstrations(str(tmp_path / "a.NDJSON.gz"), byte_level_tokenizer()) == [row]


def test_stages_read_records_that_were_compressed(tmp_path):
    verdicts = [
        {**{k: v for k, v in pair.items() if k in ("id", "prompt", "prompt_ids")}, "answer": "7", "sample": 0,
         "completion_ids": [3], "completion": "7", "finish_reason": "stop", "extracted": "7", "correct": True}
        for pair in random_pairs(3)
    ]  # fmt: skip
    (tmp_path / "v.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, verdicts)).encode()))
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path / "v.jsonl.gz"), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["pass@1"]["value"] == 1
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "v.jsonl.gz"), str(tmp_path / "out.jsonl")])
    assert done.exit_code == 0 and len(read_records(tmp_path / "out.jsonl")) == 3


def test_records_as_csv_are_refused_by_name(tmp_path):
    (tmp_path / "v.csv").write_text(
        "id,prompt,chosen,rejected,prompt_ids,chosen_ids,rejected_ids\na,q,b,c,[1],[2],[3]\n"
    )
    with pytest.raises(AlignError, match="row 0 .*prompt_ids must be a list of token ids, got str"):
        RecordFile(tmp_path / "v.csv", "pair")


def test_help_and_messages_have_one_list_of_endings():
    for command in (["sample"], ["tokenize"], ["trace"], ["mix", "bash"], ["mix", "rac"]):
        said = "".join(CliRunner().invoke(app, [*command, "--help"]).output.replace("│", "").split())
        assert "".join(READABLE.split()) in said, command


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_stages_refuse_a_file_without_rows(tmp_path, content):
    (tmp_path / "in.jsonl").write_text(content)
    for words in (["verify"], ["score", "reference", "--model", "nowhere"], ["score", "rollout", "--model", "nowhere"]):
        done = CliRunner().invoke(app, [*words, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")])
        assert isinstance(done.exception, RecordError) and "in.jsonl: there are no rows in it" in str(done.exception)
    assert not (tmp_path / "out.jsonl").exists()


def test_files_at_an_address(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for name, content in (("a.jsonl.gz", gzip.compress(TEXTS[".jsonl"].encode())), ("a.CSV", TEXTS[".csv"].encode())):
        memory.pipe(f"/rows/{name}", content)
        assert [dict(row) for row in load_rows(f"memory://rows/{name}")] == ROWS
    with pytest.raises(RecordFileError, match="memory://rows/b.csv: cannot be read"):
        load_rows("memory://rows/b.csv")
