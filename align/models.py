"""Loading models, tokenizers and adapters, and telling whether they belong together: the one place for it."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .atomic import atomic_path
from .damage import folder_damage
from .errors import ConfigError, ModelLoadError, ModelMismatchError
from .hub import FETCHING, SOURCE, check_source, source_of, split_revision
from .safety import check_templates, no_pickles

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Unpack

    from .hub import Source

#: Beside an adapter's weights: which base they were trained on.
BASE_FILE = "align_base.json"


def quantization_config(quantization: str | None, dtype: str = "bfloat16") -> BitsAndBytesConfig | None:
    """`None`, or the bitsandbytes settings of `"4bit"` (QLoRA: NF4, double quantization; Dettmers et al. 2023) and
    `"8bit"`.

    Raises:
        ConfigError: another name, or bitsandbytes is not installed.
    """
    if quantization is None:
        return None
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantization {quantization!r} needs bitsandbytes; install the extra: pip install 'align[qlora]'"
        )
    import torch
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    raise ConfigError(f"quantization {quantization!r} is unknown; use '4bit', '8bit' or leave it out")


def load_model(
    path: str,
    *,
    dtype: str = "bfloat16",
    quantization: str | None = None,
    attn_implementation: str | None = None,
    adapter: str | None = None,
    **source: Unpack[Source],
) -> PreTrainedModel | PeftModel:
    """Loads a causal LM from safetensors onto this process's device, in eval mode.

    Args:
        path: hub name or folder.
        dtype: name of a torch dtype.
        quantization: see `quantization_config`.
        adapter: folder or hub name of a PEFT adapter to put on it, checked to belong to the base; a hub name may end in
            `@REVISION`.
        source: `revision`, `trust_remote_code` and others, see `align.hub.Source`.

    Raises:
        ConfigError: unknown dtype or quantization, or a folder is asked for a revision.
        ModelLoadError: there is no model in safetensors at `path`, not all of it, or it needs code of its own.
        ModelMismatchError: the adapter does not belong to the base.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from .processes import launched_with_deepspeed, process_state

    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"dtype {dtype!r} is unknown; use float32, bfloat16 or float16")
    given = _checked(path, source)
    process = process_state()
    if launched_with_deepspeed():
        # Else each model loaded behind the arguments of a training would be ZeRO-3's, empty outside of its engine.
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    kwargs: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "use_safetensors": True,
        "trust_remote_code": False,
    } | given
    quantized = quantization_config(quantization, dtype)
    if quantized is not None:
        kwargs |= {"quantization_config": quantized, "device_map": {"": process.device}}
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    try:
        with no_pickles(path, subfolder=given.get("subfolder")):
            model, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    except (ModelLoadError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - of a damaged configuration or weight file, it raises nearly everything
        raise ModelLoadError(_not_loaded(path, "model", error)) from error
    if missing := sorted(found["missing_keys"]):
        raise ModelLoadError(f"{path}: {missing[0]} is not among its weights and would be random; fetch it again")
    if quantized is None:
        model = model.to(process.device)
    keep_trainable(model)
    if adapter is not None:
        model = load_adapters(model, {"default": adapter}, **_fetching(given))
    return model.eval()


def loading_arguments() -> set[str]:
    """Names of the arguments of `load_model`."""
    return {*signature(load_model).parameters, *SOURCE} - {"source"}


def _checked(path: str, source: Mapping[str, Any]) -> dict[str, Any]:
    """What is given of a source.

    Raises:
        TypeError: an argument that `from_pretrained` would take for a field of the configuration.
        ConfigError: a folder is asked for a revision.
    """
    if unknown := sorted(set(source) - set(SOURCE)):
        raise TypeError(f"{unknown[0]!r} is not an argument of loading; there are {', '.join(SOURCE)}")
    check_source(path, source)
    return source_of(source)


def _fetching(source: Mapping[str, Any]) -> dict[str, Any]:
    return {name: source[name] for name in FETCHING if name in source}


def keep_trainable(model: PreTrainedModel | PeftModel) -> None:
    """Keeps bitsandbytes from packing 4-bit weights for inference on a CPU: at the first pass in eval mode it would do so for
    good, and a packed layer passes no gradient on to what lies before it, without a word."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def load_tokenizer(path: str, **source: Unpack[Source]) -> PreTrainedTokenizerBase:
    """Loads a tokenizer; EOS stands in for a missing padding token.

    Args:
        path: hub name or folder.
        source: as of `load_model`: the tokenizer of a revision is that revision's.

    Raises:
        ConfigError: a folder is asked for a revision.
        ModelLoadError: there is none.
        ModelMismatchError: it has no EOS, so no completion could end.
    """
    from transformers import AutoTokenizer

    given = {"trust_remote_code": False, **_checked(path, source)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **given)
    except Exception as error:  # noqa: BLE001 - as of a model's
        raise ModelLoadError(_not_loaded(path, "tokenizer", error)) from error
    check_templates(tokenizer, path)
    if tokenizer.eos_token_id is None:
        raise ModelMismatchError(f"{path}: the tokenizer has no EOS token; set `eos_token` in its configuration")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.align_source = source_of(source)  # other files of the same revision belong to it
    return tokenizer


def _not_loaded(path: str, what: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"{path}: the {what} needs code of its own (auto_map in its config.json or tokenizer_config.json), which is not "
            "run; read it, and where you trust it give --trust-remote-code (trust_remote_code=True)"
        )
    if damage := folder_damage(path, what):
        return f"{path}: no {what} can be loaded from there: {damage}; fetch or save it again"
    reason = " ".join(str(error).split())[:200]
    return f"{path}: no {what} can be loaded from there ({reason}); give a folder with safetensors or a hub name"


def vocab_size(model: PreTrainedModel | PeftModel) -> int:
    """Number of rows of the input embedding: ids from 0 to one below it can be fed."""
    weight = model.get_input_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 leaves an empty one between passes


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model without the wrapper of its adapters, whose layers may still be in it."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


@contextmanager
def without_router_loss(model: PreTrainedModel | PeftModel):
    """Turns off the routers' auxiliary loss within the block.

    A pass that computes only logits does not need it. Beside a cache it raises, because the mask is longer than the
    tokens that were routed.
    """
    config = base_model(model).config
    asked = [each for each in (config, config.get_text_config()) if getattr(each, "output_router_logits", False)]
    for each in asked:
        each.output_router_logits = False
    try:
        yield
    finally:
        for each in asked:
            each.output_router_logits = True


def prompt_learning(model: PreTrainedModel | PeftModel) -> PeftConfig | None:
    """The active adapter's configuration, where it puts virtual tokens before each row; else `None`."""
    config = model.active_peft_config if hasattr(model, "active_peft_config") else None
    return config if getattr(config, "is_prompt_learning", False) else None


def cache_name(function: Callable) -> str:
    """What a function of transformers, a model's `forward` say, calls keys and values: `cache`, or, before transformers renamed
    it and in models written before, `past_key_values`. The output of a `forward` calls them the same."""
    return "cache" if "cache" in signature(function).parameters else "past_key_values"


def base_fingerprint(model: PreTrainedModel | PeftModel) -> str:
    """Three hashes of a base model, with dots between; LoRA adapters on it change none of them.

    Of its architecture; of what quantization does not change, norms, biases and the first embeddings, rounded to
    bfloat16; and of a part of every weight matrix, so that a fine-tune or a merged adapter is told apart, too. What
    cannot be compared is left empty: matrices of a quantized model, and all values in float16, which rounds otherwise.
    """
    import torch

    base = base_model(model)
    digest = hashlib.sha256()
    config = base.config.get_text_config()
    fields = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    digest.update(json.dumps([getattr(config, field, None) for field in fields]).encode())
    architecture = digest.hexdigest()
    if any(parameter.dtype == torch.float16 for parameter in base.parameters()):
        return f"{architecture}.."
    # PEFT names an adapted layer's own weights `….base_layer.weight`.
    own = {n.replace(".base_layer", ""): p for n, p in base.named_parameters() if "lora_" not in n}
    for parameter in [own[name] for name in sorted(own) if own[name].dim() == 1] + [_embedding(base)]:
        digest.update(_rounded(parameter))
    if getattr(base, "quantization_method", None) is not None:
        return f"{architecture}.{digest.hexdigest()}."
    matrices = hashlib.sha256()
    for name in sorted(own):
        if own[name].dim() > 1:
            matrices.update(_rounded(own[name].flatten()[:: max(1, own[name].numel() // 1024)]))
    return f"{architecture}.{digest.hexdigest()}.{matrices.hexdigest()}"


def _embedding(base: PreTrainedModel) -> torch.Tensor:
    return base.get_input_embeddings().weight[:256]


def _rounded(parameter: torch.Tensor) -> bytes:
    return parameter.detach().bfloat16().float().cpu().numpy().tobytes()


def same_base(fingerprint: str, other: str) -> bool:
    """Whether two fingerprints are of one base; a hash that only one of them has is not compared."""
    parts = zip(fingerprint.split("."), other.split("."), strict=False)
    return all(one == two for one, two in parts if one and two)


def write_base_file(
    adapter_dir: str | Path, model: PreTrainedModel | PeftModel, fingerprint: str | None = None
) -> None:
    """Writes beside a trained adapter which base it belongs to, for `load_adapters` to check."""
    base = {"name": model.config._name_or_path, "fingerprint": fingerprint or base_fingerprint(model)}
    with atomic_path(Path(adapter_dir) / BASE_FILE) as temporary:
        temporary.write_text(json.dumps(base, indent=2), encoding="utf-8")


def is_adapter(path: str, **source: Unpack[Source]) -> bool:
    """Whether a folder or hub name holds a PEFT adapter, rather than a whole model; see `load_model`."""
    from transformers.utils.peft_utils import find_adapter_config_file

    given = _checked(path, source)
    asked = {name: given[name] for name in ("revision", "subfolder", *FETCHING) if name in given}
    try:
        return find_adapter_config_file(path, **asked) is not None
    except (OSError, ValueError) as error:
        raise ModelLoadError(_not_loaded(path, "model or adapter", error)) from error


def load_adapters(model: PreTrainedModel, adapters: Mapping[str, str], **fetching: Any) -> PeftModel:
    """Puts PEFT adapters on one base, none merged; the first one is active.

    Args:
        model: base model; becomes part of the result.
        adapters: name -> folder, or hub name, which may end in `@REVISION`.
        fetching: `token`, `cache_dir` and others, see `align.hub.FETCHING`.

    Raises:
        ModelLoadError: its weights are pickles, or there are none.
        ModelMismatchError: an adapter was trained on another base: its recorded fingerprint differs, its weights have
            other shapes, or the base lacks the layers it adapts.
    """
    import torch
    from peft import PeftModel

    fingerprint = base_fingerprint(model)
    wrapped: Any = None
    for name, path in adapters.items():
        _check_base_file(path, fingerprint, model)
        place, revision = split_revision(path)
        options = fetching if revision is None else {**fetching, "revision": revision}
        try:
            with no_pickles(path), warnings.catch_warnings():
                warnings.filterwarnings("error", "Found missing adapter keys")  # they would be random
                if wrapped is None:
                    wrapped = PeftModel.from_pretrained(model, place, adapter_name=name, **options)
                elif missing := wrapped.load_adapter(place, adapter_name=name, **options).missing_keys:
                    raise KeyError(f"{missing[0]} is not among its weights")
        except (ModelLoadError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - as of a model's
            if damage := folder_damage(path, "adapter"):
                raise ModelMismatchError(f"adapter {path}: {damage}; fetch it again, or train it again") from error
            reason = str(error).strip().splitlines()
            raise ModelMismatchError(
                f"adapter {path} does not fit the base {model.config._name_or_path}: {' '.join(reason[:3])}; "
                "give the base it was trained on (base_model_name_or_path in its adapter_config.json)"
            ) from error
    return wrapped.eval()


def _check_base_file(path: str, fingerprint: str, model: PreTrainedModel) -> None:
    if not os.path.exists(path) and (os.path.isabs(path) or os.path.isdir(Path(path).parent)):
        raise ModelMismatchError(f"adapter {path}: no such folder; train it first or check the path")
    file = Path(path) / BASE_FILE
    if not os.path.isfile(file):
        return
    try:
        base = json.loads(file.read_text(encoding="utf-8"))
        recorded, name = base["fingerprint"], base["name"]
        if not isinstance(recorded, str):
            raise TypeError(f"fingerprint {recorded!r} is no text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelMismatchError(
            f"{file}: not readable ({error}); delete it to skip this check, or train again"
        ) from None
    if not same_base(recorded, fingerprint):
        raise ModelMismatchError(
            f"adapter {path} was trained on {name}, whose weights differ from those of {model.config._name_or_path}; "
            "give the base it was trained on"
        )


@contextmanager
def active_adapter(model: PreTrainedModel | PeftModel, name: str | None):
    """Runs the block under the adapter `name`, or under the bare base for `None`; models without adapters pass through.

    Raises:
        ModelMismatchError: there is no adapter of that name.
    """
    if not hasattr(model, "peft_config"):
        if name is not None:
            raise ModelMismatchError(f"the model has no adapters, so there is none named {name!r}")
        yield
        return
    if name is not None and name not in model.peft_config:
        raise ModelMismatchError(f"there is no adapter {name!r}; the model has {', '.join(model.peft_config)}")
    from trl.trainer.utils import use_adapter

    with use_adapter(model, name):
        yield


@contextmanager
def folded_adapter(model: PreTrainedModel | PeftModel, name: str | None):
    """Runs the block with LoRA layers computing x (W + s B A)ᵀ instead of x Wᵀ + s (x Aᵀ) Bᵀ: for more than a few dozen
    positions, one product is faster than three.

    The sum exists for one layer at a time, while it runs. Only float32 weights are folded: the sum would be rounded to a
    shorter dtype, and a quantized weight has none. Other layers, and kinds of adapters, run as PEFT has them.
    """
    import torch
    from torch.nn.functional import linear

    def foldable(layer) -> bool:
        base = getattr(layer, "base_layer", None)
        return (
            type(layer).__module__.startswith("peft.tuners.lora")
            and type(base) is torch.nn.Linear
            and base.weight.dtype == torch.float32
            and name in layer.lora_A
            and getattr(layer.lora_B[name], "bias", None) is None
            and not layer.merged
            and name not in getattr(layer, "lora_variant", {})
            and not layer.training
        )

    def fold(layer):
        def forward(x, *_args, **_kwargs):
            base = layer.base_layer
            return linear(x, base.weight + layer.get_delta_weight(name), base.bias)

        return forward

    folded = [layer for layer in model.modules() if foldable(layer)] if name is not None else []
    for layer in folded:
        layer.forward = fold(layer)
    try:
        yield
    finally:
        for layer in folded:
            del layer.forward
