"""cDPO: DPO that pushes down the critical tokens of wrong solutions (Lin et al., ICML 2025, arXiv 2411.19943)."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

import torch

from ..errors import ConfigError
from ..losses import cdpo_weights, position_token_dpo_loss
from .token_dpo import TokenDPOConfig, TokenDPOTrainer


@dataclass
class CDPOConfig(TokenDPOConfig):
    """[`TokenDPOConfig`] with cDPO's fields. The released code trains with learning rate 4e-5 (LoRA), β 0.1, 3 epochs.

    Args:
        weight_chosen (`bool`, defaults to `False`):
            Whether chosen tokens are weighted with their scores too: w⁺_t = s_t instead of 1.
        loss_aggregation (`str`, defaults to `"sequence"`):
            `"sequence"` sums weighted log-ratios over tokens before the log-sigmoid. `"position"` is what the released
            code computes: a log-sigmoid at every position, averaged over all of them, padding and prompt included.
    """

    weight_chosen: bool = field(default=False, metadata={"help": "Weight chosen tokens with their scores, too."})
    loss_aggregation: str = field(
        default="sequence", metadata={"help": "Where the log-sigmoid stands.", "choices": ["sequence", "position"]}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_aggregation not in ("sequence", "position"):
            raise ConfigError(f"loss_aggregation = {self.loss_aggregation!r} is unknown; use 'sequence' or 'position'")
        if self.loss_aggregation == "position":
            wrong = {
                name: value
                for name, value, only in (
                    ("loss_type", self.loss_type, ["sigmoid"]),
                    ("f_divergence_type", self.f_divergence_type, "reverse_kl"),
                    ("ld_alpha", self.ld_alpha, None),
                    ("loss_weights", self.loss_weights, None),
                )
                if value != only
            }
            if wrong:
                raise ConfigError(
                    f"loss_aggregation='position' is the sigmoid loss of the released code; unset {wrong}"
                )


class CDPOTrainer(TokenDPOTrainer):
    """[`TokenDPOTrainer`] with w⁻_t = 1 − s_t and w⁺_t = 1 (or s_t), from `rejected_ce_scores` (and `chosen_ce_scores`).

    `align score contrastive` writes those columns. Their ids must be the data set's own.
    """

    _tag_names = ["trl", "dpo", "align", "cdpo"]
    _name = "cDPO"
    _paper = {
        "title": "Critical Tokens Matter: Token-Level Contrastive Estimation Enhances LLM's Reasoning Capability",
        "id": "2411.19943",
        "citation": textwrap.dedent("""\
            @inproceedings{lin2025critical,
                title     = {{Critical Tokens Matter: Token-Level Contrastive Estimation Enhances LLM's Reasoning Capability}},
                author    = {Zicheng Lin and Tian Liang and Jiahao Xu and Qiuzhi Lin and Xing Wang and Ruilin Luo and Chufan Shi and Siheng Li and Yujiu Yang and Zhaopeng Tu},
                year      = 2025,
                booktitle = {International Conference on Machine Learning},
                eprint    = {2411.19943},
            }"""),
    }
    token_columns = ("ce_scores",)
    config_class = CDPOConfig

    def required_columns(self, args: CDPOConfig) -> tuple[str, ...]:
        return ("rejected_ce_scores", *(("chosen_ce_scores",) if args.weight_chosen else ()))

    def constant_weights(self) -> tuple[str, str]:
        return self._name, (
            "Score again with `align score contrastive` and two adapters that were trained apart, or train DPO (methods.dpo)"
        )

    def token_weights(
        self, chosen: dict[str, torch.Tensor], rejected: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = chosen.get("ce_scores", chosen["mask"])
        return cdpo_weights(scores, rejected["ce_scores"], self.args.weight_chosen)

    def _finish_loss(self, loss, logratios, weights, mask):
        if self.args.loss_aggregation == "sequence":
            return super()._finish_loss(loss, logratios, weights, mask)
        return position_token_dpo_loss(*logratios.chunk(2), *weights.chunk(2), self.beta, self.label_smoothing)
