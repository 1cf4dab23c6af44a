"""`report_to`: refused before anything is loaded where the tracker is missing; end to end where it is there.

TensorBoard is among the tests' requirements. With wandb and trackio, in an environment of their own:

    python3 -m venv .venv-trackers && .venv-trackers/bin/python -m pip install -e '.[dev]' wandb trackio
    HF_HUB_OFFLINE=1 .venv-trackers/bin/python -m pytest tests/test_trackers.py
"""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import random_pairs
from transformers.integrations import get_available_reporting_integrations

from align import BASHConfig, CDPOConfig
from align.config import read_config
from align.errors import ConfigError
from align.pipeline import Chain
from align.trainers import training
from align.trainers.trackers import TRACKERS, check_trackers, run_of_its_own
from align.trainers.training import train_preference, train_sft

ROOT = Path(__file__).parent.parent
TINY = ROOT / "recipes/configs/cdpo/tiny-arithmetic.yaml"
ARGS = {
    "max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2, "bf16": False, "disable_tqdm": True,
    "save_steps": 2,
}  # fmt: skip
#: Metrics of ours, and of TRL, as trackers call them.
METRICS = (
    "train/loss", "train/weights/chosen", "train/weights/rejected", "train/weights/rejected_negative", "train/rewards/margins",
    "train/rewards/chosen_unweighted", "train/logps/rejected",
)  # fmt: skip


@pytest.fixture
def without_wandb(monkeypatch):
    """Whether it is installed or not."""
    monkeypatch.setitem(sys.modules, "wandb", None)


def pairs():
    return random_pairs(6, columns=("ce_scores",))


def train(folder, model_dir, report_to, seed=0, **args):
    return train_preference(
        "cdpo", {"path": model_dir}, pairs(), folder, args={**ARGS, "report_to": report_to, "seed": seed, **args}
    )


def losses(folder) -> list[float]:
    """What the trainer itself kept."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in log if "loss" in row]


@pytest.mark.parametrize(
    "report_to, words",
    [
        ("wandb", "report_to: wandb needs the package wandb, which is not installed; pip install wandb"),
        (["tensorboard", "wandb"], "pip install wandb"),
        ("wandv", "report_to: 'wandv' is unknown; use none, all, or some of .*wandb"),
        (["none", "tensorboard"], "'none' is unknown"),
        (None, "None is unknown"),
        (5, "5 is unknown|report_to = 5 must be"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_before_anything_is_loaded(
    tmp_path, monkeypatch, without_wandb, report_to, words
):
    monkeypatch.setattr(training, "load_model", lambda **_: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=words):
        check_trackers(report_to)
    with pytest.raises(ConfigError, match=words):
        train(tmp_path / "out", "no-model", report_to)
    row = {"id": "a", "prompt": "x", "completion": "y", "prompt_ids": [5], "completion_ids": [6]}
    for method in ("sft", "bash"):
        with pytest.raises(ConfigError, match=words):
            train_sft({"path": "no-model"}, [row], tmp_path / "out", method=method, args={"report_to": report_to})
    for section in ("methods.cdpo", "methods.sft", "contrastive"):
        config = read_config(TINY)
        (config.methods[section[8:]] if section != "contrastive" else config.contrastive)["args"]["report_to"] = (
            report_to
        )
        with pytest.raises(ConfigError, match=words):
            Chain(config, tmp_path / "run")
    for cls in (CDPOConfig, BASHConfig):
        with pytest.raises(ConfigError, match=words):
            cls(str(tmp_path), report_to=report_to, bf16=False, use_cpu=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "report_to, taken",
    [
        *(("none", []), (["none"], []), ([], []), ("tensorboard", ["tensorboard"]), (["tensorboard"], ["tensorboard"])),
        *((everything, get_available_reporting_integrations()) for everything in ("all", ["all"])),
    ],
)
def test_what_transformers_takes_is_taken(tmp_path, monkeypatch, report_to, taken):
    monkeypatch.setitem(TRACKERS, "tensorboard", (lambda: True, "tensorboard"))
    check_trackers(report_to)
    assert CDPOConfig(str(tmp_path), report_to=report_to, bf16=False, use_cpu=True).report_to == taken


def test_every_tracker_of_transformers_is_known():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert TRACKERS.keys() == INTEGRATION_TO_CALLBACK.keys()
    assert all(isinstance(there(), bool) for there, _ in TRACKERS.values())


def test_a_recipe_stops_with_one_line(tmp_path):
    """Exit code 2 as a user sees it, nothing sampled, nothing trained."""
    script = "import runpy, sys\nsys.modules['wandb'] = None\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs()))
    for recipe, method, more in (("cdpo", "cdpo", []), ("dpo", "dpo", ["--data", str(data)])):
        command = [f"recipes/{recipe}.py", "--config", str(TINY), "--output", str(tmp_path / "run"), *more]
        done = subprocess.run(
            [sys.executable, "-c", script, *command, "--set", f"methods.{method}.args.report_to=wandb"], cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr[-2000:]
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("align:")]
        assert "pip install wandb" in line and "Traceback" not in done.stderr and "Loading weights" not in done.stderr
    assert list(tmp_path.iterdir()) == [data]


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """Per metric, steps and values of all of TensorBoard's files below a folder."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = reader.EventAccumulator(str(file))
        events.Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, []).extend((event.step, event.value) for event in events.Scalars(name))
    return found


def test_tensorboard_has_every_metric_and_outlives_the_training(tmp_path, model_dir):
    pytest.importorskip("tensorboard")
    train(tmp_path / "cdpo", model_dir, "tensorboard")
    found = scalars(tmp_path / "cdpo")
    for metric in METRICS:
        assert [step for step, _ in found[metric]] == [1, 2, 3], metric
    assert [value for _, value in found["train/loss"]] == pytest.approx(losses(tmp_path / "cdpo"), rel=1e-4)
    weights = [value for _, value in found["train/weights/rejected"]]
    assert all(0 < value < 1 for value in weights) and {v for _, v in found["train/weights/chosen"]} == {1.0}
    assert not list(tmp_path.glob("*.training"))


def test_a_resumed_training_keeps_what_was_logged_before(tmp_path, model_dir, monkeypatch):
    pytest.importorskip("tensorboard")
    step, taken = training.CDPOTrainer.training_step, []

    def dying(self, *args, **kwargs):
        taken.append(1)
        if len(taken) == 4:  # the preflight's is the first
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.CDPOTrainer, "training_step", dying)
        train(tmp_path / "cdpo", model_dir, "tensorboard")
    train(tmp_path / "cdpo", model_dir, "tensorboard")
    assert sorted(step for step, _ in scalars(tmp_path / "cdpo")["train/loss"]) == [1, 2, 3]


def test_contexts_are_logged(tmp_path, model_dir):
    pytest.importorskip("tensorboard")
    rows = [
        {"id": f"d{i}", "prompt": "x", "completion": "y", "prompt_ids": [5, 6], "completion_ids": [7 + i, 8, 0]}
        for i in range(6)
    ]
    args = {**ARGS, "epsilon": 0.5, "refresh_steps": 1, "report_to": "tensorboard"}
    train_sft({"path": model_dir}, rows, tmp_path / "bash", method="bash", args=args)
    found = scalars(tmp_path / "bash")
    assert {"train/bash/own_tokens", "train/bash/own_tokens_that_differ", "train/loss"} <= found.keys()


def wandb_records(file: Path) -> Iterator[bytes]:
    """Of a file in LevelDB's log format behind a header of 7 bytes: blocks of 32 KiB, in which a record has checksum, size and
    kind (1 a whole one, 4 the last piece of one), 7 bytes, in front of it."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield record
            record = b""


def test_wandb_has_every_metric_a_run_for_each_training(tmp_path, model_dir, monkeypatch):
    """Offline; what it has written is read back from its own files."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.chdir(tmp_path)
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    for seed, name in enumerate(("first", "second")):
        train(tmp_path / name, model_dir, "wandb", seed, run_name=name)
    runs = {}
    for file in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        rows, title = [], None
        for data in wandb_records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                title = record.run.display_name or title
            if record.HasField("history"):
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                rows.append(row)
        runs[title] = rows
    assert runs.keys() == {"first", "second"}
    for name, rows in runs.items():
        steps = [row for row in rows if "train/loss" in row]
        assert [row["train/global_step"] for row in steps] == [1, 2, 3]
        assert all(set(METRICS) <= row.keys() for row in steps)
        assert [row["train/loss"] for row in steps] == pytest.approx(losses(tmp_path / name))


def test_trackio_has_every_metric(tmp_path, model_dir):
    """In a process of its own, as trackio settles where it writes when it is imported."""
    pytest.importorskip("trackio")
    script = (
        "import json, sys\nfrom test_trackers import train\nfrom pathlib import Path\n"
        "train(Path(sys.argv[1]), sys.argv[2], 'trackio', project='tests', run_name='first')\n"
        "import trackio\nrun, = trackio.Api().runs('tests')\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "print('LOGS', json.dumps(SQLiteStorage.get_logs('tests', run.name), default=str))\n"
    )
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "cdpo"), model_dir], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": path, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [row for row in json.loads(done.stdout.split("LOGS ")[1]) if "train/loss" in row]
    assert [row["train/global_step"] for row in rows] == [1, 2, 3]
    assert all(set(METRICS) <= row.keys() for row in rows)
    assert [row["train/loss"] for row in rows] == pytest.approx(losses(tmp_path / "cdpo"))


@pytest.mark.parametrize("error, code", [(None, 0), (RuntimeError, 1), (KeyboardInterrupt, 1)])
def test_a_training_that_fails_is_no_finished_run(monkeypatch, error, code):
    ended = []
    wandb = SimpleNamespace(run=None, finish=lambda exit_code: ended.append(exit_code))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(error) if error else nullcontext(), run_of_its_own(["wandb"]):
        wandb.run = object()
        if error:
            raise error
    assert ended == [code]
    with run_of_its_own(["wandb"]):  # within the caller's
        pass
    assert ended == [code]
