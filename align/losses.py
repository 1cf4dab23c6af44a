"""Token weights and losses as pure tensor functions; imports torch alone.

Notation (B pairs, T label positions, padding and prompt included): `logratios` Δ_t = log π_θ(y_t) − log π_ref(y_t) in
nats, `weights` w_t, both (B, T) and 0 outside the completion.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

#: Numbers of a temporary copy of logits.
CHUNK = 1 << 22


def cdpo_weights(
    chosen_scores: torch.Tensor, rejected_scores: torch.Tensor, weight_chosen: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """cDPO's weights from contrastive scores s_t: w⁻_t = 1 − s_t, and w⁺_t = 1 or s_t (Lin et al. 2025,
    arXiv 2411.19943).

    Args:
        chosen_scores, rejected_scores: (B, T) in [0, 1]; low = critical.
        weight_chosen: whether chosen tokens are weighted too.

    Returns:
        Weights of the chosen and of the rejected tokens, (B, T) each.
    """
    chosen_weights = chosen_scores if weight_chosen else torch.ones_like(chosen_scores)
    return chosen_weights, 1.0 - rejected_scores


def tgdpo_weights(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    alpha: float,
    beta: float,
    floor: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """TGDPO's weights from token rewards r̂_t = β log(π̂/π_ref): w⁺_t = 1 + α r̂⁺_t, w⁻_t = 1 − α r̂⁻_t (Zhu et al. 2025,
    arXiv 2506.14574).

    Args:
        chosen_logratios, rejected_logratios: (B, T) log-ratio of guide and reference, nats.
        alpha: how far the rewards bend the weights.
        beta: turns log-ratios into rewards.
        floor: least weight; the released code has none, so that weights can be negative.

    Returns:
        Weights of the chosen and of the rejected tokens, (B, T) each.
    """
    chosen, rejected = 1.0 + alpha * beta * chosen_logratios, 1.0 - alpha * beta * rejected_logratios
    return (chosen, rejected) if floor is None else (chosen.clamp(min=floor), rejected.clamp(min=floor))


def weighted_logps(logps: torch.Tensor, ref_logps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Log-probabilities whose sum exceeds the reference's by Σ_t w_t Δ_t: ref_t + w_t Δ_t, written so that w_t = 1
    gives `logps` to the last bit.

    Args:
        logps, ref_logps, weights: (B, T).
    """
    return logps + (weights - 1.0) * (logps - ref_logps)


def position_token_dpo_loss(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    chosen_weights: torch.Tensor,
    rejected_weights: torch.Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The loss of cDPO's released code: −log σ( β (w⁺_t Δ⁺_t − w⁻_t Δ⁻_t) ), the mean over all B·T positions.

    Chosen and rejected tokens are paired by position, and prompt and padding positions count, each adding log 2: the
    value depends on the padded width T, as it does there.

    Args:
        chosen_logratios, rejected_logratios, chosen_weights, rejected_weights: (B, T), one T for both sides.
        label_smoothing: probability that the preference is flipped (conservative DPO).
    """
    margins = beta * (chosen_weights * chosen_logratios - rejected_weights * rejected_logratios)
    losses = -F.logsigmoid(margins) * (1.0 - label_smoothing) - F.logsigmoid(-margins) * label_smoothing
    return losses.mean()


def contrastive_scores(
    positive_logits: torch.Tensor,
    negative_logits: torch.Tensor,
    token_ids: torch.Tensor,
    beta: float = 1.0,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Contrastive probability of each token: s_t = softmax_v( (1+β) log p⁺(v) − β log p⁻(v) ) at v = y_t
    (arXiv 2411.19943). The normalizers of p⁺ and p⁻ are the same for every v, so logits serve as log-probabilities.

    Args:
        positive_logits, negative_logits: (U, V) logits at the positions that predict the tokens.
        token_ids: (N,) the tokens y_t.
        beta: β_CE, weight of the negative model.
        positions: (N,) which row of the logits predicts each token; by default N = U and each row its own.

    Returns:
        (N,) float32 in [0, 1]; low = critical.
    """
    if positions is None:
        positions = torch.arange(len(token_ids), device=token_ids.device)
    # In chunks, since a copy of the logits of a large vocabulary costs more than the sums over it.
    chunk = max(1, CHUNK // positive_logits.shape[-1])
    normalizers = [
        torch.lerp(positive.float(), negative.float(), -beta).logsumexp(-1)
        for positive, negative in zip(positive_logits.split(chunk), negative_logits.split(chunk), strict=True)
    ]
    positive, negative = positive_logits[positions, token_ids].float(), negative_logits[positions, token_ids].float()
    return (torch.lerp(positive, negative, -beta) - torch.cat(normalizers)[positions]).exp()


def entropies(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of each row's softmax, H = log Σ_v e^{z_v} − Σ_v p_v z_v.

    Args:
        logits: (U, V).

    Returns:
        (U,) float32, nats.
    """
    found = []
    for part in logits.split(max(1, CHUNK // logits.shape[-1])):
        logps = part.float().log_softmax(-1)
        found.append(-(logps.exp() * logps.masked_fill(logps == -torch.inf, 0.0)).sum(-1))
    return torch.cat(found)
