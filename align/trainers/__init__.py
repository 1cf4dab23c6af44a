"""Trainers that subclass TRL's, a weight for every token."""

from .cdpo import CDPOConfig, CDPOTrainer
from .token_dpo import TokenDPOConfig, TokenDPOTrainer

__all__ = ["CDPOConfig", "CDPOTrainer", "TokenDPOConfig", "TokenDPOTrainer"]
