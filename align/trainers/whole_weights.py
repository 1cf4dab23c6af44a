"""Whole weights in every process of a sharded model, for as long as each draws on its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.distributed.fsdp import FSDPModule

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Gathers the weights that FSDP2 has sharded, in the dtype that they compute in, and frees them at the end; a model that
    is not sharded is left alone. All processes enter it together, between two updates; inside, each may run any number of
    passes without gradients, or none, since no pass gathers anything.

    `generate` is to be called with `synced_gpus=False`: transformers takes the processes of a sharded model to step
    together, and would have them wait for each other after every token.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not shards:
        yield
        return
    # What follows is torch's own business, but its public calls neither tell what a module does after a pass, so that it
    # could be restored, nor forget passes.
    for module in shards:
        module._get_fsdp_state()._lazy_init()  # the first is the root, which decides here what becomes of its weights
    groups = {group: group.post_forward_mesh_info for module in shards for group in _groups(module)}
    method = vars(model).pop("generate", None)  # the Trainer's, which frees the root's weights after every call
    try:
        for group in groups:
            group.post_forward_mesh_info = None  # weights stay after a pass
        for module in shards:
            module.unshard()
        yield
    finally:
        if method is not None:
            model.generate = method
        for group, after_pass in groups.items():
            group.post_forward_mesh_info = after_pass
            # The next backward pass gathers ahead by these, and would wait for processes that have none.
            group._post_forward_indices.clear()
            group.comm_ctx.post_forward_order.clear()
        for module in shards:
            module.reshard()


def _groups(module: FSDPModule) -> list[Any]:
    """What a module gathers at once; torch 2.11 has one group where later ones have a list."""
    held = vars(module._get_fsdp_state())
    return [group for group in held.get("_fsdp_param_groups", [held.get("_fsdp_param_group")]) if group is not None]
