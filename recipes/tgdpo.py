"""TGDPO from preference data, or from problems, to an evaluated model (Zhu et al., ICML 2025, arXiv 2506.14574).

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/tgdpo.py \
        --config recipes/configs/tgdpo/tiny-arithmetic.yaml --output runs/tgdpo-tiny-arithmetic

The guide is trained by DPO, unless the section `guide` names one: `--set guide.path=FOLDER_OR_HUB_NAME`.
Started again, it goes on where it stopped; stages that are complete for the same settings are skipped.
"""

from typing import Annotated

import typer

from align.errors import AlignError
from align.pipeline import run_recipe
from align.processes import leave


def main(
    config: Annotated[str, typer.Option(help="YAML file; recipes/configs/tgdpo has some.")],
    output: Annotated[str, typer.Option(help="Folder of the run.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
) -> None:
    """Makes pairs, trains the guide, scores its token rewards, trains DPO and TGDPO, evaluates, reports."""
    try:
        run_recipe(config, output, set_)
    except AlignError as error:
        leave(error)


if __name__ == "__main__":
    typer.run(main)
