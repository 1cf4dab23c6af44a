"""Reverse speculative decoding (Kim et al., 2025, arXiv 2509.22230), from problems to an evaluated student.

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/rsd.py \
        --config recipes/configs/rsd/tiny-arithmetic.yaml --output runs/rsd

Traces are drawn, verified, rejected, and selected by `align select`'s rules; the student learns from each choice by SFT, and from
the teacher's own samples beside them. The teacher is trained first, unless the section `teacher` names one:
`--set teacher.path=FOLDER_OR_HUB_NAME`. Started again, it goes on where it stopped.
"""

from typing import Annotated

import typer

from align.errors import AlignError
from align.pipeline import run_recipe
from align.processes import leave


def main(
    config: Annotated[str, typer.Option(help="YAML file; recipes/configs/rsd has some.")],
    output: Annotated[str, typer.Option(help="Folder of the run.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
) -> None:
    """Draws traces and the teacher's samples, selects, trains the student on each, evaluates, reports."""
    try:
        run_recipe(config, output, set_)
    except AlignError as error:
        leave(error)


if __name__ == "__main__":
    typer.run(main)
