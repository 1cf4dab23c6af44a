"""What `--help` says: quickly, with an example for every command, and the examples run."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from align.cli import app

ROOT = Path(__file__).parent.parent
HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "pyarrow",
    "trl",
    "peft",
    "accelerate",
    "pandas",
    "numpy",
    "sympy",
    "matplotlib",
)


def commands(command=None, path: tuple[str, ...] = ("align",)) -> dict[tuple[str, ...], object]:
    """Every command below the tree's root, groups included."""
    command = get_command(app) if command is None else command
    found = {path: command}
    for name, child in getattr(command, "commands", {}).items():
        found |= commands(child, (*path, name))
    return found


TREE = commands()
LEAVES = {path: command for path, command in TREE.items() if not hasattr(command, "commands")}


def examples(path: tuple[str, ...]) -> list[list[str]]:
    lines = (LEAVES[path].help or "").splitlines()
    return [shlex.split(line.partition("Example:")[2]) for line in lines if line.strip().startswith("Example:")]


def parse(words: list[str]):
    """Reads an example's options and arguments as the command line would, and does nothing."""
    depth = max(len(path) for path in LEAVES if tuple(words[: len(path)]) == path)
    command = LEAVES[tuple(words[:depth])]
    return command.make_context(words[depth - 1], list(words[depth:]))


def test_nothing_heavy_is_imported_for_help():
    """In one process of its own, which then has the help of every command printed."""
    script = (
        "import sys\nimport align\nfrom typer.testing import CliRunner\nfrom align.cli import app\n"
        f"heavy = {HEAVY!r}\nassert not set(heavy) & set(sys.modules), 'import align'\n"
        f"for path in {[path[1:] for path in TREE]!r}:\n"
        "    done = CliRunner().invoke(app, [*path, '--help'])\n"
        "    assert done.exit_code == 0 and 'Usage' in done.output, path\n"
        "    assert not set(heavy) & set(sys.modules), (path, set(heavy) & set(sys.modules))\n"
        "import numpy\nassert set(heavy) & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(TREE) > 15


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_command_has_an_example_that_parses(path):
    assert examples(path), f"{' '.join(path)} has no example in its help"
    for words in examples(path):
        assert tuple(words[: len(path)]) == path
        parse(words)
    with pytest.raises(Exception, match="[Nn]o such option"):
        parse([*examples(path)[0], "--no-such-option"])


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_help_shows_the_example_and_every_option(path):
    done = CliRunner().invoke(app, [*path[1:], "--help"], terminal_width=200, env={"COLUMNS": "200"})
    assert done.exit_code == 0 and "Example:" in done.output
    for parameter in LEAVES[path].params:
        if isinstance(parameter, typer.core.TyperOption):
            assert any(name in done.output for name in parameter.opts), parameter.opts


#: Examples in an order in which each has what it reads. The longer ones, rollouts and traces, are in README's chain, too, and
#: run by its test.
CHAIN = (
    ("align", "sample"), ("align", "verify"), ("align", "pair"), ("align", "tokenize"), ("align", "score", "reference"),
    ("align", "score", "contrastive"), ("align", "score", "guidance"), ("align", "score", "entropy"), ("align", "mix", "bash"),
    ("align", "merge"), ("align", "evaluate"), ("align", "inspect", "records"),
)  # fmt: skip


def test_the_examples_run(tmp_path, monkeypatch):
    """One after the other, as they stand in the help, on the embedded model; adapters are of random weights."""
    from peft import LoraConfig, get_peft_model

    from align.models import load_model
    from align.records import read_records, write_records

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    for name in ("positive", "negative", "dpo"):
        model = load_model("data/tiny-arithmetic/model", dtype="float32")
        get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")).save_pretrained(
            f"runs/{name}"
        )
    problems = read_records("data/tiny-arithmetic/train.jsonl")[:20]
    rows = [{"prompt": row["prompt"], "chosen": row["solution"], "rejected": " none"} for row in problems]
    write_records("preferences.jsonl", rows)
    ran = 0
    for path in CHAIN:
        for words in examples(path) if path in LEAVES else ():
            if "server" in words:  # there is none
                continue
            if "--export" in words:  # judges read one draw of a prompt
                write_records(words[words.index("evaluate") + 1], read_records("samples.jsonl", "sample")[::4])
            written = set(tmp_path.rglob("*"))
            done = CliRunner().invoke(app, words[1:])
            assert done.exit_code == 0, (words, done.output, done.exception)
            assert path == ("align", "evaluate") or set(tmp_path.rglob("*")) > written, words
            ran += 1
    assert ran >= 13
