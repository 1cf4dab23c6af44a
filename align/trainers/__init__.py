"""Trainers that subclass TRL's, a weight for every token."""

from .cdpo import CDPOConfig, CDPOTrainer
from .tgdpo import TGDPOConfig, TGDPOTrainer
from .token_dpo import TokenDPOConfig, TokenDPOTrainer

__all__ = ["CDPOConfig", "CDPOTrainer", "TGDPOConfig", "TGDPOTrainer", "TokenDPOConfig", "TokenDPOTrainer"]
