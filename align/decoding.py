"""Decoding with a cache of whose slots some are left out: rows that take different numbers of tokens stay in one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from .errors import ConfigError
from .logps import configured_not_to_share, head_on
from .models import active_adapter, base_model, cache_name

#: Share of slots left out from which on a cache is closed up, and the fewest slots for which that is worth its copy.
LOOSE, WORTH = 0.25, 64


@dataclass(frozen=True)
class Policy:
    """A model, or a base under one of its adapters.

    Args:
        model: causal LM in eval mode.
        adapter: name of the adapter it runs under, `None` for the bare base; `...` leaves the model as it is.
        ids: for ids that this model knows by other numbers, the common id -> its own; see `align.vocabulary`.
        never: common ids that are not drawn, whatever the model makes of them: tokens that another policy lacks.
    """

    model: PreTrainedModel
    adapter: Any = ...
    ids: Mapping[int, int] = field(default_factory=dict)
    never: tuple[int, ...] = ()

    @classmethod
    def of(cls, given: Any) -> Policy:
        """`given`: a policy, a model, or a pair of one with adapters and the name of an adapter."""
        if isinstance(given, cls):
            return given
        return cls(*given) if isinstance(given, tuple) else cls(given)

    def check(self, role: str) -> None:
        """Raises a ConfigError where the model is not in eval mode, or its attention cannot leave slots of its cache out."""
        if self.model.training:
            raise ConfigError(
                f"the {role} is in training mode, where dropout makes its probabilities noise; call .eval()"
            )
        reason = configured_not_to_share(self.model)
        if reason is not None:
            raise ConfigError(
                f"the {role} cannot be decoded with slots left out: {reason}; take a model of full attention"
            )

    @property
    def device(self) -> torch.device:
        """Where its inputs belong."""
        return self.model.get_input_embeddings().weight.device

    @property
    def context(self) -> int | None:
        """Most positions it knows; `None` where its configuration does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def forward(self, cache: Cache, **inputs: Any) -> tuple[torch.Tensor, Cache]:
        """Logits (B, n, V) and the cache, grown by n slots."""
        # Of the class: accelerate puts a wrapper without parameters on a model that it spreads over devices.
        name = cache_name(type(base_model(self.model)).forward)
        inputs[name] = cache
        if self.ids:
            own = self.own_ids()
            inputs["input_ids"] = own[inputs["input_ids"]]
        if self.adapter is ...:
            output = self.model(**inputs, use_cache=True)
        else:
            with active_adapter(self.model, self.adapter):
                output = self.model(**inputs, use_cache=True)
        logits = output.logits
        if self.ids:
            logits = logits[..., own]
            # Its own numbers of these tokens are no common ids.
            logits[..., [number for number in self.ids.values() if number not in self.ids]] = float("-inf")
        return logits, output[name]

    def own_ids(self) -> torch.Tensor:
        """(V,) its own number of every common id."""
        own = torch.arange(self.vocabulary, device=self.device)
        for common, number in self.ids.items():
            own[common] = number
        return own

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return self.model.config.get_text_config().vocab_size


class Decoding:
    """Several policies that are fed the same tokens, row by row.

    Args:
        policies: one cache is kept for each.
        prompts: of each row, at least one token. All but the last are fed at once; the last is the first to be given to
            `feed`, so that every round begins alike.
    """

    def __init__(self, policies: Sequence[Policy], prompts: Sequence[Sequence[int]]) -> None:
        self.policies = list(policies)
        width = max(map(len, prompts)) - 1
        #: (B, W) which slots a row sees; prompts end at one slot, whatever their length.
        self.visible = torch.zeros(len(prompts), width, dtype=torch.bool)
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            if len(prompt) > 1:
                ids[row, width - len(prompt) + 1 :] = torch.tensor(prompt[:-1])
                self.visible[row, width - len(prompt) + 1 :] = True
        self.caches: list[Cache] = [DynamicCache() for _ in self.policies]
        if width:
            positions = (self.visible.cumsum(1) - 1).clamp(min=0)
            last = torch.zeros_like(self.visible)
            last[:1, -1] = True  # logits that nobody asks for: of one position in place of all
            for number, policy in enumerate(self.policies):
                with head_on(policy.model, last):
                    self._forward(number, ids, self.visible, positions)

    @property
    def lengths(self) -> torch.Tensor:
        """(B,) tokens that a row has been fed."""
        return self.visible.sum(1)

    def _forward(self, number: int, ids: torch.Tensor, visible: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        policy = self.policies[number]
        mask = visible.clone()
        # A row that sees nothing at all would divide by zero; what it computes there is never looked at.
        mask[~mask.any(1), -1] = True
        logits, self.caches[number] = policy.forward(
            self.caches[number], input_ids=ids.to(policy.device), attention_mask=mask.long().to(policy.device),
            position_ids=positions.to(policy.device),
        )  # fmt: skip
        return logits

    def feed(self, number: int, tokens: torch.Tensor, before: int = 0) -> torch.Tensor:
        """Feeds (B, n) tokens to one policy; `commit` says afterwards which of them stay.

        Args:
            number: of the policy.
            before: tokens that it was fed since the last `commit`.

        Returns:
            (B, n, V) logits.
        """
        fed = before + tokens.shape[1]
        visible = torch.cat([self.visible, torch.ones(len(tokens), fed, dtype=torch.bool)], 1)
        positions = self.lengths[:, None] + torch.arange(before, fed)
        if (context := self.policies[number].context) is not None:
            positions = positions.clamp(max=context - 1)  # drafts beyond a row's end, which nobody takes
        return self._forward(number, tokens, visible, positions)

    def commit(self, kept: torch.Tensor, fed: int) -> None:
        """Of the `fed` tokens that every policy was fed since the last call, the first (B,) `kept` of a row stay."""
        self.visible = torch.cat([self.visible, torch.arange(fed) < kept[:, None]], 1)
        longest, width = int(self.lengths.max()), self.visible.shape[1]
        if width >= WORTH and longest < (1 - LOOSE) * width:
            # Slots that are seen move to the end, in their order.
            order = self.visible.long().argsort(dim=1, stable=True)[:, width - longest :]
            self.visible = self.visible.gather(1, order)
            self._rebuild(lambda values: values.gather(2, _like(order, values)))

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Lets the other rows go."""
        chosen = torch.tensor(rows)
        self.visible = self.visible[chosen]
        self._rebuild(lambda values: values[chosen.to(values.device)])

    def _rebuild(self, change: Any) -> None:
        for number, cache in enumerate(self.caches):
            new = DynamicCache()
            for layer, values in enumerate(cache.layers):
                if values.keys is not None and values.keys.numel():
                    new.update(change(values.keys), change(values.values), layer)
            self.caches[number] = new


def _like(order: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(B, W') slots as an index into (B, heads, W, size)."""
    return order.to(values.device)[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3])


def warp(logits: torch.Tensor, temperature: float, top_p: float, top_k: int) -> torch.Tensor:
    """(…, V) float32 probabilities after temperature, top-k and top-p, in this order, as in transformers.

    Args:
        temperature: 0 puts everything on the likeliest token.
        top_k: 0 is the whole vocabulary.
    """
    logits = logits.float()
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        # A token stays while those before it have not reached top_p; the first one always does.
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before >= top_p)
        logits = logits.masked_fill(dropped, float("-inf"))
    return logits.softmax(-1)
