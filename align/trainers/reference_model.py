"""The reference of a model that is passed as an object: the model as it is now, not as its folder has it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from accelerate.hooks import add_hook_to_module
from peft.tuners.tuners_utils import BaseTunerLayer

from ..errors import ConfigError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

#: What TRL calls the adapter that is trained, and its copy, the reference.
TRAINED, REFERENCE = "default", "ref"


def is_partitioned(model: PreTrainedModel) -> bool:
    """Whether a model was loaded under ZeRO-3, which leaves each process a part of its weights."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def copy_partitioned(model: PreTrainedModel, reference: torch.nn.Module) -> None:
    """Writes a partitioned model's weights into the reference that TRL loaded from its folder, one matrix at a time.

    Raises:
        ConfigError: the folder's model has other shapes.
    """
    import deepspeed

    pairs = list(zip(model.named_parameters(), reference.parameters(), strict=True))
    for (name, ours), theirs in pairs:
        if ours.ds_shape != theirs.ds_shape:
            raise ConfigError(
                f"{name} has shape {list(ours.ds_shape)}, and {list(theirs.ds_shape)} in {model.config._name_or_path}: under ZeRO-3 "
                "the reference has the folder's shapes; save the model and give the folder, or give ref_model"
            )
    for (_, ours), theirs in pairs:
        with deepspeed.zero.GatheredParameters([ours, theirs], modifier_rank=0):
            theirs.data.copy_(ours.data)


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model, as large as it is; TRL would load a second one in its place.

    Raises:
        ConfigError: its weights lie in pieces in several processes, or cannot be copied.
    """
    remedy = "give ref_model, or the model's name in place of the model, or set precompute_ref_log_probs=True"
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise ConfigError(
            f"the model's weights are sharded already, so the reference cannot be copied from them; {remedy}"
        )
    try:
        copied = copy.deepcopy(model)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        if "out of memory" in str(error):
            raise
        raise ConfigError(f"the reference cannot be copied from the model ({error}); {remedy}") from error
    _forget_original(copied)
    return copied.eval().requires_grad_(False)


def _forget_original(copied: PreTrainedModel) -> None:
    """Takes functions off a copied model that call the model they were put on: an earlier trainer's `forward`, accelerate's `to`."""
    for module in {copied, copied.base_model}:  # an earlier trainer replaced the `forward` of both
        for name, value in list(vars(module).items()):
            if callable(value) and callable(getattr(type(module), name, None)):
                delattr(module, name)
        if hasattr(module, "_hf_hook"):
            add_hook_to_module(module, module._hf_hook)  # accelerate's `forward`, again


def check_adapters(model: PeftModel) -> None:
    """Raises a ConfigError where TRL cannot copy the adapter of a model for its reference."""
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ConfigError(
            "the model has an adapter on its head, which is left out where log-probabilities are computed; leave the head out "
            "of target_modules, or give modules_to_save=['lm_head']"
        )
    if TRAINED not in model.peft_config:
        raise ConfigError(
            f"the model's adapters are called {', '.join(model.peft_config)}; load the one to train as {TRAINED!r}"
        )
    if REFERENCE in model.peft_config:
        raise ConfigError(
            f"the model has an adapter {REFERENCE!r}, as after an earlier training; remove it: model.delete_adapter({REFERENCE!r})"
        )


def complete_reference_adapter(model: PeftModel) -> None:
    """Copies the weights of the trained adapter into the reference's that TRL's copy leaves out: those of embeddings, for one."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parts = name.split(".")
        if TRAINED in parts:
            of_reference = ".".join(REFERENCE if part == TRAINED else part for part in parts)
            parameters[of_reference].data.copy_(parameter.data)
