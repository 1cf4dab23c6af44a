"""Batch-scheduled sampling (BASH) beside SFT, from problems with solutions to an evaluated model (Cen et al., TMLR 2025,
arXiv 2410.14655).

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/bash.py \
        --config recipes/configs/bash/tiny-arithmetic.yaml --output runs/bash

Started again, it goes on where it stopped; stages that are complete for the same settings are skipped.
"""

from typing import Annotated

import typer

from align.errors import AlignError
from align.pipeline import run_recipe
from align.processes import leave


def main(
    config: Annotated[str, typer.Option(help="YAML file; recipes/configs/bash has some.")],
    output: Annotated[str, typer.Option(help="Folder of the run.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
) -> None:
    """Tokenizes the solutions, trains SFT and BASH, evaluates, reports."""
    try:
        run_recipe(config, output, set_)
    except AlignError as error:
        leave(error)


if __name__ == "__main__":
    typer.run(main)
