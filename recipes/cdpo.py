"""cDPO from problems to an evaluated model (Lin et al., ICML 2025, arXiv 2411.19943).

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/cdpo.py \
        --config recipes/configs/cdpo/tiny-arithmetic.yaml --output runs/tiny-arithmetic

Started again, it goes on where it stopped; stages that are complete for the same settings are skipped.
"""

import sys
from typing import Annotated

import typer

from align.errors import AlignError
from align.pipeline import CDPOChain, read_config
from align.processes import process_state
from align.report import markdown_table


def main(
    config: Annotated[str, typer.Option(help="YAML file; recipes/configs/cdpo has some.")],
    output: Annotated[str, typer.Option(help="Folder of the run.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
) -> None:
    """Samples, verifies, pairs, trains the contrastive models, scores, trains, evaluates, reports."""
    try:
        summary = CDPOChain(read_config(config, set_), output).run()
    except AlignError as error:
        sys.exit(f"align: {error}")
    if process_state().is_main_process:
        print("\n" + markdown_table(summary["table"]))
        if share := summary.get("lowest score is the first error"):
            print(
                f"\nlowest-scored token of a rejected solution is its true first error: {share['share']:.1%} of {share['n']}"
            )
        print(f"\ntokens coloured by score: {output}/pairs.html\nall numbers: {output}/summary.json")


if __name__ == "__main__":
    typer.run(main)
