"""Every subcommand of `align`, in process: files that went wrong, options that mean nothing, outputs that cannot be.

Only what loads models is replaced, by the embedded model loaded once; whatever reads what a user gives is the real thing.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from unittest.mock import patch

import fuzzing as fz
import typer.main
from fuzz_targets import MODEL, TARGETS, Target, base_model, put, rows_in, tokenizer
from hypothesis import strategies as st

from align.records import read_records

# Values of options; those that cost time when they are large stay small.
small = st.sampled_from(["1", "2", "3", "3", "0", "-1", "x", "", "1.5"])
free = st.sampled_from(["1", "2", "7", "7", "0", "-1", "x", str(10**30), str(-(2**63)), "nan"])
share = st.sampled_from(["0.5", "0.2", "1", "0", "-1", "2", "nan", "inf", "-inf", "1e-320", "x", "1e999"])
text = fz.texts.map(lambda t: t.replace("\0", ""))
LIMIT = {"--limit": free}
FEW = LIMIT | {"--seed": free, "--max-prompt-length": free}
DRAW = {"--temperature": share, "--top-p": share, "--top-k": free, "--batch-size": small}
CHAT = {"--chat": None, "--split": text, "--subset": text}
SYSTEM = CHAT | {
    "--system-prompt": text,
    "--chat-template-kwargs": text | st.sampled_from(['{"x": 1}', "{}", "[1]", '{"tokenize": 1}']),
}
PROMPT = {"--prompt-template": text | st.just("{prompt}")}
TOKENS = {"--max-tokens-per-batch": free}
BUDGET = TOKENS | {"--max-length": free}
QUANTIZED = {"--quantization": st.sampled_from(["", "3bit"])}
LOAD = QUANTIZED | {"--adapter": st.just("nowhere")}
ENGINE = {"--engine": st.sampled_from(["transformers", "server", "server", "x"]), "--server-url": text | st.just("http://127.0.0.1:9/v1"),
          "--served-model-name": text, "--concurrency": free, "--timeout": share, "--tensor-parallel-size": free, "--max-model-len": free,
          "--gpu-memory-utilization": share}  # fmt: skip

#: Options that only what loads models looks at, which is replaced here, or what runs them on a GPU.
LOADING = {"--cuda-graphs", "--dtype", "--trust-remote-code", "--teacher-adapter", "--student-adapter", "--revision",
           "--teacher-revision", "--student-revision"}  # fmt: skip

#: Command -> kinds of its input, whether it writes records, what it always needs, and what it may have.
COMMANDS = {
    "verify": (("sample",), True, {}, {}),
    "pair": (
        ("verdict", "trace"),
        True,
        {"--positive": st.just("positive.jsonl"), "--negative": st.just("negative.jsonl")},
        {"--negative-coverage": share, "--pairs-per-problem": free, "--keep-truncated": None, "--positive": st.just("out.jsonl")},
    ),
    "tokenize": (("preference",), True, {"--model": st.just(MODEL)}, LIMIT | SYSTEM | {"--max-prompt-length": free, "--trl-completions": None}),
    "evaluate": (
        ("verdict", "sample"),
        False,
        {},
        {"--k": free, "--json": None, "--corrections": text, "--export": st.sampled_from(["alpaca-eval", "arena-hard", "x"]),
         "--name": text, "--out": st.sampled_from(["e.json", ".", "in.jsonl/x"])},
    ),
    "inspect records": (
        ("pair", "trace"),
        False,
        {"--tokenizer": st.just(MODEL)},
        {"--column": st.sampled_from(["ce_scores", "weights", "student_probs", "x", ""]), "--limit": free, "--title": text},
    ),
    "inspect run": (
        ("pair", "trace"),
        False,
        {},
        LIMIT | {"--tokenizer": st.just(MODEL), "--out": st.sampled_from(["run.html", "in.jsonl", "in.parquet", ".", "in.jsonl/x"])},
    ),
    "sample": (("problem", "solved"), True, {"--model": st.just(MODEL), "--max-new-tokens": st.just("2")},
               FEW | DRAW | PROMPT | SYSTEM | LOAD | ENGINE | {"--n": small, "--stop": text, "--no-answers": None, "--max-new-tokens": small}),
    "trace": (
        ("problem", "solved"),
        True,
        {"--kept": st.just("kept.jsonl"), "--teacher": st.just(MODEL), "--student": st.just(MODEL), "--max-new-tokens": st.just("2"), "--n": st.just("2")},
        FEW | PROMPT | SYSTEM | QUANTIZED | {"--never": text, "--threshold": share, "--draws": small, "--lookahead": small, "--top-p": share, "--batch-size": small,
                        "--max-student-share": share, "--prefix-tokens": free, "--special-token": text, "--kept": st.just("out.jsonl"),
                        "--teacher-temperature": share, "--student-temperature": share, "--top-k": free},
    ),
    "select": (
        ("trace", "verdict"),
        True,
        {"--model": st.just(MODEL), "--keep-per-problem": st.just("1")},
        TOKENS | LOAD | {"--rule": st.sampled_from(["rsr", "aslec-drop", "aslec-casl", "mean-logp", "x"]), "--keep-share": share,
                         "--step-separator": text, "--no-only-correct": None, "--no-only-ended": None, "--max-student-share": share},
    ),
    "mix bash": (("solved", "demonstration"), True, {"--model": st.just(MODEL)},
                 LIMIT | TOKENS | PROMPT | SYSTEM | LOAD | {"--seed": free, "--epsilon": share, "--generation": st.sampled_from(["parallel", "autoregressive", "x"]),
                                          "--passes": small, "--temperature": share}),
    "mix rac": (("solved", "demonstration"), True, {"--model": st.just(MODEL), "--max-new-tokens": st.just("2")},
                LIMIT | BUDGET | PROMPT | SYSTEM | LOAD | {"--seed": free, "--prefix-fraction": text, "--cue": text, "--keep-correct-share": share, "--temperature": share}),
    "score reference": (("pair",), True, {"--model": st.just(MODEL)}, BUDGET | LOAD),
    "score entropy": (("pair",), True, {"--model": st.just(MODEL)}, BUDGET | LOAD | {"--top": share}),
    "score guidance": (("pair",), True, {"--model": st.just(MODEL), "--guide": st.just(MODEL)}, BUDGET | QUANTIZED),
    "score contrastive": (("pair",), True, {"--model": st.just(MODEL), "--positive": st.just("a"), "--negative": st.just("b")},
                          BUDGET | QUANTIZED | {"--beta": share}),
    "score rollout": (("pair",), True, {"--model": st.just(MODEL), "--n": st.just("2"), "--max-new-tokens": st.just("8")},
                      DRAW | LOAD | {"--max-length": free, "--search": st.sampled_from(["all", "bisection", "x"]), "--rule": st.sampled_from(["drop", "critical"]),
                              "--threshold": share, "--weight-chosen": None, "--k": small, "--max-new-tokens": small, "--seed": free, "--stop": text}),
    "merge": ((), False, {"--model": st.just(MODEL), "--adapter": st.just("nowhere")}, {}),
}  # fmt: skip


def _words(options: dict):
    """Options as a command line has them; files among them lie in the input's folder, but for adapters, which are `a` and `b`."""
    for name, value in options.items():
        yield name
        if value is not None:
            inside = name in ("--positive", "--negative", "--kept", "--out") and value not in ("a", "b")
            yield f"IN/{value}" if inside else value


@st.composite
def calls(draw, command: str) -> tuple:
    """A command, its input, and its arguments; `OUT` and `IN` stand for paths in the input's folder."""
    kinds, writes, needed, optional = COMMANDS[command]
    if draw(st.booleans()):
        # Nothing is wrong, or what comes after the first check would hardly be reached.
        out, data = (
            draw(st.sampled_from(["out.jsonl", "out.parquet"])),
            draw(fz.jsonl_bytes((kinds or ("pair",))[0], 0)),
        )
        where = [f"IN/{'.' if command == 'inspect run' else 'in.jsonl'}"] * bool(kinds)
        where += [f"IN/{out}"] * (writes or command in ("inspect records", "merge"))
        options = {name: draw(values) for name, values in needed.items()}
        return command, ("in.jsonl", data), (*command.split(), *where, *_words(options))
    file = draw(fz.record_files(kinds or ("pair",)))
    out = draw(
        st.sampled_from(
            ["out.jsonl"] * 8
            + ["out.parquet"] * 4
            + ["sub/out.jsonl", "out.txt", ".", "", "in.jsonl/out.jsonl", "in.jsonl"]
        )
    )
    args = command.split()
    if command == "inspect records" and draw(st.booleans()):
        args.remove("records")  # it may be left out
    if command == "inspect run":
        args.append("IN/" + draw(st.sampled_from(["."] * 20 + ["missing", file[0]])))
    elif kinds:
        args.append("IN/" + draw(st.sampled_from([file[0]] * 20 + ["missing.jsonl", "."])))
    if writes or command in ("inspect records", "merge"):
        args.append("IN/" + out)
    options = {name: draw(values) for name, values in needed.items()}
    for name in (
        draw(st.lists(st.sampled_from(sorted(optional)), max_size=draw(st.sampled_from([0, 0, 1, 3])), unique=True))
        if optional
        else ()
    ):
        options[name] = None if optional[name] is None else draw(optional[name])
    args += _words(options)
    if draw(st.integers(0, 30)) == 0:
        args.insert(
            draw(st.integers(0, len(args))), draw(st.one_of(text, st.sampled_from(["--help", "--", "-1", "--x"])))
        )
    return command, file, tuple(args)


@cache
def _with_adapters():
    from peft import LoraConfig, get_peft_model

    from align.models import load_model

    config = LoraConfig(r=2, target_modules="all-linear")
    model = get_peft_model(load_model(MODEL, dtype="float32"), config, adapter_name="positive")
    model.add_adapter("negative", config)
    return model.eval()


def _load_model(path, *, dtype="float32", quantization=None, adapter=None, **_options):
    from align.errors import ModelMismatchError
    from align.models import quantization_config

    quantization_config(quantization)
    if adapter is not None:
        raise ModelMismatchError(f"adapter {adapter}: no such folder")
    return base_model()


def _load_policies(teacher, student, special_tokens=None, never=(), cuda_graphs=True):
    from align.decoding import Policy
    from align.vocabulary import shared_ids

    shared_ids(tokenizer(), tokenizer(), special_tokens, never)
    return Policy(base_model()), Policy(base_model()), tokenizer()


_COMMAND = cache(typer.main.get_command)


def _run(folder, value) -> None:
    """Ends with 0 or 2 and words, never with a traceback; what came in is in what comes out, or in the counts."""
    import align.models
    from align import cli
    from align.errors import AlignError

    command, file, args = value
    path = put(folder, file)
    before = path.read_bytes()
    if command == "inspect run":
        put(folder, (f"{file[0]}.manifest.json", b'{"stage": "t", "counts": {"rows": 1}}'))
    argv = ["align", *(a.replace("IN/", f"{folder}/", 1) if a.startswith("IN/") else a for a in args)]
    stdout, stderr = io.StringIO(), io.StringIO()
    model, tokens, adapted = base_model(), tokenizer(), _with_adapters()
    with ExitStack() as stack:
        replaced = {"load_model": _load_model, "load_tokenizer": lambda *_, **__: tokens,
                    "load_adapters": lambda *_: adapted}  # fmt: skip
        for name, substitute in replaced.items():
            stack.enter_context(patch.object(align.models, name, substitute))
        stack.enter_context(patch("align.identity.model_identity", lambda path, **_: str(path)))
        stack.enter_context(patch("align.trace.load_policies", _load_policies))
        stack.enter_context(patch("align.scoring.guidance.load_guide", lambda *_: (model, model, tokens)))
        stack.enter_context(patch("typer.main.get_command", _COMMAND))  # put together once: most of a call's time
        stack.enter_context(patch.object(sys, "argv", argv))
        stack.enter_context(redirect_stdout(stdout))
        stack.enter_context(redirect_stderr(stderr))
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
    assert path.read_bytes() == before, "the input was changed"
    said = stderr.getvalue()
    if code:
        assert code == 2 and ("align: " in said or "Usage" in said or "─ Error ─" in said), (
            f"exit code {code}: {said[-500:]}"
        )
        raise AlignError(said)
    if "--help" in args or not COMMANDS[command][1]:
        return
    out, total = folder / argv[len(command.split()) + 2][len(f"{folder}/") :], rows_in(path)
    counts = json.loads(stdout.getvalue())
    rows = rows_in(out)
    if "--limit" in args:
        total = min(total, int(args[args.index("--limit") + 1]))
    plain = {word for word in args if word.startswith("--")} <= COMMANDS[command][2].keys()
    if command == "pair":
        assert counts["completions"] == total and counts["pairs"] == rows
        for name in ("positive", "negative") if plain else ():
            given = len(argv) - argv[::-1].index(f"--{name}")  # behind the last one, which counts
            assert counts[name] == rows_in(Path(argv[given]))
        return
    assert counts["rows"] == rows
    n = int(args[args.index("--n") + 1]) if command in ("sample", "trace") and "--n" in args else 1
    if command == "select":
        left = total - sum(counts[r] for r in ("wrong", "unended", "mostly_student", "empty"))
        assert total == counts["traces"] and rows <= left
        if plain:  # one trace of every problem that has a good one
            good = [
                row
                for row in read_records(path)
                if row["completion_ids"] and row["correct"] and row["finish_reason"] == "stop"
            ]
            good = [row["id"] for row in good if row.get("student_share", 0) <= 0.5]
            assert left == len(good) and sorted(set(good)) == sorted(row["id"] for row in read_records(out))
    elif command == "tokenize":
        assert total == rows + sum(counts[r] for r in ("prompt_too_long", "equal", "empty"))
    elif command == "trace":
        assert total * n == rows + n * counts["prompt_too_long_for_us"]
        if plain:
            problems = {row["id"] for row in read_records(out)}
            assert counts["left_out"] + rows_in(folder / "kept.jsonl") == len(problems)
    elif command == "sample":
        assert total * n == rows + n * counts["prompt_too_long"]
    else:
        assert total == rows + counts.get("too_long", 0)


for _name in COMMANDS:
    TARGETS[f"align {_name}"] = Target(calls(_name), _run)
