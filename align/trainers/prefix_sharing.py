"""Runs a trainer's padded batches, in the prefix-shared layout of `align.packing` where a model can, and hands back what
TRL expects."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger

from ..lm_head import add_token_head, knows_head, select_labelled
from ..logps import batches_by_length, configured_not_to_share, keep_pages, masks_of_layers, short_windows, windows
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

IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")

#: What a trial gives a model: the layout as it is; the layout without windows; no mask, and positions that go on. The last
#: two are wrong, and show how far a model that ignores its mask would be off.
FAITHFUL, UNWINDOWED, UNMASKED = "faithful", "unwindowed", "unmasked"


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
        self._probing: str | None = None
        select_labelled(base)
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
            return model(**kwargs)  # the caller reads logits
        ids, mask, labels = (kwargs.pop(name) for name in ("input_ids", "attention_mask", "labels"))
        on_cpu, routed = ids.device.type == "cpu", kwargs.get("output_router_logits", False)
        if not routed and getattr(self.base.config.get_text_config(), "output_router_logits", False):
            kwargs["output_router_logits"] = False  # because TRL does not ask for the router's loss
        # A router's loss is not a sum over tokens, so one pass holds all of them, each row's last one too.
        most = None if routed else self._most(on_cpu)
        layouts = lay_out_pairs(ids, mask, labels, most=most, whole=routed, **self._shape(on_cpu))
        passes = [self._run(model, layout, routed, kwargs) for layout in layouts]
        places = torch.cat([layout.places for layout in layouts])
        shape = (ids.shape[0], ids.shape[1] - 1)

        def unpacked(name: str) -> torch.Tensor | None:
            """(2B, L-1): a field of the outputs, 0 where there is no label."""
            parts = [fields[name] for fields in passes]
            if parts[0] is None:
                return None
            values = torch.cat([part[layout.sources] for part, layout in zip(parts, layouts, strict=True)])
            return values.new_zeros(shape[0] * shape[1]).index_put((places,), values).view(shape)

        fields = {name: unpacked(name) for name in FIELDS}
        return FusedCausalLMOutput(**fields, label_mask=labels[:, 1:] != IGNORED, aux_loss=passes[0].get("aux_loss"))

    def probe(self, model: Any, how: str, **kwargs: Any) -> FusedCausalLMOutput:
        """A call with all pairs in one row; `how` is `FAITHFUL`, or a way to be wrong."""
        self._probing = how
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
        self, model: Any, layout: PairLayout, routed: bool, kwargs: dict[str, Any]
    ) -> dict[str, torch.Tensor | None]:
        """The fields of a layout's outputs, (U,) each, and `aux_loss` where `routed`."""
        inputs: dict[str, Any] = {"input_ids": layout.input_ids, "labelled": layout.labelled, **kwargs}
        if self._probing != UNMASKED:
            mask = masks_of_layers(self.base.config, lambda window: self._mask(layout, window))
            # TRL's head gives the router's loss `attention_mask`, which holds how often a token counts.
            masks = {"attention_mask": layout.counts(), "seen": mask} if routed else {"attention_mask": mask}
            inputs |= {"position_ids": layout.position_ids, **masks}
        if not routed and knows_head(self.base):
            del inputs["fused_lm_head"]
            outputs = model(**inputs, targets=layout.targets)
            return {name: outputs.get(name) for name in FIELDS}
        outputs = model(**inputs, shift_labels=layout.targets.unsqueeze(0))
        fields = {name: None if (field := outputs.get(name)) is None else field[0] for name in FIELDS}
        return fields | {"aux_loss": outputs.get("aux_loss")}

    def _mask(self, layout: PairLayout, window: int | None) -> Any:
        """A layout's mask for layers with this window, as the model's kind of attention takes it."""
        window = None if self._probing == UNWINDOWED else window
        if self.attention == "flex_attention":
            return layout.block_mask(window)
        device = layout.input_ids.device.type
        # SDPA takes an additive mask only in the dtype that a layer computes in. Eager attention takes no other kind.
        exact = self.base.dtype == torch.float32 and not torch.is_autocast_enabled(device) and not self.quantized
        if self.attention == "eager" or (device == "cpu" and exact):
            return additive(layout.mask(window), self.base.dtype)
        return layout.mask(window)


def differs(
    model: PreTrainedModel, sharing: PrefixSharing, autocast: AbstractContextManager, routed: bool = False
) -> str | None:
    """Tries two short pairs in both layouts: why they come out differently, or `None` if they do not. What a forward pass
    makes of a mask and of position ids is nowhere declared. Sliding windows are made shorter than the pairs.

    Args:
        model: what TRL gave its fused head, with its adapters, not yet wrapped for several processes.
        autocast: what training runs in.
        routed: whether training adds the router's loss.
    """
    prompts, completions = ([1, 2, 3, 1, 2, 3], [3, 2, 1, 2, 3, 1]), ([4, 5, 6, 4, 2, 5], [6, 4, 5, 2, 6, 4])
    ids = torch.tensor(
        [prompt + own for own in completions for prompt in prompts], device=model.get_input_embeddings().weight.device
    )
    labels = ids.clone()
    labels[:, : len(prompts[0])] = IGNORED
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    batch |= {"fused_lm_head": True, "use_cache": False}
    router = {"output_router_logits": True} if routed else {}
    mistakes = [UNMASKED, *([UNWINDOWED] if any(windows(sharing.base.config).values()) else [])]
    training, name, kind = model.training, type(sharing.base).__name__, ids.device.type
    devices = [ids.device] if kind == "cuda" else []
    try:
        with torch.no_grad(), autocast, short_windows(sharing.base), torch.random.fork_rng(devices):
            exact = sharing.base.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(kind)
            before = _random_state(ids.device)
            model.train()(**batch)
            drawn = not torch.equal(before, _random_state(ids.device))
            model.eval()
            plain, shared = model(**batch, **router), sharing.probe(model, FAITHFUL, **batch, **router)
            wrong = [sharing.probe(model, how, **batch).log_probs for how in mistakes]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a model of unknown make comes up with, rows it can do
        return f"{name} fails on the layout's mask ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    finally:
        model.train(training)
    if drawn:
        return f"{name} draws random numbers in training, and both sides of a pair would share a prompt's"
    # In bfloat16, rounding alone adds tenths of a nat, so the limit is a share of the error that a wrong mask makes.
    apart = _largest if exact else _mean
    mistake = min(apart(plain.log_probs, found) for found in wrong)
    limit = min(1e-3, mistake / 20) if exact else min(0.3, mistake / 4)
    if not (error := apart(plain.log_probs, shared.log_probs)) <= limit:  # NaN is neither
        return f"{name} gives other log-probabilities in the shared layout (by {error:.2g})"
    if routed:
        error, limit = _largest(plain.aux_loss, shared.aux_loss), (1e-4 if exact else 0.05) * plain.aux_loss
        if not error <= limit:
            return f"{name} gives another router loss in the shared layout (by {error:.2g}); set router_aux_loss_coef=0 to share"
    return None


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.float() - other.float()).abs().max().item()


def _mean(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.float() - other.float()).abs().mean().item()


def layout_of(trainer: DPOTrainer, model: Any) -> PrefixSharing | PaddedRows:
    """How a trainer calls `model`, its policy or its reference: in the prefix-shared layout, unless its settings, the model
    or the way it is trained forbid that. One warning says what does."""
    args, accelerator, most = trainer.args, trainer.accelerator, trainer.args.max_tokens_per_batch
    if not args.prefix_sharing:
        return PaddedRows(most)
    model = accelerator.unwrap_model(model)
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    reason = configured_not_to_share(model, IMPLEMENTATIONS)
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
            reason = differs(model, sharing, accelerator.autocast(), trainer.aux_loss_enabled)
    if reason is None:
        return sharing
    logger.warning(f"prefix_sharing is off: {reason}")
    return PaddedRows(most)
