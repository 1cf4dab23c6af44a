"""Accuracy of base, SFT, DPO and cDPO on the embedded task over several seeds, each at the learning rate best for it.

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

CONFIG = "recipes/configs/cdpo/tiny-arithmetic.yaml"
GRID = {
    "sft": [1e-4, 3e-4, 1e-3],
    "dpo": [1e-6, 3e-6, 1e-5, 2e-5, 3e-5],
    "cdpo": [1e-5, 3e-5, 1e-4, 2e-4, 4e-4, 8e-4],
}
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
    run(start, 0, {}, str(held_out))

    def attempt(method: str, rate: float) -> float:
        folder = out / f"grid-{method}-{rate:g}"
        if not folder.exists():  # the pairs and their scores are the same for every rate
            shutil.copytree(start, folder)
        return accuracy(run(folder, 0, {method: rate}, str(held_out)), method)

    tried = {
        method: {f"{rate:g}": pool.submit(attempt, method, rate) for rate in rates} for method, rates in GRID.items()
    }
    found = {method: {rate: job.result() for rate, job in jobs.items()} for method, jobs in tried.items()}
    return {method: float(max(rates, key=rates.get)) for method, rates in found.items()}, found


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
    for other in ("base", "dpo", "sft"):
        mean, half = mean_and_half([a - b for a, b in zip(values["cdpo"], values[other], strict=True)])
        differences[f"cdpo - {other}"] = {"mean": mean, "half": half}
    shares = [summary["lowest score is the first error"] for summary in runs]
    first = sum(s["share"] * s["n"] for s in shares) / sum(s["n"] for s in shares)
    print(markdown_table(rows))
    for name, difference in differences.items():
        print(f"{name}: {difference['mean']:+.1f} ± {difference['half']:.1f}")
    print(f"lowest score is the first error: {first:.1%} of {sum(s['n'] for s in shares)} rejected solutions")
    if json_path:
        result = {
            "seeds": seeds, "test problems": runs[0]["scores"]["base"]["n"], "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
            "accuracy": values, "learning rates": best, "grid on held-out problems": grid, "differences": differences,
            "lowest score is first error": {"share": first, "by seed": shares},
        }  # fmt: skip
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
