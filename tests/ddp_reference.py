"""Not a test: precomputes references twice, each process with a cache folder of its own, as on two machines. Launched by
test_distributed.py."""

import os
import sys

from accelerate.utils import gather_object
from conftest import byte_level_tokenizer, random_pairs, tiny_llama
from datasets import Dataset
from peft import LoraConfig

from align import TokenDPOConfig, TokenDPOTrainer
from align.processes import process_state

out = sys.argv[1]
os.environ["ALIGN_CACHE"] = f"{out}/cache-{process_state().process_index}"
found = []
for run in range(2):
    trainer = TokenDPOTrainer(
        tiny_llama(), processing_class=byte_level_tokenizer(), peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        args=TokenDPOConfig(f"{out}/{run}", bf16=False, use_cpu=True, report_to="none", precompute_ref_log_probs=True),
        train_dataset=Dataset.from_list(random_pairs(7)),
    )  # fmt: skip
    found.append(list(trainer.train_dataset["rejected_ref_logps"]))
assert found[0] == found[1] and len(found[0]) == 7
every = gather_object([process_state().process_index])  # lines of two processes would run into one another
if process_state().is_main_process:
    print("SAME", *every)
