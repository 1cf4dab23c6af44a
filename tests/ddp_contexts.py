"""Not a test: trains BASH or RAC and prints losses and contexts as JSON. Launched by test_distributed.py, by one process or
two."""

import json
import sys
from pathlib import Path

from conftest import byte_level_tokenizer, tiny_llama
from test_self_generated import KINDS, OPTIONS, demonstrations

from align.processes import process_state
from align.records import read_records

kind, out = sys.argv[1:]
cls, config, own = KINDS[kind]
size = {"per_device_train_batch_size": 4 // process_state().num_processes, "max_steps": 7}
args = config(out, **OPTIONS | own | {"contexts_limit": None, "generation_tokens": 60} | size)
tokenizer = byte_level_tokenizer()
trainer = cls(
    tiny_llama(vocab_size=len(tokenizer)), args=args, train_dataset=demonstrations(16), processing_class=tokenizer
)
trainer.train()
if process_state().is_main_process:
    rows = [row for path in sorted(Path(out, "contexts").iterdir()) for row in read_records(path)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("PROCESSES", process_state().num_processes)
    print("LOGGED", json.dumps({"losses": losses, "contexts": rows}))
