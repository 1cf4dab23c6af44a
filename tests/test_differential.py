"""The harness of the matrix finds what differs."""

import pytest
import torch
from differential import KINDS, Outcome, difference

from align.errors import ConfigError


def outcome(**changed):
    logged = {
        "step": 1,
        "loss": 0.5,
        "rewards/margins": 0.1,
        "rewards/accuracies": 0.75,
        "train_runtime": 3.0,
    } | changed
    return Outcome([logged], {"head": torch.ones(2)}, True)


def failed(error):
    return Outcome(error=error)


def moved(by):
    found = outcome()
    found.weights = {"head": torch.ones(2) + by}
    return found


@pytest.mark.parametrize(
    "theirs, ours, kind",
    [
        (outcome(), outcome(), None),
        (outcome(), outcome(train_runtime=9.0), None),
        (outcome(), outcome(**{"weights/chosen": 1.0}), None),  # a metric of ours
        (outcome(aux_loss=1.0), outcome(), "other numbers"),
        (outcome(), outcome(loss=0.5 + 4e-6), None),
        (outcome(), outcome(loss=0.5 + 7e-6), "other numbers"),
        (outcome(loss=float("nan")), outcome(loss=float("nan")), None),
        (outcome(), outcome(loss=float("nan")), "other numbers"),
        (outcome(), outcome(**{"rewards/accuracies": 0.5}), "other numbers"),
        (outcome(**{"rewards/margins": 1e-6}), outcome(**{"rewards/margins": 0.0, "rewards/accuracies": 0.5}), None),
        (outcome(), moved(1e-6), None),
        (outcome(), moved(1e-4), "other numbers"),
        (outcome(), failed(ConfigError("no")), "refused"),
        (failed(ValueError("no")), outcome(), "accepted"),
        (failed(ValueError("no")), failed(ValueError("no")), None),
        (failed(ValueError("no")), failed(ConfigError("no")), "own words"),
    ],
)
def test_kinds_of_differences(theirs, ours, kind):
    found = difference(theirs, ours, 1e-5)
    assert (found and found[0]) == kind and (kind is None or kind in KINDS)


@pytest.mark.parametrize("theirs", [outcome(), failed(ValueError("no"))])
def test_an_error_of_ours_that_is_no_refusal_is_raised(theirs):
    with pytest.raises(TypeError, match="bug"):
        difference(theirs, failed(TypeError("bug")), 1e-5)
