"""Which file of a model's folder, or of a checkpoint, is missing or cut off. Headers are read, not weights."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import AlignError, ModelLoadError

#: Files of which one holds a tokenizer's vocabulary.
VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "vocab.model",
)  # fmt: skip


def file_damage(file: Path) -> str | None:
    """Whether a file is cut off or damaged, as far as its header, or the directory at its end, tells."""
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):  # compares the file's size with its header
                pass
        elif file.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(file):  # its directory stands at its end
                pass
        elif file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
    except (SafetensorError, zipfile.BadZipFile, ValueError, OSError, RecursionError):
        return f"({file.stat().st_size} bytes) is cut off or damaged"
    return None


def missing_shard(folder: Path) -> str | None:
    """The first weight file that an index names and that is not there, or the index that is not readable."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            shards = {Path(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
            return f"{index.name} is cut off or damaged"
        if gone := sorted(shard for shard in shards if not (folder / shard).is_file()):
            return f"{gone[0]} is missing"
    return None


def folder_damage(path: str | os.PathLike, what: str) -> str | None:
    """The first file of a local `model`, `adapter` or `tokenizer` that is missing or damaged; `None` where none is, or for a hub name."""
    folder = Path(path)
    if not os.path.isdir(folder):
        return None
    if what == "tokenizer":
        files = [*folder.glob("tokenizer*.json"), folder / "special_tokens_map.json", folder / "config.json"]
        there = any((folder / name).is_file() for name in VOCABULARIES)
        missing = None if there else "tokenizer.json is missing"
    elif what == "adapter":
        needed = ("adapter_config.json", "adapter_model.safetensors")
        files = [folder / name for name in needed]
        missing = next((f"{name} is missing" for name in needed if not (folder / name).is_file()), None)
    else:
        files = [folder / "config.json", folder / "generation_config.json", *folder.glob("*.safetensors")]
        missing = _missing_of_model(folder)
    damaged = ((file, file_damage(file)) for file in sorted(files) if file.is_file())
    return missing or next((f"{file.name} {damage}" for file, damage in damaged if damage), None)


@contextmanager
def whole_folders(*models: Any) -> Iterator[None]:
    """Makes a ModelLoadError of a library's error where the folder of a model, given by its name, is not whole."""
    try:
        yield
    except AlignError:
        raise
    except Exception as error:  # noqa: BLE001 - of a damaged file, libraries raise nearly everything
        for path in (model for model in models if isinstance(model, str)):
            adapter = os.path.isfile(Path(path, "adapter_config.json"))
            for what in ("adapter",) if adapter else ("model", "tokenizer"):
                if damage := folder_damage(path, what):
                    raise ModelLoadError(f"{path}: {damage}; fetch or save it again") from error
        raise


def _missing_of_model(folder: Path) -> str | None:
    if not (folder / "config.json").is_file():
        return "config.json is missing"
    if shard := missing_shard(folder):
        return shard
    indexed = any(folder.glob("*.safetensors.index.json"))
    if not indexed and not (folder / "model.safetensors").is_file():
        parts = any(folder.glob("model-*.safetensors"))
        return f"model.safetensors{'.index.json' if parts else ''} is missing"
    return None
