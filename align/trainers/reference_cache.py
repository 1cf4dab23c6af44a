"""Reference log-probabilities kept on disk from run to run, token by token, keyed on ids and weights alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from accelerate.logging import get_logger
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..atomic import atomic_path

logger = get_logger(__name__)


def default_folder() -> Path:
    """`$ALIGN_CACHE/ref_logps`, by default below `~/.cache/align`."""
    return Path(os.environ.get("ALIGN_CACHE", "~/.cache/align")).expanduser() / "ref_logps"


#: Fields of configurations that say where something came from, or how it is trained; no number depends on them.
PROVENANCE = {
    "_name_or_path", "name_or_path", "transformers_version", "use_cache", "architectures", "base_model_name_or_path", "revision",
    "inference_mode", "auto_mapping", "peft_version", "lora_dropout", "dtype", "torch_dtype",
}  # fmt: skip


def weights_key(model: torch.nn.Module, left_out: Sequence[str], precision: str) -> str:
    """A hash of all that a model's numbers depend on besides ids: its weights as they lie in memory, its configuration and
    its adapters' (heads, RoPE, scaling have no tensor of their own), and the precision of its forward pass.

    Args:
        left_out: adapters that are off while the reference is computed, so that their weights do not matter.
        precision: accelerate's mixed precision.
    """
    digest = hashlib.sha256(precision.encode())
    adapters = {name: c for name, c in getattr(model, "peft_config", {}).items() if name not in left_out}
    for name, config in [("", model.config), *sorted(adapters.items())]:
        kept = {key: value for key, value in config.to_dict().items() if key not in PROVENANCE}
        # Sets have no order of their own; what JSON does not know (enums, dtypes) has a name.
        text = json.dumps(kept, sort_keys=True, default=lambda v: sorted(map(str, v)) if isinstance(v, set) else str(v))
        digest.update(f"{name} {text}".encode())
    parts = [f".{name}." for name in left_out]
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor) and not any("lora_" in name and part in name for part in parts):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def row_key(input_ids: Sequence[int], completion_length: int) -> bytes:
    """What a row's numbers depend on besides the weights: the ids the model is fed, and which of them are asked for."""
    return hashlib.sha256(f"{completion_length} {' '.join(map(str, input_ids))}".encode()).digest()


class ReferenceCache:
    """Numbers of one model's rows, in files of one folder; a file appears whole or not at all, and is never changed.

    Args:
        folder: of all models.
        key: see `weights_key`.
    """

    def __init__(self, folder: str | os.PathLike, key: str) -> None:
        self.folder = Path(folder) / key
        self._known: dict[bytes, list[float]] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                stored = load_file(file)
                keys, lengths, values = stored["keys"], stored["lengths"].tolist(), stored["values"]
                parts = values.split(lengths)
            except (SafetensorError, KeyError, RuntimeError, OSError) as error:
                logger.warning(f"{file} cannot be read ({error}); its rows are computed again")
                continue
            rows = zip(keys.numpy(), parts, strict=True)
            self._known.update({row.tobytes(): part.tolist() for row, part in rows})

    def get(self, key: bytes) -> list[float] | None:
        """A row's numbers, one per completion token; `None` where they are not known."""
        return self._known.get(key)

    def add(self, rows: Iterable[tuple[bytes, list[float]]]) -> None:
        """Keeps rows, and writes those that are new as one file."""
        new = {key: values for key, values in rows if key not in self._known}
        if not new:
            return
        self._known |= new
        tensors = {
            "keys": torch.frombuffer(bytearray(b"".join(new)), dtype=torch.uint8).view(len(new), -1),
            "lengths": torch.tensor([len(values) for values in new.values()]),
            "values": torch.tensor([value for values in new.values() for value in values], dtype=torch.float32),
        }
        file = self.folder / f"{hashlib.sha256(b''.join(sorted(new))).hexdigest()[:32]}.safetensors"
        try:
            with atomic_path(file) as temporary:
                save_file(tensors, temporary)
        except (OSError, SafetensorError) as error:  # the numbers are there, and a training waits for them
            logger.warning(f"{file} cannot be written ({error}); other runs will compute these rows again")
