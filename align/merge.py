"""The stage `align merge`: a LoRA adapter and its base become one model."""

from __future__ import annotations

import os
from pathlib import Path

from .atomic import atomic_path
from .errors import ConfigError, ModelMismatchError
from .identity import model_identity
from .locks import locked
from .models import load_model, load_tokenizer
from .progress import is_shown
from .stages import is_complete, write_manifest


def merge_adapter(
    model: str, adapter: str, out: str | Path, *, dtype: str = "bfloat16", trust_remote_code: bool = False
) -> str:
    """Writes a LoRA adapter merged into its base, with the tokenizer: what a further adapter is trained on.

    Args:
        model, adapter: hub names or folders.
        out: folder to write; it must not be there, be empty, or hold this very model already.
        dtype: of the merged weights. An adapter trained on a quantized base is merged into the unquantized one, as usual.

    Returns:
        `out`.

    Raises:
        ConfigError: `out` holds something else.
        ModelMismatchError: see `load_adapters`; or the adapter is of a kind that cannot be merged.
        RecordFileError: `out` cannot be written, or another process writes it.
    """
    out = Path(out)
    settings = {"model": model_identity(model), "adapter": model_identity(adapter), "dtype": dtype}
    if is_complete(out, "merge", settings):
        return str(out)
    if os.path.islink(out) or (os.path.exists(out) and (not out.is_dir() or any(out.iterdir()))):
        raise ConfigError(f"{out} exists already; give another folder, or remove it yourself")
    loaded = load_model(model, dtype=dtype, adapter=adapter, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    if any(config.is_prompt_learning for config in loaded.peft_config.values()):
        raise ModelMismatchError(f"adapter {adapter} learns a prompt, which no weights can hold; merge LoRA adapters")
    with locked(out), atomic_path(out) as temporary:
        loaded.merge_and_unload(progressbar=is_shown()).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if out.exists():
            out.rmdir()  # or the manifest would speak of an empty folder
        # Before the folder is there: one without a manifest is taken for somebody else's.
        write_manifest(out, "merge", settings, {}, written=temporary)
    return str(out)
