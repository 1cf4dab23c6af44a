"""What TRL's trainers leave out when they load a model by its name: `model_init_kwargs` for all that belongs to it."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from ..damage import whole_folders
from ..errors import ConfigError
from ..hub import check_source, source_of
from ..models import base_model, load_tokenizer
from ..trl_versions import get_config_model_id

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel
    from trl import DPOConfig, SFTConfig

logger = get_logger(__name__)


def source_of_trainer(args: DPOConfig | SFTConfig) -> dict[str, Any]:
    """Where a trainer's model comes from, and its configuration and tokenizer with it; see `align.hub.Source`."""
    return {"trust_remote_code": args.trust_remote_code, **source_of(args.model_init_kwargs)}


def model_name(model: Any) -> str:
    """A model's folder or hub name, of what was loaded too."""
    return model if isinstance(model, str) else get_config_model_id(model.config)


def default_output(model: Any, method: str) -> str:
    """The folder of a trainer without `args`: as in TRL, the model's name and the method's."""
    return f"{model_name(model).split('/')[-1]}-{method}"


def processing_class_of(model: Any, args: DPOConfig) -> PreTrainedTokenizerBase | ProcessorMixin:
    """A model's own processor, or its tokenizer where it has none: what TRL loads, so that both are saved alike.

    Raises:
        ConfigError: the model was not loaded by a name.
        AlignError: see `align.load_tokenizer`.
    """
    name, source = name_of_tokenizer(model), source_of_trainer(args)
    tokenizer = load_tokenizer(name, **source)
    if type(config_of(model, args)) not in PROCESSOR_MAPPING:
        return tokenizer
    try:
        return AutoProcessor.from_pretrained(name, **source)
    except (ImportError, OSError, ValueError) as error:
        logger.warning(f"{name}: the processor cannot be loaded ({error}); its tokenizer alone is used, and saved")
        return tokenizer


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that is given, or that of a processor. Without a chat template, it gets the processor's.

    Raises:
        TypeError: it is neither, in TRL's words.
    """
    found = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    if not isinstance(found, PreTrainedTokenizerBase):
        raise TypeError("The `processing_class` must be either a `PreTrainedTokenizerBase` or a `ProcessorMixin`")
    found.chat_template = found.chat_template or getattr(processing_class, "chat_template", None)
    return found


def check_without_images(processing_class: Any, columns: Collection[str], name: str, trainer: str) -> None:
    """Raises a ConfigError where a processor would read images; without one, TRL refuses them itself.

    Args:
        columns, name: of a data set.
        trainer: the name of its class.
    """
    if isinstance(processing_class, ProcessorMixin) and (images := {"image", "images"} & set(columns)):
        raise ConfigError(
            f"{name} data set: column {min(images)} has images, and {trainer} trains on text alone; remove the column, or train "
            "with TRL"
        )


def set_pad_token(tokenizer: PreTrainedTokenizerBase, args: DPOConfig) -> None:
    """Give a tokenizer the padding token that the configuration names.

    Raises:
        ConfigError: it is not in the vocabulary; transformers would add it, and the model has no place for its id.
    """
    token = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
    if token not in tokenizer.get_vocab():
        raise ConfigError(f"pad_token = {token!r} must be in the tokenizer's vocabulary; name one of its tokens")
    tokenizer.pad_token = token


def name_of_tokenizer(model: Any) -> str:
    """The name that a model's tokenizer is loaded by.

    Raises:
        ConfigError: the model has none.
    """
    if name := model_name(model):
        return name
    raise ConfigError("the model was not loaded from anywhere, so its tokenizer is unknown; give processing_class")


def config_of(model: Any, args: DPOConfig | SFTConfig) -> PretrainedConfig:
    """The configuration of a model, loaded or named."""
    from transformers import AutoConfig

    if not isinstance(model, str):
        return model.config
    files = [os.path.isfile(os.path.join(model, name)) for name in ("adapter_config.json", "config.json")]
    if files == [True, False]:
        raise ConfigError(
            f"model = {model!r} must be a whole model, and is an adapter; give align.load_model(BASE, adapter={model!r})"
        )
    with whole_folders(model):
        return AutoConfig.from_pretrained(model, **source_of_trainer(args))


@contextmanager
def whole_source(model: Any, args: DPOConfig | SFTConfig) -> Iterator[None]:
    """Names the model's class to TRL within the block, where `model_init_kwargs` says where the model comes from.

    Without it, TRL reads the class from the configuration of the hub name's `main`, whatever the revision.

    Raises:
        ConfigError: a folder is asked for a revision.
    """
    import transformers

    given = args.model_init_kwargs
    if not isinstance(model, str) or not source_of(given):
        yield
        return
    check_source(model, source_of(given))
    named = (config_of(model, args).architectures or [""])[0]
    known = getattr(transformers, named, transformers.AutoModelForCausalLM)
    args.model_init_kwargs = {"architecture": known, **given}
    try:
        yield
    finally:
        args.model_init_kwargs = given


def with_revision(peft_config: PeftConfig | None, model: Any, args: DPOConfig | SFTConfig) -> PeftConfig | None:
    """An adapter's settings with the revision of its base, which is what loads the adapter's base later."""
    revision = source_of_trainer(args).get("revision")
    if not isinstance(model, str) or getattr(peft_config, "revision", "unknown") is not None:
        return peft_config
    peft_config = copy.copy(peft_config)
    peft_config.revision = revision
    return peft_config


def name_bias(model: PreTrainedModel | PeftModel) -> None:
    """Gives a wrapped head the bias of what it wraps: TRL reads both, PEFT's wrapper of single tokens has its weights alone."""
    head = base_model(model).get_output_embeddings()
    if head is not None and not hasattr(head, "bias"):
        object.__setattr__(head, "bias", getattr(head.original_module, "bias", None))  # not one more parameter of it


def functional_dropout(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str]]:
    """Modules with a dropout probability that they pass to a function, and the name of the attribute that has it.

    OPT and Llama's attention do so. TRL's `disable_dropout` changes only dropout modules.
    """
    return [
        (module, name)
        for module in model.modules()
        for name, value in vars(module).items()
        if ("dropout" in name or "layerdrop" in name) and type(value) is float and value > 0
    ]


def disable_functional_dropout(model: torch.nn.Module) -> None:
    """Sets these probabilities to 0, as TRL's `disable_dropout` does for modules."""
    for module, name in functional_dropout(model):
        setattr(module, name, 0.0)
