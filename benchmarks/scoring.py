"""Contrastive scoring: two adapters over one base, batched, against two merged models, one sequence at a time.

    python benchmarks/scoring.py --model data/tiny-arithmetic/model --pairs runs/tiny-arithmetic/pairs.jsonl \
        --positive runs/tiny-arithmetic/contrastive/positive --negative runs/tiny-arithmetic/contrastive/negative

Both ways score the same completions, in turn; the ratio is of medians. Memory is that of the weights.
"""

import json
import os
import platform
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from peft import PeftModel

from align.models import load_adapters, load_model, load_tokenizer
from align.records import read_records
from align.report import markdown_table
from align.scoring.contrastive import score_rows


def one_at_a_time(positive, negative, rows, beta: float = 1.0) -> list[list[float]]:
    """The straightforward way: a forward pass per sequence and model, softmaxes over the whole sequence."""
    scores = []
    for prompt, completion in rows:
        ids = torch.tensor([[*prompt, *completion]], device=positive.device)
        with torch.inference_mode():
            logits = (1 + beta) * positive(ids).logits - beta * negative(ids).logits
            probabilities = logits[0, :-1].float().softmax(-1)
        chosen = probabilities.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        scores.append(chosen.tolist())
    return scores


def weight_bytes(*models) -> int:
    return sum(p.numel() * p.element_size() for model in models for p in model.parameters())


def main(
    model: Annotated[str, typer.Option()],
    pairs: Annotated[Path, typer.Option()],
    positive: Annotated[str, typer.Option()],
    negative: Annotated[str, typer.Option()],
    n: Annotated[int, typer.Option(help="Pairs to score.")] = 200,
    repeats: int = 3,
    max_tokens_per_batch: int = 8192,
    dtype: str = "float32",
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Times both ways in turn and prints the table."""
    rows = [
        (p["prompt_ids"], p[f"{side}_ids"]) for p in read_records(pairs, "pair")[:n] for side in ("chosen", "rejected")
    ]
    pad = load_tokenizer(model).pad_token_id
    ours = load_adapters(load_model(model, dtype=dtype), {"positive": positive, "negative": negative})
    merged = [
        PeftModel.from_pretrained(load_model(model, dtype=dtype), path).merge_and_unload()
        for path in (positive, negative)
    ]
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(repeats):
        start = time.perf_counter()
        found = score_rows(ours, rows, pad_token_id=pad, max_tokens_per_batch=max_tokens_per_batch)
        middle = time.perf_counter()
        expected = one_at_a_time(*merged, rows)
        times["ours"].append(middle - start)
        times["theirs"].append(time.perf_counter() - middle)
    difference = max(abs(a - b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))
    seconds = {name: median(values) for name, values in times.items()}
    tokens = sum(len(completion) for _, completion in rows)
    result = {
        "model": Path(model).name, "sequences": len(rows), "completion tokens": tokens, "repeats": repeats,
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, {torch.get_num_threads()} threads",
        "seconds, one at a time over two models": seconds["theirs"], "seconds, batched over one base": seconds["ours"],
        "ratio": seconds["theirs"] / seconds["ours"],
        "weights MB, two models": weight_bytes(*merged) / 1e6, "weights MB, one base and two adapters": weight_bytes(ours) / 1e6,
        "largest difference of a score": difference,
    }  # fmt: skip
    print(
        markdown_table([{"what": key, "value": f"{v:.4g}" if isinstance(v, float) else v} for key, v in result.items()])
    )
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
