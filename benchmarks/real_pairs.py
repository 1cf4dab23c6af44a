"""cDPO on real solutions with a real small model: LoRA steps, QLoRA steps, and the page of the scored pairs.

    python benchmarks/real_pairs.py --model HuggingFaceTB/SmolLM2-135M-Instruct --solutions solutions.jsonl --out runs/real-pairs

`solutions.jsonl` has `id`, `question`, `answer`, `completion`, `is_correct`, several solutions of a problem, such as the
model solutions published with GSM8K. They solve test problems: what is trained here is for measuring speed and memory,
not accuracy.
"""

import json
import os
import platform
import resource
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer

from align.models import load_adapters, load_model, load_tokenizer
from align.records import Record, read_records, write_records
from align.report import inspect_pairs, markdown_table
from align.scoring.contrastive import score_contrastive
from align.tokens import encode_pair
from align.trainers.training import train_preference, train_sft

LORA = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def make_pairs(solutions: Path, tokenizer, count: int) -> list[Record]:
    """A pair of every problem that one solution gets right and another wrong, as chat messages."""
    by_problem = defaultdict(list)
    for row in read_records(solutions):
        by_problem[row["id"]].append(row)
    pairs = []
    for rows in by_problem.values():
        good, bad = ([r for r in rows if r["is_correct"] is correct] for correct in (True, False))
        if good and bad and len(pairs) < count:
            prompt = [{"role": "user", "content": rows[0]["question"]}]
            text = {"prompt": prompt, "chosen": good[0]["completion"], "rejected": bad[0]["completion"]}
            pairs.append({"id": rows[0]["id"], **text, **encode_pair(tokenizer, text, rows[0]["id"])})
    return pairs


def demonstrations(pairs: list[Record], side: str) -> list[Record]:
    return [
        {"id": p["id"], "prompt": p["prompt"], "completion": p[side], "prompt_ids": p["prompt_ids"], "completion_ids": p[f"{side}_ids"]}
        for p in pairs
    ]  # fmt: skip


def main(
    model: Annotated[str, typer.Option()],
    solutions: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option()],
    pairs: int = 60,
    contrastive_steps: int = 15,
    batch_size: int = 2,
    lora_steps: int = 10,
    qlora_steps: int = 5,
    dtype: str = "float32",
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Makes the pairs, scores them, trains, prints seconds per step and peak memory."""
    base = {"path": model, "dtype": dtype}
    tokenizer = load_tokenizer(model)
    rows = make_pairs(solutions, tokenizer, pairs)
    write_records(out / "pairs.jsonl", rows)
    common = {
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": batch_size,
    }
    adapters = {}
    for name, side in (("positive", "chosen"), ("negative", "rejected")):
        adapters[name] = str(out / name)
        args = {**common, "learning_rate": 3e-4, "max_steps": contrastive_steps, "max_length": 1024}
        train_sft(base, demonstrations(rows, side), adapters[name], args=args, lora={**LORA, "r": 8, "lora_alpha": 16})
    loaded = load_adapters(load_model(**base), adapters)
    score_contrastive(
        loaded, rows, out / "scored.jsonl", pad_token_id=tokenizer.pad_token_id, max_tokens_per_batch=2048
    )
    del loaded
    scored = read_records(out / "scored.jsonl")
    inspect_pairs(scored, tokenizer, out / "pairs.html", title="Real GSM8K solutions, contrastive scores")
    results = []
    for name, steps, quantization in (("LoRA", lora_steps, None), ("QLoRA 4-bit", qlora_steps, "4bit")):
        args = {**common, "learning_rate": 4e-5, "beta": 0.1, "max_steps": steps, "max_length": 1024}
        folder = out / name.lower().replace(" ", "-")
        start = time.perf_counter()
        counts = train_preference("cdpo", {**base, "quantization": quantization}, scored, folder, args=args, lora=LORA)
        if not counts:
            continue  # complete already, nothing to time
        losses = [
            e["loss"] for e in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in e
        ]
        results.append(
            {
                "cDPO": name, "steps": counts["steps"], "pairs per step": batch_size,
                "seconds per step": round(counts["train_runtime"] / counts["steps"], 2),
                "seconds with loading": round(time.perf_counter() - start, 1),
                "peak memory of the process, GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
                "first loss": round(losses[0], 4), "last loss": round(losses[-1], 4),
            }
        )  # fmt: skip
    print(markdown_table(results))
    print(f"page: {out}/pairs.html")
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        hardware = f"{os.cpu_count()} CPU cores, {platform.machine()}"
        json_path.write_text(
            json.dumps(
                {"model": model.split("/")[-1], "pairs": len(rows), "hardware": hardware, "rows": results}, indent=2
            )
            + "\n"
        )


if __name__ == "__main__":
    typer.run(main)
