"""What tells a model or adapter apart from another, for manifests and caches."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ModelLoadError
from .hub import check_source, commit_of, source_of, split_revision

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .hub import Source

#: Bytes of a weight file that is still hashed whole; bytes of a strip of a tensor of a larger one, and how many there are.
WHOLE, STRIP, STRIPS = 1 << 26, 1 << 16, 3


def _ordered(adapter_config: bytes) -> bytes:
    """PEFT holds names of modules as a set, and writes them in another order in every process."""
    try:
        settings = json.loads(adapter_config)
        names = settings["target_modules"]
        return json.dumps(settings | {"target_modules": sorted(names) if isinstance(names, list) else names}).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        return adapter_config


def model_identity(path: str | Path, **source: Unpack[Source]) -> str:
    """What tells a model or adapter apart in a manifest: its hub name and commit, or a hash of its configuration, tokenizer
    and weights.

    Without a network and a copy in the cache, a hub name's commit is not known; then the revision stands for it. Files of up to 64 MiB are read whole. Of a larger one, every tensor is looked at: whole, or in strips from its
    beginning, middle and end.

    Raises:
        ConfigError: a folder is asked for a revision.
        ModelLoadError: a large weight file is no safetensors file.
    """
    source = source_of(source)
    check_source(path, source)
    folder = Path(path, source.get("subfolder", ""))
    if not os.path.isdir(path):
        return _hub_identity(str(path), source)
    digest = hashlib.sha256()
    kinds = ("*.safetensors", "*config.json", "tokenizer*.json", "*.jinja")
    for file in sorted(file for kind in kinds for file in folder.glob(kind)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as stream:
            if size <= WHOLE or file.suffix != ".safetensors":
                content = stream.read()
                digest.update(_ordered(content) if file.name == "adapter_config.json" else content)
                continue
            header = stream.read(min(size, int.from_bytes(stream.read(8), "little")))
            digest.update(header)
            start = stream.tell()
            try:
                places = {
                    name: tensor["data_offsets"]
                    for name, tensor in json.loads(header).items()
                    if name != "__metadata__"
                }
                if not all(0 <= low <= high <= size for low, high in places.values()):
                    raise ValueError("a tensor lies outside the file")
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise ModelLoadError(f"{file} is no safetensors file, or a part of one; fetch it again") from None
            for _, (low, high) in sorted(places.items()):
                last = max(low, high - STRIP)
                for place in sorted({low + (last - low) * i // (STRIPS - 1) for i in range(STRIPS)}):
                    stream.seek(start + place)
                    digest.update(stream.read(min(STRIP, high - place)))
    return digest.hexdigest()


def _hub_identity(path: str, source: dict) -> str:
    name, revision = split_revision(path)
    revision = revision or source.get("revision")
    version = commit_of(name, {**source, "revision": revision}) or revision
    parts = [name if version is None else f"{name}@{version}", source.get("subfolder")]
    return "/".join(part for part in parts if part)
