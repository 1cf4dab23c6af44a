"""Which checkpoint a training goes on from: the last one that was written to its end."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import Trainer, TrainingArguments

from ..damage import file_damage, missing_shard
from ..errors import ConfigError, RecordFileError
from ..processes import process_state, together

#: What the files begin with in which FSDP keeps the weights that it goes on from.
FSDP_WEIGHTS = "pytorch_model_fsdp"

#: What the folder begins with in which DeepSpeed keeps weights and optimizer.
DEEPSPEED_STATE = "global_step"


class ResumesAtTheEnd(Trainer):
    """Goes on from whole checkpoints of its own kind alone, and from one of the last step takes no further step, as the
    Trainer would; goes in front of a TRL trainer."""

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        if resume_from_checkpoint:
            given = resume_from_checkpoint
            checkpoint = _newest(Path(self.args.output_dir)) if given is True else Path(given)
            with together(self.accelerator.state):
                self._check_checkpoint(checkpoint)
        return super().train(
            resume_from_checkpoint=resume_from_checkpoint, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval
        )

    def _check_checkpoint(self, path: Path) -> None:
        """Raises an error where the Trainer would go on with a part of its state made afresh, or end within a library."""
        if not path.is_dir():
            raise RecordFileError(f"{path}: no such checkpoint; check resume_from_checkpoint, or leave it out to begin")
        damage = checkpoint_damage(path, self.args, self.args.world_size)
        if self.accelerator.scaler is not None and not (path / "scaler.pt").is_file():
            damage = damage or "scaler.pt, the state of fp16's loss scale, is missing"
        if damage and damage.startswith("rng_state") and damage.endswith("is missing"):
            print(f"align: {path}: {damage}; random numbers begin again, so that numbers will differ", file=sys.stderr)
        elif damage:
            raise RecordFileError(
                f"{path}: {damage}, so the training cannot go on from there; resume from a whole checkpoint, or begin again "
                "(with this one's weights as the model, if they are whole)"
            )
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            _check_adapter(path, isinstance(self.model, PeftModel))
        _check_kind(path, self.is_fsdp_enabled, self.is_deepspeed_enabled)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        self.control.should_training_stop = True


def last_whole_checkpoint(
    working: Path, args: TrainingArguments, *, fsdp: bool = False, deepspeed: bool = False
) -> str | None:
    """The newest checkpoint of `working` that is whole, the same in all processes; `None` where there is none.

    Newer ones are removed and named: the training will write them once more, and what an interrupted writing leaves must
    not mix with what was there before.

    Args:
        fsdp, deepspeed: whether this training is sharded by FSDP, or by DeepSpeed.

    Raises:
        ConfigError: the checkpoint is of a training that was sharded, and this one is not, or otherwise; or the other way round.
    """
    process = process_state()
    found: list[str | None] = [None]
    with together(process):
        if process.is_main_process:
            found = [_last_whole(working, args, process.num_processes)]
            if found[0] is not None:
                _check_kind(Path(found[0]), fsdp, deepspeed)
    if process.num_processes > 1:
        broadcast_object_list(found)
    return found[0]


def _newest(folder: Path) -> Path:
    found = _checkpoints(folder)
    if not found:
        raise RecordFileError(f"{folder}: there is no checkpoint in it; leave resume_from_checkpoint out to begin")
    return found[-1]


def _check_adapter(path: Path, adapted: bool) -> None:
    # Of the other kind's optimizer, torch says that a parameter group has another size.
    there = (path / "adapter_config.json").is_file()
    if there and not adapted:
        raise ConfigError(
            f"{path} is of a training of an adapter, and this one trains all weights; give peft_config, or another output folder"
        )
    if adapted and not there:
        raise ConfigError(
            f"{path} is of a training of all weights, and this one trains an adapter; leave peft_config out, or give another "
            "output folder"
        )


def check_processes(working: Path, before: int | None, now: int) -> None:
    """Raises a ConfigError where there are checkpoints of another number of processes: each of them would lack the random
    state of some process, and be skipped.

    Args:
        before: how many began the training; `None` where nothing says so.
    """
    if before not in (None, now) and (path := next(iter(_checkpoints(working)), None)):
        raise ConfigError(
            f"{path} is of a training in {before} process{'es' * (before != 1)}, and this one would go on in {now}, with other "
            f"batches; launch as many as before, or remove {working} to begin anew"
        )


def _checkpoints(working: Path) -> list[Path]:
    """By step."""
    found = (path for path in working.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal())
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _last_whole(working: Path, args: TrainingArguments, processes: int) -> str | None:
    for path in reversed(_checkpoints(working)):
        if (damage := checkpoint_damage(path, args, processes)) is None:
            return str(path)
        print(f"align: {path} is incomplete and skipped: {damage}", file=sys.stderr)
        shutil.rmtree(path)
    return None


def _check_kind(path: Path, fsdp: bool, deepspeed: bool) -> None:
    # The Trainer would begin with a fresh optimizer where it finds none of its own, without a word.
    for engine, here, pattern, config in (
        ("FSDP", fsdp, FSDP_WEIGHTS, "fsdp2.yaml"),
        ("DeepSpeed", deepspeed, DEEPSPEED_STATE, "zero3.yaml"),
    ):
        there = any(path.glob(f"{pattern}*"))
        if here and not there:
            raise ConfigError(
                f"{path} has no {pattern}, from which a training that {engine} shards could go on: it was written without "
                f"{engine}, or with save_only_model=True; launch without {engine}, or remove {path.parent} to begin anew"
            )
        if there and not here:
            raise ConfigError(
                f"{path} was written under {engine}, and this training is not sharded by it; launch with "
                f"recipes/accelerate/{config}, or remove {path.parent} to begin anew"
            )


def checkpoint_damage(path: Path, args: TrainingArguments, processes: int = 1) -> str | None:
    """What keeps a training from going on exactly from a checkpoint: the first file that is missing or cut off.

    Headers and directories of files are read, not their numbers, so that it takes no longer for a large model.

    Args:
        processes: how many took part; each keeps the state of its random numbers.
    """
    if damage := _missing(path, args, processes):
        return damage
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        if damage := file_damage(file):
            return f"{file.relative_to(path)} {damage}"
    state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    if not isinstance(state, dict) or not {"global_step", "max_steps"} <= state.keys():
        return "trainer_state.json does not say at which step it was written"
    return None


def _missing(path: Path, args: TrainingArguments, processes: int) -> str | None:
    if not (path / "trainer_state.json").is_file():  # the Trainer writes it last
        return "trainer_state.json is missing"
    # DeepSpeed and FSDP keep weights and optimizer in folders or files of their own.
    fsdp = any(path.glob(f"{FSDP_WEIGHTS}*"))
    engine = fsdp or any(path.glob(f"{DEEPSPEED_STATE}*"))
    if not engine and not any(path.glob("*.safetensors")):
        return "there are no weights: model.safetensors, or adapter_model.safetensors, is missing"
    if shard := missing_shard(path):
        return shard
    if (path / "adapter_model.safetensors").is_file() and not (path / "adapter_config.json").is_file():
        return "adapter_config.json is missing"
    needed = [] if engine else ["optimizer.pt", "scheduler.pt"]
    if (path / f"{FSDP_WEIGHTS}.bin").is_file():
        needed = ["optimizer.bin", "scheduler.pt"]
    elif fsdp:  # in pieces; the list of them is written last
        needed = [f"{FSDP_WEIGHTS}_0/.metadata", "optimizer_0/.metadata", "scheduler.pt"]
    if not args.save_on_each_node:  # otherwise those of other machines lie there
        needed += ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    gone = next((name for name in needed if not (path / name).is_file()), None)
    return None if gone is None else f"{gone} is missing" + " (save_only_model=True)" * args.save_only_model


def mean_loss(history: list[dict[str, Any]], otherwise: float) -> float:
    """The mean loss of a training from what was logged, by how many steps each entry speaks of."""
    logged = [entry for entry in history if "loss" in entry]
    steps = [entry["step"] - before for entry, before in zip(logged, [0, *(e["step"] for e in logged)], strict=False)]
    total = sum(steps)
    return sum(e["loss"] * n for e, n in zip(logged, steps, strict=True)) / total if total else otherwise
