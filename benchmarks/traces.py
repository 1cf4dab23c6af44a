"""A student after SFT on its teacher's samples, on RSD traces, and on those that each rule selects, over several seeds.

    python benchmarks/traces.py --out runs/traces --json benchmarks/results/traces.json --plot benchmarks/results/traces.svg

The recipe's embedded configuration, where the teacher writes half of its steps in a hand that the student was never taught. One
teacher for all; seeds decide traces, samples and the students' training. At the paper's threshold traces hardly differ; a second
one, far lower, leaves rules something to choose. Learning rates are the best of three on problems that are neither trained nor
tested on (seed 0), for the teacher's samples and for RSD traces each. Started again, it goes on where it stopped.
"""

import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from math import log
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from tiny_methods import mean_and_half

from align.records import read_records, write_records
from align.report import markdown_table

CONFIG = "recipes/configs/rsd/tiny-arithmetic.yaml"
RATES = [1e-4, 3e-4, 1e-3]
RULES = ("rsd_rsr", "rsd_aslec_drop", "rsd_aslec_casl", "rsd_mean_logp")
LOW = 1e-5
TITLES = {
    "base": "base", "teacher_samples": "the teacher's samples", "rsd": "RSD traces, the shortest", "rsd_rsr": "RSD traces, RSR",
    "rsd_aslec_drop": "RSD traces, ASLEC-DROP", "rsd_aslec_casl": "RSD traces, ASLEC-CASL", "rsd_mean_logp": "RSD traces, mean log-probability",
}  # fmt: skip
ALL = [name for name in TITLES if name != "base"]


def recipe(out: Path, values: dict[str, Any]) -> dict:
    """One run with one thread; its summary."""
    out.mkdir(parents=True, exist_ok=True)
    flags = [word for name, value in values.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    with open(out / "log.txt", "a") as log_file:
        command = [sys.executable, "recipes/rsd.py", "--config", CONFIG, "--output", str(out), *flags]
        subprocess.run(command, check=True, stdout=log_file, stderr=log_file, env=environment)
    print(f"{out}: done", flush=True)
    return json.loads((out / "summary.json").read_text())


def run(
    out: Path, seed: int, rates: dict[str, float], teacher: str | None, threshold: float = 0.01, **more: Any
) -> dict[str, Any]:
    values: dict[str, Any] = {
        "trace.seed": seed,
        "evaluate.seed": seed,
        "trace.threshold": threshold,
        "train.limit": 500,
        "test.limit": 500,
        **more,
    }
    if teacher:
        values |= {"teacher": {"path": teacher, "dtype": "float32"}}
    for method in ALL:
        if method in rates:
            values |= {f"methods.{method}.args.seed": seed, f"methods.{method}.args.learning_rate": rates[method]}
        else:
            values[f"methods.{method}"] = None
    return recipe(out, values)


def accuracy(summary: dict, method: str) -> float:
    return 100 * summary["scores"][method]["pass@1"]["value"]


def surprisal(out: Path) -> dict[str, list[float]]:
    """Natural logarithms of the student's probability of every token of what is trained on."""
    from align.logps import token_logps
    from align.models import load_model

    student, found = load_model("data/tiny-arithmetic/model", dtype="float32"), {}
    for name, file in (("the teacher's samples", "teacher-kept.jsonl"), ("RSD traces", "traces-kept.jsonl")):
        rows = [(row["prompt_ids"], row["completion_ids"]) for row in read_records(out / file)]
        found[name] = [value for row in token_logps(student, rows, pad_token_id=0) for value in row]
    return found


def plot(values: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "align"
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    edges = [k / 4 for k in range(-40, 1)]
    for name, logps in values.items():
        shown = [max(edges[0], logp / log(10)) for logp in logps]
        axis.hist(shown, edges, histtype="step", label=name, weights=[100 / len(logps)] * len(logps))
    axis.axvline(-2, color="grey", linestyle=":", linewidth=1)
    axis.set(yscale="log", xlabel="log10 of the token's probability under the student", ylabel="% of tokens")
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main(
    out: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs/traces"),
    seeds: int = 5,
    jobs: Annotated[int, typer.Option(help="Runs at a time, one thread each.")] = 2,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where the numbers go.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Where the plot goes.")] = None,
) -> None:
    """Runs everything and prints the table."""
    out.mkdir(parents=True, exist_ok=True)
    held_out = out / "held-out.jsonl"
    write_records(held_out, read_records("data/tiny-arithmetic/train.jsonl")[-500:])
    tried = ("teacher_samples", "rsd")
    # Held-out problems are the teacher's, too; the student never sees them.
    common = {"test.source": str(held_out)}
    grid = {tried[0]: {}, tried[1]: {}}
    first = run(out / "grid-0", 0, dict.fromkeys(tried, RATES[0]), None, **common)
    teacher = str(out / "grid-0" / "teacher")
    with ThreadPoolExecutor(jobs) as pool:
        others = pool.map(
            lambda i: run(out / f"grid-{i}", 0, dict.fromkeys(tried, RATES[i]), teacher, **common), range(1, len(RATES))
        )
        for rate, summary in zip(RATES, [first, *others], strict=True):
            for method in tried:
                grid[method][f"{rate:g}"] = accuracy(summary, method)
        best = {method: float(max(those, key=those.get)) for method, those in grid.items()}
        print(json.dumps({"best": best, "grid": grid}), flush=True)
        rates = dict.fromkeys(ALL, best["rsd"]) | {"teacher_samples": best["teacher_samples"]}
        # At the paper's threshold the traces of a problem are the same but for rare ones: nothing to choose among.
        at_paper = {method: rates[method] for method in tried}
        lower = {method: rate for method, rate in rates.items() if method != "teacher_samples"}
        numbers = range(1, seeds + 1)
        high = list(pool.map(lambda seed: run(out / f"seed-{seed}", seed, at_paper, teacher), numbers))
        low = list(pool.map(lambda seed: run(out / f"seed-{seed}-low", seed, lower, teacher, LOW), numbers))
    values = {method: [accuracy(s, method) for s in high] for method in ("base", *tried)}
    values |= {f"{method}, low": [accuracy(s, method) for s in low] for method in lower}
    rows = []
    for method, those in values.items():
        mean, half = mean_and_half(those)
        name, _, is_low = method.partition(", ")
        threshold = "" if name in ("base", "teacher_samples") else f"{LOW:g}" if is_low else "0.01"
        rows.append({"student trained on": TITLES[name], "τ": threshold, "accuracy, %": f"{mean:.1f} ± {half:.1f}"})
    print(markdown_table(rows))
    pairs = [("rsd", "teacher_samples"), ("rsd", "rsd, low"), *((f"{r}, low", "rsd, low") for r in RULES)]
    differences = {}
    for one, other in pairs:
        mean, half = mean_and_half([a - b for a, b in zip(values[one], values[other], strict=True)])
        differences[f"{one} - {other}"] = {"mean": mean, "half": half}
        print(f"{one} - {other}: {mean:+.1f} ± {half:.1f}")
    counted = {}
    for name, runs, suffix in (("0.01", high, ""), (f"{LOW:g}", low, "-low")):
        traces = [s["counts"]["trace"] for s in runs]
        counted[name] = {
            key: fmean(t[key] for t in traces)
            for key in ("rows", "correct", "acceptance", "teacher_share", "kept", "prefix_only")
        }
        counted[name]["problems with traces that differ"] = fmean(
            differ(out / f"seed-{seed}{suffix}/traces.jsonl") for seed in range(1, seeds + 1)
        )
    samples = [s["counts"]["teacher samples"] for s in high]
    counted["teacher samples"] = {
        key: fmean(s[key] for s in samples) for key in ("rows", "wrong", "kept", "prefix_only")
    }
    print(json.dumps(counted))
    logps = surprisal(out / "seed-1")
    under = {name: fmean(v < log(0.01) for v in those) for name, those in logps.items()}
    print(json.dumps(under))
    if plot_path:
        plot(logps, plot_path)
    if json_path:
        result = {
            "seeds": seeds, "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}", "accuracy": values,
            "learning rates": best, "grid on held-out problems": grid, "differences": differences, "counts": counted,
            "share of tokens under 0.01": under,
        }  # fmt: skip
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=2) + "\n")


def differ(path: Path) -> float:
    """Share of problems whose right traces are not all the same."""
    texts: dict[str, set] = {}
    for row in read_records(path):
        if row["correct"]:
            texts.setdefault(row["id"], set()).add(row["completion"])
    return fmean(len(those) > 1 for those in texts.values())


if __name__ == "__main__":
    typer.run(main)
