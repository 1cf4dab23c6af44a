"""Not a test: trains cDPO, the loss of the last process being no number. Launched by test_parallel.py."""

import sys

from parallel_losses import build

from align.errors import AlignError
from align.processes import leave, process_state

if __name__ == "__main__":
    trainer = build("cdpo", sys.argv[1], lora=True)
    process, step = process_state(), trainer.compute_loss
    if process.process_index == process.num_processes - 1:
        trainer.compute_loss = lambda *args, **kwargs: step(*args, **kwargs) * float("nan")
    try:
        trainer.train()
    except AlignError as error:
        leave(error)
