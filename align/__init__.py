"""align: preference alignment token by token. Public names are imported when they are first used."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "AlignError": "errors",
    "BASHConfig": "trainers",
    "BASHTrainer": "trainers",
    "CDPOConfig": "trainers",
    "CDPOTrainer": "trainers",
    "EngineConfig": "engines",
    "PairConfig": "pair",
    "RACConfig": "trainers",
    "RACTrainer": "trainers",
    "RSDConfig": "rsd",
    "RecordFile": "record_file",
    "RolloutConfig": "scoring.rollout",
    "SampleConfig": "sample",
    "SelectConfig": "select",
    "TGDPOConfig": "trainers",
    "TGDPOTrainer": "trainers",
    "TokenDPOConfig": "trainers",
    "TokenDPOTrainer": "trainers",
    "Trace": "rsd",
    "TraceConfig": "trace",
    "evaluate_verdicts": "evaluate",
    "export_completions": "export",
    "inspect_pairs": "report",
    "inspect_traces": "report",
    "inspect_run": "run_report",
    "load_adapters": "models",
    "load_model": "models",
    "load_problems": "problems",
    "load_tokenizer": "models",
    "open_engine": "engines",
    "preference_accuracy": "evaluate",
    "read_records": "records",
    "reverse_speculative_decode": "rsd",
    "sample_completions": "sample",
    "score_contrastive": "scoring.contrastive",
    "score_entropy": "scoring.entropy",
    "score_guidance": "scoring.guidance",
    "score_reference": "scoring.reference",
    "score_rollout": "scoring.rollout",
    "select_pairs": "pair",
    "select_traces": "select",
    "token_entropies": "scoring.entropy",
    "token_logps": "logps",
    "tokenize_pairs": "preferences",
    "trace_problems": "trace",
    "train_preference": "trainers.training",
    "train_sft": "trainers.training",
    "verify_records": "verify",
    "write_records": "records",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    # Loading torch takes seconds; `align --help` and a notebook's first cell should not wait for it.
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
