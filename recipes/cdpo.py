"""cDPO from problems to an evaluated model (Lin et al., ICML 2025, arXiv 2411.19943).

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/cdpo.py \
        --config recipes/configs/cdpo/tiny-arithmetic.yaml --output runs/tiny-arithmetic

Started again, it goes on where it stopped; stages that are complete for the same settings are skipped.
"""

from typing import Annotated

import typer

from align.errors import AlignError
from align.pipeline import run_recipe
from align.processes import leave


def main(
    config: Annotated[str, typer.Option(help="YAML file; recipes/configs/cdpo has some.")],
    output: Annotated[str, typer.Option(help="Folder of the run.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
) -> None:
    """Samples, verifies, pairs, trains the contrastive models, scores, trains, evaluates, reports."""
    try:
        run_recipe(config, output, set_)
    except AlignError as error:
        leave(error)


if __name__ == "__main__":
    typer.run(main)
