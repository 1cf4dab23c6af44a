"""Progress bars: rows done of all rows, with what an earlier run has done; in one process, and silent where asked."""

import re
from pathlib import Path

import pytest
from conftest import random_pairs, tiny_llama
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from align import (
    BASHConfig,
    BASHTrainer,
    RACConfig,
    RACTrainer,
    TokenDPOConfig,
    TokenDPOTrainer,
    mix_stage,
    preferences,
    select,
    stages,
    verify,
)
from align import progress as progress_module
from align.cli import app
from align.errors import RecordError
from align.models import load_model
from align.record_file import RecordFile
from align.records import read_records, write_records
from align.scoring import pairs as scoring
from align.stages import run_in_parts
from align.trainers import self_generated, training
from align.trainers.row_data import dataset_on_disk

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "data/tiny-arithmetic/model")
CPU = {"use_cpu": True, "report_to": "none", "dataloader_pin_memory": False, "save_strategy": "no", "bf16": False}


@pytest.fixture(autouse=True)
def shown(monkeypatch):
    """Whatever the tests' own environment says."""
    for name in ("TQDM_DISABLE", "RANK"):
        monkeypatch.delenv(name, raising=False)


def bars(stderr: str) -> dict[str, tuple[str, str]]:
    """Per bar, what it showed first and last: rows done of all, as text."""
    found: dict[str, tuple[str, str]] = {}
    for name, count in re.findall(r"(?:^|[\r\n])([\w][\w: ,.-]*?): +\d+%\|[^|]*\| (\d+/\d+) ", stderr):
        found[name] = (found.get(name, (count,))[0], count)
    return found


def align(*command: str):
    return CliRunner().invoke(app, [str(word) for word in command])


class Killed(Exception):
    pass


MODEL = ("--model", TINY, "--dtype", "float32")

#: Every stage of the command line in an order in which each has what it reads: its bar, the rows, the command.
STAGES = [
    ("sample", "24", ["sample", "problems.jsonl", "samples.jsonl", *MODEL, "--n", "4", "--batch-size", "8", "--max-new-tokens", "60"]),
    ("verify", "24", ["verify", "samples.jsonl", "verdicts.jsonl"]),
    ("pair", "24", ["pair", "judged.jsonl", "pairs.jsonl", "--positive", "positive.jsonl", "--negative", "negative.jsonl"]),
    ("evaluate", "24", ["evaluate", "judged.jsonl", "--k", "2"]),
    ("evaluate corrections", "24", ["evaluate", "judged.jsonl", "--corrections", "No."]),
    ("export arena-hard", "6", ["evaluate", "first.jsonl", "--export", "arena-hard", "--out", "arena.jsonl", "--name", "x"]),
    ("tokenize", "7", ["tokenize", "preferences.jsonl", "tokenized.jsonl", "--model", TINY]),
    ("score reference", "6", ["score", "reference", "pairs.jsonl", "referenced.jsonl", *MODEL]),
    ("score contrastive", "6", ["score", "contrastive", "pairs.jsonl", "scored.jsonl", *MODEL, "--positive", "a", "--negative", "b"]),
    ("score guidance", "6", ["score", "guidance", "pairs.jsonl", "guided.jsonl", *MODEL, "--guide", "a"]),
    ("score entropy", "6", ["score", "entropy", "pairs.jsonl", "entropies.jsonl", *MODEL]),
    ("score rollout", "6", ["score", "rollout", "pairs.jsonl", "rollouts.jsonl", *MODEL, "--n", "2", "--batch-size", "4", "--max-new-tokens", "80", "--search", "bisection"]),
    ("mix bash", "6", ["mix", "bash", "problems.jsonl", "mixed.jsonl", *MODEL]),
    ("mix rac", "6", ["mix", "rac", "problems.jsonl", "corrections.jsonl", *MODEL, "--max-new-tokens", "9"]),
    ("trace", "12", ["trace", "problems.jsonl", "traces.jsonl", "--kept", "kept.jsonl", "--teacher", TINY, "--student", TINY, "--dtype", "float32", "--n", "2", "--batch-size", "4", "--max-new-tokens", "9"]),
    ("select", "24", ["select", "judged.jsonl", "selected.jsonl", *MODEL, "--keep-share", "0.5", "--no-only-correct", "--no-only-ended"]),
]  # fmt: skip

#: Stages that write their output at once, and are never resumed.
WHOLE = ("pair", "evaluate", "evaluate corrections", "export arena-hard")


@pytest.fixture
def small_parts(monkeypatch):
    """Four rows a part, so that a handful can be interrupted."""
    monkeypatch.setattr(verify, "PART", 4)
    monkeypatch.setattr(select, "PART", 4)
    monkeypatch.setattr(mix_stage, "PART", 4)
    monkeypatch.setattr(preferences, "ROWS_PER_PART", 4)
    monkeypatch.setitem(scoring.score_stage.__kwdefaults__, "per_part", 4)


def killed_in_its_second_part(monkeypatch, command):
    seal, sealed = stages._write_seal, []

    def write_seal(part):
        if sealed:
            raise Killed
        sealed.append(part)
        seal(part)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "_write_seal", write_seal)
        done = align(*command)
    assert isinstance(done.exception, Killed), (command, done.output)
    return done.stderr


def make_inputs():
    problems = read_records(str(ROOT / "data/tiny-arithmetic/train.jsonl"))[:6]
    write_records("problems.jsonl", problems)
    rows = [{"prompt": row["prompt"], "chosen": row["solution"], "rejected": " none"} for row in problems]
    write_records("preferences.jsonl", [*rows, {"prompt": "x", "chosen": "y", "rejected": "z"}])
    for name in ("a", "b"):
        model = load_model(TINY, dtype="float32")
        config = LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(name)


def judge():
    """Verdicts of which each problem has a right one and three wrong ones."""
    rows = read_records("samples.jsonl", "sample")
    judged = [row | {"extracted": str(row["sample"]), "rule": "hash", "correct": row["sample"] == 0} for row in rows]
    write_records("judged.jsonl", [row | {"finish_reason": "stop"} for row in judged])
    write_records("first.jsonl", [row for row in rows if row["sample"] == 0])


def test_every_stage_shows_rows_and_goes_on_where_it_was(tmp_path, monkeypatch, small_parts):
    """Interrupted in silence, then resumed with a bar that counts what was done before."""
    monkeypatch.chdir(tmp_path)
    make_inputs()
    for name, total, command in STAGES:
        if name not in WHOLE:
            with monkeypatch.context() as patch:
                patch.setenv("TQDM_DISABLE", "1")
                assert name not in bars(killed_in_its_second_part(monkeypatch, command)), name
        done = align(*command)
        assert done.exit_code == 0, (command, done.output, done.exception)
        first, last = bars(done.stderr)[name]
        assert last == f"{total}/{total}", (name, last)
        begun, of = first.split("/")
        assert of == total and (int(begun) == 0 if name in WHOLE else 0 < int(begun) < int(total)), (name, first)
        if name == "sample":
            judge()
    write = ["merge", "merged", *MODEL, "--adapter", "a"]
    assert any("merging" in name for name in bars(align(*write).stderr))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    write[1] = "merged-too"
    assert not any("merging" in name for name in bars(align(*write).stderr))
    for name, _, command in STAGES:
        if name in WHOLE:
            assert name not in bars(align(*command).stderr), name


def stage(path, parts=((1, 2), (3,), (4, 5, 6)), **options):
    return run_in_parts(
        path, parts, lambda _, batch: [{"id": str(x)} for x in batch], stage="s", settings={},
        order=lambda row: row["id"], **options,
    )  # fmt: skip


def test_a_fresh_run_counts_from_none_in_the_first_process_alone(tmp_path, monkeypatch, capsys):
    stage(tmp_path / "a.jsonl")
    assert bars(capsys.readouterr().err) == {"s": ("0/6", "6/6")}
    stage(tmp_path / "b.jsonl", size=lambda batch: 10)
    assert bars(capsys.readouterr().err) == {"s": ("0/30", "30/30")}
    monkeypatch.setenv("TQDM_DISABLE", "1")
    stage(tmp_path / "c.jsonl")
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setenv("RANK", "1")
    stage(tmp_path / "d.jsonl")
    assert not capsys.readouterr().err


def test_passes_over_rows_have_a_bar_where_they_take_long(tmp_path, monkeypatch, capsys):
    write_records(tmp_path / "a.jsonl", [{"id": str(i)} for i in range(5)])
    RecordFile(tmp_path / "a.jsonl")
    stage(tmp_path / "b.jsonl")
    assert bars(capsys.readouterr().err).keys() == {"s"}
    for module in ("record_file", "stages", "scoring.pairs", "trainers.row_data"):
        monkeypatch.setattr(f"align.{module}.DELAY", 0.0)
    stage(tmp_path / "c.jsonl")
    assert bars(capsys.readouterr().err)["s: writing"] == ("0/6", "6/6")
    rows = RecordFile(tmp_path / "a.jsonl")
    assert "reading a.jsonl: 5 rows" in capsys.readouterr().err
    assert rows.digest
    assert bars(capsys.readouterr().err) == {"hashing a.jsonl": ("0/5", "5/5")}
    dataset_on_disk(rows, tmp_path / "rows.arrow")
    assert bars(capsys.readouterr().err)["writing rows"][1] == "5/5"
    dataset_on_disk(rows, tmp_path / "rows.arrow", hidden=True)
    assert not bars(capsys.readouterr().err)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_disable_tqdm_hides_the_writing_of_rows(tmp_path, tokenizer, monkeypatch, kind, hidden):
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def write(_rows, _path, hidden=False):
        raise RecordError(f"hidden is {hidden}")

    monkeypatch.setattr(training, "dataset_on_disk", write)
    given = {
        "model": {"path": str(tmp_path / "model")},
        "out_dir": tmp_path / "out",
        "args": {"disable_tqdm": hidden, **CPU},
    }
    with pytest.raises(RecordError, match=f"hidden is {hidden}"):
        if kind == "sft":
            row = {"id": "a", "prompt": "", "completion": "", "prompt_ids": [5], "completion_ids": [6]}
            training.train_sft(demonstrations=[row], **given)
        else:
            training.train_preference("dpo", pairs=random_pairs(2, vocab_size=20), **given)


def reference_bars(tmp_path, tokenizer, capsys, pairs, **settings):
    capsys.readouterr()
    args = TokenDPOConfig(
        str(tmp_path), precompute_ref_log_probs=True, per_device_train_batch_size=2, **CPU, **settings
    )
    TokenDPOTrainer(
        tiny_llama(), args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    return bars(capsys.readouterr().err).get("reference of train data set")


def test_the_reference_pass_counts_what_the_cache_has(tmp_path, tokenizer, capsys):
    pairs = random_pairs(9)
    assert reference_bars(tmp_path, tokenizer, capsys, pairs[:5]) == ("0/5", "5/5")
    assert reference_bars(tmp_path, tokenizer, capsys, pairs[:5]) is None  # nothing to do
    assert reference_bars(tmp_path, tokenizer, capsys, pairs[:7]) == ("5/7", "7/7")
    assert reference_bars(tmp_path, tokenizer, capsys, pairs, disable_tqdm=True) is None


@pytest.mark.parametrize("kind", ["bash", "rac"])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_refresh_counts_the_rows_of_its_window(tmp_path, tokenizer, capsys, monkeypatch, kind, hidden):
    config, trainer_class = {"bash": (BASHConfig, BASHTrainer), "rac": (RACConfig, RACTrainer)}[kind]
    # Equal prompts' draws fit no batch together, so that there are several.
    own = {"epsilon": 0.5} if kind == "bash" else {"max_new_tokens": 4}
    rows = [{"id": f"d{i}", "input_ids": [5, 6, 7 + i, 9], "completion_mask": [0, 0, 1, 1]} for i in range(8)]
    made = []

    def remembered(*args, **kwargs):
        made.append(progress_module.progress(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(self_generated, "progress", remembered)
    args = config(
        str(tmp_path), refresh_steps=2, completion_only_loss=True, per_device_train_batch_size=2, max_steps=4,
        generation_tokens=8, disable_tqdm=hidden, **own, **CPU,
    )  # fmt: skip
    trainer_class(tiny_llama(), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()
    assert len(made) == 2
    shown = bars(capsys.readouterr().err).get("contexts")
    if hidden:
        assert shown is None and all(bar.disable for bar in made)
    else:
        assert shown[0] == "0/4" and [(bar.n, bar.total) for bar in made] == [(4, 4)] * 2
