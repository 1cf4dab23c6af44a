"""Seconds from starting Python to `import align`, to `align --help` and to the help of every command.

    python benchmarks/imports.py --json benchmarks/results/imports.json

Each is a process of its own, all in turn, several rounds; a figure is the median. What Python itself takes is among them, and
the first row says how much.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from typer.main import get_command

from align.cli import app
from align.report import markdown_table


def commands(command=None, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command, groups included, without `align`."""
    command = get_command(app) if command is None else command
    children = getattr(command, "commands", {})
    return [path, *(found for name, child in children.items() for found in commands(child, (*path, name)))]


def seconds(words: list[str]) -> tuple[float, float]:
    """Wall time of one process, and what it took of a core: on a machine that does other things, the first is longer."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(
    rounds: Annotated[int, typer.Option(help="Processes per row.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write the result.")] = None,
) -> None:
    """Measures, prints a table, writes JSON."""
    rows = {"python": ["-c", ""], "import align": ["-c", "import align"]}
    rows |= {" ".join(("align", *path, "--help")): ["-m", "align", *path, "--help"] for path in commands()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, words in rows.items():
            found[name].append(seconds(words))
    table = []
    for name, times in found.items():
        wall, core = (median(values) for values in zip(*times, strict=True))
        table.append({"command": name, "seconds": round(wall, 3), "of a core": round(core, 3)})
    print(markdown_table(table))
    result = {
        "medians": table, "rounds": rounds, "machine": platform.machine(), "cores": os.cpu_count(),
        "load": os.getloadavg()[0], "python": platform.python_version(),
    }  # fmt: skip
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
