"""Per-token quantities of given ids under a model: batched by length, head on completion positions alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .errors import ConfigError
from .models import active_adapter
from .tokens import pad_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

#: A prompt and its completion, as ids.
Row = tuple[Sequence[int], Sequence[int]]


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Groups indices so that each batch, padded to its longest row, holds at most `max_tokens` positions.

    Longest rows come first, so that memory runs out in the first batch or never. A row longer than `max_tokens` gets a
    batch of its own.

    Args:
        lengths: length of every row, in tokens.
        max_tokens: budget of a batch, padding included.

    Raises:
        ConfigError: the budget is not positive.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens_per_batch = {max_tokens} must be at least 1")
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@contextmanager
def _head_on(model: PreTrainedModel, positions: torch.Tensor):
    """Lets the LM head see the hidden states of `positions` (B, L, bool) only, as one row (1, N, H).

    A hook on the head, not a head of our own: scaling and soft-capping after it stay the model's.
    """

    def select(_module, args):
        return (args[0][positions.to(args[0].device)].unsqueeze(0), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def completion_logits(
    model: PreTrainedModel, rows: Sequence[Row], pad_token_id: int, adapter: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that predict the completions' tokens, in one padded forward pass.

    Args:
        model: causal LM, with or without adapters.
        rows: prompt and completion ids; neither is empty.
        adapter: the adapter to run under; `None` is the bare base.

    Returns:
        (N, V) logits and (N,) token ids, N being the number of completion tokens, row after row.
    """
    import torch

    device = model.get_input_embeddings().weight.device
    input_ids = pad_rows([[*prompt, *completion] for prompt, completion in rows], pad_token_id).to(device)
    attention_mask = pad_rows([[1] * (len(prompt) + len(completion)) for prompt, completion in rows], 0).to(device)
    is_label = pad_rows([[0] * len(prompt) + [1] * len(completion) for prompt, completion in rows], 0).bool().to(device)
    predicting = torch.zeros_like(is_label)
    predicting[:, :-1] = is_label[:, 1:]
    with active_adapter(model, adapter), _head_on(model, predicting):
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    return logits[0], input_ids[is_label].to(logits.device)


def per_token(
    rows: Sequence[Row], compute: Callable[[list[Row]], torch.Tensor], max_tokens_per_batch: int
) -> list[list[float]]:
    """Runs `compute` on length-sorted batches and hands every row its own numbers back, in the order of `rows`.

    Args:
        rows: prompt and completion ids. Equal rows are computed once.
        compute: batch of rows -> (N,) numbers of their completion tokens, row after row.
        max_tokens_per_batch: see `batches_by_length`.

    Returns:
        One list per row, as long as its completion.
    """
    import torch

    unique = {(tuple(prompt), tuple(completion)): None for prompt, completion in rows}
    todo = list(unique)
    for batch in batches_by_length(
        [len(prompt) + len(completion) for prompt, completion in todo], max_tokens_per_batch
    ):
        batch_rows = [todo[i] for i in batch]
        with torch.inference_mode():
            numbers = compute(batch_rows).float().cpu()
        for row, values in zip(
            batch_rows, numbers.split([len(completion) for _, completion in batch_rows]), strict=True
        ):
            unique[row] = values.tolist()
    return [unique[(tuple(prompt), tuple(completion))] for prompt, completion in rows]


def token_logps(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    pad_token_id: int,
    adapter: str | None = None,
    max_tokens_per_batch: int = 8192,
) -> list[list[float]]:
    """Log-probability, in nats, of every completion token given what precedes it.

    Args:
        model: causal LM in eval mode.
        rows: prompt and completion ids.
        adapter: see `completion_logits`.

    Returns:
        One list per row, one number per id of its completion.
    """

    def compute(batch: list[Row]) -> torch.Tensor:
        logits, ids = completion_logits(model, batch, pad_token_id, adapter)
        logits = logits.float()
        return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)

    return per_token(rows, compute, max_tokens_per_batch)
