"""How the time of a DPO step grows with the prompt: TRL's DPOTrainer without its reference pass, and ours.

    python benchmarks/dpo_growth.py --json benchmarks/results/dpo_growth.json --plot benchmarks/results/dpo_growth.svg

Seconds per pair, forward and backward, at prompts of 128 to 8,192 tokens and completions of a fixed length: TRL's two rows
take the prompt twice. A time is a median; both take turns, on the same pairs and weights.
"""

import json
import os
import platform
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from dpo_step import MODELS, Sides, random_pair

PROMPTS = [128, 256, 512, 1024, 2048, 4096, 8192]


def measure(model: str, prompt: int, completion: int, steps: int, device: str, attention: str) -> dict[str, float]:
    """Median seconds per pair of both, and how far their losses are apart."""
    import random

    count, draw = max(1, 2048 // prompt), random.Random(0)
    pairs = [random_pair(draw, prompt, completion, completion) for _ in range(count)]
    sides = {which: Sides(which, MODELS[model], pairs, device, attention) for which in ("trl", "ours")}
    seconds: dict[str, list[float]] = {which: [] for which in sides}
    for step in range(steps + 1):
        for which, side in sides.items():
            taken = side.step()
            if step:
                seconds[which].append(taken / count)
    apart = abs(sides["ours"].loss - sides["trl"].loss) / abs(sides["trl"].loss)
    times = {which: median(values) for which, values in seconds.items()}
    return {"prompt": prompt, "pairs": count, **times, "ratio": times["trl"] / times["ours"], "losses apart": apart}


def plot(rows: list[dict], completion: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "align"
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2))
    prompts = [row["prompt"] for row in rows]
    for which, name in (("trl", "TRL"), ("ours", "align")):
        left.loglog(prompts, [row[which] for row in rows], marker="o", markersize=3, label=name)
    left.set(title=f"completions of {completion} tokens", ylabel="seconds per pair")
    left.legend(frameon=False)
    right.semilogx(prompts, [row["ratio"] for row in rows], marker="o", markersize=3, color="black")
    right.set(title="TRL's time over ours", ylim=(0, None))
    for axis in (left, right):
        axis.set(xlabel="prompt tokens")
        axis.set_xticks(prompts, [str(p) for p in prompts], minor=False, fontsize=7)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(
    model: str = "small, V=32k, LoRA",
    completion: int = 128,
    longest: int = 8192,
    steps: int = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    attention: Annotated[str, typer.Option(help="sdpa, eager or flex_attention")] = "sdpa",
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot")] = None,
) -> None:
    """Measures every prompt length, prints the table, draws the plot."""
    from align.report import markdown_table

    rows = []
    for prompt in [p for p in PROMPTS if p <= longest]:
        rows.append(measure(model, prompt, completion, steps, device, attention))
        print(json.dumps(rows[-1]), flush=True)
    print(markdown_table([{k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]))
    if json_path:
        hardware = (
            torch.cuda.get_device_name() if device != "cpu" else f"{os.cpu_count()} CPU cores, {platform.machine()}"
        )
        json_path.parent.mkdir(parents=True, exist_ok=True)
        result = {"hardware": hardware, "model": model, "completion": completion, "attention": attention, "rows": rows}
        json_path.write_text(json.dumps(result, indent=1) + "\n")
    if plot_path:
        plot(rows, completion, plot_path)


if __name__ == "__main__":
    typer.run(main)
