"""cDPO on real solutions with a real small model: LoRA steps, QLoRA steps, and the page of the scored pairs.

    python benchmarks/real_pairs.py run --model HuggingFaceTB/SmolLM2-135M-Instruct \
        --solutions solutions.jsonl --out runs/real-pairs

`solutions.jsonl` has `id`, `question`, `answer`, `completion`, `is_correct`, several solutions of a problem, such as the
model solutions published with GSM8K. They solve test problems: what is trained here is for measuring speed and memory,
not accuracy. Each training is a launch of its own, so that its peak memory is its own; LoRA runs with one process and,
for the same losses, with two that share the batch.
"""

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer

from align.models import load_adapters, load_model, load_tokenizer
from align.processes import process_state
from align.records import Record, read_records, write_records
from align.report import inspect_pairs, markdown_table
from align.scoring.contrastive import score_contrastive
from align.tokens import encode_pair
from align.trainers.training import train_preference, train_sft

app = typer.Typer(add_completion=False)

LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml", "--num_processes"]

#: cDPO trainings: name, pairs per process and step, processes, quantization.
TRAININGS = [("LoRA", 2, 1, None), ("LoRA", 1, 2, None), ("QLoRA 4-bit", 2, 1, "4bit")]

COMMON = {"bf16": False, "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no", "max_length": 1024}

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


@app.command()
def run(
    model: Annotated[str, typer.Option()],
    solutions: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option()],
    pairs: int = 60,
    contrastive_steps: int = 15,
    lora_steps: int = 10,
    qlora_steps: int = 5,
    dtype: str = "float32",
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Makes the pairs, scores them, trains, prints seconds per step, peak memory and losses."""
    base = {"path": model, "dtype": dtype}
    tokenizer = load_tokenizer(model)
    rows = make_pairs(solutions, tokenizer, pairs)
    write_records(out / "pairs.jsonl", rows)
    adapters = {}
    for name, side in (("positive", "chosen"), ("negative", "rejected")):
        adapters[name] = str(out / name)
        args = {**COMMON, "learning_rate": 3e-4, "max_steps": contrastive_steps, "per_device_train_batch_size": 2}
        train_sft(base, demonstrations(rows, side), adapters[name], args=args, lora={**LORA, "r": 8, "lora_alpha": 16})
    loaded = load_adapters(load_model(**base), adapters)
    scored = out / "scored.jsonl"
    score_contrastive(loaded, rows, scored, pad_token_id=tokenizer.pad_token_id, max_tokens_per_batch=2048)
    del loaded
    title = "Real GSM8K solutions, contrastive scores"
    inspect_pairs(read_records(scored), tokenizer, out / "pairs.html", title=title)
    results = []
    for name, batch_size, processes, quantization in TRAININGS:
        folder = out / f"{name.lower().replace(' ', '-')}-{processes}"
        steps = qlora_steps if quantization else lora_steps
        options = ["--model", model, "--dtype", dtype, "--pairs", scored, "--out", folder, "--steps", steps]
        options += ["--batch-size", batch_size, *(("--quantization", quantization) if quantization else ())]
        command = [sys.executable, *LAUNCH, processes, "benchmarks/real_pairs.py", "train", *options]
        measured = folder.with_suffix(".json")
        if not measured.exists():
            shutil.rmtree(folder, ignore_errors=True)  # finished but not measured
            subprocess.run(list(map(str, command)), check=True)
        results.append({"cDPO": name, "processes": processes} | json.loads(measured.read_text()))
    print(markdown_table([{k: v for k, v in row.items() if k != "losses"} for row in results]))
    one, two = results[0]["losses"], results[1]["losses"]
    apart = max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True))
    print(f"largest relative difference between the losses of one process and two: {apart:.1e}")
    print(f"page: {out}/pairs.html")
    if json_path:
        result = {
            "model": model.rstrip("/").split("/")[-1], "dtype": dtype, "pairs": len(rows), "trainings": results,
            "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}", "losses of two processes differ by": apart,
        }  # fmt: skip
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=2) + "\n")


@app.command()
def train(
    model: Annotated[str, typer.Option()],
    pairs: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option()],
    steps: Annotated[int, typer.Option()],
    batch_size: Annotated[int, typer.Option()],
    dtype: str = "float32",
    quantization: str | None = None,
) -> None:
    """One cDPO training under `accelerate launch`; what it measured goes to `<out>.json`."""
    args = {**COMMON, "learning_rate": 4e-5, "beta": 0.1, "max_steps": steps, "per_device_train_batch_size": batch_size}
    base = {"path": model, "dtype": dtype, "quantization": quantization}
    counts = train_preference("cdpo", base, read_records(pairs), out, args=args, lora=LORA)
    if process_state().is_main_process:
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        measured = {
            "steps": counts["steps"], "pairs per step": batch_size * process_state().num_processes,
            "seconds per step": round(counts["train_runtime"] / counts["steps"], 2),
            "peak memory of a process, GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
            "losses": [entry["loss"] for entry in history if "loss" in entry],
        }  # fmt: skip
        out.with_suffix(".json").write_text(json.dumps(measured))


if __name__ == "__main__":
    app()
