"""Continuations of one completion from many of its positions; what precedes a position is computed once for all of them.

A *fork* leaves a completion y before its token t: another token stands there, and the model goes on from it. Whether a
draw of the model forks at t, and to which token, follows from the probabilities of one forward pass over y; only what
comes after the fork is generated, from the keys and values that this pass left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .logps import head_on, shares_prefixes
from .losses import CHUNK
from .prefix_tree import Row
from .sample import SampleConfig, cut_at_end, end_token_ids, generate, run_generate
from .tokens import pad_rows

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

#: Below this, what the sampling distribution leaves to other tokens is rounding.
NO_ALTERNATIVE = 1e-7


@dataclass(frozen=True)
class Fork:
    """A continuation of the completion of `row` that keeps its first `position` tokens and has `token` next."""

    row: int
    position: int
    token: int


@dataclass(frozen=True)
class NextTokens:
    """What the model draws at each of the T positions of a completion, given the completion before it.

    Args:
        follow: T probabilities of the completion's own token, under temperature, top-p and top-k.
        others: per position, n draws of a token that is not the completion's own; empty where there is none.
        any: per position, n draws of any token.
    """

    follow: list[float]
    others: list[list[int]]
    any: list[list[int]]


class Continuations:
    """Draws from many positions of a few completions.

    Args:
        model: causal LM; where it has an adapter, that is on.
        tokenizer: its tokenizer.
        rows: R rows of prompt and completion ids.
        config: how to sample; `max_new_tokens` is the longest completion, what precedes the fork included, and
            `batch_size` the most continuations generated together. `n` draws of each kind are made at every position.
        share: whether keys and values of what precedes a fork are computed once; by default where the model's attention
            allows it (full attention, no adapter that prepends positions).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Row],
        config: SampleConfig,
        seed: int,
        share: bool | None = None,
    ) -> None:
        import torch

        self.model, self.tokenizer, self.rows, self.config, self.seed = model, tokenizer, list(rows), config, seed
        self.share = shares_prefixes(model) if share is None else share
        self.ends = set(end_token_ids(model, tokenizer.eos_token_id))
        #: Tokens that the model was fed: rows as given, and continuations.
        self.forward_tokens = sum(len(prompt) + len(completion) for prompt, completion in self.rows)
        self._batches = 0
        device = model.get_input_embeddings().weight.device
        self._generator = torch.Generator(device=device).manual_seed(seed)
        ids = [[*prompt, *completion] for prompt, completion in self.rows]
        self._input_ids = pad_rows(ids, tokenizer.pad_token_id).to(device)
        mask = pad_rows([[1] * len(row) for row in ids], 0).to(device)
        predicting = torch.zeros_like(mask, dtype=torch.bool)
        for place, (prompt, completion) in zip(predicting, self.rows, strict=True):
            place[len(prompt) - 1 : len(prompt) + len(completion) - 1] = True
        with torch.inference_mode(), head_on(model, predicting):
            output = model(input_ids=self._input_ids, attention_mask=mask, use_cache=self.share)
            self._cache: Cache | None = output.past_key_values if self.share else None
            logits = output.logits[0]
            tokens = torch.tensor([t for _, completion in self.rows for t in completion], device=device)
            drawn = self._draw(logits, tokens)
        lengths = [len(completion) for _, completion in self.rows]
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        #: One `NextTokens` per row.
        self.next_tokens = [
            NextTokens(*(part[start : start + length] for part in drawn))
            for start, length in zip(starts, lengths, strict=True)
        ]

    def _draw(self, logits: torch.Tensor, tokens: torch.Tensor) -> tuple[list, list, list]:
        """See `NextTokens`, of all rows' positions one after the other; `logits` (U, V), `tokens` (U,)."""
        import torch

        follow, others, free = [], [], []
        chunk = max(1, CHUNK // logits.shape[-1])
        for part, own in zip(logits.split(chunk), tokens.split(chunk), strict=True):
            probs = sampling_probs(part.float(), self.config)
            places = torch.arange(len(own), device=own.device)
            free += torch.multinomial(probs, self.config.n, replacement=True, generator=self._generator).tolist()
            follow += probs[places, own].tolist()
            probs[places, own] = 0.0
            rest = probs.sum(-1)
            probs[rest <= NO_ALTERNATIVE, 0] = 1.0  # to have something to draw from; thrown away below
            drawn = torch.multinomial(probs, self.config.n, replacement=True, generator=self._generator).tolist()
            others += [d if r > NO_ALTERNATIVE else [] for d, r in zip(drawn, rest.tolist(), strict=True)]
        return follow, others, free

    def complete(self, forks: Sequence[Fork]) -> list[list[int]]:
        """Goes on from each fork.

        Returns:
            The completions' ids, from their first token on, one per fork.
        """
        done: list[list[int]] = [[*self.rows[f.row][1][: f.position], f.token] for f in forks]
        longest = self.config.max_new_tokens
        open_forks = [i for i, f in enumerate(forks) if f.token not in self.ends and len(done[i]) < longest]
        # Forks at like places have like prefixes and like lengths to go.
        open_forks.sort(key=lambda i: (len(self.rows[forks[i].row][0]) + forks[i].position, i))
        for start in range(0, len(open_forks), self.config.batch_size):
            batch = open_forks[start : start + self.config.batch_size]
            budget = longest - min(len(done[i]) for i in batch)
            config = replace(self.config, n=1, max_new_tokens=budget)
            self._batches += 1
            seed = self.seed * 1_000_003 + self._batches
            if self.share:
                found = self._from_cache([forks[i] for i in batch], config, seed)
            else:
                prompts = [[*self.rows[forks[i].row][0], *done[i]] for i in batch]
                drawn = generate(self.model, self.tokenizer, prompts, config, seed)
                found = [continuations[0][0] for continuations in drawn]
                self.forward_tokens += sum(map(len, prompts)) - len(prompts)
            for i, ids in zip(batch, found, strict=True):
                ids = ids[: longest - len(done[i])]
                self.forward_tokens += len(ids)  # the fork's token is fed, the last one is not
                done[i] += ids
        return done

    def _from_cache(self, forks: list[Fork], config: SampleConfig, seed: int) -> list[list[int]]:
        import torch
        from transformers import DynamicCache

        device = self._input_ids.device
        visible = [len(self.rows[f.row][0]) + f.position for f in forks]
        width = max(visible)
        rows = torch.tensor([f.row for f in forks], device=device)
        cache = DynamicCache()
        for number, layer in enumerate(self._cache.layers):
            cache.update(layer.keys[rows, :, :width], layer.values[rows, :, :width], number)
        # Slots behind a fork hold another continuation's keys: masked out, and positions count what is visible.
        mask = pad_rows([[1] * v for v in visible], 0, width).to(device)
        tokens = torch.tensor([[f.token] for f in forks], device=device)
        output = run_generate(
            self.model, self.tokenizer, config, seed,
            input_ids=torch.cat([self._input_ids[rows, :width], tokens], 1),
            attention_mask=torch.cat([mask, torch.ones_like(tokens)], 1), past_key_values=cache,
        )  # fmt: skip
        return [cut_at_end(self.model, self.tokenizer, ids, self.config)[0] for ids in output[:, width + 1 :].tolist()]


def sampling_probs(logits: torch.Tensor, config: SampleConfig) -> torch.Tensor:
    """(U, V) probabilities that tokens are drawn with: temperature, then top-k, then top-p, as `generate` does.

    Args:
        logits: (U, V) float32.
        config: its temperature is positive.
    """
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = TemperatureLogitsWarper(float(config.temperature))(None, logits)
    if config.top_k:
        logits = TopKLogitsWarper(config.top_k)(None, logits)
    if config.top_p < 1:
        logits = TopPLogitsWarper(config.top_p)(None, logits)
    return logits.softmax(-1)
