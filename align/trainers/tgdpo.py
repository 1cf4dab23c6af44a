"""TGDPO: DPO whose tokens leave the reference as far as a token-level reward says (Zhu et al., ICML 2025,
arXiv 2506.14574)."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

import torch

from ..errors import ConfigError
from ..losses import tgdpo_weights
from .token_dpo import TokenDPOConfig, TokenDPOTrainer


@dataclass
class TGDPOConfig(TokenDPOConfig):
    """[`TokenDPOConfig`] with TGDPO's fields. The released code trains all weights with learning rate 7e-7, β 0.1, for one
    epoch of 128 pairs per update.

    Args:
        alpha (`float`, defaults to `0.5`):
            α, how far the guidance bends the weights; 0 is DPO.
        guidance_beta (`float`, *optional*):
            β that turns the guide's log-ratios into token rewards r̂_t; `beta` by default.
        weight_floor (`float`, *optional*):
            Least weight of a token. Without it, as in the released code, a token of extreme reward has a negative weight.
    """

    alpha: float = field(default=0.5, metadata={"help": "How far the guidance bends the weights; 0 is DPO."})
    guidance_beta: float | None = field(
        default=None, metadata={"help": "β that turns the guide's log-ratios into token rewards; beta by default."}
    )
    weight_floor: float | None = field(default=None, metadata={"help": "Least weight of a token; off by default."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise ConfigError(f"alpha = {self.alpha} would turn the guidance round; give 0 (DPO) or more")
        if self.guidance_beta is not None and self.guidance_beta <= 0:
            raise ConfigError(f"guidance_beta = {self.guidance_beta} must be positive; leave it out for beta")
        if self.weight_floor is not None and self.weight_floor > 1:
            raise ConfigError(f"weight_floor = {self.weight_floor} would lift tokens without guidance; give at most 1")


class TGDPOTrainer(TokenDPOTrainer):
    """[`TokenDPOTrainer`] with w⁺_t = 1 + α r̂⁺_t and w⁻_t = 1 − α r̂⁻_t, the token reward r̂_t being β times the guide's
    log-ratio to the reference, from `chosen_guidance_logratios` and `rejected_guidance_logratios`.

    `align score guidance` writes those columns, so that neither guide nor reference is in memory while training.
    """

    _tag_names = ["trl", "dpo", "align", "tgdpo"]
    _name = "TGDPO"
    _paper = {
        "title": "TGDPO: Harnessing Token-Level Reward Guidance for Enhancing Direct Preference Optimization",
        "id": "2506.14574",
        "citation": textwrap.dedent("""\
            @inproceedings{zhu2025tgdpo,
                title     = {{TGDPO: Harnessing Token-Level Reward Guidance for Enhancing Direct Preference Optimization}},
                author    = {Mingkang Zhu and Xi Chen and Zhongdao Wang and Bei Yu and Hengshuang Zhao and Jiaya Jia},
                year      = 2025,
                booktitle = {International Conference on Machine Learning},
                eprint    = {2506.14574},
            }"""),
    }
    token_columns = ("guidance_logratios",)
    config_class = TGDPOConfig

    def required_columns(self, args: TGDPOConfig) -> tuple[str, ...]:
        return ("chosen_guidance_logratios", "rejected_guidance_logratios")

    def constant_weights(self) -> tuple[str, str]:
        if self.args.alpha == 0:
            return self._name, "alpha = 0 takes no guidance; raise it, or train DPO (methods.dpo)"
        return self._name, (
            "The guide may be the reference: score again with `align score guidance` and a guide that preference training has "
            f"changed; or alpha = {self.args.alpha:g} and weight_floor = {self.args.weight_floor} flatten what it says"
        )

    def token_weights(
        self, chosen: dict[str, torch.Tensor], rejected: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        beta = self.beta if self.args.guidance_beta is None else self.args.guidance_beta
        logratios = chosen["guidance_logratios"], rejected["guidance_logratios"]
        return tgdpo_weights(*logratios, self.args.alpha, beta, self.args.weight_floor)
