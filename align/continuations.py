"""Continuations of one completion from many of its positions; what precedes a position is computed once for all of them.

A *fork* leaves a completion y before its token t: another token stands there, and the model goes on from it. Whether a
draw of the model forks at t, and to which token, follows from the probabilities of one forward pass over y; only what
comes after the fork is generated, from the keys and values that this pass left. A fork ends where a completion sampled
with the same settings would: at an end token, at a stop text (it may begin before the fork), or at the longest length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING

from .logps import head_on, shares_prefixes, windowed
from .losses import CHUNK
from .models import base_model, cache_name
from .positions import position_limit
from .prefix_tree import Row
from .sample import SampleConfig, derived_seed, end_token_ids, find_end, pad_left, run_generate
from .tokens import pad_rows

if TYPE_CHECKING:
    import random

    import torch
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

#: Below this, what the sampling distribution leaves to other tokens is rounding.
NO_ALTERNATIVE = 1e-7

#: Batches of continuations are numbered from 1; no batch has this number.
FRESH = 2**62


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
        config: how to sample; `max_new_tokens` is the longest completion, what precedes the fork included (none
            of `rows` is longer), and `batch_size` the most continuations generated together. `n` draws of each kind are
            made at every position.
        seed: decides the draws.
        share: whether keys and values of what precedes a fork are computed once; by default where the model's attention
            allows it (full attention, no adapter that prepends positions).
        fresh: whether a second set of draws is made, independent of the first, which it leaves as it is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Row],
        config: SampleConfig,
        seed: int,
        share: bool | None = None,
        fresh: bool = False,
    ) -> None:
        import torch

        self.model, self.tokenizer, self.rows, self.config, self.seed = model, tokenizer, list(rows), config, seed
        self.share = (not windowed(model) and shares_prefixes(model)) if share is None else share
        #: Continuations of each row that the longest length cut.
        self.cut = [0] * len(self.rows)
        #: Tokens that the model was fed: rows as given, and continuations; padding is not counted.
        self.forward_tokens = sum(len(prompt) + len(completion) for prompt, completion in self.rows)
        self._batches = 0
        device = model.get_input_embeddings().weight.device
        ids = [[*prompt, *completion] for prompt, completion in self.rows]
        self._input_ids = pad_rows(ids, tokenizer.pad_token_id).to(device)
        mask = pad_rows([[1] * len(row) for row in ids], 0).to(device)
        predicting = torch.zeros_like(mask, dtype=torch.bool)
        for place, (prompt, completion) in zip(predicting, self.rows, strict=True):
            place[len(prompt) - 1 : len(prompt) + len(completion) - 1] = True
        with torch.inference_mode(), head_on(model, predicting):
            output = model(input_ids=self._input_ids, attention_mask=mask, use_cache=self.share)
            name = cache_name(type(base_model(model)).forward)
            self._cache: Cache | None = output[name] if self.share else None
            logits = output.logits[0]
            #: One `NextTokens` per row; and the second set, where asked for.
            self.next_tokens = self._draw(logits, seed)
            self.fresh_tokens = self._draw(logits, derived_seed(seed, FRESH)) if fresh else []

    def _draw(self, logits: torch.Tensor, seed: int) -> list[NextTokens]:
        """See `NextTokens`; `logits` (U, V) of all rows' positions, one after the other."""
        import torch

        device = logits.device
        generator = torch.Generator(device=device).manual_seed(seed % 2**63)
        tokens = torch.tensor([t for _, completion in self.rows for t in completion], device=device)
        follow, others, free = [], [], []
        chunk = max(1, CHUNK // logits.shape[-1])
        for part, own in zip(logits.split(chunk), tokens.split(chunk), strict=True):
            probs = sampling_probs(part.float(), self.config)
            places = torch.arange(len(own), device=device)
            free += torch.multinomial(probs, self.config.n, replacement=True, generator=generator).tolist()
            follow += probs[places, own].tolist()
            probs[places, own] = 0.0
            rest = probs.sum(-1)
            probs[rest <= NO_ALTERNATIVE, 0] = 1.0  # to have something to draw from; thrown away below
            drawn = torch.multinomial(probs, self.config.n, replacement=True, generator=generator).tolist()
            others += [d if r > NO_ALTERNATIVE else [] for d, r in zip(drawn, rest.tolist(), strict=True)]
        lengths = [len(completion) for _, completion in self.rows]
        places = [slice(sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(len(lengths))]
        return [NextTokens(follow[place], others[place], free[place]) for place in places]

    def ends(self, fork: Fork) -> bool:
        """Whether the fork's token is an end token or completes a stop text: nothing follows it."""
        return self._end(fork, [*self.rows[fork.row][1][: fork.position], fork.token]) is not None

    def _end(self, fork: Fork, ids: list[int]) -> tuple[list[int], int] | None:
        prompt = self.rows[fork.row][0]
        end_ids = end_token_ids(self.model, self.tokenizer.eos_token_id)
        return find_end(end_ids, self.tokenizer, ids, self.config, given=fork.position, context=prompt)

    def complete(self, forks: Sequence[Fork]) -> list[list[int]]:
        """Goes on from each fork.

        Returns:
            The completions' ids, from their first token on, one per fork. A stop text is cut, and EOS put there, even
            where it begins before the fork.
        """
        done: list[list[int]] = [[*self.rows[f.row][1][: f.position], f.token] for f in forks]
        ends = [self._end(fork, ids) for fork, ids in zip(forks, done, strict=True)]
        longest = self.config.max_new_tokens
        open_forks = [i for i, end in enumerate(ends) if end is None and len(done[i]) < longest]
        # Forks at like places have like prefixes and like lengths to go.
        open_forks.sort(key=lambda i: (len(self.rows[forks[i].row][0]) + forks[i].position, i))
        for batch in self._batched(open_forks, forks, done):
            budget = longest - min(len(done[i]) for i in batch)
            config = replace(self.config, n=1, max_new_tokens=budget)
            self._batches += 1
            drawn = self._draw_on([forks[i] for i in batch], [done[i] for i in batch], config)
            for i, ids in zip(batch, drawn, strict=True):
                known, done[i] = len(done[i]), [*done[i], *ids][:longest]
                ends[i] = self._end(forks[i], done[i])
                # The fork's token is fed; the one drawn last is not, or only as padding is, since its batch goes on.
                self.forward_tokens += (len(done[i]) if ends[i] is None else ends[i][1]) - known
        for fork, end in zip(forks, ends, strict=True):
            self.cut[fork.row] += end is None
        return [ids if end is None else end[0] for ids, end in zip(done, ends, strict=True)]

    def _batched(self, places: list[int], forks: list[Fork], done: list[list[int]]) -> Iterator[list[int]]:
        """Forks that are drawn together. Padding is fed to those that end first, so its positions are counted, too."""
        limit, longest, batch = position_limit(self.model), self.config.max_new_tokens, []
        for place in places:
            those = [*batch, place]
            last = max(len(self.rows[forks[i].row][0]) + len(done[i]) for i in those)
            fits = limit is None or last + longest - min(len(done[i]) for i in those) <= limit
            if batch and (len(batch) == self.config.batch_size or not fits):
                yield batch
                those = [place]
            batch = those
        if batch:
            yield batch

    def _draw_on(self, forks: list[Fork], done: list[list[int]], config: SampleConfig) -> list[list[int]]:
        """What is drawn after each fork, uncut: padding may stand behind an end."""
        import torch
        from transformers import StoppingCriteriaList

        if self.share:
            inputs = self._from_cache(forks)
        else:
            prompts = [[*self.rows[f.row][0], *ids] for f, ids in zip(forks, done, strict=True)]
            inputs = pad_left(prompts, self.tokenizer.pad_token_id, self._input_ids.device)
            self.forward_tokens += sum(map(len, prompts)) - len(prompts)
        width = inputs["input_ids"].shape[1]
        # Forks of a batch have unlike lengths to go; what is fed beyond a fork's own is padding.
        limits = torch.tensor(
            [width + self.config.max_new_tokens - len(ids) for ids in done], device=self._input_ids.device
        )
        limit = StoppingCriteriaList([lambda input_ids, _scores, **_: input_ids.shape[1] >= limits])
        seed = derived_seed(self.seed, self._batches)
        output = run_generate(self.model, self.tokenizer, config, seed, **inputs, stopping_criteria=limit)
        return output[:, width:].tolist()

    def _from_cache(self, forks: list[Fork]) -> dict[str, torch.Tensor | Cache]:
        """What `generate` is given: ids up to each fork's token, and keys and values of what precedes it."""
        import torch
        from transformers import DynamicCache, GenerationMixin

        device = self._input_ids.device
        visible = torch.tensor([len(self.rows[f.row][0]) + f.position for f in forks], device=device)[:, None]
        width = int(visible.max())
        rows = torch.tensor([f.row for f in forks], device=device)[:, None]
        # Each prefix ends right before its fork's token: generation looks for stop texts in the ids as they lie there.
        # What lies in front of a shorter one is masked out, and positions count what is visible.
        slots = torch.arange(width, device=device) - (width - visible)
        mask, slots = slots >= 0, slots.clamp(min=0)
        cache = DynamicCache()
        for number, layer in enumerate(self._cache.layers):
            heads = torch.arange(layer.keys.shape[1], device=device)
            place = rows[..., None], heads[:, None], slots[:, None]
            cache.update(layer.keys[place], layer.values[place], number)
        ids = torch.where(mask, self._input_ids[rows, slots], self.tokenizer.pad_token_id)
        tokens = torch.tensor([[f.token] for f in forks], device=device)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        name = cache_name(GenerationMixin.prepare_inputs_for_generation)
        return {"input_ids": torch.cat([ids, tokens], 1), "attention_mask": mask.long(), name: cache}


def chain_draws(
    continuations: Continuations, rng: random.Random
) -> tuple[list[Fork], list[tuple[list[list[int]], dict[int, int]]]]:
    """n draws of every state of each completion, shared by neighbouring states: a draw that takes the completion's
    own token at one state is a draw of the next, and those that fork off are replaced there.

    Returns:
        The forks; and per row the draws of each state, by number, and for each draw that forks the index of its fork.
        One that does not is the completion itself.
    """
    forks: list[Fork] = []
    plans = []
    for row, (_, completion) in enumerate(continuations.rows):
        drawn, names, n = continuations.next_tokens[row], count(), continuations.config.n
        standing = [next(names) for _ in range(n)]  # the draws at this state
        states, fates = [], {}
        for position, own in enumerate(completion):
            states.append(standing)
            others, follow = drawn.others[position], drawn.follow[position]
            leaving = [draw for draw in standing if others and rng.random() >= follow]
            for draw, token in zip(leaving, others, strict=False):
                fates[draw] = len(forks)
                forks.append(Fork(row, position, token))
            going_on = [draw for draw in standing if draw not in fates]
            if continuations.ends(Fork(row, position, own)):
                # The completion may go on (it was sampled without this stop text, perhaps), but draws do not.
                fates |= dict.fromkeys(going_on, len(forks))
                forks.append(Fork(row, position, own))
                going_on = []
            standing = going_on + [next(names) for _ in range(n - len(going_on))]
        plans.append((states, fates))
    return forks, plans


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
