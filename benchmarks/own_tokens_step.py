"""What drawing own tokens adds to an SFT step, and how many tokens a second either way draws.

    python benchmarks/own_tokens_step.py --json benchmarks/results/own_tokens_step.json

SFT, BASH both ways and RAC train the same model on the same rows. Windows of `refresh_steps` updates take turns; a window's time is
from the moment that its first batches are asked for to the end of its last update: optimizer, logging and BASH's and RAC's refreshes
with the contexts that they write are in it, the setting up of a training is not. A figure is a median over windows. Tokens drawn
are counted from the contexts.
"""

import json
import os
import platform
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from dpo_step import LORA, MODELS, make_model
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from align import BASHConfig, BASHTrainer, RACConfig, RACTrainer
from align.report import markdown_table

KINDS = {
    "SFT": (SFTTrainer, SFTConfig, {}),
    "BASH, parallel": (BASHTrainer, BASHConfig, {"generation": "parallel"}),
    "BASH, autoregressive": (BASHTrainer, BASHConfig, {"generation": "autoregressive"}),
    "RAC": (RACTrainer, RACConfig, {}),
}


class Clock(TrainerCallback):
    """When a training's loop begins and its last update ends."""

    def __init__(self, device: str) -> None:
        self.device, self.start, self.end = device, 0.0, 0.0

    def _now(self) -> float:
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.start = self.start or self._now()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.end = self._now()


def tokens_drawn(trainer) -> int:
    """Own tokens in the last window: those that BASH placed, those that RAC generated."""
    records = getattr(trainer, "_records", [])
    if records and "generated_ids" in records[0]:
        return sum(len(row["generated_ids"]) for row in records)
    labelled = sum(label != -100 for row in records for label in row["labels"][1:])
    shares = [e["bash/own_tokens"] for e in trainer.state.log_history if "bash/own_tokens" in e]
    return round(labelled * shares[-1]) if shares else 0


def rows(count: int, prompt: tuple[int, int], completion: tuple[int, int], vocabulary: int) -> Dataset:
    draw = random.Random(0)
    made = []
    for _ in range(count):
        lengths = draw.randint(*prompt), draw.randint(*completion)
        ids = [draw.randrange(3, vocabulary) for _ in range(sum(lengths))]
        made.append({"input_ids": ids, "completion_mask": [0] * lengths[0] + [1] * lengths[1]})
    return Dataset.from_list(made)


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(MODELS)}.")] = None,
    trainer: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(KINDS)}; SFT is always there.")] = None,
    prompt: tuple[int, int] = (64, 192),
    completion: tuple[int, int] = (64, 192),
    batch: int = 4,
    refresh_steps: int = 16,
    epsilon: float = 0.25,
    windows: int = 5,
    device: str = "cpu",
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Times all of them and prints the table."""
    results = []
    kinds = {kind: KINDS[kind] for kind in dict.fromkeys(["SFT", *(trainer or KINDS)])}
    for name in model or ["small, V=400", "small, V=32k, LoRA"]:
        results += compare(name, prompt, completion, batch, refresh_steps, epsilon, windows, device, kinds)
    shown = [{k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()} for row in results]
    print(markdown_table(shown))
    if json_path:
        hardware = (
            torch.cuda.get_device_name() if device != "cpu" else f"{os.cpu_count()} CPU cores, {platform.machine()}"
        )
        settings = {
            "hardware": hardware, "rows per step": batch, "prompt tokens": prompt, "completion tokens": completion,
            "refresh_steps": refresh_steps, "epsilon": epsilon, "windows": windows,
        }  # fmt: skip
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(settings | {"results": results}, indent=2) + "\n")


def compare(
    name: str,
    prompt: tuple,
    completion: tuple,
    batch: int,
    refresh_steps: int,
    epsilon: float,
    windows: int,
    device: str,
    kinds: dict[str, tuple],
) -> list[dict[str, Any]]:
    """All of them on one model, a window at a time."""
    spec, tokenizer = MODELS[name], AutoTokenizer.from_pretrained("data/tiny-arithmetic/model")
    data = rows(batch * refresh_steps, prompt, completion, len(tokenizer))
    trainers = {}
    for kind, (cls, config, own) in kinds.items():
        if config is BASHConfig:
            own = own | {"epsilon": epsilon, "refresh_steps": refresh_steps}
        elif config is RACConfig:
            own = own | {"max_new_tokens": completion[1], "refresh_steps": refresh_steps}
        args = config(
            tempfile.mkdtemp(), per_device_train_batch_size=batch, max_steps=refresh_steps, bf16=device != "cpu",
            use_cpu=device == "cpu", report_to="none", save_strategy="no", disable_tqdm=True, completion_only_loss=True, logging_steps=refresh_steps,
            gradient_checkpointing=spec.get("checkpointing", False), max_length=None, learning_rate=1e-5, **own,
        )  # fmt: skip
        lora = LoraConfig(task_type="CAUSAL_LM", **LORA) if spec.get("lora") else None
        trainers[kind] = cls(
            make_model(spec, device, "sdpa"),
            args=args,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=lora,
        )
    seconds: dict[str, list[float]] = {kind: [] for kind in trainers}
    drawing: dict[str, list[float]] = {kind: [] for kind in trainers}
    for window in range(windows + 1):
        for kind, trainer in trainers.items():
            clock = Clock(device)
            trainer.add_callback(clock)
            trainer.train()
            trainer.remove_callback(clock)
            if window:
                seconds[kind].append((clock.end - clock.start) / refresh_steps)
                logged = [entry["refresh_seconds"] for entry in trainer.state.log_history if "refresh_seconds" in entry]
                drawing[kind] += logged
    results = []
    for kind, times in seconds.items():
        row = {
            "model": name,
            "trainer": kind,
            "seconds per step": median(times),
            "over SFT's": median(times) / median(seconds["SFT"]),
        }
        refresh = median(drawing[kind]) if drawing[kind] else 0.0
        drawn = tokens_drawn(trainers[kind])
        row |= {
            "refresh, seconds": refresh,
            "tokens drawn": drawn,
            "tokens drawn per second of refresh": drawn / refresh if refresh else 0.0,
        }
        results.append(row | {"all seconds": times})
    return results


if __name__ == "__main__":
    typer.run(main)
