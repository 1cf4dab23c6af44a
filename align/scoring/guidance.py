"""Token rewards of preference pairs: the log-ratio of a preference-trained guide and the reference (TGDPO,
arXiv 2506.14574)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ModelLoadError, ModelMismatchError
from ..hub import elsewhere, source_of
from ..logps import Row, token_logps
from ..models import is_adapter, load_model, load_tokenizer, vocab_size
from ..records import Record
from .pairs import both_sides, score_stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_same_vocabulary(
    guide: PreTrainedTokenizerBase, reference: PreTrainedTokenizerBase, guide_name: str = "the guide"
) -> None:
    """Log-ratios of single tokens need one vocabulary: each id the same token for both.

    Raises:
        ModelMismatchError: naming the first ids that differ.
    """
    ids = range(max(len(guide), len(reference)))
    pairs = zip(ids, guide.convert_ids_to_tokens(list(ids)), reference.convert_ids_to_tokens(list(ids)), strict=True)
    different = [(i, ours, theirs) for i, ours, theirs in pairs if ours != theirs]
    if different:
        shown = "; ".join(f"id {i} is {ours!r}, the reference's {theirs!r}" for i, ours, theirs in different[:3])
        raise ModelMismatchError(
            f"{guide_name} has another tokenizer: {shown} ({len(different)} ids differ). A token's log-ratio needs one "
            "vocabulary; take a guide trained from the reference"
        )


def load_guide(
    model: Mapping[str, Any], guide: str
) -> tuple[PreTrainedModel, PreTrainedModel | None, PreTrainedTokenizerBase]:
    """Loads what `score_guidance` takes: one model with an adapter, or two where the guide is a model of its own.

    Args:
        model: arguments of `align.load_model` for the reference, `path` among them.
        guide: folder or hub name of an adapter on the reference, or of a whole model; a hub name may end in `@REVISION`.

    Returns:
        The guide, the reference (`None` where the guide is an adapter), and the reference's tokenizer.

    Raises:
        ModelMismatchError: the guide has another tokenizer or base.
    """
    tokenizer, own = check_guide(model, guide), elsewhere(model, guide)
    if is_adapter(own["path"], **source_of(own)):
        return load_model(**{**model, "adapter": guide}), None, tokenizer
    return load_model(**own), load_model(**model), tokenizer


def check_guide(model: Mapping[str, Any], guide: str) -> PreTrainedTokenizerBase:
    """Whether there is such a guide and its tokenizer is the reference's, asked before anything is loaded; parameters as in
    `load_guide`. An adapter that was saved without a tokenizer has its base's.

    Raises:
        ModelLoadError: nothing can be loaded from `guide`.
        ModelMismatchError: the guide has another tokenizer.
    """
    tokenizer, other = load_tokenizer(model["path"], **source_of(model)), elsewhere(model, guide)
    try:
        own = load_tokenizer(other["path"], **source_of(other))
    except ModelLoadError:
        if not is_adapter(other["path"], **source_of(other)):
            raise
        return tokenizer
    check_same_vocabulary(own, tokenizer, guide)
    return tokenizer


def score_guidance(
    guide: PreTrainedModel,
    reference: PreTrainedModel | None,
    pairs: Sequence[Record],
    out_path: str | os.PathLike,
    *,
    pad_token_id: int,
    max_length: int | None = None,
    max_tokens_per_batch: int = 8192,
    settings: dict | None = None,
) -> dict[str, int]:
    """The stage `align score guidance`: adds `chosen_guidance_logratios` and `rejected_guidance_logratios`, in nats, to
    pairs, and `chosen_ref_logps`, `rejected_ref_logps`, which cost nothing more.

    Args:
        guide: π̂, any preference-trained policy with the reference's vocabulary; where it has an adapter, that is on.
        reference: π_ref; `None` is the guide's base, its adapter off, so that one model is in memory.
        pairs: pair records; other token-level columns are kept.
        out_path: scored pairs, JSONL or Parquet.
        max_length: pairs whose prompt and longer completion exceed it are left out and counted.
        settings: what else the numbers depend on (hashes of both models), for resuming.

    Returns:
        Counts: `rows`, `too_long`, `tokens`, `constant` (pairs with one log-ratio for all tokens of each completion).

    Raises:
        ModelMismatchError: no reference is given and the guide has no adapter.
    """
    adapter = getattr(guide, "active_adapter", None) if hasattr(guide, "peft_config") else None
    if reference is None and adapter is None:
        raise ModelMismatchError("the guide has no adapter to switch off, so it cannot be its own reference; give one")
    # Embeddings are padded to different sizes at times.
    smaller = min((guide, guide if reference is None else reference), key=vocab_size)
    options = {"pad_token_id": pad_token_id, "max_tokens_per_batch": max_tokens_per_batch}

    def compute(rows: list[Row]) -> dict[str, list[list[float]]]:
        guided = token_logps(guide, rows, adapter=adapter, **options)
        plain = token_logps(guide if reference is None else reference, rows, **options)
        ratios = [[g - r for g, r in zip(*row, strict=True)] for row in zip(guided, plain, strict=True)]
        return {"guidance_logratios": ratios, "ref_logps": plain}

    return score_stage(
        pairs,
        out_path,
        both_sides(compute),
        model=smaller,
        max_length=max_length,
        stage="score guidance",
        varies="guidance_logratios",
        settings=settings or {},
    )
