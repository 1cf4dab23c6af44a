"""Verdicts per second on given completions, of this checkout and, in turn, of another one.

    python benchmarks/verdicts.py solutions.jsonl --against ../an-earlier-checkout --json benchmarks/results/verdicts.json

Rows have `completion` and `answer`. They are repeated up to `--rows`, each time with other white space at the end, so that no
verdict is taken from an earlier one of the same text. Every figure is a process of its own; a checkout's figure is the median.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from align.report import markdown_table

MEASURE = """
import json, sys, time
from align.verify import verify_records
rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
made = [
    {"id": str(i), "prompt": "q", "answer": row["answer"], "sample": 0, "prompt_ids": [1], "completion_ids": [2],
     "completion": row["completion"] + " " * (i // len(rows)), "finish_reason": "stop"}
    for i in range(int(sys.argv[2])) for row in [rows[i % len(rows)]]
]
verify_records(made[:10])
start = time.perf_counter()
counts = verify_records(made)[1]
print(json.dumps({"rows_per_second": len(made) / (time.perf_counter() - start), "correct": counts["correct"]}))
"""


def main(
    completions: Annotated[Path, typer.Argument(help="JSONL of completion and answer.")],
    rows: Annotated[int, typer.Option(help="Verdicts per process.")] = 8000,
    rounds: Annotated[int, typer.Option(help="Processes per checkout, in turn.")] = 5,
    against: Annotated[Path | None, typer.Option(help="Another checkout of align.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write the result.")] = None,
) -> None:
    """Measures, prints a table, writes JSON."""
    checkouts = {"this": Path(__file__).parent.parent} | ({"other": against} if against else {})
    found: dict[str, list[dict]] = {name: [] for name in checkouts}
    for _ in range(rounds):
        for name, folder in checkouts.items():
            command = [sys.executable, "-c", MEASURE, str(completions.resolve()), str(rows)]
            environment = {**os.environ, "PYTHONPATH": str(folder.resolve())}
            result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=folder)
            found[name].append(json.loads(result.stdout.splitlines()[-1]))
    speeds = {name: median(each["rows_per_second"] for each in results) for name, results in found.items()}
    table = [
        {"checkout": name, "rows per second": round(speed), "correct": found[name][0]["correct"]}
        for name, speed in speeds.items()
    ]
    print(markdown_table(table))
    result = {
        "medians": table, "rows": rows, "rounds": rounds, "machine": platform.machine(), "cores": os.cpu_count(),
        "load": os.getloadavg()[0], "python": platform.python_version(),
    }  # fmt: skip
    if against:
        result["ratio"] = round(speeds["this"] / speeds["other"], 2)
        print(f"ratio {result['ratio']}")
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
