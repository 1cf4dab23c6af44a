"""Reference-answer-based correction (RAC) beside SFT, from problems with solutions to an evaluated model (Cen et al., TMLR 2025,
arXiv 2410.14655).

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/rac.py \
        --config recipes/configs/rac/tiny-arithmetic.yaml --output runs/rac

Its result is what DPO or cDPO goes on from (the paper's best result):

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/cdpo.py \
        --config recipes/configs/cdpo/tiny-arithmetic.yaml --set model.path=runs/rac/rac --output runs/rac-cdpo \
        --set sample.max_new_tokens=160 --set evaluate.max_new_tokens=160 --set inspect.first_error=false

An adapter is merged before: `align merge runs/rac/merged --model BASE --adapter runs/rac/rac`.

Started again, it goes on where it stopped; stages that are complete for the same settings are skipped.
"""

from typing import Annotated

import typer

from align.errors import AlignError
from align.pipeline import run_recipe
from align.processes import leave


def main(
    config: Annotated[str, typer.Option(help="YAML file; recipes/configs/rac has some.")],
    output: Annotated[str, typer.Option(help="Folder of the run.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
) -> None:
    """Tokenizes the solutions, trains SFT and RAC, evaluates, reports."""
    try:
        run_recipe(config, output, set_)
    except AlignError as error:
        leave(error)


if __name__ == "__main__":
    typer.run(main)
