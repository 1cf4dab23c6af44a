"""Any bytes, any JSON, any mix of types: a refusal by name, or everything that came in is there or counted.

Quick: a few hundred inputs, the same ones every time. Slow: 100,000, in batches; batches that passed with the same sources are
not run again, so that an interrupted run goes on (`python -m pytest tests/test_fuzz.py -m slow`).
"""

import hashlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fuzz_cli
import fuzz_settings  # noqa: F401 - registers targets
import pytest
from fuzz_targets import TARGETS, attempt
from hypothesis import HealthCheck, Phase, given, seed, settings
from test_help import LEAVES

ROOT = Path(__file__).parent.parent

#: Targets that are commands.
COMMANDS = [name for name in TARGETS if name.startswith("align ")]

#: Inputs of each target in a thousand: the readers most, what runs a model least.
SHARES = {
    "records": 100, "records_api": 60, "problems": 70, "preferences": 80, "demonstrations": 60, "verify": 60, "answers": 90,
    "pair": 60, "evaluate": 60, "export": 40, "inspect": 60, "stages": 40, "config": 30, "vocabulary": 20, "tokens": 42,
    "adapters": 30, "run_folder": 30,
} | dict.fromkeys(COMMANDS, 4)  # fmt: skip
BATCHES = 100

#: Targets that have nothing to refuse.
TAKES_ALL = {"answers"}

#: Targets of which nothing comes: the adapter to be merged is none.
TAKES_NONE = {"align merge"}


def feed(name: str, inputs: int, number: int | None = None) -> Counter:
    """How many inputs a target accepted and refused; a bug of ours is raised. Without a number, the inputs are always the same."""
    seen: Counter = Counter()

    @settings(
        max_examples=inputs, database=None, deadline=None, derandomize=number is None,
        phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    @given(TARGETS[name].inputs)
    def run(value):
        seen["accepted" if attempt(name, value) else "refused"] += 1

    if number is not None:
        run = seed(number)(run)
    run()
    return seen


def test_every_target_has_its_share():
    assert SHARES.keys() == TARGETS.keys() and sum(SHARES.values()) == 1000


def test_every_command_and_option_is_fuzzed():
    """A new one has to be named in `fuzz_cli.COMMANDS`; and what is named there is no misspelling, which would be refused untried."""
    commands = {" ".join(path[1:]): command for path, command in LEAVES.items()}
    assert commands.keys() == fuzz_cli.COMMANDS.keys()
    for name, command in commands.items():
        _, _, needed, optional = fuzz_cli.COMMANDS[name]
        options = [{*each.opts, *each.secondary_opts} for each in command.params if each.param_type_name == "option"]
        left_out = [each for each in options if not each & (needed.keys() | optional.keys() | fuzz_cli.LOADING)]
        assert left_out == [], name
        assert needed.keys() | optional.keys() <= set().union(*options), name


#: What reads bytes that someone else may have written -> the target that feeds it; `None` where another test spoils its files.
READERS = {
    "records.py": "records", "record_file.py": "records", "sources.py": "problems", "stages.py": "stages", "config.py": "config",
    "prompts.py": "tokens", "models.py": "adapters", "identity.py": "adapters", "run_folder.py": "run_folder", "row_sample.py": "run_folder",
    "vllm_adapter.py": None, "server.py": None,  # tests/test_engine_misuse.py, tests/test_engines.py
    "trainers/checkpoints.py": None, "safety.py": None,  # tests/test_crash_training.py, tests/test_safety.py
    "damage.py": None,  # tests/test_trainer_input.py
}  # fmt: skip


def test_every_module_that_reads_is_fuzzed():
    parsers = re.compile(
        r"\bjson\.loads?\(|\.json\(\)|\byaml\.\w*load|\bParquetFile\(|\bread_table\(|\bopen\([^)]*\"rb?\"|\bload_dataset\("
    )
    align = ROOT / "align"
    found = {
        file.relative_to(align).as_posix()
        for file in align.rglob("*.py")
        if any(parsers.search(line) for line in file.read_text(encoding="utf-8").splitlines())
    }
    assert found == READERS.keys() and {name for name in READERS.values() if name} <= TARGETS.keys()


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_comes_in_is_refused_by_name_or_accounted_for(name):
    seen = feed(name, 30 + SHARES[name])
    assert seen["accepted"] or name in TAKES_NONE, (
        "inputs of which none is accepted test nothing behind the first check"
    )
    assert seen["refused"] or name in TAKES_ALL


def sources() -> str:
    """Hash of what a batch's result depends on."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "align").rglob("*.py"), *(ROOT / "tests").glob("*fuzz*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_hundred_thousand_inputs(request, batch):
    key = f"align-fuzz/{sources()[:16]}"
    passed = request.config.cache.get(key, {})
    if str(batch) not in passed:
        seen = sum((feed(name, share, batch) for name, share in SHARES.items()), Counter())
        passed = request.config.cache.get(key, {}) | {str(batch): dict(seen)}
        request.config.cache.set(key, passed)
    assert sum(passed[str(batch)].values()) >= 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_inputs_steered_by_coverage(name, tmp_path):
    pytest.importorskip("atheris")
    runs = "200" if name in COMMANDS else "1000"
    command = [sys.executable, str(ROOT / "tests/fuzz_coverage.py"), name, "--runs", runs, "--corpus", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert not list(tmp_path.glob("crash-*"))
    assert len(list(tmp_path.iterdir())) > 1, "nothing was found that reaches anything new: is align instrumented?"
