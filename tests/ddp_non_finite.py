"""Not a test: trains cDPO, the loss of the last process being no number, or the gradient of one parameter in all. Launched by
test_parallel.py and test_zero3.py, which names the parameter."""

import sys

import torch
from parallel_losses import build, talk_over_gloo

from align.errors import AlignError
from align.processes import leave, process_state

if __name__ == "__main__":
    talk_over_gloo()
    trainer = build("cdpo", sys.argv[1], lora=True, preflight=False)  # which would find it before the first step
    process, step = process_state(), trainer.compute_loss
    if named := sys.argv[2:]:
        parameter = dict(trainer.model.named_parameters())[named[0]]
        parameter.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    elif process.process_index == process.num_processes - 1:
        trainer.compute_loss = lambda *args, **kwargs: step(*args, **kwargs) * float("nan")
    try:
        trainer.train()
    except AlignError as error:
        leave(error)
