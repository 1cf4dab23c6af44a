"""The recipe of traces, run as a user runs it; what its sections refuse; tokens that only one of the two models has."""

import json

import pytest
import torch
from conftest import byte_level_tokenizer, tiny_llama
from test_recipes import ROOT, align, python
from test_trace import with_tokens

from align.config import read_config
from align.decoding import Policy
from align.errors import ConfigError, ModelMismatchError
from align.pipeline import Chain
from align.records import read_records
from align.rsd import RSDConfig, reverse_speculative_decode
from align.teaching import Teaching
from align.tiny import make_problems, restyle
from align.trace import load_policies
from align.vocabulary import never_ids, shared_ids

CONFIG = ROOT / "recipes/configs/rsd/tiny-arithmetic.yaml"


def test_the_recipe_then_nothing_to_do_then_a_page(tmp_path):
    out = tmp_path / "run"
    small = ["train.limit=12", "test.limit=6", "trace.n=3", "teacher.args.max_steps=4", "trace.threshold=1e-6"]
    small += ["methods.rsd_aslec_drop=null", "methods.rsd_mean_logp=null"]
    methods = ("teacher_samples", "rsd", "rsd_rsr", "rsd_aslec_casl")
    small += [f"methods.{name}.args.max_steps=1" for name in methods]
    command = ["recipes/rsd.py", "--config", str(CONFIG), "--output", str(out)]
    command += [word for value in small for word in ("--set", value)]
    shown = python(*command).stdout
    for words in ("SFT on the teacher's samples", "SFT on RSD traces, the shortest", "by RSR", "by ASLEC-CASL"):
        assert words in shown
    counts = json.loads((out / "summary.json").read_text())["counts"]
    traces = read_records(out / "traces.jsonl", "verdict")
    assert counts["trace"]["rows"] == counts["teacher samples"]["rows"] == len(traces) == 36
    # The student learns from nothing but what it accepts; the teacher's samples know no such rule.
    assert all(
        p >= 1e-6 for row in traces for p, own in zip(row["student_probs"], row["from_teacher"], strict=True) if own
    )
    kept = read_records(out / "traces-kept.jsonl", "demonstration")
    assert len(kept) == counts["trace"]["kept"] + counts["trace"]["prefix_only"] == counts["train rsd"]["rows"]
    selected = read_records(out / "selected-rsr.jsonl", "demonstration")
    right = {row["id"] for row in traces if row["correct"]}
    assert {row["id"] for row in selected} == right and len(selected) == len(right)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.jsonl")}
    table = shown[shown.index("| method") :]
    assert python(*command).stdout.endswith(table)  # no model is loaded, no file is touched
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.jsonl")}
    again = json.loads((out / "summary.json").read_text())["counts"]
    assert again["trace"] == counts["trace"] and again["select rsr"] == counts["select rsr"]
    page = tmp_path / "traces.html"
    align("inspect", out / "traces.jsonl", page, "--tokenizer", "data/tiny-arithmetic/model", "--limit", "5")
    assert "5 of 36 traces" in page.read_text()


def test_mistakes_in_the_sections_are_named(tmp_path):
    for override, words in (
        ("teacher={}", "'teacher' is missing"),
        ("teacher=5", "'teacher': 5 must be a mapping"),
        ("teacher={lora: {}}", "'teacher': args is missing"),
        ("teacher.args.max_step=1", "max_step: no field of GuardedSFTConfig"),
        ("teacher.model={dtype: float32}", "'teacher.model': path is missing"),
        ("teacher.problems={limit: 3}", "'teacher.problems': source is missing"),
        ("teacher={path: x, dtpe: float32}", "'teacher': unknown dtpe"),
        ("trace.lookahed=1", "'trace': unknown lookahed"),
        ("trace.threshold=2", "threshold = 2 must lie in"),
        ("trace.max_student_share=2", "max_student_share = 2"),
        ("select.rule=rsr", "'select': unknown rule"),
        ("select={keep_share: 2}", "keep_share = 2 must lie in"),
        ("never=x", "never: 'x' must be a list"),
        ("special_tokens=x", "'special_tokens': 'x' must be a mapping"),
    ):
        with pytest.raises(ConfigError, match=words):
            Chain(read_config(CONFIG, [override]), tmp_path)
    others = [f"methods.{name}=null" for name in read_config(CONFIG).methods]
    with pytest.raises(ConfigError, match="no method learns from a teacher"):
        Chain(read_config(CONFIG, [*others, "methods.sft={args: {}}", "demonstrations=solutions"]), tmp_path)
    share = Chain(read_config(CONFIG, ["select={keep_share: 0.5}"]), tmp_path).settings.selecting["rsr"]
    assert (share.keep_share, share.keep_per_problem) == (0.5, None)


def test_a_restyled_solution_is_the_same_calculation():
    import random

    rows, rng = make_problems(50, 0, "train"), random.Random(0)
    assert all(restyle(row["solution"], rng, rate=0.0) == row["solution"] for row in rows)
    changed = 0
    for row in rows:
        other = restyle(row["solution"], rng)
        changed += other != row["solution"]
        assert other.rpartition("####")[2].strip() == row["answer"]
        for mine, theirs in zip(other.split(";")[:-1], row["solution"].split(";")[:-1], strict=True):
            assert sorted(mine.split(":")[-1].strip().split("=")) == sorted(theirs.split(":")[-1].strip().split("="))
    assert changed > 40


def test_a_token_that_one_of_them_lacks_is_never_drawn():
    plain, more = byte_level_tokenizer(), with_tokens("<|think|>")
    assert shared_ids(plain, more, never=["<|think|>"]) == shared_ids(more, plain, never=["<|think|>"]) == {}
    own = never_ids(more, ["<|think|>"])
    assert own == (len(plain),) and never_ids(plain, ["<|think|>"]) == ()
    for never, words in (
        (["<|x|>"], "none of the two has it"),
        ([plain.convert_ids_to_tokens(9)], "both have it"),
        ([plain.eos_token], "it ends an answer"),
    ):
        with pytest.raises(ModelMismatchError, match=words):
            shared_ids(plain, more, never=never)
    with pytest.raises(ModelMismatchError, match="never to be drawn"):
        shared_ids(plain, more)
    torch.manual_seed(0)
    # A student all of whose weight lies on the token: without the bar it would draw nothing else.
    teacher, student = (tiny_llama(vocab_size=len(more)).eval() for _ in range(2))
    with torch.no_grad():
        student.get_output_embeddings().weight[own[0]] *= 1000
    config = RSDConfig(lookahead=2, max_new_tokens=12, draws=1, top_k=0, top_p=1.0)
    prompts = [[5, 6, 7]] * 8
    drawn = [
        {token for t in reverse_speculative_decode(teacher, policy, prompts, config, -1) for token in t.completion_ids}
        for policy in (Policy(student), Policy(student, never=own))
    ]
    assert own[0] in drawn[0] and own[0] not in drawn[1]
    # What is recorded and judged is the student's raw probability, the barred token's included.
    (trace,) = reverse_speculative_decode(Policy(teacher), Policy(student, never=own), prompts[:1], config, -1)
    ids = prompts[0] + trace.completion_ids
    with torch.no_grad():
        raw = student(torch.tensor([ids])).logits[0, len(prompts[0]) - 1 : -1].softmax(-1)
    wanted = raw.gather(1, torch.tensor(trace.completion_ids)[:, None])[:, 0].tolist()
    assert trace.student_probs == pytest.approx(wanted, rel=1e-3, abs=1e-12)
    assert all(p >= 0.01 for p, source in zip(wanted, trace.sources, strict=True) if source == "teacher")


def test_which_ids_are_barred_where_others_are_mapped(tmp_path):
    """The teacher's barred token may have the number of another one of the student's."""
    teacher, student = with_tokens("<|think|>", "<|a|>"), with_tokens("<|a|>")
    for name, tokenizer in (("teacher", teacher), ("student", student)):
        tokenizer.save_pretrained(tmp_path / name)
        tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / name)
    models = ({"path": str(tmp_path / name), "dtype": "float32"} for name in ("teacher", "student"))
    one, other, _ = load_policies(*models, {"<|a|>": "<|a|>"}, ["<|think|>"])
    size = len(byte_level_tokenizer())
    assert one.ids == {size: size + 1} and one.never == other.never == ()


def test_samples_of_a_teacher_with_other_ids_are_refused(tmp_path):
    """They would be trained on as other tokens; traces are mapped as they are drawn."""
    for name, tokens in (("teacher", ("<|a|>", "<|b|>")), ("student", ("<|b|>", "<|a|>"))):
        tokenizer = with_tokens(*tokens)
        tokenizer.save_pretrained(tmp_path / name)
        tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / name)
    values = [
        f"teacher={{path: {tmp_path / 'teacher'}, dtype: float32}}",
        f"model.path={tmp_path / 'student'}",
        "train.limit=4",
    ]
    with pytest.raises(ModelMismatchError, match="other tokenizers"):
        Chain(read_config(CONFIG, values), tmp_path / "run").train("teacher_samples", {})
    mapped = [*values, "special_tokens={'<|a|>': '<|a|>', '<|b|>': '<|b|>'}"]
    with pytest.raises(ConfigError, match="special tokens under other ids"):
        Chain(read_config(CONFIG, mapped), tmp_path / "run").train("teacher_samples", {})


def test_what_the_student_does_not_know_is_no_demonstration(tmp_path):
    """Samples with a token that the student lacks are left out and counted."""
    for name, tokens in (("teacher", ("<|think|>",)), ("student", ())):
        tokenizer = with_tokens(*tokens)
        tokenizer.save_pretrained(tmp_path / name)
        model = tiny_llama(vocab_size=len(tokenizer))
        if tokens:
            with torch.no_grad():
                model.get_output_embeddings().weight[tokenizer.get_vocab()["<|think|>"]] *= 30
        model.save_pretrained(tmp_path / name)
    values = [
        f"teacher={{path: {tmp_path / 'teacher'}, dtype: float32}}",
        f"model.path={tmp_path / 'student'}",
        "train.limit=4",
    ]
    values += [
        "never=['<|think|>']",
        "trace.max_new_tokens=6",
        "trace.n=3",
        "trace.teacher_temperature=1.0",
        "trace.top_k=0",
    ]
    chain = Chain(read_config(CONFIG, values), tmp_path / "run")
    counts = {}
    path = Teaching(chain, counts).samples()
    never = with_tokens("<|think|>").get_vocab()["<|think|>"]
    drawn = read_records(tmp_path / "run" / "teacher-samples.jsonl")
    bad = sum(never in row["completion_ids"] for row in drawn)
    assert counts["teacher samples"]["unknown_to_student"] == bad > 0
    assert all(never not in row["completion_ids"] for row in read_records(path))
