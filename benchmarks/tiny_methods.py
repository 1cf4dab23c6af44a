"""Accuracy of every method on the embedded task over several seeds, each at the learning rate best for it.

    python benchmarks/tiny_methods.py --out runs/tiny-methods --json benchmarks/results/tiny_methods.json

Learning rates are chosen with seed 0 on problems that are neither trained nor tested on; the table is of seeds 1 to n,
on the test problems. A seed decides sampling, the contrastive models and the training; the base model stays.
Started again, it goes on where it stopped.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated

import typer

from align.records import read_records, write_records
from align.report import markdown_table

CONFIG = "benchmarks/tiny_methods.yaml"
GRID = {
    "sft": [1e-4, 3e-4, 1e-3],
    "dpo": [3e-6, 1e-5, 2e-5, 3e-5],
    "cdpo": [1e-4, 2e-4, 4e-4, 8e-4],
    "tgdpo": [3e-6, 1e-5, 2e-5, 3e-5],
    "entropy": [3e-6, 1e-5, 2e-5, 3e-5, 1e-4],
    "rollout": [1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3],
}
#: Paired differences worth an interval.
DIFFERENCES = [
    ("cdpo", "base"), ("cdpo", "dpo"), ("cdpo", "sft"), ("tgdpo", "dpo"), ("entropy", "dpo"), ("rollout", "dpo"),
    ("rollout", "cdpo"),
]  # fmt: skip
#: Two-sided 95 % quantiles of Student's t by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def run(out: Path, seed: int, rates: dict[str, float], test: str | None = None) -> dict:
    """One run of the recipe with one thread; methods without a rate are left out."""
    values = [f"sample.seed={seed}", f"evaluate.seed={seed}", f"contrastive.args.seed={seed}"]
    for method in GRID:
        if method in rates:
            values += [f"methods.{method}.args.learning_rate={rates[method]}", f"methods.{method}.args.seed={seed}"]
        else:
            values.append(f"methods.{method}=null")
    if test:
        values += [f"test.source={test}"]
    command = [sys.executable, "recipes/cdpo.py", "--config", CONFIG, "--output", str(out)]
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    with open(out / "log.txt", "a") as log:
        flags = [word for value in values for word in ("--set", value)]
        subprocess.run([*command, *flags], check=True, stdout=log, stderr=log, env=environment)
    print(f"{out}: done", flush=True)
    return json.loads((out / "summary.json").read_text())


def accuracy(summary: dict, method: str) -> float:
    return 100 * summary["scores"][method]["pass@1"]["value"]


def mean_and_half(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval over seeds (Student's t)."""
    return fmean(values), T95[len(values) - 1] * stdev(values) / len(values) ** 0.5


def choose_rates(out: Path, pool: ThreadPoolExecutor) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Best learning rate of each method on held-out problems, and the accuracy of every rate tried."""
    held_out = out / "held-out.jsonl"
    write_records(held_out, read_records("data/tiny-arithmetic/train.jsonl")[-500:])
    start = out / "seed-0"
    run(start, 0, {name: GRID[name][0] for name in ("cdpo", "entropy", "rollout")}, str(held_out))

    def attempt(method: str, rate: float, start: Path, others: dict[str, float]) -> float:
        folder = out / f"grid-{method}-{rate:g}"
        if not folder.exists():  # the pairs and their scores are the same for every rate
            shutil.copytree(start, folder)
        return accuracy(run(folder, 0, {**others, method: rate}, str(held_out)), method)

    def grid(methods: list[str], start: Path, others: dict[str, float]) -> None:
        jobs = {
            method: {f"{rate:g}": pool.submit(attempt, method, rate, start, others) for rate in GRID[method]}
            for method in methods
        }
        for method, tried in jobs.items():
            found[method] = {rate: job.result() for rate, job in tried.items()}
            best[method] = float(max(found[method], key=found[method].get))

    best: dict[str, float] = {}
    found: dict[str, dict[str, float]] = {}
    grid([method for method in GRID if method != "tgdpo"], start, {})
    dpo = {"dpo": best["dpo"]}  # TGDPO's guide
    grid(["tgdpo"], out / f"grid-dpo-{best['dpo']:g}", dpo)
    return best, found


def main(
    out: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs/tiny-methods"),
    seeds: int = 5,
    jobs: Annotated[int, typer.Option(help="Runs at a time, one thread each.")] = 2,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where the numbers go.")] = None,
) -> None:
    """Runs everything and prints the table."""
    with ThreadPoolExecutor(jobs) as pool:
        best, grid = choose_rates(out, pool)
        print(f"learning rates: {best}\n{json.dumps(grid, indent=1)}", flush=True)
        runs = list(pool.map(lambda seed: run(out / f"seed-{seed}", seed, best), range(1, seeds + 1)))
    values = {method: [accuracy(summary, method) for summary in runs] for method in ("base", *GRID)}
    rows, differences = [], {}
    for method, numbers in values.items():
        mean, half = mean_and_half(numbers)
        rows.append(
            {"method": method, "accuracy, %": f"{mean:.1f} ± {half:.1f}", "learning rate": f"{best.get(method, 0):g}"}
        )
    for method, other in DIFFERENCES:
        mean, half = mean_and_half([a - b for a, b in zip(values[method], values[other], strict=True)])
        differences[f"{method} - {other}"] = {"mean": mean, "half": half}
    first = {}
    for name in ("lowest score is the first error", "critical token is the first error"):
        shares = [summary[name] for summary in runs]
        n = sum(share["n"] for share in shares)
        first[name] = {"share": sum(s["share"] * s["n"] for s in shares) / n, "n": n, "by seed": shares}
    print(markdown_table(rows))
    for name, difference in differences.items():
        print(f"{name}: {difference['mean']:+.1f} ± {difference['half']:.1f}")
    for name, share in first.items():
        print(f"{name}: {share['share']:.1%} of {share['n']} rejected solutions")
    if json_path:
        result = {
            "seeds": seeds, "test problems": runs[0]["scores"]["base"]["n"], "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
            "accuracy": values, "learning rates": best, "grid on held-out problems": grid, "differences": differences, **first,
            "rollouts": [summary["counts"]["score rollout"] for summary in runs],
        }  # fmt: skip
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
