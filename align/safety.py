"""What a model, tokenizer or adapter of someone else's may not do: unpickle, run code, name files outside its folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ModelLoadError, RecordFileError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Endings of files that are unpickled when they are loaded.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

#: Pickles beside weights that no loading looks at: a training's own settings and states.
_NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")

#: Which file holds which tensor, where weights are in several files.
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def pickle_message(path: str | Path) -> str:
    """What is wrong with a pickle, and the remedy."""
    return (
        f"{path}: a pickle, and to load one can run any code; convert it to safetensors where you trust its source "
        "(load it there and call save_pretrained), or take a model that has them"
    )


def plain_name(name: Any) -> bool:
    """Whether a value that was read is the name of a file in a folder, and leads nowhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def check_folder(path: str | Path) -> None:
    """Looks at a local folder before anything is loaded from it; hub names pass, `no_pickles` watches over them.

    Raises:
        ModelLoadError: its weights are pickles, its index names a pickle or a file elsewhere, or its configuration would
            fetch attention kernels.
    """
    folder = Path(path)
    if not os.path.isdir(folder):
        return
    files = sorted(file.name for file in folder.iterdir())
    weights = [name for name in files if name.endswith(PICKLES) and name not in _NOT_WEIGHTS]
    weights = [name for name in weights if not name.startswith("rng_state")]
    if weights and not any(name.endswith(".safetensors") for name in files):
        raise ModelLoadError(pickle_message(folder / weights[0]))
    for index in _INDEXES:
        _check_index(folder / index)
    for name in ("config.json", "adapter_config.json"):
        _check_config(folder / name)


def _check_index(index: Path) -> None:
    if not index.is_file():
        return
    found = _read(index)
    shards = found.get("weight_map", {})
    if not isinstance(shards, dict):
        raise ModelLoadError(f"{index}: weight_map {shards!r} must map tensors to files; fetch it again")
    for tensor, shard in shards.items():
        if not plain_name(shard):
            raise ModelLoadError(
                f"{index}: {tensor} shall be in {shard!r}, which is no file of this folder; fetch it again"
            )
        if index.name.startswith("model") and not shard.endswith(".safetensors"):
            raise ModelLoadError(f"{index}: {tensor} shall be in {shard!r}. {pickle_message(index.parent / shard)}")


def _check_config(file: Path) -> None:
    if not file.is_file():
        return
    config = _read(file)
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        if "/" in str(config.get(key, "")):
            raise ModelLoadError(f"{file}: {key} {config[key]!r} is code on the hub; remove it, or write sdpa")
    if config.get("megatron_config") is not None:  # PEFT then imports whatever module megatron_core names
        raise ModelLoadError(
            f"{file}: megatron_config makes PEFT import {config.get('megatron_core')!r}; remove it, LoRA on plain layers needs none"
        )


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{file}: not readable as JSON ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise ModelLoadError(f"{file}: an object is expected, not {type(found).__name__}; fetch it again")
    return found


@contextmanager
def no_pickles(*paths: Any, subfolder: str | None = None) -> Iterator[None]:
    """Lets `torch.load` refuse within the block, with the file's name; models are loaded in it.

    Asking transformers and PEFT for safetensors is not enough: PEFT takes `adapter_model.bin` where there is nothing else, and
    transformers follows an index to pickles.

    Args:
        paths: what is about to be loaded, see `check_folder`; what is no text is a model already, and passes.
        subfolder: where in them the files are.

    Raises:
        ModelLoadError: something was to be unpickled.
    """
    import torch

    for path in paths:
        if isinstance(path, (str, Path)):
            check_folder(Path(path, subfolder or ""))

    def refuse(file: Any, *_args: Any, **_kwargs: Any) -> Any:
        raise ModelLoadError(pickle_message(getattr(file, "name", file)))

    original, torch.load = torch.load, refuse
    try:
        yield
    finally:
        torch.load = original


def check_templates(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Names of chat templates become names of files where a tokenizer is saved.

    Raises:
        ModelLoadError: one would lie elsewhere.
    """
    if isinstance(tokenizer.chat_template, dict):
        for name in tokenizer.chat_template:
            if not plain_name(name):
                raise ModelLoadError(
                    f"{path}: chat template {name!r} has a name that leads out of a folder; rename it in tokenizer_config.json"
                )


def check_checkpoint(checkpoint: str | Path, folder: str | Path) -> None:
    """Looks at a training's checkpoint before it is resumed.

    Args:
        folder: where this training keeps its checkpoints.

    Raises:
        RecordFileError: it lies elsewhere (a link), or its state names a best checkpoint elsewhere, which would be loaded.
    """
    checkpoint, home = Path(checkpoint), Path(folder).resolve()
    best = _read(checkpoint / "trainer_state.json").get("best_model_checkpoint")
    for named in (checkpoint, best):
        if named is not None and Path(named).resolve().parent != home:
            raise RecordFileError(
                f"{checkpoint}: leads to {named}, outside {folder}; remove the checkpoint to train without it"
            )
