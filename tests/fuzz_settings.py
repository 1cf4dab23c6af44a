"""Targets that are no records: manifests and parts of stages, folders of runs, configurations, vocabularies, what lies beside weights."""

from __future__ import annotations

import html
import json
from contextlib import suppress
from functools import cache
from pathlib import Path

import fuzzing as fz
import pytest
from fuzz_targets import ROOT, base_model, put, rows_in, target, tokenizer
from hypothesis import strategies as st

from align.errors import AlignError
from align.records import read_records

manifests = st.one_of(
    st.binary(max_size=80),
    fz.json_values.map(lambda v: json.dumps(v).encode()),
    st.tuples(fz.json_values, fz.json_values, fz.json_values).map(
        lambda v: json.dumps({"stage": "t", "settings": {"a": 1}, "counts": v[0], "batches": v[1], "x": v[2]}).encode()
    ),
    st.sampled_from([b"[" * 90_000, b'{"a":' * 90_000, b'{"stage": "t", "settings": {"a": 1}}', b"9" * 5000, b"\xef\xbb\xbf{}"]),
    st.just(json.dumps({"stage": "t", "settings": {"a": 1}, "batches": 3}).encode()),
)  # fmt: skip

#: Of a finished output, of that size or another.
finished_manifests = st.one_of(st.sampled_from([{"": 3}, {"": 4}, {"": None}, {"x": 3}]), fz.json_values).map(
    lambda sizes: json.dumps({"stage": "t", "settings": {"a": 1}, "counts": {}, "bytes": sizes}).encode()
)


@target(
    st.tuples(
        st.booleans().flatmap(lambda done: finished_manifests if done else manifests),
        manifests,
        fz.jsonl_bytes("problem", 2),
        st.booleans(),
    )
)
def stages(folder, value):
    """Whatever lies beside an output, of this run or another, a stage ends with all rows, or says which part is damaged."""
    from align.stages import is_complete, read_manifest, run_in_parts

    manifest, header, part, finished = value
    out, parts = folder / "out.jsonl", folder / "out.jsonl.parts"
    Path(f"{out}.manifest.json").write_bytes(manifest)
    parts.mkdir()
    (parts / "settings.json").write_bytes(header)
    (parts / "000001.jsonl").write_bytes(part)
    if finished:
        out.write_bytes(b"{}\n")
    assert read_manifest(out) is None or isinstance(read_manifest(out), dict)

    def compute(number, _batch):
        return [{"id": str(number), "_row": number}]

    complete = is_complete(out, "t", {"a": 1})
    counts = run_in_parts(
        out, [0, 1, 2], compute, stage="t", settings={"a": 1}, order=lambda row: row.pop("_row"), count=lambda rows: {}
    )
    assert isinstance(counts, dict)
    if not complete:
        assert counts["rows"] == len(read_records(out)) >= 2 and is_complete(out, "t", {"a": 1})


states = st.one_of(
    manifests,
    st.tuples(fz.json_values, fz.numbers, st.lists(st.dictionaries(st.sampled_from(["step", "loss", "eval_loss", "rewards/chosen", ""]), fz.scalars), max_size=4))
    .map(lambda v: json.dumps({"max_steps": v[0], "global_step": v[1], "log_history": v[2]}).encode()),
)  # fmt: skip
summaries = st.one_of(
    manifests,
    st.tuples(st.dictionaries(fz.texts, st.dictionaries(st.sampled_from(["n", "pass@1", "corrections"]), st.one_of(
        st.dictionaries(st.sampled_from(["value", "low", "high"]), fz.numbers), fz.scalars)), max_size=2), fz.json_values)
    .map(lambda v: json.dumps({"scores": v[0], "table": v[1], "counts": v[1]}).encode()),
)  # fmt: skip

#: What may lie in a run's folder.
run_files = st.fixed_dictionaries(
    {"scored.jsonl": fz.jsonl_bytes("pair", 2)},
    optional={
        "scored.jsonl.manifest.json": manifests | finished_manifests,
        "traces.jsonl": fz.jsonl_bytes("trace", 2),
        "old.parquet": fz.parquet_bytes("pair"),
        "summary.json": summaries,
        "test/base-verdicts.jsonl": fz.jsonl_bytes("verdict", 2),
        "test/base-verdicts.jsonl.manifest.json": finished_manifests,
        "dpo/trainer_state.json": states,
        "dpo/README.md": st.binary(max_size=60) | fz.texts.map(lambda t: f"### Framework versions\n- TRL: {t}".encode("utf-8", "replace")),
        "cdpo.training/checkpoint-2/trainer_state.json": states,
        "cdpo.training.settings.manifest.json": manifests,
        "drawn.jsonl.parts/settings.json": manifests,
    },
)  # fmt: skip


@target(run_files)
def run_folder(folder, value):
    """A folder has a page or is no run; every file of token-level numbers is on the page with all its rows, or named as damaged."""
    from align.run_report import inspect_run

    for name, data in value.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        put(folder, (name, data))
    path, problems = inspect_run(folder, tokenizer=tokenizer())
    assert {name for name in value if (folder / name).read_bytes() != value[name]} == set(), "a run's file was changed"
    page = path.read_text(encoding="utf-8")
    text = html.unescape(page)
    assert all(problem.encode("utf-8", "backslashreplace").decode() in text for problem in problems)
    block = page.partition('type="application/json" id="data">')[2].partition("</script>")[0]
    for shown in json.loads(block, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) if block else ():
        about = [problem for problem in problems if problem.startswith(shown["name"])]
        if all("has no manifest" in problem for problem in about):
            assert f"of the {rows_in(folder / shown['name']):,} rows" in shown["about"]


@cache
def base_configs() -> list[str]:
    return [p.read_text() for p in sorted((ROOT / "recipes/configs").rglob("tiny*.yaml"))]


sections = ["model", "train", "test", "pairs", "sample", "pair", "score", "entropy", "rollout", "teacher", "trace", "select", "methods",
            "special_tokens", "never", "evaluate", "inspect", "guide", "demonstrations", "contrastive", "model.path", "methods.cdpo", "x",
            "evaluate.ks", "evaluate.export", "sample.n", "sample.temperature", "methods.cdpo.args", "train.answers", "", ".", "sample.stop",
            "rollout.n", "trace.n", "select.rule", "inspect.first_error", "test_pairs", "guide.path", "select.keep_share"]  # fmt: skip
setting = st.one_of(
    st.sampled_from(["1", "null", "[1]", "{a: 1}", "nan", "1e-5", "[", "2001-99-99", "true", "text", "-1", "{1: 2}", "[[1]]", "!!set {a}",
                     "[a, 1]", "&a [*a]", "0x", "2001-01-01", "\x00", "9" * 5000, "{}", "[]", "''", "0", "1.5", "{a: [1]}", "." * 10, "*x"]),
    fz.texts,
    fz.json_values.map(json.dumps),
)  # fmt: skip


@st.composite
def config_bytes(draw) -> bytes:
    which = draw(st.integers(0, 9))
    if which == 0:
        return draw(st.one_of(st.sampled_from(fz.YAML_BYTES), st.binary(max_size=60)))
    if which == 1:
        return json.dumps(
            {draw(st.sampled_from(sections)): draw(fz.json_values), "model": draw(fz.json_values)}
        ).encode()
    text = draw(st.sampled_from(base_configs()))
    if which == 2:
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.one_of(fz.texts, setting)) + text[place + draw(st.integers(0, 40)) :]
    return text.encode("utf-8", "surrogatepass")


@target(st.tuples(config_bytes(), st.lists(st.tuples(st.sampled_from(sections), setting).map("=".join), max_size=2)))
def config(folder, value):
    from align.config import Settings, read_config

    data, overrides = value
    path = put(folder, ("config.yaml", data))
    Settings(read_config(path, overrides), folder / "out")


@target(
    st.tuples(
        st.booleans(),
        st.booleans(),
        st.one_of(st.none(), st.dictionaries(st.one_of(st.sampled_from(["<|endoftext|>", "<|end|>"]), fz.texts), fz.json_values, max_size=2)),
        st.lists(st.one_of(st.sampled_from(["<|endoftext|>", "<|start|>"]), fz.scalars), max_size=2),
    )
)  # fmt: skip
def vocabulary(folder, value):
    from align.vocabulary import never_ids, shared_ids

    one, other, mapping, never = value
    found = shared_ids(tokenizer(one), tokenizer(other), mapping, never)
    assert all(isinstance(i, int) for pair in found.items() for i in pair)
    never_ids(tokenizer(one), never)


base_files = st.one_of(
    st.binary(max_size=60),
    fz.json_values.map(lambda v: json.dumps(v).encode()),
    st.tuples(fz.json_values, fz.json_values).map(lambda v: json.dumps({"fingerprint": v[0], "name": v[1]}).encode()),
    st.just(b"[" * 90_000),
)


@target(st.tuples(base_files, base_files))
def adapters(folder, value):
    """An adapter's note of its base, and the header of a large weight file."""
    from align import identity, models

    note, header = value
    (folder / "align_base.json").write_bytes(note)
    with suppress(AlignError):
        models._check_base_file(str(folder), "a.b.c", base_model())
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    whole, identity.WHOLE = identity.WHOLE, 0
    try:
        assert identity.model_identity(folder)
    finally:
        identity.WHOLE = whole
