"""What CONTRIBUTING.md names is there."""

import re
import subprocess
from pathlib import Path

import align
from align.config import METHODS
from align.pipeline import SCORED, Chain

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_named_files_exist():
    paths = set(re.findall(r"\b(?:align|recipes|benchmarks|data|tests)/(?:[\w./*-]*[\w/])?", TEXT))
    assert len(paths) > 25
    for path in paths:
        if "NAME" not in path and "*" not in path:
            assert (ROOT / path).exists() or list(ROOT.glob(f"{path}*.py")), path


def test_named_code_exists():
    """Every name in code type is somewhere in the project, or is a placeholder."""
    code = "\n".join(
        file.read_text(encoding="utf-8")
        for pattern in ("align/**/*.py", "tests/conftest.py", "tests/*fuzz*.py", "pyproject.toml", "Makefile")
        for file in ROOT.glob(pattern)
    )
    names = {name for name in re.findall(r"`(\w+)`", TEXT) if "NAME" not in name}
    assert len(names) > 20
    for name in names:
        assert re.search(rf"\b{name}\b", code), name
    assert align.TokenDPOTrainer.token_weights and align.TokenDPOTrainer.required_columns


def test_methods_and_scores_fit_together():
    """The steps for a method and for a score, of those that there are."""
    for method in METHODS.values():
        assert method.scores is None or (method.scores in SCORED and hasattr(Chain, f"_score_{method.scores}"))


def test_commands_are_what_the_project_has():
    (block, *_) = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    for target in re.findall(r"^make ([\w-]+)$", block, re.MULTILINE):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "pytest" in done.stdout, target
    settings = (ROOT / "pyproject.toml").read_text()
    for marker in re.findall(r"-m (\w+)$", block, re.MULTILINE):
        assert f'"{marker}:' in settings, marker
    for script in re.findall(r"python (benchmarks/\S+)", TEXT):
        assert (ROOT / script).exists()


def test_it_stays_short():
    assert len(TEXT.splitlines()) < 150
