"""SFT, BASH, RAC, and DPO and cDPO after RAC, on the embedded task over several seeds; and whether errors accumulate.

    python benchmarks/own_tokens.py --out runs/own-tokens --json benchmarks/results/own_tokens.json --plot benchmarks/results/own_tokens.svg

Settings are chosen with seed 0 on problems that are neither trained nor tested on; the table is of seeds 1 to n. All learn
from the same 1,000 solutions; DPO and cDPO from solutions sampled from what RAC made. Learning rates of DPO and cDPO
are those of benchmarks/results/tiny_methods.json. Started again, it goes on where it stopped.
"""

import json
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
import yaml
from tiny_methods import mean_and_half

from align.rac import correction_report
from align.records import read_records, write_records
from align.report import markdown_table

LEARNERS = ("sft", "bash", "bash_autoregressive", "rac")
#: Settings tried per method; the autoregressive way has those of the parallel one. RAC needs far more updates than the others: an
#: answer behind an answer is longer than anything that the base was made on.
GRID: dict[str, list[dict[str, Any]]] = {
    "sft": [{"learning_rate": rate} for rate in (1e-4, 3e-4, 1e-3)],
    "bash": [{"learning_rate": rate, "epsilon": eps} for rate in (1e-4, 3e-4, 1e-3) for eps in (0.1, 0.25, 0.5)],
    "rac": [
        {"learning_rate": rate, "num_train_epochs": epochs, "prefix_fraction": prefix}
        for rate, epochs, prefix in (
            (1e-4, 2, [0.0, 1.0]),
            (3e-4, 2, [0.0, 1.0]),
            (1e-3, 2, [0.0, 1.0]),
            (1e-3, 10, [0.0, 1.0]),
            (3e-3, 10, [0.0, 1.0]),
            (1e-3, 10, [0.0, 0.25]),
            (3e-4, 30, [0.0, 1.0]),
            (1e-3, 30, [0.0, 1.0]),
            (1e-3, 30, [1.0, 1.0]),
        )
    ],
}
#: Tried, but no choice: SFT with as many updates as RAC has.
CONTROLS = {"sft": [{"learning_rate": 3e-4, "num_train_epochs": 30}]}
TITLES = {
    "base": "base", "sft": "SFT", "bash": "BASH, parallel", "bash_autoregressive": "BASH, autoregressive", "rac": "RAC",
    "rac-dpo": "RAC, then DPO", "rac-cdpo": "RAC, then cDPO",
}  # fmt: skip


def recipe(script: str, config: str, out: Path, values: dict[str, Any]) -> dict:
    """One run with one thread; its summary."""
    out.mkdir(parents=True, exist_ok=True)
    flags = [word for name, value in values.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    with open(out / "log.txt", "a") as log:
        command = [sys.executable, script, "--config", config, "--output", str(out), *flags]
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    print(f"{out}: done", flush=True)
    return json.loads((out / "summary.json").read_text())


def learn(out: Path, seed: int, settings: dict[str, dict], test: str | None = None) -> dict:
    """Methods that learn from demonstrations, those in `settings`."""
    values: dict[str, Any] = {"evaluate.seed": seed, **({"test.source": test} if test else {})}
    for method in LEARNERS:
        if method not in settings:
            values[f"methods.{method}"] = None
        else:
            own = {"seed": seed, **settings[method]}
            values |= {f"methods.{method}.args.{name}": value for name, value in own.items()}
    return recipe("recipes/bash.py", "benchmarks/own_tokens.yaml", out, values)


def prefer(out: Path, seed: int, start: Path) -> dict:
    """DPO and cDPO on solutions sampled from the model in `start`."""
    values = {"model.path": str(start), "sample.seed": seed, "contrastive.args.seed": seed, "evaluate.seed": seed}
    values |= {"sample.max_new_tokens": 160, "evaluate.max_new_tokens": 160, "inspect.first_error": False}
    values |= {f"methods.{method}": None for method in ("sft", "tgdpo", "entropy", "rollout")}
    values |= {f"methods.{method}.args.seed": seed for method in ("dpo", "cdpo")}
    rates = json.loads(Path("benchmarks/results/tiny_methods.json").read_text())["learning rates"]
    values |= {f"methods.{method}.args.learning_rate": rates[method] for method in ("dpo", "cdpo")}
    return recipe("recipes/cdpo.py", "benchmarks/tiny_methods.yaml", out, values)


def choose(out: Path, pool: ThreadPoolExecutor) -> tuple[dict[str, dict], dict[str, dict[str, float]]]:
    """Best settings of each method on held-out problems, and what every setting tried reached."""
    held_out = out / "held-out.jsonl"
    write_records(held_out, read_records("data/tiny-arithmetic/train.jsonl")[-500:])
    jobs = {}
    for method, tried in GRID.items():
        for settings in [*tried, *CONTROLS.get(method, [])]:
            name = json.dumps(settings)
            folder = out / f"grid-{method}-{re.sub(r'[^0-9a-z.]+', '-', name)}"
            jobs[method, name] = settings, pool.submit(learn, folder, 0, {method: settings}, str(held_out))
    found: dict[str, dict[str, float]] = {method: {} for method in GRID}
    best: dict[str, tuple[float, dict]] = {}
    for (method, name), (settings, job) in jobs.items():
        found[method][name] = score = accuracy(job.result(), method)
        if settings in CONTROLS.get(method, []):
            continue
        best[method] = max(best.get(method, (-1.0, {})), (score, settings), key=lambda pair: pair[0])
    chosen = {method: settings for method, (_, settings) in best.items()}
    return chosen | {"bash_autoregressive": chosen["bash"]}, found


def accuracy(summary: dict, method: str) -> float:
    return 100 * summary["scores"][method]["pass@1"]["value"]


def steps(text: str) -> list[str]:
    return [step.strip() for step in text.split("####")[0].split(";")[:-1]]


def judge(completion: str, solution: str) -> list[bool]:
    """Per step of the one right solution, whether the model's step is right given the count that its own steps led to: the same
    event, the right decision, the right calculation from that count. Behind a step that is none, all are wrong."""
    mine, right = steps(completion), steps(solution)
    count, verdicts = None, []
    for number, wanted in enumerate(right):
        given = re.fullmatch(r"(\w+): (-?\d+)([+-])(-?\d+)=(-?\d+)", mine[number]) if number < len(mine) else None
        verb, left, operator, operand = re.fullmatch(r"(\w+): (\d+)([+-])(\d+)=\d+", wanted).groups()
        if given is None:
            return [*verdicts, *[False] * (len(right) - number)]
        start = int(left) if count is None else count
        operand = str(start) if verb == "doubles" else operand
        result = start + int(operand) if operator == "+" else start - int(operand)
        verdicts.append(given.groups() == (verb, str(start), operator, operand, str(result)))
        count = int(given.group(5))
    return verdicts


def accumulation(path: Path, cue: str = "\nAnswer:") -> dict[str, dict[str, list[int]]]:
    """Right steps and all steps by position, after only right steps and after an error."""
    found: dict[str, dict[str, list[int]]] = {"after right steps": {}, "after an error": {}}
    solutions = {row["id"]: row["solution"] for row in read_records("data/tiny-arithmetic/test.jsonl")}
    for row in read_records(path):  # behind the cue, where there is one: the correction
        verdicts = judge(row["completion"].rpartition(cue)[2], solutions[row["id"]])
        for number, right in enumerate(verdicts):
            before = "after right steps" if all(verdicts[:number]) else "after an error"
            cell = found[before].setdefault(str(number + 1), [0, 0])
            cell[0] += right
            cell[1] += 1
    return found


def pooled(curves: list[dict]) -> dict[str, dict[str, list[int]]]:
    whole: dict[str, dict[str, list[int]]] = {}
    for before, cells in (item for curve in curves for item in curve.items()):
        for number, (right, n) in cells.items():
            cell = whole.setdefault(before, {}).setdefault(number, [0, 0])
            cell[0] += right
            cell[1] += n
    return whole


def by_step(curves: list[dict]) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean share of right steps over seeds, and half of its 95 % interval, where every seed has at least 3 such steps."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for before, cells in curves[0].items():
        for number in cells:
            those = [curve.get(before, {}).get(number, [0, 0]) for curve in curves]
            if min(n for _, n in those) >= 3:
                found.setdefault(before, {})[number] = mean_and_half([100 * right / n for right, n in those])
    return found


def plot(curves: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "align"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.2), sharey=True)
    for axis, before in zip(axes, ("after right steps", "after an error"), strict=True):
        for shift, (method, curve) in enumerate(curves.items()):
            cells = sorted((int(number), *cell) for number, cell in curve.get(before, {}).items())
            places = [number + 0.06 * (shift - len(curves) / 2) for number, _, _ in cells]
            shares, halves = [mean for _, mean, _ in cells], [half for _, _, half in cells]
            axis.errorbar(places, shares, halves, label=TITLES[method], marker="o", markersize=3)
        axis.set(title=f"right steps {before}, %", xlabel="step")
        axis.set_xticks(range(1, 6))
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main(
    out: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs/own-tokens"),
    seeds: int = 5,
    jobs: Annotated[int, typer.Option(help="Runs at a time, one thread each.")] = 2,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where the numbers go.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Where the plot goes.")] = None,
) -> None:
    """Runs everything and prints the table."""

    def one(seed: int) -> dict[str, Any]:
        folder = out / f"seed-{seed}"
        summary = learn(folder, seed, best)
        values = {method: accuracy(summary, method) for method in ("base", *LEARNERS)}
        after = prefer(out / f"seed-{seed}-rac", seed, folder / "rac")
        values |= {f"rac-{method}": accuracy(after, method) for method in ("dpo", "cdpo")}
        curves = {m: accumulation(folder / "test" / f"{m}-verdicts.jsonl") for m in ("base", *LEARNERS)}
        corrections = correction_report(read_records(folder / "test" / "rac-verdicts.jsonl"), "\nAnswer:")
        return {"values": values, "curves": curves, "corrections": corrections}

    with ThreadPoolExecutor(jobs) as pool:
        best, grid = choose(out, pool)
        print(json.dumps({"best": best, "grid": grid}, indent=1), flush=True)
        runs = list(pool.map(one, range(1, seeds + 1)))
    values = {method: [run["values"][method] for run in runs] for method in TITLES}
    rows = []
    for method, numbers in values.items():
        mean, half = mean_and_half(numbers)
        settings = ", ".join(f"{k} {v}" for k, v in best.get(method, {}).items())
        rows.append({"method": TITLES[method], "accuracy, %": f"{mean:.1f} ± {half:.1f}", "settings": settings})
    print(markdown_table(rows))
    differences = {}
    for method, other in [(m, "sft") for m in TITLES if m not in ("base", "sft")] + [
        ("rac-dpo", "rac"),
        ("rac-cdpo", "rac"),
    ]:
        mean, half = mean_and_half([a - b for a, b in zip(values[method], values[other], strict=True)])
        differences[f"{method} - {other}"] = {"mean": mean, "half": half}
        print(f"{method} - {other}: {mean:+.1f} ± {half:.1f}")
    curves = {method: pooled([run["curves"][method] for run in runs]) for method in ("base", *LEARNERS)}
    shares = {method: by_step([run["curves"][method] for run in runs]) for method in ("base", *LEARNERS)}
    corrections = {key: fmean(run["corrections"][key] for run in runs) for key in runs[0]["corrections"]}
    print(json.dumps(curves), json.dumps(corrections), sep="\n")
    if plot_path:
        plot({method: shares[method] for method in ("base", "sft", "bash", "bash_autoregressive")}, plot_path)
    if json_path:
        hardware = f"{os.cpu_count()} CPU cores, {platform.machine()}"
        result = {
            "seeds": seeds,
            "hardware": hardware,
            "accuracy": values,
            "settings": best,
            "other settings": yaml.safe_load(Path("benchmarks/own_tokens.yaml").read_text())["methods"],
            "grid on held-out problems": grid,
        }
        result |= {
            "differences": differences,
            "right steps and all steps by position": curves,
            "share of right steps by position, mean and half of its interval": shares,
            "corrections": corrections,
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
