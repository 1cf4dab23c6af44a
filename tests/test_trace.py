"""`align trace`: traces of the embedded model under another as its teacher; which are kept; whose vocabularies are one."""

import json

import pytest
import torch
from conftest import byte_level_tokenizer, tiny_llama
from test_recipes import ROOT, align

from align.decoding import Policy
from align.errors import ConfigError, ModelMismatchError, NonFiniteError, RecordError
from align.models import load_tokenizer
from align.records import read_records
from align.rsd import RSDConfig, Trace, reverse_speculative_decode
from align.trace import TraceConfig, choose, trace_problems
from align.vocabulary import shared_ids

MODEL = str(ROOT / "data/tiny-arithmetic/model")


def test_the_command(tmp_path):
    flags = [
        "--teacher",
        MODEL,
        "--student",
        MODEL,
        "--dtype",
        "float32",
        "--limit",
        "8",
        "--n",
        "3",
        "--max-new-tokens",
        "80",
    ]
    flags += ["--top-k", "0", "--teacher-temperature", "1", "--student-temperature", "1", "--batch-size", "7"]
    problems = str(ROOT / "data/tiny-arithmetic/train.jsonl")
    command = ["trace", problems, tmp_path / "traces.jsonl", "--kept", tmp_path / "kept.jsonl", *flags]
    counts = json.loads(align(*command).stdout)
    rows, kept = (
        read_records(tmp_path / "traces.jsonl", "verdict"),
        read_records(tmp_path / "kept.jsonl", "demonstration"),
    )
    assert counts["rows"] == len(rows) == 24 and counts["kept"] + counts["prefix_only"] == len(kept) == 8
    assert counts["correct"] == sum(row["correct"] for row in rows) > 0 and counts["teacher_share"] > 0.8
    assert 1 < counts["tokens_per_teacher_pass"] <= 5
    tokenizer = load_tokenizer(MODEL)
    for row in rows:
        assert (
            len(row["completion_ids"])
            == len(row["from_teacher"])
            == len(row["student_probs"])
            == len(row["teacher_probs"])
        )
        assert tokenizer.decode(row["completion_ids"], skip_special_tokens=True) == row["completion"]
    # Started again nothing is drawn; in other batches, the same traces are.
    assert json.loads(align(*command).stdout) == counts
    other = [*command[:2], tmp_path / "other.jsonl", "--kept", tmp_path / "k.jsonl", *flags[:-1], "3"]
    align(*other)
    assert [r["completion_ids"] for r in read_records(tmp_path / "other.jsonl")] == [r["completion_ids"] for r in rows]


def row(problem: str, length: int, correct: bool = True, reason: str = "stop", share: float = 0.1) -> dict:
    return {
        "id": problem, "prompt": "x", "answer": "1", "prompt_ids": [1], "completion": "y", "sample": 0,
        "completion_ids": list(range(length)), "correct": correct, "finish_reason": reason, "student_share": share,
    }  # fmt: skip


def test_the_shortest_right_trace_is_kept_or_a_beginning():
    rows = [row("a", 9), row("a", 7), row("a", 5, correct=False), row("a", 3, share=0.6), row("a", 4, reason="length")]
    rows += [
        row("b", 6, correct=False),
        row("b", 9, reason="length"),
        row("c", 0, correct=False, reason="prompt_too_long"),
    ]
    chosen, counts = choose(rows, TraceConfig(prefix_tokens=4))
    assert [(r["id"], r["completion_ids"], r["prefix_only"]) for r in chosen] == [
        ("a", list(range(7)), False), ("b", list(range(4)), True),
    ]  # fmt: skip
    assert counts == {"kept": 1, "prefix_only": 1, "left_out": 1, "wrong": 3, "unended": 2, "mostly_student": 1}
    assert [r["id"] for r in choose(rows, TraceConfig(prefix_tokens=0))[0]] == ["a"]
    # A beginning is never the whole of a wrong answer, nor has it its end.
    whole = TraceConfig(prefix_tokens=128)
    assert [r["completion_ids"] for r in choose([row("b", 7, correct=False)], whole)[0]] == [[0, 1, 2]]
    assert choose([row("b", 1, correct=False)], whole)[1]["left_out"] == 1
    for settings, words in (({"n": 0}, "n = 0"), ({"max_student_share": 2}, "max_student_share = 2")):
        with pytest.raises(ConfigError, match=words):
            TraceConfig(**settings)


def with_tokens(*tokens: str):
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


def test_vocabularies():
    plain = byte_level_tokenizer()
    assert shared_ids(plain, byte_level_tokenizer()) == {}
    with pytest.raises(ModelMismatchError, match="id 3 is .* for the teacher, .* for the student"):
        shared_ids(load_tokenizer(MODEL), plain)
    size = len(plain)
    with pytest.raises(
        ModelMismatchError, match=rf"id {size} is '<\|a\|>' for the teacher, None for the student \(1 ids differ\)"
    ):
        shared_ids(with_tokens("<|a|>"), plain)
    # The same special tokens, one under another name, two in another order.
    assert shared_ids(with_tokens("<|a|>"), with_tokens("<|b|>"), {"<|a|>": "<|b|>"}) == {}
    swapped = with_tokens("<|a|>", "<|b|>"), with_tokens("<|b|>", "<|a|>")
    assert shared_ids(*swapped, {"<|a|>": "<|a|>", "<|b|>": "<|b|>"}) == {size: size + 1, size + 1: size}
    for mapping, words in (
        ({"<|a|>": "<|a|>"}, "1 ids differ|2 ids differ"),
        ({"<|a|>": "<|b|>", "<|b|>": "<|b|>"}, "two of the teacher's map to one"),
        ({"<|x|>": "<|a|>"}, "the teacher has no token '<|x|>'"),
        ({"the": "<|a|>"}, "token 'the'"),
    ):
        with pytest.raises(ModelMismatchError, match=words.replace("|x|", r"\|x\|")):
            shared_ids(*swapped, mapping)
    other_end = with_tokens("<|a|>")
    other_end.eos_token = "<|a|>"
    with pytest.raises(ModelMismatchError, match="the teacher ends with '<.a.>'"):
        shared_ids(other_end, with_tokens("<|a|>"))


def test_a_teacher_that_knows_tokens_by_other_numbers():
    """Its embeddings and head permuted, and the permutation undone by the mapping: the same traces."""
    teacher, student = tiny_llama(0, vocab_size=40), tiny_llama(1, vocab_size=40)
    renamed = tiny_llama(0, vocab_size=40)
    swap = {7: 9, 9: 7}
    order = torch.tensor([swap.get(i, i) for i in range(40)])
    with torch.no_grad():
        for weight in (renamed.get_input_embeddings().weight, renamed.get_output_embeddings().weight):
            weight.copy_(weight[order].clone())
    config = RSDConfig(threshold=0.02, max_new_tokens=30, top_k=0)
    prompts = [[7, 3], [9, 9, 4], [5]]
    plain = reverse_speculative_decode(teacher, student, prompts, config, 0)
    mapped = reverse_speculative_decode(Policy(renamed, ids=swap), student, prompts, config, 0)
    assert [t.completion_ids for t in mapped] == [t.completion_ids for t in plain]
    assert any({7, 9} & set(t.completion_ids) for t in plain)
    for policy in (Policy(teacher, ids={39: 40}), Policy(teacher, ids={41: 3})):
        with pytest.raises(ConfigError, match="the teacher is said to know token .*, but has 40 ids"):
            reverse_speculative_decode(policy, student, prompts, config, 0)


def test_probabilities_are_raw_also_of_a_teacher_with_a_token_of_its_own():
    """It knows common id 7 as 9, and its own 7 nobody knows: whatever it puts on that is missing from the others."""
    teacher, student = tiny_llama(0, vocab_size=40), tiny_llama(1, vocab_size=40)
    config = RSDConfig(threshold=0.0, max_new_tokens=30, top_k=0)
    (trace,) = reverse_speculative_decode(Policy(teacher, ids={7: 9, 9: 11}), student, [[5, 3]], config, 0)
    own = [{7: 9, 9: 11}.get(token, token) for token in [5, 3, *trace.completion_ids]]
    with torch.no_grad():
        p = teacher(torch.tensor([own])).logits[0, 1:-1].softmax(-1)
    assert trace.teacher_probs == pytest.approx(p.gather(1, torch.tensor(own[2:])[:, None])[:, 0].tolist(), abs=1e-5)


def test_a_trace_ends_where_either_would(tmp_path):
    """The teacher's end token is known by its own number; what the student calls by that number ends nothing."""
    tokenizer = byte_level_tokenizer()
    end, vocabulary = tokenizer.eos_token_id, len(tokenizer)
    other = vocabulary - 1
    teacher, student = (tiny_llama(i, vocab_size=vocabulary, eos_token_id=None) for i in (0, 1))
    for model in (teacher, student):
        model.generation_config.eos_token_id = None
    seen = []

    def ends(_teacher, _student, prompts, _config, ends, *_):
        seen.append(list(ends))
        return [Trace(finish_reason="length") for _ in prompts]

    problems = [{"id": "p", "prompt": "one", "answer": "1"}]
    for own in (None, 5, end):
        teacher.generation_config.eos_token_id = own
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("align.trace.reverse_speculative_decode", ends)
            trace_problems(
                Policy(teacher, ids={end: other, other: end}), Policy(student), tokenizer, problems,
                tmp_path / f"{own}.jsonl", tmp_path / f"{own}-k.jsonl", RSDConfig(max_new_tokens=5), TraceConfig(n=1),
            )  # fmt: skip
    assert seen == [[end], sorted([end, 5]), sorted([end, other])]


def test_an_empty_prompt_costs_the_others_nothing(tmp_path):
    model, tokenizer = tiny_llama(vocab_size=len(byte_level_tokenizer())), byte_level_tokenizer()
    problems = [{"id": f"p{i}", "prompt": text, "answer": "1"} for i, text in enumerate(["one", "", "two"])]
    policies = Policy(model), Policy(model)
    settings = RSDConfig(max_new_tokens=5), TraceConfig(n=2, batch_size=3)
    counts = trace_problems(*policies, tokenizer, problems, tmp_path / "t.jsonl", tmp_path / "k.jsonl", *settings)
    assert counts["empty_prompt"] == 2 and counts["rows"] == 6
    assert {r["id"] for r in read_records(tmp_path / "t.jsonl") if not r["completion_ids"]} == {"p1"}
    small = Policy(tiny_llama(vocab_size=40))
    with pytest.raises(RecordError, match="problem 'p0': its prompt has id .*, the models know 40"):
        trace_problems(small, small, tokenizer, problems[:1], tmp_path / "a.jsonl", tmp_path / "b.jsonl", *settings)


def test_probabilities_that_are_no_numbers_name_the_problem(tmp_path):
    tokenizer = byte_level_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer))
    problems = [{"id": f"p{i}", "prompt": text, "answer": "1"} for i, text in enumerate(["one", "zebra"])]
    (spoilt,) = set(tokenizer("zebra")["input_ids"][:1])
    with torch.no_grad():
        model.get_input_embeddings().weight[spoilt] = float("inf")
    with pytest.raises(NonFiniteError, match="problem 'p1', sample 0: the teacher's probabilities"):
        trace_problems(
            Policy(model), Policy(model), tokenizer, problems, tmp_path / "t.jsonl", tmp_path / "k.jsonl",
            RSDConfig(max_new_tokens=5), TraceConfig(n=2, batch_size=4),
        )  # fmt: skip


def test_interrupted_and_started_again_the_traces_are_the_same(tmp_path, monkeypatch):
    from align import trace as module

    model, tokenizer = tiny_llama(vocab_size=len(byte_level_tokenizer())), byte_level_tokenizer()
    problems = [{"id": f"p{i}", "prompt": f"what is {i}", "answer": "1"} for i in range(6)]
    settings = RSDConfig(max_new_tokens=5), TraceConfig(n=2, batch_size=3)

    def run(name: str) -> list[dict]:
        policies = Policy(model), Policy(model)
        trace_problems(
            *policies, tokenizer, problems, tmp_path / f"{name}.jsonl", tmp_path / f"{name}-k.jsonl", *settings
        )
        return read_records(tmp_path / f"{name}.jsonl")

    whole, calls, draw = run("whole"), [], reverse_speculative_decode

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(module, "reverse_speculative_decode", failing)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    assert not (tmp_path / "parts.jsonl").exists()
    assert run("parts") == whole and len(calls) == 3 + 2  # two of four batches were done
