"""Per-token quantities of given ids under a model: what sequences share computed once, batched by length, the head on
the positions that predict a completion's token alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .models import active_adapter, base_model, folded_adapter, without_router_loss
from .prefix_tree import PrefixTree, Row, additive, ancestor_mask, grow_trees, within
from .tokens import pad_rows

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass
class Batch:
    """Trees of a forward pass; B trees, padded to W nodes, with N completion tokens in all.

    Args:
        inputs: `input_ids` (B, W), `attention_mask` (B, W) or that of `masks_of_layers`, and `position_ids` (B, W) where
            trees branch.
        predicting: (B, W) bool, U nodes that predict a completion token.
        positions: (N,) which of the U nodes predicts each token; where completions part, one node predicts several.
        token_ids: (N,) the tokens, row after row.
        members: index of each row among those asked for.
        lengths: number of completion tokens of each row.
    """

    inputs: dict[str, torch.Tensor]
    predicting: torch.Tensor
    positions: torch.Tensor
    token_ids: torch.Tensor
    members: list[int]
    lengths: list[int]


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


def lay_out(
    trees: Sequence[tuple[PrefixTree, list[int]]],
    rows: Sequence[Row],
    pad_token_id: int,
    model: PreTrainedModel,
) -> Batch:
    """One batch of trees over `rows`, where `model` takes it."""
    import torch

    grown = [tree for tree, _ in trees]
    members = [index for _, of_tree in trees for index in of_tree]
    input_ids = pad_rows([tree.ids for tree in grown], pad_token_id)
    width, device = input_ids.shape[1], model.get_input_embeddings().weight.device
    if all(tree.is_chain for tree in grown):  # plain sequences: causal attention needs no mask of ours
        inputs = {"attention_mask": pad_rows([[1] * len(tree) for tree in grown], 0).to(device)}
    else:
        ancestors, depths = ancestor_mask(grown, width), pad_rows([tree.depths for tree in grown], 0)
        inputs = {
            "position_ids": depths.to(device),
            "attention_mask": masks_of_layers(
                model.config, lambda window: additive(within(ancestors, depths, window), model.dtype).to(device)
            ),
        }
    nodes = [b * width + node for b, tree in enumerate(grown) for path in tree.predictors for node in path]
    predicting, positions = torch.tensor(nodes).unique(return_inverse=True)
    is_predicting = torch.zeros(input_ids.shape, dtype=torch.bool)
    is_predicting.view(-1)[predicting] = True
    token_ids = torch.tensor([token for index in members for token in rows[index][1]])
    return Batch(
        {"input_ids": input_ids.to(device), **inputs}, is_predicting.to(device), positions.to(device), token_ids.to(device), members,
        [len(rows[index][1]) for index in members],
    )  # fmt: skip


#: What transformers calls layers that attend to all positions before, and to the last `sliding_window` of them.
FULL, SLIDING = "full_attention", "sliding_attention"

#: Names under which configurations keep attention that depends on more than ancestors and their distance.
WINDOWS = ("attention_types", "window_size", "attention_window_size", "attention_chunk_size", "alibi")


@contextmanager
def head_on(model: PreTrainedModel, positions: torch.Tensor):
    """Lets the LM head see the hidden states of `positions` (B, W, bool) only, as one row (1, U, H).

    A hook on the head, not a head of our own, so that scaling and soft-capping after it stay the model's. A
    prompt-learning adapter puts virtual tokens before each row, so the W positions are the last ones. Routers' losses are
    left out.
    """

    def select(_module, args):
        hidden = args[0][:, -positions.shape[1] :]
        return (hidden[positions.to(hidden.device)].unsqueeze(0), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        with without_router_loss(model):
            yield
    finally:
        handle.remove()


def completion_logits(model: PreTrainedModel, batch: Batch, adapter: str | None = None) -> torch.Tensor:
    """(U, V) logits of the nodes that predict completion tokens, in one forward pass.

    Args:
        model: causal LM, with or without adapters.
        adapter: the adapter to run under; `None` is the bare base.
    """
    with active_adapter(model, adapter), folded_adapter(model, adapter), head_on(model, batch.predicting):
        return model(**batch.inputs, use_cache=False).logits[0]


def length_dependent(config: PretrainedConfig) -> str | None:
    """Why what a model computes of a row depends on how long the longest of its batch is; `None` if nothing says so."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    for rope in nested:
        if (kind := rope.get("rope_type", rope.get("type"))) in ("dynamic", "longrope"):
            return f"its rotary embedding (rope_type {kind!r}) depends on the longest row of a batch"
    return None


def windows(config: PretrainedConfig) -> dict[str, int | None]:
    """Per kind of layers, how many positions their attention reaches back, their own among them; `None` is all."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or [FULL if window is None else SLIDING]
    return {kind: window if kind == SLIDING else None for kind in kinds}


def masks_of_layers(config: PretrainedConfig, make: Callable[[int | None], Any]) -> Any:
    """What a model takes as `attention_mask`: one mask, or one for each kind of its layers.

    Args:
        make: from a window, see `windows`, to a mask.
    """
    masks = {kind: make(window) for kind, window in windows(config).items()}
    return masks if len(masks) > 1 else masks.popitem()[1]


@contextmanager
def short_windows(model: PreTrainedModel, window: int = 3):
    """Makes sliding windows `window` positions long within the block, so that a short row reaches beyond them.

    Changes modules and their configurations, because which of the two a forward pass reads is nowhere declared.
    """
    known = [model.config.get_text_config(), *model.modules()]
    holders = {id(one): one for part in known for one in (part, getattr(part, "config", None))}
    kept = [(holder, own) for holder in holders.values() if type(own := getattr(holder, "sliding_window", None)) is int]
    for holder, own in kept:
        holder.sliding_window = min(own, window)
    try:
        yield
    finally:
        for holder, own in kept:
            holder.sliding_window = own


def windowed(model: PreTrainedModel) -> str | None:
    """Why keys and values of early positions are not all there for late ones; `None` if they are."""
    reach = min((window for window in windows(model.config).values() if window is not None), default=None)
    return (
        None
        if reach is None
        else f"{type(base_model(model)).__name__} has sliding-window attention (sliding_window = {reach})"
    )


def configured_not_to_share(model: PreTrainedModel, implementations: Sequence[str] = ("sdpa", "eager")) -> str | None:
    """Why a model cannot compute what rows share once, as far as its configuration tells; `None` where nothing speaks
    against it: attention over all positions before, or the last of them, that takes a mask of ours.

    Args:
        implementations: kinds of attention that do.
    """
    base = base_model(model)
    config, kinds = base.config.get_text_config(), windows(base.config)
    name = type(base).__name__
    if others := set(kinds) - {FULL, SLIDING}:
        return f"{name} has layers of kind {', '.join(sorted(others))}"
    if SLIDING in kinds and kinds[SLIDING] is None:
        return f"{name} has layers of kind {SLIDING}, and no window (sliding_window)"
    for window in WINDOWS:
        if getattr(config, window, None):
            return f"{name} has attention that depends on distances ({window})"
    if reason := length_dependent(config):
        return f"{name}: {reason}"
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in getattr(model, "peft_config", {}).values()):
        return "its adapter looks for the last invocation of a row (alora_invocation_tokens), and a row holds several"
    if any(adapter.is_prompt_learning for adapter in getattr(model, "peft_config", {}).values()):
        return "its adapter puts positions before the prompt"
    if (attention := getattr(config, "_attn_implementation", None)) not in implementations:
        return f"attention implementation {attention!r} takes no mask of ours; {', '.join(implementations)} do"
    if "position_ids" not in signature(base.forward).parameters:
        return f"{name} takes no position_ids"
    return None


def shares_prefixes(model: PreTrainedModel) -> bool | None:
    """Whether a model computes the same for a prefix tree as for its sequences one by one.

    `None` where a trial cannot show it: the model's numbers are not finite, or its vocabulary is too small to try. The
    configuration is read first. Then a few tokens are tried once, because no configuration declares how a model uses a
    mask and position ids.
    """
    base = base_model(model)
    known = getattr(base, "_align_shares_prefixes", None)
    if known is None:
        known = configured_not_to_share(model) is None and _agrees(model, base.dtype)
        if known is not None:
            base._align_shares_prefixes = known
    return known


def _agrees(model: PreTrainedModel, dtype: torch.dtype) -> bool | None:
    """Whether two short rows have the same logits in one tree and apart; `None` where that cannot be told."""
    import torch

    prompt = [1, 2, 3, 2, 3, 1]
    rows: list[Row] = [(prompt, [4, 5, 6, 7, 5, 4]), (prompt, [4, 7, 5, 6, 4, 5])]
    if model.config.get_text_config().vocab_size <= 7:
        return None
    logits = {}
    for share in (True, False):
        try:
            with torch.inference_mode(), short_windows(model):
                parts = [completion_logits(model, b).float()[b.positions] for b in _batches(model, rows, 0, 99, share)]
        except (ValueError, TypeError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return False  # a model that makes masks of its own has no use for ours
        logits[share] = torch.cat(parts)
    if not logits[False].isfinite().all():
        return None
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 0.1
    # By position: a wrong mask moves all logits of some; rounding in bfloat16 moves the worst of 150,000 by a lot, but not all.
    scale = (logits[False] - logits[False].mean(-1, keepdim=True)).norm(dim=-1)
    return bool(((logits[True] - logits[False]).norm(dim=-1) <= tolerance * scale).all())


def keep_pages() -> None:
    """Lets glibc keep the pages of what is freed. Until it has seen a large block freed, it gives memory back to the system
    at once, and every activation would fault its pages in anew: a fifth of the time of a small model on a CPU."""
    import torch

    block = torch.zeros(8_000_000)
    del block


def _batches(model: PreTrainedModel, rows: Sequence[Row], pad_token_id: int, max_tokens: int, share: bool):
    # Some models keep a mask of their own, as wide as their longest sequence.
    trees = grow_trees(rows, share, getattr(model.config.get_text_config(), "max_position_embeddings", None))
    if model.get_input_embeddings().weight.device.type == "cpu":
        keep_pages()
    for chosen in batches_by_length([len(tree) for tree, _ in trees], max_tokens):
        yield lay_out([trees[i] for i in chosen], rows, pad_token_id, model)


def per_token(
    model: PreTrainedModel,
    rows: Sequence[Row],
    compute: Callable[[Batch], torch.Tensor],
    *,
    pad_token_id: int,
    max_tokens_per_batch: int,
) -> list[list[float]]:
    """Runs `compute` on batches and hands every row its own numbers back, in the order of `rows`.

    Args:
        model: whose positions the batches hold; decides whether rows with one prompt share it.
        rows: prompt and completion ids; neither is empty. Equal rows are computed once.
        compute: batch -> (N,) numbers of its completion tokens.
        max_tokens_per_batch: see `batches_by_length`.

    Returns:
        One list per row, as long as its completion.
    """
    import torch

    places = {(tuple(prompt), tuple(completion)): None for prompt, completion in rows}
    unique = list(places)
    found: list[list[float]] = [[] for _ in unique]
    with torch.inference_mode():
        for batch in _batches(model, unique, pad_token_id, max_tokens_per_batch, shares_prefixes(model)):
            numbers = compute(batch).float().cpu().split(batch.lengths)
            for index, values in zip(batch.members, numbers, strict=True):
                found[index] = values.tolist()
    by_row = dict(zip(unique, found, strict=True))
    return [by_row[(tuple(prompt), tuple(completion))] for prompt, completion in rows]


def token_logps(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    pad_token_id: int,
    adapter: str | None = None,
    max_tokens_per_batch: int = 8192,
) -> list[list[float]]:
    """Log-probability, in nats, of every completion token given what precedes it.

    In bfloat16 a number depends on what shares its batch: by tenths of a nat in places, as every forward pass in
    bfloat16 does.

    Args:
        model: causal LM in eval mode.
        rows: prompt and completion ids.
        adapter: see `completion_logits`.

    Returns:
        One list per row, one number per id of its completion.
    """

    def compute(batch: Batch) -> torch.Tensor:
        logits = completion_logits(model, batch, adapter).float()
        return logits[batch.positions, batch.token_ids] - logits.logsumexp(-1)[batch.positions]

    return per_token(model, rows, compute, pad_token_id=pad_token_id, max_tokens_per_batch=max_tokens_per_batch)
