"""Runs a trainer's padded batches in the prefix-shared layout of `align.packing`, and hands back what TRL expects."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from trl.trainer.utils import FusedCausalLMOutput

from ..lm_head import add_token_head, knows_head
from ..logps import configured_not_to_share, keep_pages
from ..packing import IGNORED, PairLayout, lay_out_pairs
from ..prefix_tree import additive

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Slots of a forward pass on a CPU. Caches are small there, and a mask costs the square of a row's width; more passes cost
#: nothing.
CPU_SLOTS = 1024

#: Configurations of models that send a token to some of many experts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")


class PrefixSharing:
    """Calls of a causal LM that TRL gave its fused head, with what the rows of a pair share computed once.

    Args:
        base: the causal LM itself, without PEFT; it is patched where its head can be run on labelled positions alone.
        several_passes: whether a batch may be split into several forward passes; not under DDP, whose gradients are
            averaged after the first.
    """

    def __init__(self, base: PreTrainedModel, several_passes: bool = True) -> None:
        self.base = base
        self.several_passes = several_passes
        self.attention = base.config.get_text_config()._attn_implementation
        self.quantized = getattr(base, "is_quantized", False)
        if knows_head(base):
            add_token_head(base)

    def __call__(self, model: Any, **kwargs: Any) -> FusedCausalLMOutput:
        """What `model(**kwargs)` gives, `kwargs` being those of TRL's DPO trainer: `input_ids`, `attention_mask` and
        `labels`, (2B, L) each, chosen rows first, and `fused_lm_head=True`.

        Args:
            model: `base`, as PEFT, DDP or FSDP wrap it.
        """
        ids, mask, labels = (kwargs.pop(name) for name in ("input_ids", "attention_mask", "labels"))
        on_cpu, flex = ids.device.type == "cpu", self.attention == "flex_attention"
        own_head = knows_head(self.base)
        if own_head:
            kwargs.pop("fused_lm_head")
        if on_cpu:
            keep_pages()
        layouts = lay_out_pairs(
            ids, mask, labels, multiple=1 if on_cpu else 128 if flex else 8, one_row=flex,
            most=CPU_SLOTS if on_cpu and self.several_passes else None,
        )  # fmt: skip
        passes = [self._run(model, layout, flex, own_head, kwargs) for layout in layouts]
        places = torch.cat([layout.places for layout in layouts])
        shape = (ids.shape[0], ids.shape[1] - 1)

        def unpacked(name: str) -> torch.Tensor | None:
            """(2B, L-1): a field of the outputs, 0 where there is no label."""
            parts = [fields[name] for fields in passes]
            if parts[0] is None:
                return None
            values = torch.cat([part[layout.sources] for part, layout in zip(parts, layouts, strict=True)])
            return values.new_zeros(shape[0] * shape[1]).index_put((places,), values).view(shape)

        names = ("log_probs", "entropy", "mean_logits", "is_top1")
        return FusedCausalLMOutput(**{name: unpacked(name) for name in names}, label_mask=labels[:, 1:] != IGNORED)

    def _run(
        self, model: Any, layout: PairLayout, flex: bool, own_head: bool, kwargs: dict[str, Any]
    ) -> dict[str, torch.Tensor | None]:
        """The fields of a layout's outputs, (U,) each."""
        device = layout.input_ids.device
        # SDPA takes an additive mask in the dtype that a layer computes in alone, eager attention nothing else.
        exact = self.base.dtype == torch.float32 and not torch.is_autocast_enabled(device.type) and not self.quantized
        if flex:
            mask: Any = layout.block_mask()
        elif self.attention == "eager" or (device.type == "cpu" and exact):
            mask = additive(layout.mask(), self.base.dtype)
        else:
            mask = layout.mask()
        inputs = {"input_ids": layout.input_ids, "position_ids": layout.position_ids, "attention_mask": mask, **kwargs}
        if own_head:
            outputs = model(**inputs, labelled=layout.labelled, targets=layout.targets)
            return {name: outputs.get(name) for name in ("log_probs", "entropy", "mean_logits", "is_top1")}
        outputs = model(**inputs, shift_labels=layout.label_slots())
        return {
            name: None if (field := outputs.get(name)) is None else field.flatten()[layout.labelled]
            for name in ("log_probs", "entropy", "mean_logits", "is_top1")
        }


def why_not(model: PreTrainedModel, base: PreTrainedModel) -> str | None:
    """Why a model cannot be trained in the prefix-shared layout; `None` if it can.

    Args:
        model: `base`, with its adapters.
        base: the causal LM.
    """
    config = base.config.get_text_config()
    for name in EXPERTS:
        if (getattr(config, name, None) or 0) > 1:
            return f"{type(base).__name__} is a mixture of experts ({name} = {getattr(config, name)}), whose router reads padded rows"
    if getattr(config, "attn_logit_softcapping", None):
        return f"{type(base).__name__} caps attention scores (attn_logit_softcapping)"
    return configured_not_to_share(model, IMPLEMENTATIONS)


def differs(model: PreTrainedModel, sharing: PrefixSharing, autocast: AbstractContextManager) -> str | None:
    """Tries two short pairs in both layouts: why they come out differently, or `None` if they do not. What a forward pass
    makes of a mask and of position ids is nowhere declared.

    Args:
        model: what TRL gave its fused head, with its adapters, not yet wrapped for several processes.
        autocast: what training runs in.
    """
    rows = [[1, 2, 3, 4, 5, 6], [1, 2, 6, 5, 4, 3], [1, 2, 3, 6, 4, 5], [1, 2, 4, 3, 5, 6]]
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor(rows, device=device)
    labels = ids.clone()
    labels[:, :2] = IGNORED
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "fused_lm_head": True}
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast:
            plain = model(**batch, use_cache=False).log_probs
            shared = sharing(model, **batch, use_cache=False).log_probs
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"{type(sharing.base).__name__} does not take the layout's mask ({' '.join(str(error).split())[:120]})"
    finally:
        model.train(training)
    exact = sharing.base.dtype in (torch.float32, torch.float64)
    error = (plain.float() - shared.float()).abs().max().item()
    if error > (1e-3 if exact else 0.3):
        return f"{type(sharing.base).__name__} gives other log-probabilities in the shared layout (by {error:.2g})"
    return None
