"""The same arguments to TRL's trainer and to ours: losses, metrics, final weights, or the same error.

A case is data. Both trainers run in one process with the same seeds, four steps each. What differs stands in `DIFFERENCES`
with its reason; a difference without a row fails, and so does a row without a difference.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from families import family_folder, family_tokenizer
from packaging.version import Version
from transformers import AutoModelForCausalLM, set_seed

from align import trl_versions
from align.errors import AlignError

#: Steps of a run.
STEPS = 4

#: How far numbers may lie apart, relative to the larger one. A float32 number has 6e-8. Our default layout sums in another
#: order than padded rows: each log-probability of a token moves by some 1e-6 nats, those of a row add up.
SHARED = 1e-5
#: The same layout as TRL's, so that only the weights' product rounds.
PADDED = 1e-6

#: Numbers near 0, such as a reward of the first step, may differ by this times the tolerance, because they are differences of
#: sums of some 60 nats: float32 has 4e-6 there.
SCALE_OF_ZERO = 0.5

BASE = {
    "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "bf16": False, "report_to": "none", "logging_steps": 1,
    # Adam would divide by gradients that are next to nothing, and enlarge rounding.
    "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "gradient_checkpointing": False, "seed": 3,
    "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_length": 64, "max_steps": STEPS,
}  # fmt: skip

#: Kinds of differences. `refused`: TRL trains, ours raises an `AlignError`. `own words`: both raise, ours an `AlignError`.
#: `accepted`: TRL raises, ours trains. `other numbers`: both train, further apart than the tolerance.
KINDS = ("refused", "own words", "accepted", "other numbers")

#: Case -> kind and reason. Each file of cases adds its own with `differ`.
DIFFERENCES: dict[str, tuple[str, str]] = {}


def differ(rows: Mapping[str, tuple[str, str]]) -> None:
    """Adds rows to the table of differences."""
    for name, (kind, reason) in rows.items():
        assert kind in KINDS and reason.strip() and name not in DIFFERENCES, name
        DIFFERENCES[name] = (kind, reason)


@dataclass(frozen=True)
class Case:
    """Arguments of a trainer.

    Args:
        name: what the table of differences calls it.
        config: values of the configuration.
        data: makes the training data, again for each trainer.
        family: a key of `FAMILIES`.
        model: makes the model from the family's folder; by default it is loaded from there.
        trainer: further arguments of the trainer; a function's result is given in its place, so that nothing is shared. A
            function with a parameter gets the family's folder.
        ours: values of our configuration alone, such as one that TRL's rows need.
        tolerance: how far numbers may lie apart.
        raises: whether both raise the same error.
        after: called with the trainer after its training; what it returns is compared, too.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    data: Callable[[], Any] | None = None
    family: str = "llama"
    family_config: Mapping[str, Any] = field(default_factory=dict)
    model: Callable[[str], Any] | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = SHARED
    raises: bool = False
    after: Callable[[Any], Any] | None = None

    def __str__(self) -> str:
        return self.name


@dataclass
class Outcome:
    """What a run came to: numbers, or an error."""

    logs: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    moved: bool = False
    extra: Any = None
    error: Exception | None = None


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def _made(value: Any, folder: str) -> Any:
    """A fresh argument; classes are arguments themselves."""
    if inspect.isfunction(value):
        return value(folder) if inspect.signature(value).parameters else value()
    return value


def run(
    trainer_class: type, config_class: type, case: Case, folder: Path, default_data: Callable[[], Any], **own
) -> Outcome:
    """Train `STEPS` steps.

    Args:
        folder: for what the trainer writes.
        default_data: makes the training data of a case that has none of its own.
        own: further values of the configuration.
    """
    there = family_folder(case.family, **case.family_config)
    outcome = Outcome()
    try:
        set_seed(0)
        args = config_class(**{"output_dir": str(folder), **BASE, **own, **case.config})
        given = {"processing_class": family_tokenizer, **case.trainer}
        made = {name: _made(value, there) for name, value in given.items()}
        set_seed(0)
        model = _made(case.model or load, there)
        set_seed(0)
        trainer = trainer_class(model, args=args, train_dataset=(case.data or default_data)(), **made)
        before = _trainable(trainer.model)
        set_seed(0)
        trainer.train()
        outcome.weights = _trainable(trainer.model)
        outcome.moved = any(not torch.equal(before[name], outcome.weights[name]) for name in before)
        outcome.logs = trainer.state.log_history
        outcome.extra = case.after(trainer) if case.after else None
    except Exception as error:  # noqa: BLE001 - errors are what is compared
        outcome.error = error
    return outcome


def _trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def difference(theirs: Outcome, ours: Outcome, tolerance: float) -> tuple[str, str] | None:
    """Kind and description of a difference; `None` for the same.

    Raises:
        Exception: ours, where it is an error that TRL does not raise and that is not an `AlignError`: always a bug.
    """
    if theirs.error is not None and ours.error is not None:
        if type(theirs.error) is type(ours.error) and str(theirs.error) == str(ours.error):
            return None
        if not isinstance(ours.error, AlignError):
            raise ours.error
        return "own words", f"{theirs.error!r} against {ours.error!r}"
    if ours.error is not None:
        if not isinstance(ours.error, AlignError):
            raise ours.error
        return "refused", repr(ours.error)
    if theirs.error is not None:
        return "accepted", repr(theirs.error)
    found = _apart(theirs, ours, tolerance)
    return None if found is None else ("other numbers", found)


def _apart(theirs: Outcome, ours: Outcome, tolerance: float) -> str | None:
    """The first thing that lies further apart than the tolerance, in words."""
    if len(theirs.logs) != len(ours.logs) or theirs.weights.keys() != ours.weights.keys():
        return (
            f"{len(theirs.logs)} entries of {len(theirs.weights)} weights, and {len(ours.logs)} of {len(ours.weights)}"
        )
    for theirs_at, ours_at in zip(theirs.logs, ours.logs, strict=True):
        if missing := {key for key in theirs_at.keys() - ours_at.keys() if not _of_time(key)}:
            return f"step {theirs_at['step']}: {sorted(missing)} is logged by TRL alone"
        for key, value in theirs_at.items():
            if _of_time(key) or (key.endswith("rewards/accuracies") and _is_tie(theirs_at, key, tolerance)):
                continue
            if not close(value, ours_at[key], tolerance):
                return f"step {theirs_at['step']}: {key} = {value!r} and {ours_at[key]!r}"
    for name, weights in theirs.weights.items():
        largest = weights.float().abs().max().item() if weights.numel() else 0.0
        error = (weights - ours.weights[name]).float().abs().max().item() if weights.numel() else 0.0
        if not error <= tolerance * max(largest, 1e-2):
            return f"{name}: apart by {error:.3g}, its largest is {largest:.3g}"
    return None if theirs.extra == ours.extra else f"{theirs.extra!r} and {ours.extra!r}"


def _is_tie(logged: Mapping[str, float], key: str, tolerance: float) -> bool:
    """Whether both rewards are the same up to rounding, as before the first update. Then rounding decides the accuracy."""
    return abs(logged[key.replace("accuracies", "margins")]) <= SCALE_OF_ZERO * tolerance


def _of_time(key: str) -> bool:
    return "runtime" in key or "per_second" in key or "flos" in key


def close(theirs: Any, ours: Any, tolerance: float) -> bool:
    """Whether two logged values are the same up to rounding; a NaN is the same as a NaN."""
    if not isinstance(theirs, float) or not isinstance(ours, (int, float)):
        return theirs == ours
    if math.isnan(theirs) or math.isnan(ours):
        return math.isnan(theirs) and math.isnan(ours)
    return math.isclose(theirs, ours, rel_tol=tolerance, abs_tol=SCALE_OF_ZERO * tolerance)


def check(
    case: Case, theirs: tuple[type, type], ours: tuple[type, type], folder: Path, default_data: Callable[[], Any], **own
) -> None:
    """Run a case on both trainers, and compare what comes out with the table.

    Args:
        theirs, ours: trainer and configuration.
        own: values of our configuration, below those of the case.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = run(*theirs, case, folder / "trl", default_data)
        second = run(*ours, case, folder / "align", default_data, **{**own, **case.ours})
    found = difference(first, second, case.tolerance)
    if trl_versions.installed() < Version(trl_versions.NEWEST):
        # The table is the newest TRL's. An older one raises where that does not; it may not train with other numbers.
        assert found is None or found[0] != "other numbers" or case.name in DIFFERENCES, f"{case.name}: {found}"
        return
    if case.name not in DIFFERENCES:
        assert found is None, f"{case.name} differs and has no row in DIFFERENCES: {found}"
        assert (first.error is not None) == case.raises, f"{case.name}: {first.error!r}, and raises = {case.raises}"
        # Two runs that learn nothing are equal whatever they do.
        assert case.raises or first.moved, f"{case.name} trains nothing"
        return
    kind, _ = DIFFERENCES[case.name]
    assert found is not None, f"{case.name} is equal: remove its row from DIFFERENCES"
    assert found[0] == kind, f"{case.name}: {found[0]} ({found[1]}), and DIFFERENCES has {kind!r}"
