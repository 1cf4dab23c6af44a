"""Not a test: the stages that `kills.py` kills, each on a little data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODEL = str(ROOT / "data/tiny-arithmetic/model")
PLAIN = {"path": MODEL, "dtype": "float32"}
TRAINING = {
    "max_steps": 6, "per_device_train_batch_size": 2, "bf16": False, "gradient_checkpointing": False, "save_steps": 1,
    "disable_tqdm": True, "learning_rate": 1e-3, "logging_steps": 1, "save_total_limit": 3,
}  # fmt: skip
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def load():
    from align.models import load_model, load_tokenizer

    return load_model(**PLAIN), load_tokenizer(MODEL)


def rows(given: Path, name: str) -> list[dict]:
    from align.records import read_records

    return read_records(given / name)


def problems(count: int) -> list[dict]:
    from align.problems import load_problems

    return load_problems(str(ROOT / "data/tiny-arithmetic/train.jsonl"), limit=count)


def sample(given: Path, out: Path) -> None:
    from align.sample import SampleConfig, sample_completions

    sample_completions(
        *load(), problems(24), out / "samples.jsonl", SampleConfig(n=4, max_new_tokens=80, batch_size=16)
    )


def verify(given: Path, out: Path) -> None:
    from align.verify import verify as stage

    stage(given / "samples.jsonl", out / "verdicts.jsonl")


def pair(given: Path, out: Path) -> None:
    from align.pair import pair as stage

    stage(given / "verdicts.jsonl", out / "pairs.jsonl", out / "positive.jsonl", out / "negative.parquet")


def tokenize(given: Path, out: Path) -> None:
    from align.models import load_tokenizer
    from align.preferences import tokenize_pairs

    tokenize_pairs(str(given / "preferences.jsonl"), load_tokenizer(MODEL), out / "tokenized.jsonl")


def demonstrations(given: Path, out: Path) -> None:
    from align.demonstrations import tokenize_demonstrations
    from align.models import load_tokenizer

    tokenize_demonstrations(problems(60), load_tokenizer(MODEL), out / "demonstrations.parquet")


def score_contrastive(given: Path, out: Path) -> None:
    from align.models import load_adapters
    from align.scoring.contrastive import score_contrastive as stage

    base, tokenizer = load()
    model = load_adapters(base, {name: str(given / name) for name in ("positive", "negative")})
    stage(model, rows(given, "pairs.jsonl"), out / "scored.jsonl", pad_token_id=tokenizer.pad_token_id)


def score_reference(given: Path, out: Path) -> None:
    from align.scoring.reference import score_reference as stage

    model, tokenizer = load()
    stage(model, rows(given, "pairs.jsonl"), out / "referenced.parquet", pad_token_id=tokenizer.pad_token_id)


def score_guidance(given: Path, out: Path) -> None:
    from align.scoring.guidance import load_guide
    from align.scoring.guidance import score_guidance as stage

    policy, reference, tokenizer = load_guide(PLAIN, str(given / "positive"))
    stage(policy, reference, rows(given, "pairs.jsonl"), out / "guided.jsonl", pad_token_id=tokenizer.pad_token_id)


def score_entropy(given: Path, out: Path) -> None:
    from align.scoring.entropy import score_entropy as stage

    model, tokenizer = load()
    stage(model, rows(given, "pairs.jsonl"), out / "entropy.jsonl", pad_token_id=tokenizer.pad_token_id)


def score_rollout(given: Path, out: Path) -> None:
    from align.scoring.rollout import RolloutConfig
    from align.scoring.rollout import score_rollout as stage

    config = RolloutConfig(n=2, max_new_tokens=100)
    stage(*load(), rows(given, "pairs.jsonl")[:6], out / "rollouts.jsonl", config)


def mix_bash(given: Path, out: Path) -> None:
    from align.mix_stage import mix_bash as stage

    stage(*load(), rows(given, "demonstrations.jsonl"), out / "bash.jsonl", epsilon=0.3)


def mix_rac(given: Path, out: Path) -> None:
    from align.mix_stage import mix_rac as stage
    from align.rac import CorrectionSettings

    stage(*load(), rows(given, "demonstrations.jsonl"), out / "rac.jsonl", config=CorrectionSettings(max_new_tokens=60))


def trace(given: Path, out: Path) -> None:
    from align.rsd import RSDConfig
    from align.trace import TraceConfig, load_policies, trace_problems

    *policies, tokenizer = load_policies({**PLAIN, "adapter": str(given / "positive")}, PLAIN)
    config = TraceConfig(n=2, batch_size=4)
    limits = RSDConfig(max_new_tokens=60)
    trace_problems(*policies, tokenizer, problems(10), out / "traces.jsonl", out / "kept.jsonl", limits, config)


def select(given: Path, out: Path) -> None:
    from align.select import SelectConfig, select_traces

    config = SelectConfig(keep_per_problem=1)
    select_traces(*load(), rows(given, "verdicts.jsonl"), out / "selected.jsonl", config)


def export(given: Path, out: Path) -> None:
    from align.export import export_completions

    first = [row for row in rows(given, "samples.jsonl") if row["sample"] == 0]
    export_completions(first, out / "outputs.json", "alpaca-eval", "tiny")


def inspect(given: Path, out: Path) -> None:
    from align.models import load_tokenizer
    from align.report import inspect_pairs

    inspect_pairs(rows(given, "weighted.jsonl"), load_tokenizer(MODEL), out / "pairs.html")


def merge(given: Path, out: Path) -> None:
    from align.merge import merge_adapter

    merge_adapter(MODEL, str(given / "positive"), out / "merged", dtype="float32")


def train_sft(given: Path, out: Path) -> None:
    from align.trainers.training import train_sft as stage

    stage(PLAIN, rows(given, "demonstrations.jsonl"), out / "sft", args=TRAINING)


def train_bash(given: Path, out: Path) -> None:
    from align.trainers.training import train_sft as stage

    stage(
        PLAIN, rows(given, "demonstrations.jsonl"), out / "bash", args=TRAINING | {"refresh_steps": 2}, lora=LORA,
        method="bash",
    )  # fmt: skip


def train_cdpo(given: Path, out: Path) -> None:
    from align.trainers.training import train_preference as stage

    args = {key: value for key, value in TRAINING.items() if key != "save_total_limit"}
    stage("cdpo", PLAIN, rows(given, "weighted.jsonl"), out / "cdpo", args=args, lora=LORA | {"lora_dropout": 0.1})


WORKS: dict[str, Callable[[Path, Path], None]] = {
    work.__name__: work
    for work in (
        *(sample, verify, pair, tokenize, demonstrations, score_contrastive, score_reference, score_guidance, score_entropy),
        *(score_rollout, mix_bash, mix_rac, trace, select, export, inspect, merge, train_sft, train_bash, train_cdpo),
    )
}  # fmt: skip


def small_parts() -> None:
    """Parts of a few rows, so that little data makes many of them."""
    import align.demonstrations
    import align.mix_stage
    import align.preferences
    import align.scoring.pairs
    import align.select
    import align.verify

    align.verify.PART = align.select.PART = 12
    align.demonstrations.ROWS_PER_PART = align.preferences.ROWS_PER_PART = align.mix_stage.PART = 8
    align.scoring.pairs.score_stage.__kwdefaults__["per_part"] = 2


def import_all() -> None:
    """What the stages import, once for all forks."""
    import datasets  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch

    import align.evaluate
    import align.scoring.rollout
    import align.trainers.training  # noqa: F401

    torch.set_num_threads(1)


def prepare(given: Path, _out: Path) -> None:
    """What the stages read."""
    from peft import LoraConfig, get_peft_model
    from torch import manual_seed

    from align.demonstrations import tokenize_demonstrations
    from align.models import load_tokenizer
    from align.records import write_records

    sample(given, given)
    verify(given, given)
    pair(given, given)
    pairs = rows(given, "pairs.jsonl")
    write_records(given / "preferences.jsonl", [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in pairs])
    for row in pairs:
        row |= {
            f"{side}_ce_scores": [0.1 + i % 7 / 10 for i, _ in enumerate(row[f"{side}_ids"])]
            for side in ("chosen", "rejected")
        }
    write_records(given / "weighted.jsonl", pairs)
    tokenize_demonstrations(problems(40), load_tokenizer(MODEL), given / "demonstrations.jsonl")
    for seed, name in enumerate(("positive", "negative")):
        manual_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **LORA)
        get_peft_model(load()[0], config).save_pretrained(given / name)
