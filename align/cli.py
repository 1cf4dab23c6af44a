"""The `align` command: one subcommand per stage. Nothing heavy is imported before a subcommand runs."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

app = typer.Typer(
    help="Preference alignment token by token. Stages read and write records (JSONL or Parquet, by file ending).",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
score_app = typer.Typer(help="Adds token-level columns to pairs.", no_args_is_help=True)
app.add_typer(score_app, name="score")

Model = Annotated[str, typer.Option(help="Hub name or folder of the base model.")]
Adapter = Annotated[str | None, typer.Option(help="PEFT adapter to put on it.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Quantization = Annotated[str | None, typer.Option(help="4bit (NF4) or 8bit.")]
Trust = Annotated[bool, typer.Option(help="Run code that comes with the model.")]
MaxTokens = Annotated[int, typer.Option(help="Token budget of a batch, padding included.")]
MaxLength = Annotated[int | None, typer.Option(help="Leave out (and count) pairs longer than so many tokens.")]


def _first() -> bool:
    """Whether this is the one process, of several under accelerate, that prints."""
    return os.environ.get("RANK", "0") == "0"


def _print(counts: dict) -> None:
    if _first():
        typer.echo(json.dumps(counts, indent=2, ensure_ascii=False))


def _identity(model: str, dtype: str, quantization: str | None, **adapters: str | None) -> dict:
    """What an output depends on besides its inputs, for its manifest."""
    from .models import model_identity

    identity = {name: model_identity(path) if path else None for name, path in {"model": model, **adapters}.items()}
    return {**identity, "dtype": dtype, "quantization": quantization}


def _finished(out: str, stage: str, settings: dict) -> bool:
    """Whether there is nothing left to do; asked before a model is loaded."""
    from .stages import is_complete, read_manifest

    if not is_complete(out, stage, settings):
        return False
    _print(read_manifest(out)["counts"])
    return True


def _load(model: str, adapter: str | None, dtype: str, quantization: str | None, trust: bool):
    from .models import load_model, load_tokenizer

    loaded = load_model(model, dtype=dtype, quantization=quantization, adapter=adapter, trust_remote_code=trust)
    return loaded, load_tokenizer(model, trust_remote_code=trust)


def _unescape(text: str | None) -> str | None:
    """A shell leaves `\\n` as two characters, where a line break is meant."""
    return text and text.replace("\\n", "\n").replace("\\t", "\t")


@app.command()
def sample(
    problems: Annotated[str, typer.Argument(help="Problem file, or hub data set.")],
    out: Annotated[str, typer.Argument(help="Samples to write.")],
    model: Model,
    adapter: Adapter = None,
    n: Annotated[int, typer.Option(help="Completions per problem.")] = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int = 512,
    max_prompt_length: int | None = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends a completion, \\n a line break; may be repeated.")
    ] = None,
    seed: int = 0,
    batch_size: int = 64,
    split: str = "train",
    subset: str | None = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many problems.")] = None,
    prompt_template: Annotated[str | None, typer.Option(help="Text with {prompt} in it, \\n a line break.")] = None,
    chat: Annotated[bool, typer.Option(help="Put the prompt through the chat template.")] = False,
    system_prompt: str | None = None,
    dtype: Dtype = "bfloat16",
    quantization: Quantization = None,
    trust_remote_code: Trust = False,
) -> None:
    """Draws n completions per problem.

    Example: align sample data/tiny-arithmetic/test.jsonl samples.jsonl --model data/tiny-arithmetic/model --n 4 --dtype float32
    """
    from .problems import load_problems
    from .sample import SampleConfig, sample_completions, sample_settings

    stops = tuple(map(_unescape, stop or ()))
    config = SampleConfig(n, temperature, top_p, top_k, max_new_tokens, max_prompt_length, stops, seed, batch_size)
    rows = load_problems(
        problems,
        split=split,
        subset=subset,
        limit=limit,
        prompt_template=_unescape(prompt_template),
        chat=chat,
        system_prompt=_unescape(system_prompt),
    )
    identity = _identity(model, dtype, quantization, adapter=adapter)
    if _finished(out, "sample", sample_settings(rows, config, identity)):
        return
    loaded, tokenizer = _load(model, adapter, dtype, quantization, trust_remote_code)
    _print(sample_completions(loaded, tokenizer, rows, out, config, identity))


@app.command()
def verify(samples: str, out: str) -> None:
    """Extracts each completion's answer and compares it with the reference.

    Example: align verify samples.jsonl verdicts.jsonl
    """
    from .verify import verify as stage

    _print(stage(samples, out))


@app.command()
def pair(
    verdicts: str,
    pairs: str,
    positive: Annotated[str, typer.Option(help="Positive set to write.")],
    negative: Annotated[str, typer.Option(help="Negative set to write.")],
    negative_coverage: float = 0.5,
    pairs_per_problem: int = 1,
    keep_truncated: bool = False,
) -> None:
    """Selects preference pairs and the two contrastive training sets.

    Example: align pair verdicts.jsonl pairs.jsonl --positive positive.jsonl --negative negative.jsonl
    """
    from .pair import PairConfig
    from .pair import pair as stage

    _print(stage(verdicts, pairs, positive, negative, PairConfig(negative_coverage, pairs_per_problem, keep_truncated)))


@score_app.command("contrastive")
def score_contrastive(
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
) -> None:
    """Contrastive probability of every token, from two adapters over one base.

    Example: align score contrastive pairs.jsonl scored.jsonl --model BASE --positive runs/positive --negative runs/negative
    """
    from .models import load_adapters
    from .records import read_records
    from .scoring.contrastive import score_contrastive as stage
    from .scoring.pairs import score_settings

    rows = read_records(pairs, "pair")
    identity = _identity(model, dtype, quantization, positive=positive, negative=negative)
    if _finished(out, "score contrastive", score_settings(rows, max_length, {"beta": beta, **identity})):
        return
    base, tokenizer = _load(model, None, dtype, quantization, trust_remote_code)
    loaded = load_adapters(base, {"positive": positive, "negative": negative})
    _print(
        stage(
            loaded, rows, out, pad_token_id=tokenizer.pad_token_id, beta=beta, max_length=max_length,
            max_tokens_per_batch=max_tokens_per_batch, settings=identity,
        )
    )  # fmt: skip


@score_app.command("reference")
def score_reference(
    pairs: str,
    out: str,
    model: Model,
    adapter: Adapter = None,
    max_length: MaxLength = None,
    max_tokens_per_batch: MaxTokens = 8192,
    dtype: Dtype = "bfloat16",
    quantization: Quantization = None,
    trust_remote_code: Trust = False,
) -> None:
    """Reference log-probability of every token, so that training needs no reference pass.

    Example: align score reference pairs.jsonl referenced.jsonl --model BASE
    """
    from .records import read_records
    from .scoring.pairs import score_settings
    from .scoring.reference import score_reference as stage

    rows = read_records(pairs, "pair")
    identity = _identity(model, dtype, quantization, adapter=adapter)
    if _finished(out, "score reference", score_settings(rows, max_length, identity)):
        return
    loaded, tokenizer = _load(model, adapter, dtype, quantization, trust_remote_code)
    _print(
        stage(
            loaded, rows, out, pad_token_id=tokenizer.pad_token_id, max_length=max_length,
            max_tokens_per_batch=max_tokens_per_batch, settings=identity,
        )
    )  # fmt: skip


@score_app.command("guidance")
def score_guidance(
    pairs: str,
    out: str,
    model: Annotated[str, typer.Option(help="Hub name or folder of the reference.")],
    guide: Annotated[str, typer.Option(help="Preference-trained policy: a model, or an adapter on the reference.")],
    max_length: MaxLength = None,
    max_tokens_per_batch: MaxTokens = 8192,
    dtype: Dtype = "bfloat16",
    quantization: Quantization = None,
    trust_remote_code: Trust = False,
) -> None:
    """Log-ratio of a guide and the reference for every token, and the reference's log-probability.

    Example: align score guidance pairs.jsonl guided.jsonl --model BASE --guide runs/dpo
    """
    from .models import is_adapter, load_tokenizer
    from .records import read_records
    from .scoring.guidance import check_same_vocabulary
    from .scoring.guidance import score_guidance as stage
    from .scoring.pairs import score_settings

    rows = read_records(pairs, "pair")
    identity = _identity(model, dtype, quantization, guide=guide)
    if _finished(out, "score guidance", score_settings(rows, max_length, identity)):
        return
    if is_adapter(guide):
        loaded, tokenizer = _load(model, guide, dtype, quantization, trust_remote_code)
        reference = None
    else:
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        check_same_vocabulary(load_tokenizer(guide, trust_remote_code=trust_remote_code), tokenizer, guide)
        reference, _ = _load(model, None, dtype, quantization, trust_remote_code)
        loaded, _ = _load(guide, None, dtype, quantization, trust_remote_code)
    _print(
        stage(
            loaded, reference, rows, out, pad_token_id=tokenizer.pad_token_id, max_length=max_length,
            max_tokens_per_batch=max_tokens_per_batch, settings=identity,
        )
    )  # fmt: skip


@app.command()
def evaluate(
    verdicts: str,
    k: Annotated[list[int] | None, typer.Option(help="Adds pass@k and maj@k; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Numbers as JSON.")] = False,
) -> None:
    """Accuracy with n and a 95 % interval.

    Example: align evaluate verdicts.jsonl --k 4
    """
    from .evaluate import evaluate_verdicts, format_interval
    from .records import read_records
    from .report import markdown_table

    result = evaluate_verdicts(read_records(verdicts, "verdict"), k or ())
    if as_json or not _first():
        _print(result)
        return
    rows = [
        {"metric": name, "% [95 %]": format_interval(value), "n": result["n"]}
        for name, value in result.items()
        if isinstance(value, dict)
    ]
    typer.echo(markdown_table(rows))
    typer.echo(f"completions per problem: {result['samples']}; without an answer: {result['no_answer']:.1%}")


@app.command()
def inspect(
    pairs: str,
    out: Annotated[str, typer.Argument(help="HTML page to write.")],
    tokenizer: Annotated[str, typer.Option(help="Hub name or folder of the tokenizer that made the ids.")],
    column: Annotated[
        list[str] | None, typer.Option(help="Token-level column without its side, e.g. ce_scores.")
    ] = None,
    limit: int = 1000,
    title: str = "align: pairs",
    trust_remote_code: Trust = False,
) -> None:
    """Writes a page of pairs with tokens coloured by a token-level column.

    Example: align inspect scored.jsonl pairs.html --tokenizer data/tiny-arithmetic/model
    """
    from .models import load_tokenizer
    from .records import read_records
    from .report import inspect_pairs

    rows = read_records(pairs, "pair")
    loaded = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    typer.echo(inspect_pairs(rows, loaded, out, columns=column, limit=limit, title=title))


def main() -> None:
    """Entry point: what is wrong with the input is one line on stderr and exit code 2, no traceback."""
    from .errors import AlignError

    try:
        app()
    except AlignError as error:
        typer.echo(f"align: {error}", err=True)
        sys.exit(2)
