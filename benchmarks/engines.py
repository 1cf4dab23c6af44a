"""Tokens per second that an engine draws, transformers and vLLM in turn, on the same prompts.

    python benchmarks/engines.py --model data/tiny-arithmetic/model --prompts 64 --n 4 --max-new-tokens 80 --json benchmarks/results/engines.json

A first round warms both up and is not counted; what starting takes stands beside it. A figure is a median over rounds. On a CPU
vLLM leaves a core to its front end unless VLLM_CPU_OMP_THREADS_BIND says otherwise.
"""

import json
import os
import platform
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from align import SampleConfig, load_problems, load_tokenizer
from align.engines import EngineConfig, open_engine
from align.report import markdown_table
from align.tokens import encode_prompt

PROBLEMS = Path(__file__).parents[1] / "data/tiny-arithmetic/train.jsonl"


def main(
    model: Annotated[str, typer.Option(help="Hub name or folder.")],
    dtype: str = "float32",
    prompts: int = 64,
    n: int = 4,
    max_new_tokens: int = 80,
    rounds: int = 3,
    json_path: Annotated[Path | None, typer.Option("--json", help="Results to add to.")] = None,
) -> None:
    """Prints a table and writes JSON."""
    tokenizer, config = load_tokenizer(model), SampleConfig(n=n, max_new_tokens=max_new_tokens)
    ids = [encode_prompt(tokenizer, row["prompt"]) for row in load_problems(str(PROBLEMS), limit=prompts)]
    engines, started, speeds = {}, {}, {"transformers": [], "vllm": []}
    for name in speeds:
        start = time.perf_counter()
        engines[name] = open_engine(EngineConfig(name), {"path": model, "dtype": dtype}, tokenizer)
        started[name] = time.perf_counter() - start
    for number in range(rounds + 1):
        for name, engine in engines.items():
            start = time.perf_counter()
            drawn = engine.generate(ids, config, seed=number)
            seconds = time.perf_counter() - start
            if number:
                speeds[name].append(sum(len(completion) for draws in drawn for completion, _ in draws) / seconds)
    for engine in engines.values():
        engine.close()
    rows: list[dict[str, Any]] = [
        {
            "model": Path(model).name,
            "engine": name,
            "tokens per second": round(median(found)),
            "start, s": round(started[name]),
        }
        for name, found in speeds.items()
    ]
    print(markdown_table(rows))
    if json_path is not None:
        known = json.loads(json_path.read_text()) if json_path.exists() else []
        setting = {
            "model": model, "dtype": dtype, "prompts": prompts, "n": n, "max_new_tokens": max_new_tokens, "rounds": speeds,
            "start": started, "cores": os.cpu_count(), "torch": torch.__version__, "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        json_path.write_text(json.dumps([*known, setting], indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
