"""Decoding rows that take different numbers of tokens at a time, in one batch: each writes to slots of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from .cuda_graphs import Graphs
from .errors import ConfigError
from .logps import configured_not_to_share, head_on, shares_prefixes, windowed
from .models import active_adapter, base_model, cache_name, without_router_loss
from .positions import position_limit
from .prefix_tree import additive
from .slot_cache import SlotCache, room_for


@dataclass(frozen=True)
class Policy:
    """A model, or a base under one of its adapters.

    Args:
        model: causal LM in eval mode.
        adapter: name of the adapter it runs under, `None` for the bare base; `...` leaves the model as it is.
        ids: for ids that this model knows by other numbers, the common id -> its own; see `align.vocabulary`.
        never: common ids that are not drawn, whatever the model makes of them: tokens that another policy lacks.
        cuda_graphs: whether passes are recorded and replayed where the model is on one GPU; changes speed, and rounding.
    """

    model: PreTrainedModel
    adapter: Any = ...
    ids: Mapping[int, int] = field(default_factory=dict)
    never: tuple[int, ...] = ()
    cuda_graphs: bool = True

    @classmethod
    def of(cls, given: Any) -> Policy:
        """`given`: a policy, a model, or a pair of one with adapters and the name of an adapter."""
        if isinstance(given, cls):
            return given
        return cls(*given) if isinstance(given, tuple) else cls(given)

    def check(self, role: str) -> None:
        """Raises a ConfigError where the model is not in eval mode, or takes no mask and positions of ours."""
        if self.model.training:
            raise ConfigError(
                f"the {role} is in training mode, where dropout makes its probabilities noise; call .eval()"
            )
        if strange := [(c, own) for c, own in self.ids.items() if max(c, own) >= self.vocabulary]:
            raise ConfigError(
                f"the {role} is said to know token {strange[0][0]} as {strange[0][1]}, but has {self.vocabulary} ids; "
                "resize its embeddings, or never draw that token"
            )
        window = windowed(self.model)
        if window or shares_prefixes(self.model) is False:
            reason = (
                configured_not_to_share(self.model)
                or window
                or "it does not compute by the mask and the positions that it is given"
            )
            raise ConfigError(f"the {role} cannot be decoded row by row: {reason}; take a model of full attention")

    @property
    def device(self) -> torch.device:
        """Where its inputs belong."""
        return self.model.get_input_embeddings().weight.device

    @property
    def context(self) -> int | None:
        """Most positions it knows; `None` where its configuration does not say."""
        return position_limit(self.model) or getattr(
            self.model.config.get_text_config(), "max_position_embeddings", None
        )

    def forward(self, **inputs: Any) -> torch.Tensor:
        """Logits (B, n, V), by its own numbers of tokens; its cache takes the n tokens."""
        # Of the class: accelerate puts a wrapper without parameters on a model that it spreads over devices.
        inputs[cache_name(type(base_model(self.model)).forward)] = self.cache
        adapter = nullcontext() if self.adapter is ... else active_adapter(self.model, self.adapter)
        with adapter, without_router_loss(self.model):
            return self.model(**inputs, use_cache=True).logits

    def own(self, ids: torch.Tensor) -> torch.Tensor:
        """Its own numbers of common ids."""
        return self._numbers[0][ids] if self.ids else ids

    def common(self, values: torch.Tensor, nothing: float) -> torch.Tensor:
        """(…, V) logits or probabilities of common ids; `nothing` stands at its own numbers that are no common ids."""
        if not self.ids:
            return values
        own, foreign = self._numbers
        return values[..., own].index_fill(-1, foreign, nothing)

    @cached_property
    def _numbers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(V,) its own number of every common id, and the numbers that are no common ids."""
        own = torch.arange(self.vocabulary)
        for common, number in self.ids.items():
            own[common] = number
        foreign = [number for number in self.ids.values() if number not in self.ids]
        return own.to(self.device), torch.tensor(foreign, dtype=torch.long, device=self.device)

    @cached_property
    def cache(self) -> SlotCache:
        """Its keys and values."""
        return SlotCache()

    @cached_property
    def graphs(self) -> Graphs:
        """Its recorded passes, where all of it is on one GPU and nothing is cast on the way."""
        places = set((getattr(base_model(self.model), "hf_device_map", None) or {"": self.device}).values())
        on_one = self.device.type == "cuda" and len(places) == 1
        return Graphs(self.cuda_graphs and on_one and not torch.is_autocast_enabled("cuda"))

    def let_go(self) -> None:
        """Drops keys, values and recordings."""
        for name in ("cache", "graphs", "_numbers"):
            self.__dict__.pop(name, None)

    def look(self) -> None:
        """Drops them where they are of another state of the model: of weights that lay elsewhere, other adapters, other casts."""
        weights = (*self.model.parameters(), *self.model.buffers())
        layers = [m for m in self.model.modules() if hasattr(m, "active_adapters") and hasattr(m, "merged")]
        state = (
            torch.is_autocast_enabled(self.device.type), torch.get_autocast_dtype(self.device.type),
            [(w.data_ptr(), w.dtype, w.device) for w in weights],
            [(list(m.active_adapters), m.merged, m.disable_adapters, dict(getattr(m, "scaling", {}))) for m in layers],
        )  # fmt: skip
        if self.__dict__.get("_state") != state:
            self.let_go()
            self.__dict__["_state"] = state

    def mask(self, seen: torch.Tensor) -> torch.Tensor:
        """(B, 1, n, W) bool, which slots a token sees, as its attention takes it fastest."""
        base = base_model(self.model)
        # Numbers have to be of the dtype that a layer computes in; eager attention takes nothing else.
        cast = getattr(base, "is_quantized", False) or torch.is_autocast_enabled(self.device.type)
        eager = base.config.get_text_config()._attn_implementation == "eager"
        return additive(seen, base.dtype) if eager or not cast else seen

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return self.model.config.get_text_config().vocab_size


class Decoding:
    """Several policies that are fed the same tokens, row by row: a row's token number t lies at slot t of a cache.

    Args:
        policies: each has a cache, which serves one decoding at a time.
        prompts: of each row, at least one token. All but the last are fed at once, equal ones once for all; the last is the
            first to be given to `feed`, so that every round begins alike.
    """

    def __init__(self, policies: Sequence[Policy], prompts: Sequence[Sequence[int]]) -> None:
        # The same policy twice needs two caches.
        self.policies = [replace(p) if any(p is other for other in policies[:i]) else p for i, p in enumerate(policies)]
        #: (B,) tokens that a row has been fed, those that were taken back not counted.
        self.lengths = torch.tensor([len(prompt) - 1 for prompt in prompts])
        places: dict[tuple[int, ...], int] = {}
        copies = torch.tensor([places.setdefault(tuple(prompt[:-1]), len(places)) for prompt in prompts])
        width = int(self.lengths.max())
        ids = torch.zeros(len(places), width, dtype=torch.long)
        for row, prompt in enumerate(places):
            ids[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.long)
        last = torch.zeros(ids.shape, dtype=torch.bool)
        last[:1, -1:] = True  # logits that nobody asks for: of one position in place of all
        for policy in self.policies:
            policy.look()
            slots = policy.cache.slots
            slots.rows, slots.width, slots.at, slots.copies = len(prompts), room_for(width), None, copies
            self._grow(policy, width)
            if width:
                own = policy.own(ids.to(policy.device))
                with head_on(policy.model, last):
                    # What stands behind a shorter prompt is overwritten before anything sees it.
                    policy.forward(input_ids=own, position_ids=torch.arange(width, device=policy.device)[None])

    def _grow(self, policy: Policy, width: int) -> None:
        if not policy.cache.holds(len(self.lengths), room_for(width)):
            policy.graphs.forget()  # first: they read and write what moves, and hold memory
            policy.cache.grow(len(self.lengths), room_for(width))

    @property
    def lingering(self) -> bool:
        """Whether rows that have ended had better stay until many have: recordings are of one number of rows."""
        return any(policy.graphs.enabled for policy in self.policies)

    def feed(self, number: int, tokens: torch.Tensor, before: int = 0) -> torch.Tensor:
        """Feeds (B, n) tokens to one policy; `commit` says afterwards which of them stay.

        Args:
            number: of the policy.
            before: tokens that it was fed since the last `commit`.

        Returns:
            (B, n, V) logits, by its own numbers of tokens.
        """
        policy = self.policies[number]
        fed = before + tokens.shape[1]
        width = int(self.lengths.max()) + fed
        self._grow(policy, width)
        if policy.graphs.enabled:
            width = room_for(width)  # few widths, few recordings
        slots = (self.lengths[:, None] + torch.arange(before, fed)).to(policy.device)

        def run(ids: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
            policy.cache.slots.at, policy.cache.slots.width = slots, width
            seen = (torch.arange(width, device=slots.device) <= slots[..., None])[:, None]
            # Drafts beyond a row's end, which nobody takes, have no positions of their own.
            positions = slots if policy.context is None else slots.clamp(max=policy.context - 1)
            return policy.forward(input_ids=ids, position_ids=positions, attention_mask=policy.mask(seen))

        return policy.graphs.run((tokens.shape, width), run, policy.own(tokens.to(policy.device)), slots)

    def commit(self, kept: torch.Tensor) -> None:
        """Of the tokens that every policy was fed since the last call, the first (B,) `kept` of a row stay."""
        self.lengths = self.lengths + kept

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Lets the other rows go."""
        chosen = torch.tensor(rows)
        self.lengths = self.lengths[chosen]
        for policy in self.policies:
            policy.cache.keep_rows(chosen)
            policy.cache.slots.rows = len(rows)


def warp(logits: torch.Tensor, temperature: float, top_p: float, top_k: int) -> torch.Tensor:
    """(…, V) float32 probabilities after temperature, top-k and top-p, in this order, as in transformers; but tokens of equal
    logits stay or go together, so that nothing depends on how a device sorts.

    Args:
        temperature: 0 puts everything on the likeliest token.
        top_k: 0 is the whole vocabulary.
    """
    logits = logits.float()
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits / temperature
    narrow = 0 < top_k < logits.shape[-1]
    if not narrow and top_p >= 1:
        return logits.softmax(-1)
    ordered = logits.topk(top_k, dim=-1).values if narrow else logits.sort(dim=-1, descending=True).values
    least = ordered[..., -1:]
    if top_p < 1:
        # A token stays while those before it have not reached top_p; the first one always does.
        share = (ordered - logits.masked_fill(logits < least, float("-inf")).logsumexp(-1, keepdim=True)).exp()
        stays = share.cumsum(-1) - share < top_p
        least = ordered.masked_fill(~stays, float("inf")).amin(-1, keepdim=True)
    return logits.masked_fill(logits < least, float("-inf")).softmax(-1)
