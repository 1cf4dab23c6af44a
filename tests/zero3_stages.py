"""Not a test: the trainings of a recipe, one after the other, with a model loaded in between. Launched by test_zero3.py."""

import sys
from pathlib import Path

from conftest import random_pairs
from parallel_losses import talk_over_gloo

from align import load_model, train_preference, train_sft
from align.processes import process_state

if __name__ == "__main__":
    talk_over_gloo()
    base, out = sys.argv[1], Path(sys.argv[2])
    pairs = random_pairs(8, columns=("ce_scores",))
    answers = [
        {"id": pair["id"], "prompt": "x", "completion": "y"}
        | {"prompt_ids": pair["prompt_ids"], "completion_ids": pair["chosen_ids"]}
        for pair in pairs
    ]
    args = {
        "per_device_train_batch_size": 4 // process_state().num_processes, "max_steps": 3, "logging_steps": 1, "seed": 3,
        "bf16": False, "learning_rate": 1e-3, "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    lora = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    train_sft({"path": base, "dtype": "float32"}, answers, out / "sft", args=args, lora=lora)
    # What a score does between two trainings; the adapter is checked to belong to these weights.
    model = load_model(base, dtype="float32", adapter=str(out / "sft"))
    assert all(parameter.numel() for parameter in model.parameters())
    train_preference("cdpo", {"path": base, "dtype": "float32"}, pairs, out / "cdpo", args=args, lora=lora)
