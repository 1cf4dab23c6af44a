"""What fuzzing found, one by one: refused by name now, or no longer lost."""

import json
import math
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import byte_level_tokenizer, random_pairs
from typer.testing import CliRunner

from align.cli import app
from align.config import Settings, read_config
from align.demonstrations import load_demonstrations
from align.errors import AlignError, ConfigError, MissingColumnError, ModelMismatchError, RecordError, RecordFileError
from align.evaluate import evaluate_verdicts, preference_accuracy
from align.export import check_format, export_completions
from align.identity import model_identity
from align.models import _check_base_file
from align.pair import pair, select_pairs
from align.preferences import tokenize_pairs
from align.records import check_ids, check_records, read_records, write_records
from align.report import inspect_pairs, inspect_traces
from align.row_sample import sample_rows
from align.rsd import RSDConfig
from align.run_report import inspect_run
from align.sample import SampleConfig
from align.select import good_traces
from align.sources import check_outside
from align.stages import is_complete, read_manifest, run_in_parts
from align.tokens import check_pair_ids, encode_pair
from align.verify import extract_answer
from align.vocabulary import shared_ids

TINY = str(Path(__file__).parent.parent / "data/tiny-arithmetic/model")
VERDICT = {
    "id": "a", "prompt": "q", "answer": "7", "sample": 0, "prompt_ids": [1], "completion_ids": [2], "completion": "7",
    "finish_reason": "stop", "extracted": "7", "correct": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"id": "a", "x": NaN}', "NaN is no number of JSON"),
        ('{"id": "a", "x": 1e400}', "1e400 is too large"),
        ('{"id": "a", "id": "b"}', "'id' stands twice"),
        (r'{"id": "a", "x": "\ud800"}', "surrogates not allowed"),
        ('{"id": "a", "x": ' + "[" * 70 + "]" * 70 + "}", "nested more than 64 deep"),
    ],
)
def test_a_line_that_could_not_be_written_again_is_refused_when_it_is_read(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_text('{"id": "z"}\n' + line + "\n")
    with pytest.raises(RecordError, match=f"line 2.*{words}"):
        read_records(tmp_path / "a.jsonl")


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "a"}\r\n')
    assert read_records(tmp_path / "a.jsonl") == [{"id": "a"}]


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff\xfe"], pyarrow.binary()).buffers()),
        pyarrow.array([2**30], pyarrow.date32()),
    ],
)
def test_parquet_values_that_python_lacks(tmp_path, column):
    pyarrow.parquet.write_table(pyarrow.table([column], names=["x"]), tmp_path / "a.parquet")
    with pytest.raises(RecordFileError, match="not a readable Parquet file"):
        read_records(tmp_path / "a.parquet")


def test_rows_without_a_field_are_not_lost_in_parquet(tmp_path):
    with pytest.raises(RecordError, match="rows without any field cannot be written as Parquet; use .jsonl"):
        write_records(tmp_path / "a.parquet", [{}, {}])
    assert not (tmp_path / "a.parquet").exists()
    write_records(tmp_path / "a.jsonl", [{}, {}])
    assert read_records(tmp_path / "a.jsonl") == [{}, {}]


def test_a_page_takes_half_a_surrogate_pair_for_damage(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"id": "\xed\xa0\x80"}\n{"id": "b"}\n')
    problems = []
    assert [row["id"] for _, row in sample_rows(tmp_path, "a.jsonl", 5, problems).rows] == ["b"]
    assert problems == ["a.jsonl: damaged, line 1 is not JSON"]


def test_parquet_keeps_columns_that_the_first_row_lacks_and_refuses_mixed_types(tmp_path):
    write_records(tmp_path / "a.parquet", [{"id": "a"}, {"id": "b", "tools": "x"}])
    assert read_records(tmp_path / "a.parquet") == [{"id": "a", "tools": None}, {"id": "b", "tools": "x"}]
    with pytest.raises(RecordError, match="column 'prompt' cannot be written as Parquet"):
        write_records(tmp_path / "b.parquet", [{"prompt": "text"}, {"prompt": 7}])
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_numbers_beyond_floats_and_ids_beyond_integers():
    row = random_pairs(1)[0]
    row["chosen_weights"] = [10**400] * len(row["chosen_ids"])
    with pytest.raises(RecordError, match="no finite number"):
        check_records([row], "pair")
    with pytest.raises(RecordError, match="not in the vocabulary"):
        check_ids([2**40], "chosen_ids", "row 0")
    with pytest.raises(RecordError, match="list of token ids, got float"):
        check_pair_ids(row | {"chosen_ids": 0.5}, 0, 400)
    with pytest.raises(RecordError, match="list of messages"):
        check_records([row | {"prompt": [{"role": 5, "content": "x"}]}], "pair")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prompt": 7}, "prompt 7 must be text"),
        ({"prompt": "half \ud800"}, "no Unicode text"),
        ({"chosen": [{"role": "assistant", "content": 5}], "prompt": [{"role": "user", "content": "x"}]}, "chat template"),
        ({"chosen": 5}, "chosen.*5 must be text"),
        ({"tools": "[", "prompt": "x"}, "tools = '\\[' must be a list"),
    ],
)  # fmt: skip
def test_rows_that_no_template_renders(change, words):
    with pytest.raises(RecordError, match=f"row 0.*{words}"):
        encode_pair(byte_level_tokenizer(chat=True), {"prompt": "a", "chosen": "b", "rejected": "c", **change}, "row 0")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": ["b"], "rejected": "c"},
        {"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"},
        {"prompt": "a", "chosen": 5, "rejected": "c"},
    ],
)
def test_preferences_of_no_known_shape(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(RecordError, match="row 0"):
        tokenize_pairs(str(tmp_path / "a.jsonl"), byte_level_tokenizer(), tmp_path / "out.jsonl")


def test_a_limit_below_one_is_refused_for_demonstrations_with_ids_too(tmp_path):
    row = {"id": "a", "prompt": "q", "completion": "b", "prompt_ids": [1], "completion_ids": [2]}
    write_records(tmp_path / "a.jsonl", [row, row | {"id": "b"}])
    for limit in (0, -1):
        with pytest.raises(ConfigError, match=f"limit = {limit}"):
            load_demonstrations(str(tmp_path / "a.jsonl"), byte_level_tokenizer(), limit=limit)


def test_thousands_of_open_boxes_take_no_time():
    start = time.process_time()
    assert extract_answer("\\boxed{" * 2800 + "7")[1] != "boxed"
    assert time.process_time() - start < 0.5
    assert extract_answer(r"\boxed{1} \boxed{2} {\boxed{3") == ("2", "boxed")
    assert extract_answer(r"\boxed{a\boxed{5}}") == ("5", "boxed")


def test_counts_of_nothing_dropped_are_there(tmp_path):
    counts = select_pairs([VERDICT, VERDICT | {"sample": 1, "extracted": "8", "correct": False}]).counts
    assert counts["completions_truncated"] == counts["problems_without_either"] == 0 and counts["pairs"] == 1
    write_records(tmp_path / "v.jsonl", [VERDICT])
    with pytest.raises(ConfigError, match="given twice"):
        pair(tmp_path / "v.jsonl", tmp_path / "p.jsonl", tmp_path / "p.jsonl", tmp_path / "n.jsonl")


def test_evaluation_refuses_what_it_would_have_passed_over():
    with pytest.raises(ConfigError, match="k = 0"):
        evaluate_verdicts([VERDICT], [0])
    row = random_pairs(1)[0] | {"chosen_guidance_logratios": None, "rejected_guidance_logratios": None}
    with pytest.raises(MissingColumnError, match="no chosen_guidance_logratios"):
        preference_accuracy([row])
    with pytest.raises(ConfigError, match="unknown"):
        check_format(["alpaca-eval"])


@pytest.mark.parametrize("judge", ["alpaca-eval", "arena-hard"])
def test_an_export_that_cannot_be_encoded_leaves_nothing(tmp_path, judge):
    with pytest.raises(AlignError, match="\\\\ud800|surrogate"):
        export_completions([VERDICT], tmp_path / "out.json", judge, "model \ud800")
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_traces_from_parquet_and_with_other_ids(tmp_path):
    rows = [{"correct": True, "student_share": None, "finish_reason": None}]
    assert good_traces(rows, 0.5)[0] == rows
    trace = {
        "id": 5,
        "prompt": "q",
        "completion_ids": [1],
        "student_probs": [0.5],
        "from_teacher": [True],
        "teacher_probs": [1],
        "correct": True,
    }
    inspect_traces([trace], byte_level_tokenizer(), tmp_path / "page.html")
    with pytest.raises(RecordError, match="prompt 5"):
        inspect_traces([trace | {"prompt": 5}], byte_level_tokenizer(), tmp_path / "page.html")


def test_a_page_of_the_largest_floats(tmp_path):
    pair = random_pairs(1)[0]
    for side in ("chosen", "rejected"):
        values = [1.7976931348623157e308, -1.7976931348623157e308] * len(pair[f"{side}_ids"])
        pair[f"{side}_weights"] = values[: len(pair[f"{side}_ids"])]
    page = inspect_pairs([pair], byte_level_tokenizer(), tmp_path / "page.html").read_text()
    assert "Infinity" not in page.split('id="data">', 1)[1].split("</script>")[0]


def test_manifests_and_parts_of_something_else(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    manifest = tmp_path / "out.jsonl.manifest.json"
    manifest.write_text("[" * 100_000)
    assert read_manifest(out) is None
    out.write_text("{}\n")
    manifest.write_text('{"stage": "t", "settings": {}}')
    assert not is_complete(out, "t", {})
    parts = tmp_path / "out.jsonl.parts"
    parts.mkdir()
    (parts / "settings.json").write_text('{"stage": "t", "settings": {}, "batches": 1}')
    (parts / "000000.jsonl").write_text('{"id": "a"}\n')
    rows = [{"id": "b", "_row": 0}]
    run_in_parts(out, [0], lambda *_: rows, stage="t", settings={}, order=lambda row: row.pop("_row"))
    assert read_records(out) == [{"id": "b"}] and "000000.jsonl has no record of its size" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfe", b"a: &a [*a]", b"a: !!set {x}", b"a: !!int x", b"a: 2001-99-99", b"a: " + b"[" * 3000,
        b"model: {path: x}\nmodel: {path: y}", b"model: {}\nmethods: [[1]]",
        b"a: &a [x,x,x,x,x,x,x,x]\n" + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 8)) for i in range(9)),
    ],
)  # fmt: skip
def test_configurations_of_what_json_lacks(tmp_path, text):
    (tmp_path / "c.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match="c.yaml"):
        read_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("override", ["model=[", "sample.n=2001-99-99", "sample={a: !!set {b}}", "sample.n=\x03"])
def test_overrides_that_are_no_yaml(tmp_path, override):
    (tmp_path / "c.yaml").write_text("model: {path: x}\n")
    with pytest.raises(ConfigError, match="--set"):
        read_config(tmp_path / "c.yaml", [override])


@pytest.mark.parametrize(
    "override", ["rollout=5", "demonstrations=[a]", "special_tokens={a: [1]}", "evaluate.export=[x]"]
)
def test_sections_of_another_type(tmp_path, override):
    text = "model: {path: x}\ntrain: {source: x}\ntest: {source: x}\nsample: {n: 2}\n"
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError):
        Settings(read_config(tmp_path / "c.yaml", [override]), tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e-320, -1, "1", True])
def test_temperatures_that_no_logits_survive(value):
    with pytest.raises(ConfigError, match="temperature"):
        SampleConfig(temperature=value)
    with pytest.raises(ConfigError, match="teacher_temperature"):
        RSDConfig(teacher_temperature=value)


def test_notes_beside_weights(tmp_path, monkeypatch):
    (tmp_path / "align_base.json").write_text('{"fingerprint": [], "name": "x"}')
    with pytest.raises(ModelMismatchError, match="not readable"):
        _check_base_file(str(tmp_path), "a.b.c", None)
    monkeypatch.setattr("align.identity.WHOLE", 0)
    for header in (b"4", b'{"x": {}}', b'{"x": {"data_offsets": [0, 99999]}}', b"[" * 90_000):
        (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(AlignError, match="no safetensors file"):
            model_identity(tmp_path)


def test_tokens_that_are_no_text():
    tokenizer = byte_level_tokenizer()
    with pytest.raises(ModelMismatchError, match="is no token"):
        shared_ids(tokenizer, tokenizer, {"<|endoftext|>": [1]})


@pytest.mark.parametrize(
    "row", [{"chosen": 0, "rejected": "0"}, {"chosen": [{"role": "user", "content": "x"}], "rejected": "0"}], ids=str
)
def test_preferences_without_a_prompt_need_messages(row):
    with pytest.raises(RecordError, match="row 1: chosen"):
        encode_pair(byte_level_tokenizer(chat=True), row, "row 1")


def test_a_run_with_dates_that_python_lacks_has_a_page(tmp_path):
    table = pyarrow.table({"id": ["a"], "when": pyarrow.array([2**30], pyarrow.date32())})
    pyarrow.parquet.write_table(table, tmp_path / "old.parquet")
    (tmp_path / "summary.json").write_text("{}")
    page, problems = inspect_run(tmp_path)
    assert page.exists() and any(problem.startswith("old.parquet: cannot be read") for problem in problems)


LONG = "a" * 5000


@pytest.mark.parametrize(
    "command",
    [
        "tokenize LONG out.jsonl --model MODEL",
        "tokenize problems.jsonl LONG.jsonl --model MODEL",
        "sample problems.jsonl LONG.jsonl --model MODEL",
        "sample problems.jsonl out.jsonl --model LONG",
        "sample problems.jsonl out.jsonl --model MODEL --adapter LONG",
        "verify samples.jsonl LONG.jsonl",
        "evaluate LONG.jsonl",
        "merge LONG --model MODEL --adapter MODEL",
        "merge out --model MODEL --adapter LONG",
        "inspect run LONG",
    ],
)
def test_a_name_that_is_too_long_is_refused(tmp_path, monkeypatch, command):
    """pathlib asks the system, and passes on its error."""
    monkeypatch.chdir(tmp_path)
    problem = {"id": "a", "prompt": "q", "answer": "7"}
    write_records("problems.jsonl", [problem])
    write_records("samples.jsonl", [{k: v for k, v in VERDICT.items() if k not in ("extracted", "correct")}])
    done = CliRunner().invoke(app, command.replace("MODEL", TINY).replace("LONG", LONG).split())
    assert isinstance(done.exception, AlignError)


def test_a_source_with_a_name_that_is_too_long_is_no_file_of_the_run(tmp_path):
    assert check_outside(tmp_path, {"source": LONG}) is None
