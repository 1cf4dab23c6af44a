"""Training stages: records in, an adapter or a model out, as one call that a recipe or a notebook makes."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from trl import SFTTrainer

from ..atomic import failed_write, sync, write_error
from ..checks import fitted
from ..errors import AlignError, ConfigError, MissingColumnError, RecordError, RecordFileError
from ..hub import loading_options, source_of
from ..identity import model_identity
from ..locks import locked, remove_temporaries
from ..models import base_fingerprint, load_model, load_tokenizer, vocab_size, write_base_file
from ..positions import check_positions, position_limit
from ..processes import process_state, together
from ..record_file import Derived
from ..records import PAIR_WEIGHT, Record, check_records, row_name
from ..safety import check_checkpoint
from ..stages import is_complete, manifest_path, read_manifest, records_hash, say_discarded, write_manifest
from ..tokens import check_row_ids
from .cdpo import CDPOTrainer
from .checkpoints import check_processes, last_whole_checkpoint, mean_loss
from .preflight import FILE as PREFLIGHT
from .row_data import dataset_on_disk
from .self_generated import BASHConfig, BASHTrainer, RACConfig, RACTrainer
from .sft import GuardedSFTConfig, GuardedSFTTrainer
from .tgdpo import TGDPOTrainer
from .token_dpo import TokenDPOTrainer
from .trackers import check_trackers, move_events, run_of_its_own

#: Preference methods by the name a configuration gives them. DPO is the token trainer with all weights 1, whatever weights
#: the pairs carry.
PREFERENCE_TRAINERS = {
    "dpo": TokenDPOTrainer,
    "token_dpo": TokenDPOTrainer,
    "cdpo": CDPOTrainer,
    "tgdpo": TGDPOTrainer,
}

#: Methods that train on demonstrations, by the name a configuration gives them.
SFT_TRAINERS = {
    "sft": (GuardedSFTConfig, GuardedSFTTrainer),
    "bash": (BASHConfig, BASHTrainer),
    "rac": (RACConfig, RACTrainer),
}

#: What a pair carries for TokenDPO and its subclasses, besides ids.
_READ = ("prompt_ids", "chosen_ids", "rejected_ids", "id", PAIR_WEIGHT)


#: Where a training keeps its rows while it runs.
ROWS_FILE = "rows.arrow"


def _sft_row(row: Record) -> Record:
    return {
        "input_ids": [*row["prompt_ids"], *row["completion_ids"]],
        "completion_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["completion_ids"]),
    }


def _arguments(cls: type, args: Mapping[str, Any], out_dir: Path, where: str = "args") -> Any:
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    if unknown := sorted(set(args) - known):
        raise ConfigError(f"{where}: {', '.join(unknown)}: no field of {cls.__name__}; correct the name or remove it")
    if "output_dir" in args:
        raise ConfigError(f"{where}: output_dir is the folder that the training is given; leave it out")
    args = fitted(cls, args, where)
    if process_state().device.type == "cpu":
        args = {"use_cpu": True, "dataloader_pin_memory": False, **args}
    check_trackers(args.get("report_to", "none"))
    return _made(cls, {"output_dir": str(out_dir), "report_to": "none", **args}, where)


def _lora(
    lora: Mapping[str, Any] | None, where: str = "lora", model: Mapping[str, Any] | None = None
) -> LoraConfig | None:
    """PEFT's settings; the base's revision is among them, because what loads an adapter takes the base of that revision."""
    if lora is None:
        return None
    known = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
    if unknown := sorted(set(lora) - known):
        raise ConfigError(f"{where}: {', '.join(unknown)}: no field of LoraConfig; correct the name or remove it")
    if lora.get("task_type", "CAUSAL_LM") != "CAUSAL_LM":
        raise ConfigError(f"{where}: task_type = {lora['task_type']!r} must be 'CAUSAL_LM'; leave it out")
    # PEFT declares lora_alpha as a whole number, and takes any.
    checked = {key: value for key, value in lora.items() if key != "lora_alpha" or type(value) is not float}
    base = {"task_type": "CAUSAL_LM", "revision": (model or {}).get("revision")}
    return _made(LoraConfig, {**base, **lora, **fitted(LoraConfig, checked, where)}, where)


def _made(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """A library's configuration, whose refusal becomes a ConfigError."""
    try:
        return cls(**values)
    except (TypeError, ValueError, ImportError) as error:
        if isinstance(error, ConfigError):
            raise ConfigError(f"{where}: {str(error).removeprefix(f'{cls.__name__}: ')}") from None
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error


def check_training(
    method: str,
    out_dir: str | os.PathLike,
    args: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
    section: str = "",
) -> None:
    """Raises a ConfigError where a training could not begin with these settings: see `train_sft`, `train_preference`.

    Args:
        section: of a recipe that they are in, for messages.
    """
    cls = SFT_TRAINERS[method][0] if method in SFT_TRAINERS else PREFERENCE_TRAINERS[method].config_class
    for name, values in (("args", args), ("lora", lora)):
        if not isinstance(values, (Mapping, type(None))):
            raise ConfigError(
                f"{section or method}.{name} = {values!r} must be a mapping of names to values; correct it"
            )
    _arguments(cls, args or {}, Path(out_dir), f"{section or method}.args")
    _lora(lora, f"{section or method}.lora")


def check_trainable(model: Mapping[str, Any], lora: Mapping[str, Any] | None) -> None:
    """Raises a ConfigError where a model's weights shall be trained as they are, but are quantized."""
    if lora is None and model.get("quantization") is not None:
        raise ConfigError(
            f"weights in {model['quantization']} cannot be trained; give lora, or leave quantization out of the model"
        )


def train_sft(
    model: Mapping[str, Any],
    demonstrations: Sequence[Record],
    out_dir: str | os.PathLike,
    *,
    args: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
    method: str = "sft",
) -> dict[str, Any]:
    """Supervised fine-tuning on demonstration records; the loss is on completions alone.

    Args:
        model: arguments of `align.load_model`, `path` among them; without `lora` its weights are held in float32, whatever
            its `dtype`, and `bf16=True` computes in bfloat16.
        demonstrations: a list or a `RecordFile` of records with `prompt_ids` and `completion_ids`; nothing is tokenized again.
        out_dir: where the adapter (or, without `lora`, the model) and its tokenizer are saved.
        args: fields of `trl.SFTConfig`, `BASHConfig` or `RACConfig`, and `preflight`.
        lora: fields of `peft.LoraConfig`; `None` trains all weights.
        method: `sft`, TRL's `SFTTrainer`; `bash` or `rac`, on the model's own tokens.

    Returns:
        `steps`, `train_loss`, `train_runtime` in seconds since the last start, `rows` that were trained on,
        and those that were dropped: `prompt_fills_max_length`, and where there are any `equal` and
        `equal_after_truncation`; empty where the output was complete already, whose manifest has them.

    Raises:
        ConfigError: an unknown field, or `out_dir` holds something else.
        RecordError, MissingColumnError: a row that cannot be trained on, or no row at all.
    """
    if method not in SFT_TRAINERS:
        raise ConfigError(f"method {method!r} is unknown; there are {', '.join(SFT_TRAINERS)}")
    config_class, trainer_class = SFT_TRAINERS[method]
    config = _arguments(config_class, {"completion_only_loss": True, **(args or {})}, Path(out_dir))
    check_records(demonstrations, "demonstration", source="demonstrations")
    kept = array(
        "q",
        (
            index
            for index, row in enumerate(demonstrations)
            if config.max_length is None
            or config.truncation_mode == "keep_end"
            or len(row["prompt_ids"]) < config.max_length
        ),
    )
    rows = Derived(demonstrations, _sft_row, kept)
    dropped = len(demonstrations) - len(rows)
    if not rows:
        raise RecordError(
            f"the prompts of all {dropped} demonstrations fill max_length = {config.max_length}; raise it"
            if dropped
            else "there are no demonstrations to train on"
        )

    def build(base, tokenizer, directory: Path) -> SFTTrainer:
        limit = position_limit(base)
        for index, row in enumerate(demonstrations):
            check_row_ids(row, index, ("prompt_ids", "completion_ids"), vocab_size(base))
            tokens = min(len(row["prompt_ids"]) + len(row["completion_ids"]), config.max_length or 2**63)
            name = f"demonstrations, {row_name(row, index)}: prompt and completion"
            check_positions(tokens, limit, name, f"set max_length to {limit} or less")
        own = _arguments(config_class, {"completion_only_loss": True, **(args or {})}, directory)
        return trainer_class(
            base,
            args=own,
            train_dataset=dataset_on_disk(rows, directory / ROWS_FILE, own.disable_tqdm),
            processing_class=tokenizer,
            peft_config=_lora(lora, model=model),
        )

    return _train(method, model, rows, out_dir, build, {"args": dict(args or {}), "lora": lora}, dropped)


def train_preference(
    method: str,
    model: Mapping[str, Any],
    pairs: Sequence[Record],
    out_dir: str | os.PathLike,
    *,
    args: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Preference training on pair records with ids and token-level columns.

    Args:
        method: a key of `PREFERENCE_TRAINERS`.
        pairs: a list, or a `RecordFile`, which is gone through row by row; the trainer's data set lies on disk.
        args: fields of the method's configuration.
        model, out_dir, lora: see `train_sft`.

    Returns:
        See `train_sft`.

    Raises:
        ConfigError: an unknown method or field.
        RecordError, MissingColumnError: a row the trainer cannot use.
    """
    if method not in PREFERENCE_TRAINERS:
        raise ConfigError(f"method {method!r} is unknown; there are {', '.join(PREFERENCE_TRAINERS)}")
    cls = PREFERENCE_TRAINERS[method]
    check_training(method, out_dir, args, lora)
    if not pairs:
        raise RecordError("there are no pairs to train on")
    weighing = () if method == "dpo" else cls.token_columns
    columns = [f"{side}_{column}" for side in ("chosen", "rejected") for column in (*weighing, "ref_logps")]
    if method == "token_dpo" and not any(f"{side}_weights" in pairs[0] for side in ("chosen", "rejected")):
        raise MissingColumnError("token_dpo trains with chosen_weights or rejected_weights, and the pairs have neither")
    rows = Derived(pairs, lambda pair: {key: pair[key] for key in (*_READ, *columns) if key in pair})

    def build(base, tokenizer, directory: Path) -> TokenDPOTrainer:
        config = _arguments(cls.config_class, args or {}, directory)
        return cls(
            base,
            args=config,
            train_dataset=dataset_on_disk(rows, directory / ROWS_FILE, config.disable_tqdm),
            processing_class=tokenizer,
            peft_config=_lora(lora, model=model),
        )

    return _train(method, model, rows, out_dir, build, {"args": dict(args or {}), "lora": lora})


def _train(
    method: str,
    model: Mapping[str, Any],
    rows: Sequence[Record],
    out_dir,
    build,
    settings: dict[str, Any],
    dropped: int = 0,
) -> dict[str, Any]:
    """Trains in `<out_dir>.training`, resuming from its last checkpoint, and moves the result to `out_dir`; `dropped` rows
    fill the length with their prompts, besides those that the trainer itself drops."""
    out_dir, process = Path(out_dir), process_state()
    check_trainable(model, settings["lora"])
    of_model = {**loading_options(model), "path": model_identity(model["path"], **source_of(model))}
    settings = {**settings, "model": of_model, "data": records_hash(rows)}
    working = out_dir.with_name(out_dir.name + ".training")
    marker = working.with_name(working.name + ".settings")
    if is_complete(out_dir, method, settings):
        if process.is_main_process and marker.exists():  # killed between the manifest and this
            with locked(out_dir):
                _clear(working, marker)
        return {}
    with locked(out_dir), _naming(working):
        return _train_alone(method, model, rows, out_dir, build, settings, working, marker, dropped)


def _train_alone(
    method: str, model: Mapping[str, Any], rows: list[dict], out_dir: Path, build, settings: dict[str, Any],
    working: Path, marker: Path, dropped: int,
) -> dict[str, Any]:  # fmt: skip
    """`_train`, while no other process works on `out_dir`."""
    process = process_state()
    ours = read_manifest(out_dir) or read_manifest(marker)  # the marker stays until the manifest is written
    if out_dir.exists() and ours is None and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ConfigError(
            f"{out_dir} exists and is no output of a training; give another folder, or remove it yourself"
        )
    if out_dir.is_symlink():  # a result is moved to its place by its name
        raise ConfigError(f"{out_dir} is a link; give the folder that it leads to")
    with together(process):
        if process.is_main_process:
            _open(working, marker, method, settings, process.num_processes)
    # Weights that are trained are kept in float32, as TRL does: in bfloat16 an update of a small learning rate is rounded away.
    base = load_model(**(model if settings["lora"] is not None else {**model, "dtype": "float32"}))
    tokenizer = load_tokenizer(model["path"], **source_of(model))
    fingerprint = base_fingerprint(base)
    try:
        trainer = build(base, tokenizer, working)
    except (TypeError, ValueError) as error:  # what TRL's trainers make of settings that contradict each other
        if isinstance(error, AlignError):
            raise
        raise ConfigError(f"{method}: the trainer cannot begin: {' '.join(str(error).split())}") from error
    checkpoint = last_whole_checkpoint(
        working, trainer.args, fsdp=trainer.is_fsdp_enabled, deepspeed=trainer.is_deepspeed_enabled
    )
    if checkpoint is not None:
        check_checkpoint(checkpoint, working)
    with run_of_its_own(trainer.args.report_to):
        result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(working / "final"))
    by_trainer = {
        reason: n
        for reason, n in trainer.data_report.get("train", {}).items()
        if n and reason not in ("rows", "truncated")
    }
    counts = {
        "steps": result.global_step,
        "rows": len(rows) - sum(by_trainer.values()),
        **by_trainer,
        "prompt_fills_max_length": dropped + by_trainer.get("prompt_fills_max_length", 0),
        **{k: result.metrics[k] for k in ("train_loss", "train_runtime")},
    }
    if checkpoint is not None:  # the Trainer's own is that of the steps since then
        counts["train_loss"] = mean_loss(trainer.state.log_history, counts["train_loss"])
    if process.is_main_process:
        tokenizer.save_pretrained(working / "final")
        if (working / "contexts").is_dir():
            shutil.move(working / "contexts", working / "final" / "contexts")
        if (working / PREFLIGHT).is_file():
            shutil.copy(working / PREFLIGHT, working / "final")
        move_events(working, working / "final")
        if settings["lora"] is not None:
            write_base_file(working / "final", trainer.model, fingerprint)
        trainer.create_model_card(model_name=out_dir.name)
        shutil.move(working / "README.md", working / "final" / "README.md")
        trainer.state.save_to_json(str(working / "final" / "trainer_state.json"))
        manifest_path(out_dir).unlink(missing_ok=True)  # it speaks of what is about to be replaced
        sync(working / "final")
        shutil.rmtree(out_dir, ignore_errors=True)
        # Before the folder is there, or a death between the two would cost contexts that are no longer in `working`.
        write_manifest(out_dir, method, settings, counts, written=working / "final")
        os.replace(working / "final", out_dir)
        _clear(working, marker)
    process.wait_for_everyone()
    del trainer, base
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return counts


def _open(working: Path, marker: Path, method: str, settings: dict[str, Any], processes: int) -> None:
    """Keeps what an earlier run with the same settings left to go on from, and removes any other's."""
    remove_temporaries(marker)
    known, before = read_manifest(marker) or {}, None
    if is_complete(marker, method, settings):
        before = known["counts"].get("processes")
        check_processes(working, before, processes)
    elif working.exists():  # checkpoints of other settings must not be resumed
        others = known.get("settings")
        others = {"method": known.get("stage"), **others} if isinstance(others, dict) else None
        say_discarded(working, others, {"method": method, **settings})
        shutil.rmtree(working, ignore_errors=True)
    if before != processes:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        write_manifest(marker, method, settings, {"processes": processes})
    _tidy(working)


def _tidy(working: Path) -> None:
    """Takes back what a run left that was killed while it wrote, or while it put its result together."""
    for file in working.rglob(".*.tmp"):
        file.unlink()
    final = working / "final"
    if (final / "contexts").is_dir():
        os.replace(final / "contexts", working / "contexts")
    move_events(final, working)
    if final.exists():
        shutil.rmtree(final)


def _clear(working: Path, marker: Path) -> None:
    """Removes what a training needs only while it runs; the marker last, since it says that the rest is ours."""
    if working.exists():
        shutil.rmtree(working)
    manifest_path(marker).unlink(missing_ok=True)
    marker.unlink(missing_ok=True)


@contextmanager
def _naming(working: Path) -> Iterator[None]:
    """Makes a RecordFileError of a write that the system refuses to the Trainer, or to what it saves with."""
    try:
        yield
    except AlignError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if not failed_write(error):
            raise
        raise RecordFileError(
            f"{write_error(working, error)}; the training goes on from its last whole checkpoint"
        ) from error
