"""What the column `weight` of pairs adds to a training step: none, the same weight for all, a few weights, one for each pair.

    python benchmarks/pair_weights.py --json benchmarks/results/pair_weights.json

The steps are on the same batch, in turn; medians. Random weights of the model. The pairs of each weight have TRL's loss once.
"""

import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from align import TokenDPOConfig, TokenDPOTrainer
from align.report import markdown_table

#: How many different weights the pairs of a batch have; `None` is no column.
DIFFERENT = (None, 1, 4, 32)


def main(
    layers: int = 2, hidden: int = 64, pairs: int = 32, prompt: int = 16, completion: int = 16, steps: int = 25,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:  # fmt: skip
    """Times the steps in turn and prints the table."""
    tokenizer = AutoTokenizer.from_pretrained("data/tiny-arithmetic/model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=1024, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip

    def ids(n: int) -> list[int]:
        return torch.randint(3, len(tokenizer), (n,)).tolist()

    rows = [
        {"prompt_ids": ids(prompt), "chosen_ids": ids(completion), "rejected_ids": ids(completion),
         "chosen_ref_logps": [-5.0] * completion, "rejected_ref_logps": [-5.0] * completion}
        for _ in range(pairs)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        args = TokenDPOConfig(
            folder, per_device_train_batch_size=pairs, bf16=False, use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False, report_to="none", check_reference=False, max_length=None,
        )  # fmt: skip
        trainer = TokenDPOTrainer(
            LlamaForCausalLM(config), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        trainer.current_gradient_accumulation_steps = 1
        batches = [
            trainer.data_collator(rows if n is None else [row | {"weight": 2.0 + i % n} for i, row in enumerate(rows)])
            for n in DIFFERENT
        ]
        seconds: list[list[float]] = [[] for _ in DIFFERENT]
        for step in range(steps + 2):
            for batch, taken in zip(batches, seconds, strict=True):
                start = time.perf_counter()
                trainer.training_step(trainer.model, dict(batch)).item()
                if step >= 2:
                    taken.append(time.perf_counter() - start)
    medians = [median(taken) for taken in seconds]
    found: list[dict[str, Any]] = [
        {"different weights": "no column" if n is None else n, "ms": round(1e3 * m, 1), "ratio": round(m / medians[0], 3)}
        for n, m in zip(DIFFERENT, medians, strict=True)
    ]  # fmt: skip
    print(markdown_table(found))
    if json_path:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
        result = {"device": device, "pairs": pairs, "steps": steps, "layers": layers, "hidden": hidden, "rows": found}
        json_path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
