"""DPO and TGDPO trained far beyond their best step: does DPO collapse, and TGDPO not?

    python benchmarks/convergence.py --runs runs/tiny-methods --json benchmarks/results/convergence.json \
        --plot benchmarks/results/convergence.svg

Takes the scored pairs that benchmarks/tiny_methods.py left (guide: that run's DPO), trains with a constant learning rate,
and asks now and then how many test problems are solved. A point is a mean over seeds.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

MODEL = "data/tiny-arithmetic/model"
#: Name in the plot -> trainer and its settings.
METHODS = {"DPO": ("dpo", {}), "TGDPO, α 0.5": ("tgdpo", {"alpha": 0.5}), "TGDPO, α 2": ("tgdpo", {"alpha": 2.0})}
POINTS = [0, 30, 60, 90, 120, 180, 240, 360]


def train(method: str, settings: dict, rate: float, seed: int, pairs: str, problems: int) -> dict:
    """One run: accuracy, and mean log-probability of chosen and rejected tokens' change, at every point."""
    from datasets import Dataset
    from transformers import TrainerCallback

    from align import TGDPOConfig, TGDPOTrainer, TokenDPOConfig, TokenDPOTrainer
    from align.models import load_model, load_tokenizer
    from align.problems import load_problems
    from align.records import read_records
    from align.sample import SampleConfig, generate
    from align.tokens import decode_completion, encode_prompt
    from align.verify import verify_completion

    model, tokenizer = load_model(MODEL, dtype="float32"), load_tokenizer(MODEL)
    test = load_problems("data/tiny-arithmetic/test.jsonl", limit=problems)
    test.sort(key=lambda row: len(row["prompt"]))
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in test]
    points: dict[int, float] = {}

    def measure(step: int) -> None:
        model.eval()
        config, right = SampleConfig(max_new_tokens=80), 0
        for start in range(0, len(test), 250):
            drawn = generate(model, tokenizer, prompts[start : start + 250], config, seed * 1000 + start)
            for row, ((ids, _),) in zip(test[start : start + 250], drawn, strict=True):
                right += verify_completion(decode_completion(tokenizer, ids), row["answer"]).correct
        points[step] = 100 * right / len(test)
        model.train()

    class Measure(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in POINTS:
                measure(state.global_step)

    config, trainer = {"dpo": (TokenDPOConfig, TokenDPOTrainer), "tgdpo": (TGDPOConfig, TGDPOTrainer)}[method]
    columns = ["prompt_ids", "chosen_ids", "rejected_ids", "chosen_ref_logps", "rejected_ref_logps"]
    if method == "tgdpo":
        columns += ["chosen_guidance_logratios", "rejected_guidance_logratios"]
    rows = Dataset.from_list([{key: row[key] for key in columns} for row in read_records(pairs)])
    with tempfile.TemporaryDirectory() as folder:
        args = config(
            folder, learning_rate=rate, lr_scheduler_type="constant_with_warmup", warmup_steps=12, beta=0.1,
            per_device_train_batch_size=32, max_steps=POINTS[-1], bf16=False, use_cpu=True, gradient_checkpointing=False,
            report_to="none", save_strategy="no", logging_steps=20, seed=seed, dataloader_pin_memory=False, **settings,
        )  # fmt: skip
        run = trainer(model, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[Measure()])
        measure(0)
        run.train()
    kept = ("loss", "logps/chosen", "logps/rejected", "rewards/accuracies", "weights/rejected_negative")
    logs = [{k: row[k] for k in ("step", *kept) if k in row} for row in run.state.log_history if "loss" in row]
    return {"accuracy": points, "logs": logs}


def near_one(pairs: str, alpha: float, beta: float = 0.1) -> float:
    """Share of TGDPO's weights that lie within 0.1 of 1."""
    from align.records import read_records

    columns = [f"{side}_guidance_logratios" for side in ("chosen", "rejected")]
    ratios = [ratio for row in read_records(pairs) for column in columns for ratio in row[column]]
    return fmean(abs(alpha * beta * ratio) <= 0.1 for ratio in ratios)


def plot(result: dict, path: Path) -> None:
    """Accuracy against training steps, one panel per learning rate."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "align"
    import matplotlib.pyplot as plt

    rates = sorted({run["learning rate"] for run in result["runs"]})
    figure, axes = plt.subplots(1, len(rates), figsize=(4.2 * len(rates), 3.2), sharey=True, squeeze=False)
    for axis, rate in zip(axes[0], rates, strict=True):
        for name in METHODS:
            runs = [r["accuracy"] for r in result["runs"] if r["method"] == name and r["learning rate"] == rate]
            steps = sorted(map(int, runs[0]))
            values = [[run[str(step)] for run in runs] for step in steps]
            (line,) = axis.plot(steps, [fmean(v) for v in values], label=name, marker="o", markersize=3)
            axis.fill_between(
                steps, [min(v) for v in values], [max(v) for v in values], alpha=0.15, color=line.get_color()
            )
        axis.set(title=f"learning rate {rate:g}", xlabel="updates of 32 pairs", ylim=(0, 100))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("test problems solved, %")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(
    runs: Annotated[Path, typer.Option(help="Folder that benchmarks/tiny_methods.py filled.")] = Path(
        "runs/tiny-methods"
    ),
    seeds: int = 3,
    rates: Annotated[list[float] | None, typer.Option("--rate", help="5e-6 and 2e-5 by default.")] = None,
    problems: int = 500,
    jobs: int = 2,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot")] = None,
    one: Annotated[str | None, typer.Option(help="Internal: one run, as JSON.")] = None,
) -> None:
    """Runs everything, prints the table, draws the plot."""
    if one is not None:
        print("RESULT " + json.dumps(train(**json.loads(one))))
        return

    rates = rates or [5e-6, 2e-5]

    def launch(name: str, rate: float, seed: int) -> dict:
        method, settings = METHODS[name]
        what = {
            "method": method, "settings": settings, "rate": rate, "seed": seed, "problems": problems,
            "pairs": str(runs / f"seed-{seed}" / "guided.jsonl"),
        }  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        command = [sys.executable, __file__, "--one", json.dumps(what)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
        print(name, rate, seed, found["accuracy"], flush=True)
        return {"method": name, "learning rate": rate, "seed": seed, **found}

    with ThreadPoolExecutor(jobs) as pool:
        tasks = [
            pool.submit(launch, name, rate, seed) for seed in range(1, seeds + 1) for rate in rates for name in METHODS
        ]
        found = [task.result() for task in tasks]
    from align.report import markdown_table

    result = {
        "seeds": seeds, "test problems": problems, "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}", "runs": found,
        "weights within 0.1 of 1": {
            name: fmean(near_one(str(runs / f"seed-{seed}" / "guided.jsonl"), settings["alpha"]) for seed in range(1, seeds + 1))
            for name, (_, settings) in METHODS.items() if settings
        },
    }  # fmt: skip
    rows = []
    for rate in rates:
        for name in METHODS:
            curves = [run["accuracy"] for run in found if run["method"] == name and run["learning rate"] == rate]
            mean = {step: fmean(curve[step] for curve in curves) for step in curves[0]}
            best = max(mean, key=mean.get)
            rows.append(
                {
                    "learning rate": f"{rate:g}",
                    "method": name,
                    "best, %": f"{mean[best]:.1f}",
                    "at step": best,
                    f"at step {POINTS[-1]}, %": f"{mean[str(POINTS[-1])]:.1f}",
                }
            )
    print(markdown_table(rows))
    print(f"weights within 0.1 of 1: {result['weights within 0.1 of 1']}")
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1) + "\n")
    if plot_path:
        plot(result, plot_path)


if __name__ == "__main__":
    typer.run(main)
