"""Whole weights for a while: the pieces of two processes, one of which draws."""

import json

import torch
from conftest import tiny_llama
from test_parallel import ROOT, TESTS, launch

from align.trainers.whole_weights import whole_weights


def test_a_process_draws_from_shards_without_the_other():
    done = launch(ROOT / "recipes/accelerate/cpu.yaml", 2, str(TESTS / "fsdp_whole_weights.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    everyones = json.loads(done.stdout.split("SEEN", 1)[1])
    assert len(everyones) == 8  # of two models in two rounds, by two processes
    for report in everyones:
        assert len(report) == 9 and all(report.values()), report


def test_a_model_that_is_not_sharded_is_left_alone():
    model = tiny_llama()
    before = [(id(weight), weight.clone()) for weight in model.parameters()]
    with whole_weights(model):
        assert [id(weight) for weight in model.parameters()] == [name for name, _ in before]
    assert all(torch.equal(weight, kept) for weight, (_, kept) in zip(model.parameters(), before, strict=True))
