"""Supervised fine-tuning on demonstration records, with the settings of a recipe's `methods.sft`.

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/sft.py \
        --config recipes/configs/cdpo/tiny-arithmetic.yaml --data runs/tiny-arithmetic/positive.jsonl --output runs/sft
"""

from typing import Annotated

import typer

from align.config import read_config
from align.errors import AlignError
from align.processes import leave, process_state
from align.record_file import RecordFile
from align.trainers.training import train_sft


def main(
    config: Annotated[str, typer.Option(help="YAML file; recipes/configs/cdpo has some.")],
    data: Annotated[str, typer.Option(help="Demonstration records, e.g. what `align pair --positive` wrote.")],
    output: Annotated[str, typer.Option(help="Folder of the trained adapter or model.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
) -> None:
    """Trains, and prints where the result is."""
    try:
        settings = read_config(config, set_)
        counts = train_sft(settings.model, RecordFile(data, "demonstration"), output, **settings.methods.get("sft", {}))
    except AlignError as error:
        leave(error)
    if process_state().is_main_process:
        print(f"{output}: {counts or 'was complete already'}")


if __name__ == "__main__":
    typer.run(main)
