"""Runs a trainer's padded batches, in the prefix-shared layout of `align.packing` where a model can, and hands back what
TRL expects."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger

from ..lm_head import add_token_head, knows_head
from ..logps import batches_by_length, configured_not_to_share, keep_pages
from ..packing import IGNORED, PairLayout, group_pairs, lay_out_pairs, layout_slots, pair_slots, prompt_length
from ..prefix_tree import additive
from ..trl_versions import FusedCausalLMOutput
from .loading import functional_dropout
from .token_budget import FIELDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import DPOTrainer

logger = get_logger(__name__)

#: Slots of a forward pass on a CPU. Caches are small there, and a mask costs the square of a row's width; more passes cost
#: nothing.
CPU_SLOTS = 1024

#: Configurations of models that send a token to some of many experts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")


class PaddedRows:
    """Calls of a causal LM as TRL makes them.

    Args:
        most: tokens, padding included, of a forward pass without gradients. With them, the trainer cuts the batch.
    """

    shares = False

    def __init__(self, most: int | None = None) -> None:
        self.most = most

    def size(self, chosen: Sequence[int], rejected: Sequence[int], prompt: int) -> int:
        """Tokens that a pair of rows takes, `prompt` tokens and a completion each."""
        return 2 * max(len(chosen), len(rejected))

    def slots(self, sizes: Sequence[int], on_cpu: bool) -> int:
        """Tokens, padding included, of a pass of pairs of these sizes."""
        return len(sizes) * max(sizes)

    def groups(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> list[list[int]]:
        """Pairs of a batch that a budget of `most` tokens allows together."""
        lengths = (attention_mask != 0).sum(1).view(2, -1).amax(0).tolist()
        return batches_by_length([2 * length for length in lengths], self.most)

    def __call__(self, model: Any, **kwargs: Any) -> Any:
        if self.most is None or torch.is_grad_enabled() or not kwargs.get("fused_lm_head"):
            return model(**kwargs)
        tensors = {name: kwargs.pop(name) for name in ("input_ids", "attention_mask", "labels")}
        count, found = len(tensors["input_ids"]) // 2, {}
        for group in self.groups(**tensors):
            pairs = torch.tensor(group, device=tensors["input_ids"].device)
            rows = torch.cat((pairs, pairs + count))
            longest = int((tensors["attention_mask"][rows] != 0).any(0).nonzero().max()) + 1
            outputs = model(**{name: value[rows, :longest] for name, value in tensors.items()}, **kwargs)
            for name in FIELDS:
                if (part := outputs.get(name)) is not None:
                    whole = found.setdefault(name, part.new_zeros(2 * count, tensors["labels"].shape[1] - 1))
                    whole[rows, : longest - 1] = part[:, 1 - longest :]
        return FusedCausalLMOutput(**found)


class PrefixSharing:
    """Calls of a causal LM that TRL gave its fused head, with what the rows of a pair share computed once.

    Args:
        base: the causal LM itself, without PEFT; it is patched where its head can be run on labelled positions alone.
        most: slots, padding included, of a forward pass without gradients. With them, the trainer cuts the batch.
        several_passes: whether a batch may be split into several forward passes with gradients; not under DDP, whose
            gradients are averaged after the first.
    """

    shares = True

    def __init__(self, base: PreTrainedModel, most: int | None = None, several_passes: bool = True) -> None:
        self.base = base
        self.most = most
        self.several_passes = several_passes
        self.attention = base.config.get_text_config()._attn_implementation
        self.quantized = getattr(base, "is_quantized", False)
        self._probing: tuple[bool] | None = None
        if knows_head(base):
            add_token_head(base)

    def _shape(self, on_cpu: bool) -> dict[str, Any]:
        """What layouts look like, see `lay_out_pairs`."""
        flex = self.attention == "flex_attention"
        return {"multiple": 128 if flex else 1 if on_cpu else 8, "one_row": flex or self._probing is not None}

    def size(self, chosen: Sequence[int], rejected: Sequence[int], prompt: int) -> int:
        """Slots that a pair of rows takes, `prompt` tokens and a completion each."""
        return pair_slots(chosen, rejected, prompt)

    def slots(self, sizes: Sequence[int], on_cpu: bool) -> int:
        """Slots, padding included, of a pass of pairs of these sizes."""
        return layout_slots(sizes, **self._shape(on_cpu))

    def groups(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> list[list[int]]:
        """Pairs of a batch that a budget of `most` slots allows together."""
        ids, real, wanted = (t.cpu().numpy() for t in (input_ids, attention_mask != 0, labels != IGNORED))
        half, sizes = len(ids) // 2, []
        for pair in zip(range(half), range(half, 2 * half), strict=True):
            rows = [ids[row, real[row]] for row in pair]
            sizes.append(pair_slots(*rows, prompt_length([wanted[row, real[row]] for row in pair])))
        return group_pairs(sizes, self.most, **self._shape(input_ids.device.type == "cpu"))

    def __call__(self, model: Any, **kwargs: Any) -> FusedCausalLMOutput:
        """What `model(**kwargs)` gives, `kwargs` being those of TRL's DPO trainer: `input_ids`, `attention_mask` and
        `labels`, (2B, L) each, chosen rows first, and `fused_lm_head=True`.

        Args:
            model: `base`, as PEFT, DDP or FSDP wrap it.
        """
        if not kwargs.get("fused_lm_head"):
            return model(**kwargs)  # somebody wants logits
        ids, mask, labels = (kwargs.pop(name) for name in ("input_ids", "attention_mask", "labels"))
        own_head = knows_head(self.base)
        if own_head:
            kwargs.pop("fused_lm_head")
        layouts = lay_out_pairs(
            ids, mask, labels, most=self._most(ids.device.type == "cpu"), **self._shape(ids.device.type == "cpu")
        )
        passes = [self._run(model, layout, own_head, kwargs) for layout in layouts]
        places = torch.cat([layout.places for layout in layouts])
        shape = (ids.shape[0], ids.shape[1] - 1)

        def unpacked(name: str) -> torch.Tensor | None:
            """(2B, L-1): a field of the outputs, 0 where there is no label."""
            parts = [fields[name] for fields in passes]
            if parts[0] is None:
                return None
            values = torch.cat([part[layout.sources] for part, layout in zip(parts, layouts, strict=True)])
            return values.new_zeros(shape[0] * shape[1]).index_put((places,), values).view(shape)

        return FusedCausalLMOutput(**{name: unpacked(name) for name in FIELDS}, label_mask=labels[:, 1:] != IGNORED)

    def probe(self, model: Any, seen: bool, **kwargs: Any) -> FusedCausalLMOutput:
        """A call with all pairs in one row; unless `seen`, with causal attention and positions that go on, which is wrong."""
        self._probing = (seen,)
        try:
            return self(model, **kwargs)
        finally:
            self._probing = None

    def _most(self, on_cpu: bool) -> int | None:
        """Slots of a pass."""
        most = None if torch.is_grad_enabled() else self.most
        if on_cpu:
            keep_pages()
            if self.several_passes:
                return min(CPU_SLOTS, most or CPU_SLOTS)
        return most

    def _run(
        self, model: Any, layout: PairLayout, own_head: bool, kwargs: dict[str, Any]
    ) -> dict[str, torch.Tensor | None]:
        """The fields of a layout's outputs, (U,) each."""
        device = layout.input_ids.device
        # SDPA takes an additive mask in the dtype that a layer computes in alone, eager attention nothing else.
        exact = self.base.dtype == torch.float32 and not torch.is_autocast_enabled(device.type) and not self.quantized
        if self.attention == "flex_attention":
            mask: Any = layout.block_mask()
        elif self.attention == "eager" or (device.type == "cpu" and exact):
            mask = additive(layout.mask(), self.base.dtype)
        else:
            mask = layout.mask()
        inputs = {"input_ids": layout.input_ids, "position_ids": layout.position_ids, "attention_mask": mask, **kwargs}
        if self._probing == (False,):
            del inputs["position_ids"], inputs["attention_mask"]
        if own_head:
            outputs = model(**inputs, labelled=layout.labelled, targets=layout.targets)
            return {name: outputs.get(name) for name in FIELDS}
        outputs = model(**inputs, shift_labels=layout.label_slots())
        return {
            name: None if (field := outputs.get(name)) is None else field.flatten()[layout.labelled] for name in FIELDS
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
    training, name = model.training, type(sharing.base).__name__
    model.eval()
    try:
        with torch.no_grad(), autocast:
            exact = sharing.base.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(device.type)
            plain = model(**batch, use_cache=False).log_probs.float()
            shared, wrong = (sharing.probe(model, seen, **batch, use_cache=False).log_probs for seen in (True, False))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a model of unknown make comes up with, rows it can do
        return f"{name} fails on the layout's mask ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    finally:
        model.train(training)
    error, mistake = ((plain - found.float()).abs().max().item() for found in (shared, wrong))
    # In bfloat16 rounding alone makes tenths of a nat; what a model makes of no mask at all says how much is too much.
    if error > (1e-3 if exact else 0.3) or error > mistake / 4:
        return f"{name} gives other log-probabilities in the shared layout (by {error:.2g})"
    return None


def layout_of(trainer: DPOTrainer, model: Any) -> PrefixSharing | PaddedRows:
    """How a trainer calls `model`, its policy or its reference: in the prefix-shared layout, unless its settings, the model
    or the way it is trained forbid that. One warning says what does."""
    args, accelerator, most = trainer.args, trainer.accelerator, trainer.args.max_tokens_per_batch
    if not args.prefix_sharing:
        return PaddedRows(most)
    model = accelerator.unwrap_model(model)
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    reason = why_not(model, base)
    if args.neftune_noise_alpha:
        reason = "noise on embeddings (neftune_noise_alpha) depends on the width of a row"
    dropping = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules()) or functional_dropout(model)
    if not args.disable_dropout and dropping:
        reason = "dropout is on (disable_dropout=False), and both sides of a pair would share a prompt's"
    parallel = accelerator.parallelism_config
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
        reason = "context and sequence parallelism cut rows in pieces"
    if reason is None:
        # Ranks whose numbers of passes differ would wait for each other for ever.
        sharing = PrefixSharing(base, most, several_passes=accelerator.num_processes == 1)
        if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):  # parameters may lie in pieces there
            reason = differs(model, sharing, accelerator.autocast())
    if reason is None:
        return sharing
    logger.warning(f"prefix_sharing is off: {reason}")
    return PaddedRows(most)
