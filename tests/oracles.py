"""Plain float64 loops over the papers' equations, written without looking at the code under test."""

from __future__ import annotations

import math

import torch


def completion_logps(model, prompt_ids: list[int], completion_ids: list[int]) -> list[torch.Tensor]:
    """log π(y_t | x, y_<t), one token after the other from the full softmax, in the model's own dtype."""
    logits = model(input_ids=torch.tensor([prompt_ids + completion_ids])).logits[0].double()
    result = []
    for t, token in enumerate(completion_ids):
        row = logits[len(prompt_ids) + t - 1]
        result.append(row[token] - torch.log(torch.exp(row - row.max()).sum()) - row.max())
    return result


def log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    return -torch.log(1 + torch.exp(-x))


def sequence_loss(policy, reference, pairs: list[dict], beta: float, weights) -> torch.Tensor:
    """Mean over pairs of −log σ(β(Σ w⁺Δ⁺ − Σ w⁻Δ⁻)); `weights(pair)` gives both lists."""
    total = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        margin = torch.zeros((), dtype=torch.float64)
        for sign, side, side_weights in zip((1, -1), ("chosen", "rejected"), weights(pair), strict=True):
            ids = pair[f"{side}_ids"]
            new = completion_logps(policy, pair["prompt_ids"], ids)
            with torch.no_grad():
                old = completion_logps(reference, pair["prompt_ids"], ids)
            for t in range(len(ids)):
                margin = margin + sign * side_weights[t] * (new[t] - old[t])
        total = total - log_sigmoid(beta * margin)
    return total / len(pairs)


def position_loss(policy, reference, pairs: list[dict], beta: float, weights, width: int) -> torch.Tensor:
    """Mean over pairs and over the width − 1 predicted positions of −log σ(β(w⁺_tΔ⁺_t − w⁻_tΔ⁻_t)), position by position."""
    total = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        weighted = {}
        for side, side_weights in zip(("chosen", "rejected"), weights(pair), strict=True):
            ids = pair[f"{side}_ids"]
            new = completion_logps(policy, pair["prompt_ids"], ids)
            with torch.no_grad():
                old = completion_logps(reference, pair["prompt_ids"], ids)
            weighted[side] = {len(pair["prompt_ids"]) + t: side_weights[t] * (new[t] - old[t]) for t in range(len(ids))}
        for position in range(1, width):
            margin = weighted["chosen"].get(position, 0.0) - weighted["rejected"].get(position, 0.0)
            total = total - log_sigmoid(beta * torch.as_tensor(margin, dtype=torch.float64))
    return total / (len(pairs) * (width - 1))


def contrastive_score(positive: list[float], negative: list[float], token: int, beta: float) -> float:
    """softmax_v((1+β) log p⁺(v) − β log p⁻(v)) at one token, from two rows of logits, with both softmaxes written out."""
    log_p = [z - math.log(sum(math.exp(y) for y in positive)) for z in positive]
    log_n = [z - math.log(sum(math.exp(y) for y in negative)) for z in negative]
    powered = [math.exp((1 + beta) * p - beta * n) for p, n in zip(log_p, log_n, strict=True)]
    return powered[token] / sum(powered)


def own_context(row, generation, next_logits):
    """The context of a `MixedRow` whose own tokens are drawn one at a time, each from the logits of one row of tokens.

    Args:
        next_logits: takes token ids, and returns the (1, V) logits of the token after them.
    """
    context = list(row.ids)
    for t, own in enumerate(row.own):
        if own:
            before = context[:t] if generation == "autoregressive" else row.ids[:t]
            passed = next_logits(list(before))[0].double().softmax(-1).cumsum(-1)
            context[t] = int((passed <= row.uniforms[t] * passed[-1]).sum())
    return context
