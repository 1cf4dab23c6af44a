"""DPO on pair records, with the settings of a recipe's `methods.dpo`: the baseline of every token-weighted method.

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/dpo.py \
        --config recipes/configs/cdpo/tiny-arithmetic.yaml --data runs/tiny-arithmetic/pairs.jsonl --output runs/dpo
"""

from typing import Annotated

import typer

from align.config import read_config
from align.errors import AlignError
from align.processes import leave, process_state
from align.record_file import RecordFile
from align.trainers.training import train_preference


def main(
    config: Annotated[str, typer.Option(help="YAML file; recipes/configs/cdpo has some.")],
    data: Annotated[str, typer.Option(help="Pair records, e.g. what `align pair` wrote.")],
    output: Annotated[str, typer.Option(help="Folder of the trained adapter or model.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
) -> None:
    """Trains, and prints where the result is."""
    try:
        settings = read_config(config, set_)
        counts = train_preference(
            "dpo", settings.model, RecordFile(data, "pair"), output, **settings.methods.get("dpo", {})
        )
    except AlignError as error:
        leave(error)
    if process_state().is_main_process:
        print(f"{output}: {counts or 'was complete already'}")


if __name__ == "__main__":
    typer.run(main)
