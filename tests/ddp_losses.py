"""Not a test: trains cDPO and prints the logged losses as JSON. Launched by test_distributed.py, by one process or two."""

import json
import sys

from conftest import byte_level_tokenizer, random_pairs, tiny_llama
from datasets import Dataset
from peft import LoraConfig

from align import CDPOConfig, CDPOTrainer
from align.processes import process_state

out, aggregation, budget = sys.argv[1:]
args = CDPOConfig(
    out, per_device_train_batch_size=4 // process_state().num_processes, max_steps=10, bf16=False, report_to="none",
    logging_steps=1, learning_rate=1e-3, gradient_checkpointing=False, use_cpu=True, save_strategy="no", disable_tqdm=True,
    loss_aggregation="position" if aggregation == "position" else "sequence", max_tokens_per_batch=int(budget) or None,
)  # fmt: skip
rows = random_pairs(16, columns=("ce_scores",))
if aggregation == "position":  # averages over the padded width, so every batch must have the same one
    rows = [
        {
            key: value[i % len(value) :] + value[: i % len(value)] if key != "id" else value
            for key, value in rows[1].items()
        }
        for i in range(len(rows))
    ]
if aggregation == "weighted":  # some batches have one weight, others several
    rows = [row | {"weight": (1, 2, 0, 0.5)[i % 5 % 4]} for i, row in enumerate(rows)]
trainer = CDPOTrainer(
    tiny_llama(), args=args, train_dataset=Dataset.from_list(rows), processing_class=byte_level_tokenizer(),
    peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
)  # fmt: skip
trainer.train()
if process_state().is_main_process:
    keys = ["loss", "rewards/margins", "weights/rejected"] + ["weights/pairs"] * (aggregation == "weighted")
    print("PROCESSES", process_state().num_processes)
    print(
        "LOGGED", json.dumps([[entry[key] for key in keys] for entry in trainer.state.log_history if "loss" in entry])
    )
