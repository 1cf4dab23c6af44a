"""Drawing a policy's own tokens into rows of ground truth (BASH): in parallel, or one after the other.

Every choice comes from numbers that belong to a row and a position: the token at position t is the one at which the
policy's cumulative probabilities pass u_t. So the draws do not depend on how rows are batched, and repeated passes of the
parallel way come to rest at the very tokens that the autoregressive way draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .checks import check_temperature, check_whole
from .errors import ConfigError
from .logps import batches_by_length, head_on, keep_pages
from .losses import CHUNK
from .mix import choose_own, interleave, row_generator
from .sample import generate_ids, pad_left
from .tokens import pad_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

GENERATIONS = ("parallel", "autoregressive")


@dataclass(frozen=True)
class OwnTokens:
    """How own tokens are drawn.

    Args:
        generation: what ŷ_t is conditioned on: the ground truth before it (`parallel`, one forward pass), or the mixed context
            before it (`autoregressive`).
        passes: of `parallel`: how often the draws are repeated, each time on the context that the last pass gave. Choices
            stay the same, so it ends where nothing changes any more, which is what `autoregressive` draws.
        temperature: of the draws; 0 takes the likeliest token.
        max_tokens_per_batch: budget of a batch, padding included.
    """

    generation: str = "parallel"
    passes: int = 1
    temperature: float = 1.0
    max_tokens_per_batch: int = 16384

    def __post_init__(self) -> None:
        if self.generation not in GENERATIONS:
            raise ConfigError(f"generation {self.generation!r} is unknown; there are {', '.join(GENERATIONS)}")
        check_whole("passes", self.passes, 1)
        if self.generation == "autoregressive" and self.passes != 1:
            raise ConfigError(f"passes = {self.passes} belongs to generation 'parallel'; leave it out")
        check_temperature("temperature", self.temperature)
        check_whole("max_tokens_per_batch", self.max_tokens_per_batch, 1)


#: Largest parallel batch on a CPU: beyond it, hidden states leave the cores' caches, and a pass takes half as long again.
CPU_TOKENS = 2048


@dataclass
class MixedRow:
    """One row of ground truth, where the policy's own tokens go in it, and the context so far.

    Args:
        ids: ground truth, prompt included.
        own: per id, whether an own token stands there.
        uniforms: per id, u in [0, 1) that decides the token.
    """

    ids: Sequence[int]
    own: Sequence[bool]
    uniforms: Sequence[float]
    context: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.context = list(self.ids)
        places = [index for index, is_own in enumerate(self.own) if is_own]
        self.first, self.last = (places[0], places[-1]) if places else (0, -1)


def mixed_row(
    ids: Sequence[int], labels: Sequence[int], epsilon: float, seed: int, step: int, position: int
) -> MixedRow:
    """The choices of one example, see `mix.row_generator`."""
    generator = row_generator(seed, step, position)
    return MixedRow(ids, choose_own(labels, epsilon, generator), [generator.random() for _ in ids])


def draw_contexts(
    model: PreTrainedModel,
    rows: Sequence[MixedRow],
    config: OwnTokens,
    pad_token_id: int,
    *,
    take: Callable[[int], bool] = lambda number: True,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    done: Callable[[int], Any] = lambda count: None,
) -> dict[int, list[int]]:
    """The contexts of rows.

    Args:
        model: causal LM, as it is to draw: where it has an adapter, that is on. Dropout is off while it draws.
        pad_token_id: any id of the vocabulary.
        take: which of the batches, by number, are drawn here; they are the same whoever draws.
        autocast: opened around every forward pass.
        done: told how many rows are dealt with, batch by batch, those that others draw among them.

    Returns:
        Index -> context ids, of the rows in the batches taken; rows without own tokens are in none.
    """
    import torch

    chosen = [index for index, row in enumerate(rows) if row.last >= 0]
    most = config.max_tokens_per_batch
    if config.generation == "parallel" and model.get_input_embeddings().weight.device.type == "cpu":
        most = min(most, CPU_TOKENS)
    batches = batches_by_length([rows[index].last + 1 for index in chosen], most)
    draw = _draw_in_order if config.generation == "autoregressive" else _draw_in_parallel
    drawn: dict[int, list[int]] = {}
    done(len(rows) - len(chosen))
    was_training = model.training
    model.eval()
    if model.get_input_embeddings().weight.device.type == "cpu":
        keep_pages()
    try:
        with torch.no_grad(), autocast():
            for number, batch in enumerate(batches):
                if take(number):
                    members = [chosen[i] for i in batch]
                    draw(model, [rows[index] for index in members], config, pad_token_id)
                    drawn |= {index: rows[index].context for index in members}
                done(len(batch))
    finally:
        model.train(was_training)
    return drawn


def _draw_in_parallel(model: PreTrainedModel, rows: Sequence[MixedRow], config: OwnTokens, pad_token_id: int) -> None:
    """Draws all own tokens given the ground truth, then, with further passes, given the contexts of the pass before."""
    import torch

    device = model.get_input_embeddings().weight.device
    for _ in range(config.passes):
        # Nothing behind the token before the last own one takes part.
        input_ids = pad_rows([row.context[: row.last] for row in rows], pad_token_id).to(device)
        mask = pad_rows([[1] * row.last for row in rows], 0).to(device)
        predicting = pad_rows([row.own[1 : row.last + 1] for row in rows], False).to(device)
        numbers = [u for row in rows for u, own in zip(row.uniforms, row.own, strict=True) if own]
        uniforms = torch.tensor(numbers, dtype=torch.float64, device=device)
        with head_on(model, predicting):
            logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[0]
        tokens = iter(draw_tokens(logits, uniforms, config.temperature).tolist())
        changed = []
        for row in rows:
            own = [next(tokens) if is_own else 0 for is_own in row.own]
            context = interleave(row.ids, own, row.own)
            if context != row.context:
                changed.append(row)
            row.context = context
        # What has not changed would be drawn again as it is.
        rows = changed
        if not rows:
            return


def _draw_in_order(model: PreTrainedModel, rows: Sequence[MixedRow], config: OwnTokens, pad_token_id: int) -> None:
    """Draws own tokens one after the other, each given the context before it; ground truth in between is fed as it is."""
    import torch
    from transformers import GenerationConfig, LogitsProcessorList

    inputs = pad_left([row.ids[: row.first] for row in rows], pad_token_id, model.get_input_embeddings().weight.device)
    width = inputs["input_ids"].shape[1]

    def decide(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at = input_ids.shape[1] - width
        places = [(row, row.first + at) for row in rows]
        draws = [b for b, (row, t) in enumerate(places) if t <= row.last and row.own[t]]
        tokens = [row.ids[t] if t <= row.last else pad_token_id for row, t in places]
        if draws:
            numbers = [places[b][0].uniforms[places[b][1]] for b in draws]
            uniforms = torch.tensor(numbers, dtype=torch.float64, device=scores.device)
            for b, token in zip(draws, draw_tokens(scores[draws], uniforms, config.temperature).tolist(), strict=True):
                tokens[b] = token
        for token, (row, t) in zip(tokens, places, strict=True):
            if t <= row.last:
                row.context[t] = token
        forced = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, float("-inf")).scatter_(1, forced, 0.0)

    options = GenerationConfig(
        max_new_tokens=max(row.last - row.first + 1 for row in rows), do_sample=False, pad_token_id=pad_token_id,
        eos_token_id=None,
    )  # fmt: skip
    generate_ids(model, options, **inputs, logits_processor=LogitsProcessorList([decide]))


def draw_tokens(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
    """(U, V) logits and (U,) numbers in [0, 1) -> (U,) tokens, the first at which cumulative probability exceeds u."""
    import torch

    if temperature == 0:
        return logits.argmax(-1)
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    size = max(1, CHUNK // logits.shape[-1])
    for start in range(0, len(logits), size):
        part = slice(start, start + size)
        # In float32 the cumulative sum of a large vocabulary is off by more than rare tokens weigh.
        passed = (logits[part].float() / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
        target = uniforms[part, None].double() * passed[:, -1:]
        tokens[part] = torch.searchsorted(passed, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens
