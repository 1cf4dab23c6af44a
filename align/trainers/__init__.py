"""Trainers that subclass TRL's: a weight for every token, or contexts of the model's own tokens."""

from .cdpo import CDPOConfig, CDPOTrainer
from .self_generated import BASHConfig, BASHTrainer, RACConfig, RACTrainer
from .tgdpo import TGDPOConfig, TGDPOTrainer
from .token_dpo import TokenDPOConfig, TokenDPOTrainer

__all__ = [
    "BASHConfig", "BASHTrainer", "CDPOConfig", "CDPOTrainer", "RACConfig", "RACTrainer", "TGDPOConfig", "TGDPOTrainer",
    "TokenDPOConfig", "TokenDPOTrainer",
]  # fmt: skip
