"""`align score …`: one subcommand per source of token-level columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .checks import check_apart
from .cli_common import (
    Adapter,
    Dtype,
    MaxLength,
    MaxTokens,
    Model,
    Quantization,
    Revision,
    Trust,
    finished,
    identity,
    load,
    print_counts,
    unescape,
)

if TYPE_CHECKING:
    from .record_file import RecordFile

app = typer.Typer(help="Adds token-level columns to pairs.", no_args_is_help=True)


def _is_done(out: str, stage: str, rows: RecordFile, max_length: int | None, settings: dict) -> bool:
    from .scoring.pairs import score_settings

    return finished(out, f"score {stage}", score_settings(rows, max_length, settings))


@app.command()
def contrastive(
    pairs: str,
    out: str,
    model: Model,
    positive: Annotated[str, typer.Option(help="Adapter trained on correct solutions.")],
    negative: Annotated[str, typer.Option(help="Adapter trained on wrong solutions.")],
    beta: Annotated[float, typer.Option(help="Weight of the negative model.")] = 1.0,
    max_length: MaxLength = None,
    max_tokens_per_batch: MaxTokens = 8192,
    dtype: Dtype = "bfloat16",
    quantization: Quantization = None,
    trust_remote_code: Trust = False,
    revision: Revision = None,
) -> None:
    """Contrastive probability of every token, from two adapters over one base.

    Example: align score contrastive pairs.jsonl scored.jsonl --model data/tiny-arithmetic/model --dtype float32 --positive runs/positive --negative runs/negative
    """
    from .models import load_adapters
    from .record_file import RecordFile
    from .scoring.contrastive import score_contrastive

    check_apart(pairs, out)
    rows = RecordFile(pairs, "pair")
    depends = identity(model, dtype, quantization, revision, positive=positive, negative=negative)
    if _is_done(out, "contrastive", rows, max_length, {"beta": beta, **depends}):
        return
    base, tokenizer = load(model, None, dtype, quantization, trust_remote_code, revision)
    loaded = load_adapters(base, {"positive": positive, "negative": negative})
    counts = score_contrastive(
        loaded, rows, out, pad_token_id=tokenizer.pad_token_id, beta=beta, max_length=max_length,
        max_tokens_per_batch=max_tokens_per_batch, settings=depends,
    )  # fmt: skip
    print_counts(counts)


@app.command()
def reference(
    pairs: str,
    out: str,
    model: Model,
    adapter: Adapter = None,
    max_length: MaxLength = None,
    max_tokens_per_batch: MaxTokens = 8192,
    dtype: Dtype = "bfloat16",
    quantization: Quantization = None,
    trust_remote_code: Trust = False,
    revision: Revision = None,
) -> None:
    """Reference log-probability of every token, so that training needs no reference pass.

    Example: align score reference pairs.jsonl referenced.jsonl --model data/tiny-arithmetic/model --dtype float32
    """
    from .record_file import RecordFile
    from .scoring.reference import score_reference

    check_apart(pairs, out)
    rows = RecordFile(pairs, "pair")
    depends = identity(model, dtype, quantization, revision, adapter=adapter)
    if _is_done(out, "reference", rows, max_length, depends):
        return
    loaded, tokenizer = load(model, adapter, dtype, quantization, trust_remote_code, revision)
    counts = score_reference(
        loaded, rows, out, pad_token_id=tokenizer.pad_token_id, max_length=max_length,
        max_tokens_per_batch=max_tokens_per_batch, settings=depends,
    )  # fmt: skip
    print_counts(counts)


@app.command()
def guidance(
    pairs: str,
    out: str,
    model: Annotated[str, typer.Option(help="Hub name or folder of the reference.")],
    guide: Annotated[
        str,
        typer.Option(
            help="Preference-trained policy: a model, or an adapter on the reference; NAME@REVISION of the hub."
        ),
    ],
    max_length: MaxLength = None,
    max_tokens_per_batch: MaxTokens = 8192,
    dtype: Dtype = "bfloat16",
    quantization: Quantization = None,
    trust_remote_code: Trust = False,
    revision: Revision = None,
) -> None:
    """Log-ratio of a guide and the reference for every token, and the reference's log-probability.

    Example: align score guidance pairs.jsonl guided.jsonl --model data/tiny-arithmetic/model --dtype float32 --guide runs/dpo
    """
    from .record_file import RecordFile
    from .scoring.guidance import load_guide, score_guidance

    check_apart(pairs, out)
    rows = RecordFile(pairs, "pair")
    depends = identity(model, dtype, quantization, revision, guide=guide)
    if _is_done(out, "guidance", rows, max_length, depends):
        return
    source = {"trust_remote_code": trust_remote_code, "revision": revision}
    settings = {"path": model, "dtype": dtype, "quantization": quantization, **source}
    loaded, plain, tokenizer = load_guide(settings, guide)
    counts = score_guidance(
        loaded, plain, rows, out, pad_token_id=tokenizer.pad_token_id, max_length=max_length,
        max_tokens_per_batch=max_tokens_per_batch, settings=depends,
    )  # fmt: skip
    print_counts(counts)


@app.command()
def entropy(
    pairs: str,
    out: str,
    model: Model,
    adapter: Adapter = None,
    top: Annotated[float, typer.Option(help="Share of all completion tokens that keep weight 1.")] = 0.2,
    max_length: MaxLength = None,
    max_tokens_per_batch: MaxTokens = 8192,
    dtype: Dtype = "bfloat16",
    quantization: Quantization = None,
    trust_remote_code: Trust = False,
    revision: Revision = None,
) -> None:
    """Weight 1 for the tokens at which the policy is least certain, 0 for the others; and every token's entropy.

    Example: align score entropy pairs.jsonl entropy.jsonl --model data/tiny-arithmetic/model --dtype float32 --top 0.2
    """
    from .record_file import RecordFile
    from .scoring.entropy import score_entropy

    check_apart(pairs, out)
    rows = RecordFile(pairs, "pair")
    depends = identity(model, dtype, quantization, revision, adapter=adapter)
    if _is_done(out, "entropy", rows, max_length, {"top": top, **depends}):
        return
    loaded, tokenizer = load(model, adapter, dtype, quantization, trust_remote_code, revision)
    counts = score_entropy(
        loaded, rows, out, pad_token_id=tokenizer.pad_token_id, top=top, max_length=max_length,
        max_tokens_per_batch=max_tokens_per_batch, settings=depends,
    )  # fmt: skip
    print_counts(counts)


@app.command()
def rollout(
    pairs: str,
    out: str,
    model: Model,
    adapter: Adapter = None,
    n: Annotated[int, typer.Option(help="Continuations per position.")] = 64,
    search: Annotated[str, typer.Option(help="all: every position; bisection: about log2 of them.")] = "all",
    threshold: Annotated[
        float, typer.Option(help="Share of right continuations at which a prefix counts as lost.")
    ] = 0.05,
    rule: Annotated[
        str, typer.Option(help="drop: weights are losses of that share; critical: 1 at one token.")
    ] = "drop",
    weight_chosen: Annotated[bool, typer.Option(help="Roll out chosen completions, too: weights are gains.")] = False,
    k: Annotated[
        list[int] | None,
        typer.Option(help="pass@k with and without the critical token, freshly drawn; may be repeated."),
    ] = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest completion, its given part included; no shorter than those in the pairs.")
    ] = 512,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends a completion, \\n a line break; may be repeated.")
    ] = None,
    seed: int = 0,
    batch_size: Annotated[int, typer.Option(help="Most continuations generated together.")] = 64,
    max_length: MaxLength = None,
    dtype: Dtype = "bfloat16",
    quantization: Quantization = None,
    trust_remote_code: Trust = False,
    revision: Revision = None,
) -> None:
    """Ground truth for critical tokens: how often the model still gets the answer after each token of a rejected solution.

    Example: align score rollout pairs.jsonl rollouts.jsonl --model data/tiny-arithmetic/model --dtype float32 --n 16 --max-new-tokens 80 --k 4
    """
    from .record_file import RecordFile
    from .scoring.rollout import RolloutConfig, rollout_settings, score_rollout

    stops = tuple(map(unescape, stop or ()))
    config = RolloutConfig(
        n, search, threshold, rule, weight_chosen, tuple(k or ()), temperature, top_p, top_k, max_new_tokens, stops,
        seed, batch_size,
    )  # fmt: skip
    check_apart(pairs, out)
    rows = RecordFile(pairs, "pair")
    depends = identity(model, dtype, quantization, revision, adapter=adapter)
    if _is_done(out, "rollout", rows, max_length, rollout_settings(config, depends)):
        return
    loaded, tokenizer = load(model, adapter, dtype, quantization, trust_remote_code, revision)
    print_counts(score_rollout(loaded, tokenizer, rows, out, config, max_length=max_length, settings=depends))
