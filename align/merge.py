"""The stage `align merge`: a LoRA adapter and its base become one model."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .atomic import atomic_path
from .errors import ConfigError, ModelLoadError, ModelMismatchError
from .hub import FETCHING, source_of
from .identity import model_identity
from .locks import locked
from .models import load_model, load_tokenizer, vocab_size
from .progress import is_shown
from .stages import is_complete, write_manifest

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel
    from typing_extensions import Unpack

    from .hub import Source

#: Largest difference of logits, as a share of their size (root mean squares), that rounding of merged weights explains.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}

#: Ids that merged model and adapter are compared on: so many over all the vocabulary, in prompts of so many.
IDS, LENGTH = 128, 16


def merge_adapter(
    model: str, adapter: str, out: str | Path, *, dtype: str = "bfloat16", **source: Unpack[Source]
) -> str:
    """Writes a LoRA adapter merged into its base, with the tokenizer: what a further adapter is trained on.

    What was written is loaded again and compared with base and adapter, before `out` appears. Where the base ties its embeddings
    and its head, and the adapter changes one of them, the merged model has both.

    Args:
        model, adapter: hub names or folders; an adapter's hub name may end in `@REVISION`.
        out: folder to write; it must not be there, be empty, or hold this very model already.
        dtype: of the merged weights. An adapter trained on a quantized base is merged into the unquantized one, as usual.
        source: see `align.load_model`.

    Returns:
        `out`.

    Raises:
        ConfigError: `out` holds something else.
        ModelMismatchError: see `load_adapters`; or the adapter is of a kind that cannot be merged.
        RecordFileError: `out` cannot be written, or another process writes it.
    """
    out, given = Path(out), source_of(source)
    of_adapter = model_identity(adapter, **{name: given[name] for name in FETCHING if name in given})
    settings = {"model": model_identity(model, **given), "adapter": of_adapter, "dtype": dtype}
    if is_complete(out, "merge", settings):
        return str(out)
    if os.path.islink(out) or (os.path.exists(out) and (not out.is_dir() or any(out.iterdir()))):
        raise ConfigError(f"{out} exists already; give another folder, or remove it yourself")
    loaded = load_model(model, dtype=dtype, adapter=adapter, **given)
    tokenizer = load_tokenizer(model, **given)
    if any(config.is_prompt_learning for config in loaded.peft_config.values()):
        raise ModelMismatchError(f"adapter {adapter} learns a prompt, which no weights can hold; merge LoRA adapters")
    prompts = _prompts(loaded)
    expected = _logits(loaded, prompts)
    with locked(out), atomic_path(out) as temporary:
        _merged(loaded, adapter).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        del loaded
        gc.collect()  # one model is in memory at a time
        _check_written(temporary, adapter, prompts, expected, dtype, given.get("trust_remote_code", False))
        if out.exists():
            out.rmdir()  # or the manifest would speak of an empty folder
        # Before the folder is there: one without a manifest is taken for somebody else's.
        write_manifest(out, "merge", settings, {}, written=temporary)
    return str(out)


def _prompts(model: PeftModel) -> torch.Tensor:
    """(rows, LENGTH) ids from all over the vocabulary, and those that adapters treat by themselves."""
    import torch

    ids = torch.linspace(0, vocab_size(model) - 1, IDS).long().tolist()
    for config in model.peft_config.values():
        chosen = getattr(config, "trainable_token_indices", None) or []
        for of_layer in chosen.values() if isinstance(chosen, dict) else [chosen]:
            ids += list(of_layer)[:IDS]
    ids += ids[: -len(ids) % LENGTH]
    return torch.tensor(ids).view(-1, LENGTH)


def _logits(model: PreTrainedModel | PeftModel, prompts: torch.Tensor) -> torch.Tensor:
    """(tokens, V) float32, on the CPU."""
    import torch

    with torch.no_grad():
        return model(input_ids=prompts.to(model.device)).logits.float().cpu().flatten(0, 1)


def _merged(model: PeftModel, adapter: str) -> PreTrainedModel:
    """The base with the adapter in its weights; embeddings and head stay tied where they are still the same."""
    import torch

    base = model.get_base_model()
    tied = [config for config in (base.config, base.config.get_text_config()) if _ties(config)]
    _untie(model)
    try:
        merged = model.merge_and_unload(progressbar=is_shown())
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - each kind of adapter has its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelMismatchError(f"adapter {adapter} cannot be merged ({reason}); use it as it is") from error
    if tied and merged.get_output_embeddings() is not None:
        same = torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)
        for config in tied:
            config.tie_word_embeddings = same  # PEFT says False as soon as there are two matrices
        if same:
            merged.tie_weights()
    return merged


def _ties(config: PretrainedConfig) -> bool:
    return getattr(config, "tie_word_embeddings", False)


def _untie(model: PeftModel) -> None:
    """Gives every module its own copy of a matrix that several share: an adapter may change it for one of them alone."""
    import torch

    seen = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in seen:
                copied = torch.nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                module._parameters[name] = copied
            elif parameter is not None:
                seen.add(id(parameter))


def _check_written(
    folder: Path, adapter: str, prompts: torch.Tensor, expected: torch.Tensor, dtype: str, trusted: bool
) -> None:
    """Loads a merged model again and compares it with base and adapter.

    Raises:
        ModelMismatchError: it cannot be loaded, or its logits are others.
    """
    import torch

    try:
        found = _logits(load_model(str(folder), dtype=dtype, trust_remote_code=trusted), prompts)
    except torch.OutOfMemoryError:
        raise
    except (ModelLoadError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).replace(str(folder), "the merged model").split())[:300]
        raise ModelMismatchError(f"adapter {adapter} cannot be merged ({reason}); use it as it is") from error
    # Both share what no softmax sees, a number for all of a row.
    found, expected = (logits - logits.mean(1, keepdim=True) for logits in (found, expected))
    share = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    if not share <= TOLERANCE[dtype]:
        raise ModelMismatchError(
            f"adapter {adapter}: the merged model's logits differ from those of base and adapter by {share:.1%} of their size, "
            f"rounding to {dtype} explains {TOLERANCE[dtype]:.2%}; use the adapter as it is, or merge with dtype float32"
        )
