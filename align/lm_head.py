"""Log-probabilities of given tokens from hidden states, for the CPU: no logits but of a few rows at a time.

TRL's fused head scores every position on a CPU, prompts and padding included, and computes all logits a second time in the
backward pass. This one sees the positions that have a label, and where the head is frozen (LoRA), its backward pass is one
multiplication: the gradient of log p(y) with respect to a hidden state, W_y − Σ_v p_v W_v, is made while p is at hand.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Numbers of a chunk of logits: small enough for glibc to keep its pages, large enough for matrix products.
CHUNK = 1 << 23

#: Settings of configurations that change logits after the head, except for a soft cap.
BEHIND_THE_HEAD = (
    "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling",
)  # fmt: skip


class TokenLogProbs(torch.autograd.Function):
    """Per token of a (U, H) batch of hidden states: log-probability of its target, and entropy, mean logit and whether the
    target is the likeliest token, these without gradient. A soft cap c makes c · tanh(z / c) of every logit z."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, cap=None):
        """(U, H), (V, H), (V,) or None, (U,) -> log-probabilities, entropies, mean logits, float32 (U,), and top-1, bool."""
        dtype = _compute_dtype(hidden)
        rows, table = hidden.to(dtype), weight.to(dtype)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        logps, entropy, means = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
        normalizers = torch.empty_like(logps)
        top1 = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        direction = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if needs_hidden else None
        size = max(1, CHUNK // len(weight))
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = _logits(rows[part], table, bias, cap)
            if cap is not None:
                means[part] = logits.mean(1)
                slope = _slope_of_cap(logits, cap) if needs_hidden else None
            own = logits.gather(1, targets[part, None])[:, 0]
            largest, likeliest = logits.max(1)
            top1[part] = likeliest == targets[part]
            logits -= largest[:, None]
            exps = logits.exp()
            sums = exps.sum(1)
            normalizers[part] = largest + sums.log()
            logps[part] = own - normalizers[part]
            entropy[part] = sums.log() - torch.linalg.vecdot(exps, logits) / sums
            if needs_hidden:
                own_row = table[targets[part]].float()
                if cap is not None:
                    exps *= slope
                    own_row *= slope.gather(1, targets[part, None])
                mean = (exps.to(dtype) @ table).float() / sums[:, None]
                direction[part] = own_row - mean
        if cap is None:  # Σ_v z_v / V is one product with the mean of the head's rows
            means = rows.float() @ weight.float().mean(0)
            if bias is not None:
                means += bias.float().mean()
        ctx.needs_table = needs_weight or needs_bias
        kept = (hidden, weight, bias, normalizers) if ctx.needs_table else (None, None, None, None)
        ctx.save_for_backward(direction, targets, *kept)
        ctx.dtypes, ctx.cap = (hidden.dtype, dtype), cap
        ctx.mark_non_differentiable(entropy, means, top1)
        return logps, entropy, means, top1

    @staticmethod
    def backward(ctx, grad, *_):
        direction, targets, hidden, weight, bias, normalizers = ctx.saved_tensors
        given, dtype = ctx.dtypes
        grad_hidden = None if direction is None else (grad[:, None] * direction).to(given)
        if not ctx.needs_table:
            return grad_hidden, None, None, None, None
        rows, table = hidden.to(dtype), weight.to(dtype)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        grad_bias = None if bias is None else torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
        size = max(1, CHUNK // len(weight))
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            # dL/dz_v = g (1[v = y] − p_v)
            logits = _logits(rows[part], table, bias, ctx.cap)
            slope = (logits - normalizers[part, None]).exp_().mul_(-grad[part, None])
            slope.scatter_add_(1, targets[part, None], grad[part, None].float())
            if ctx.cap is not None:
                slope *= _slope_of_cap(logits, ctx.cap)
            grad_weight.addmm_(slope.T, rows[part].float())
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        grad_bias = None if bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, None, None


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _logits(rows: torch.Tensor, table: torch.Tensor, bias: torch.Tensor | None, cap: float | None) -> torch.Tensor:
    """(n, V) float32."""
    logits = (rows @ table.T).float()
    if bias is not None:
        logits.add_(bias.float())
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _slope_of_cap(capped: torch.Tensor, cap: float) -> torch.Tensor:
    """d(c · tanh(z / c)) / dz = 1 − tanh²(z / c)."""
    return (capped / cap).square_().neg_().add_(1)


def knows_head(model: PreTrainedModel) -> bool:
    """Whether the logits of a causal LM are its head's output, soft-capped or as it is, on a CPU and in one piece."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    plain = not any(getattr(config, name, None) for name in BEHIND_THE_HEAD)
    return plain and type(head) is torch.nn.Linear and _is_whole(head.weight) and _on_cpu(head)


def _is_whole(weight: torch.Tensor) -> bool:
    """Whether this process has all of it at any time: no DTensor (FSDP2), nor empty outside of its module (ZeRO-3)."""
    return type(weight) is torch.nn.Parameter and not hasattr(weight, "ds_id")


def _on_cpu(head: torch.nn.Linear) -> bool:
    return head.weight.device.type == "cpu" and head.weight.dtype in (torch.float32, torch.bfloat16)


def own_forward(module: torch.nn.Module) -> Callable[..., Any]:
    """A module's `forward` as a function of the module, for what replaces it.

    A bound method would stay bound to this module in a deep copy. Then a reference that is copied from a policy would
    compute with the policy's weights.
    """
    forward = module.forward
    if getattr(forward, "__self__", None) is module:
        return forward.__func__
    return lambda _self, *args, **kwargs: forward(*args, **kwargs)  # a hook of accelerate's, put there on the module


def select_labelled(model: PreTrainedModel) -> None:
    """Lets the backbone of a causal LM, its `base_model`, give its head the labelled positions alone.

    `labelled` (U,) are flat indices into the batch's positions: hidden states come out as (1, U, H). `seen` is the mask
    of attention where `attention_mask` is one that a router's loss reads. All other calls are the backbone's own.
    """
    own = own_forward(model.base_model)

    @functools.wraps(type(model.base_model).forward)
    def forward(self, *args: Any, labelled: torch.Tensor | None = None, seen: Any = None, **kwargs: Any):
        if seen is not None:
            kwargs["attention_mask"] = seen
        outputs = own(self, *args, **kwargs)
        if labelled is not None:
            outputs.last_hidden_state = outputs.last_hidden_state.flatten(0, 1)[labelled].unsqueeze(0)
        return outputs

    model.base_model.forward = types.MethodType(forward, model.base_model)


def add_token_head(model: PreTrainedModel) -> None:
    """Lets `model(..., labelled=positions, targets=tokens)` score these positions alone.

    `labelled` (U,) are flat indices into the batch's positions, `targets` (U,) the tokens that they predict. All other calls
    are the model's own. Call it after `select_labelled`, on a model that TRL gave its fused head, before DDP or FSDP wrap
    it.
    """
    own = own_forward(model)

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against it
    def forward(self, *args: Any, targets: torch.Tensor | None = None, **kwargs: Any):
        if targets is None:
            return own(self, *args, **kwargs)
        from .trl_versions import FusedCausalLMOutput

        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[0]
        head = self.get_output_embeddings()
        cap = getattr(self.config.get_text_config(), "final_logit_softcapping", None)
        logps, entropy, means, top1 = TokenLogProbs.apply(hidden, head.weight, head.bias, targets, cap)
        return FusedCausalLMOutput(log_probs=logps, entropy=entropy, mean_logits=means, is_top1=top1)

    model.forward = types.MethodType(forward, model)
