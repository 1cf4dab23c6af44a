"""Not a test: trains cDPO with a preflight and without, and once more where the last process has no memory. Launched by
test_preflight.py."""

import sys

import torch
from parallel_losses import build

from align.errors import AlignError
from align.processes import leave, process_state

if __name__ == "__main__":
    ends = []
    for preflight in (True, False):
        torch.manual_seed(0)
        trainer = build("cdpo", sys.argv[1], lora=True, preflight=preflight, gradient_accumulation_steps=2, max_steps=3)
        trainer.train()
        assert not preflight or trainer.model_wrapped.require_forward_param_sync
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        ends.append((logged, {name: value.clone() for name, value in trainer.model.state_dict().items()}))
    (losses, weights), (plain_losses, plain) = ends
    assert losses == plain_losses and len(losses) == 3
    assert all(torch.equal(value, plain[name]) for name, value in weights.items())
    process = process_state()
    if process.is_main_process:
        print("SAME", process.num_processes, flush=True)
    trainer = build("cdpo", sys.argv[1], lora=True)
    if process.process_index == process.num_processes - 1:

        def full(*_):
            raise MemoryError("no more")

        trainer.model.get_base_model().get_input_embeddings().register_forward_pre_hook(full)
    try:
        trainer.train()
    except AlignError as error:
        leave(error)
