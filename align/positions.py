"""How many positions a model has, where it looks them up in a table of fixed size.

Beyond a learned table, a forward pass ends in an IndexError, or on a GPU in an assertion that leaves the device unusable.
Rotary models compute positions, so `max_position_embeddings` does not bound them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import RecordError
from .models import base_model, prompt_learning

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

#: Rows that a table has before its first position, at most: OPT's has 2.
MOST_BEFORE = 8


def position_limit(model: PreTrainedModel | PeftModel) -> int | None:
    """Most tokens that a model takes; `None` where no table of positions bounds it.

    A table has a row for each of the `max_position_embeddings` positions, and maybe a few before. It is an embedding
    other than that of tokens, or a constant: sinusoids (GPT-J), or a causal mask.
    """
    import torch

    base = base_model(model)
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    found = []
    for module in base.modules():
        if isinstance(module, torch.nn.Embedding) and module is not base.get_input_embeddings():
            before = module.num_embeddings - positions
            if 0 <= before <= MOST_BEFORE:
                # Of a table without rows before, padding takes the first ones: RoBERTa counts from padding_idx + 1.
                taken = before or (0 if module.padding_idx is None else module.padding_idx + 1)
                found.append(module.num_embeddings - taken)
        for buffer in module._buffers.values():
            if buffer is not None and buffer.dim() >= 2 and positions in (buffer.shape[0], buffer.shape[-1]):
                found.append(positions)
    return min(found) - _virtual_tokens(model) if found else None


def _virtual_tokens(model: PreTrainedModel | PeftModel) -> int:
    """Positions that a prompt-learning adapter takes before the prompt."""
    return getattr(prompt_learning(model), "num_virtual_tokens", None) or 0


def check_positions(tokens: int, limit: int | None, name: str, remedy: str) -> None:
    """Raises a RecordError where a sequence has more tokens than its model has positions.

    Args:
        name: what has so many tokens.
        remedy: what to do about it, after "give a model with more, or".
    """
    if limit is not None and tokens > limit:
        raise RecordError(
            f"{name} = {tokens} tokens must be at most {limit}, the positions of the model; give a model with more, or {remedy}"
        )
