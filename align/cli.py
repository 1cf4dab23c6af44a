"""The `align` command: one subcommand per stage. Nothing heavy is imported before a subcommand runs."""

from __future__ import annotations

from typing import Annotated

import typer

from .checks import check_apart
from .cli_common import (
    Adapter,
    ChatArguments,
    Dtype,
    Model,
    Quantization,
    Revision,
    System,
    Trust,
    finished,
    identity,
    is_first,
    json_object,
    print_counts,
    unescape,
)
from .cli_inspect import app as inspect_app
from .cli_mix import app as mix_app
from .cli_score import app as score_app
from .cli_trace import select, trace
from .records import READABLE

app = typer.Typer(
    help="Preference alignment token by token. Stages write records as JSONL or Parquet, by file ending.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
app.add_typer(score_app, name="score")
app.add_typer(mix_app, name="mix")
app.add_typer(inspect_app, name="inspect")
app.command()(trace)
app.command()(select)


@app.command()
def sample(
    problems: Annotated[str, typer.Argument(help=f"Problems: a file ({READABLE}), or a hub data set.")],
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
    system_prompt: System = None,
    chat_template_kwargs: ChatArguments = None,
    answers: Annotated[bool, typer.Option(help="Problems with answers; --no-answers for open-ended prompts.")] = True,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 (unless the engine is a server) or float16.")
    ] = None,
    quantization: Quantization = None,
    trust_remote_code: Trust = False,
    revision: Revision = None,
    engine: Annotated[
        str, typer.Option(help="transformers; vllm (pip install 'align[vllm]'); or server, one that returns token ids.")
    ] = "transformers",
    tensor_parallel_size: Annotated[int | None, typer.Option(help="vllm: GPUs that share the model.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="vllm: most tokens of prompt and completion.")] = None,
    gpu_memory_utilization: Annotated[float | None, typer.Option(help="vllm: share of a GPU's memory.")] = None,
    server_url: Annotated[
        str | None, typer.Option(help="server: http://HOST:PORT/v1; its key in ALIGN_SERVER_KEY.")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="server: the model's name there; --model's by default.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(help="server: most requests at a time; 64.")] = None,
    timeout: Annotated[float | None, typer.Option(help="server: seconds that a request may take; 600.")] = None,
) -> None:
    """Draws n completions per problem.

    Example: align sample data/tiny-arithmetic/test.jsonl samples.jsonl --model data/tiny-arithmetic/model --n 4 --limit 40 --dtype float32

    Example: align sample data/tiny-arithmetic/test.jsonl drawn.jsonl --model data/tiny-arithmetic/model --engine server --server-url http://localhost:8000/v1
    """
    from .engines import EngineConfig, open_engine
    from .models import load_tokenizer
    from .problems import load_problems
    from .sample import SampleConfig, sample_completions, sample_settings

    check_apart(problems, out)
    dtype = dtype or (None if engine == "server" else "bfloat16")
    drawing = EngineConfig(
        engine, tensor_parallel_size, max_model_len, gpu_memory_utilization, server_url, served_model_name, concurrency,
        timeout,
    )  # fmt: skip
    loaded = {"path": model, "adapter": adapter, "quantization": quantization, "trust_remote_code": trust_remote_code}
    loaded |= {} if revision is None else {"revision": revision}
    loaded |= {} if dtype is None else {"dtype": dtype}
    stops = tuple(map(unescape, stop or ()))
    config = SampleConfig(n, temperature, top_p, top_k, max_new_tokens, max_prompt_length, stops, seed, batch_size)
    drawing.check_model(loaded, config)
    rows = load_problems(
        problems,
        split=split,
        subset=subset,
        limit=limit,
        prompt_template=unescape(prompt_template),
        chat=chat,
        system_prompt=unescape(system_prompt),
        chat_template_kwargs=json_object(chat_template_kwargs, "--chat-template-kwargs"),
        answers=answers,
    )
    depends = {**identity(model, dtype, quantization, revision, adapter=adapter), **drawing.settings()}
    if finished(out, "sample", sample_settings(rows, config, depends)):
        return
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code, revision=revision)
    with open_engine(drawing, loaded, tokenizer) as opened:
        print_counts(sample_completions(opened, tokenizer, rows, out, config, depends))


@app.command()
def verify(samples: str, out: str) -> None:
    """Extracts each completion's answer and compares it with the reference.

    Example: align verify samples.jsonl verdicts.jsonl
    """
    from .verify import verify as stage

    check_apart(samples, out)
    print_counts(stage(samples, out))


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

    print_counts(
        stage(verdicts, pairs, positive, negative, PairConfig(negative_coverage, pairs_per_problem, keep_truncated))
    )


@app.command()
def tokenize(
    source: Annotated[str, typer.Argument(help=f"Preferences: a file ({READABLE}), or a hub data set.")],
    out: Annotated[str, typer.Argument(help="Pairs to write.")],
    model: Annotated[str, typer.Option(help="Hub name or folder of the model whose tokenizer makes the ids.")],
    split: str = "train",
    subset: str | None = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many rows.")] = None,
    chat: Annotated[bool, typer.Option(help="Put text through the chat template.")] = False,
    system_prompt: System = None,
    chat_template_kwargs: ChatArguments = None,
    max_prompt_length: Annotated[
        int | None, typer.Option(help="Leave out (and count) rows with longer prompts.")
    ] = None,
    trl_completions: Annotated[
        bool,
        typer.Option(help="Completions as TRL makes them: as the chat template ends them, turns of others included."),
    ] = False,
    trust_remote_code: Trust = False,
    revision: Revision = None,
) -> None:
    """Makes pairs of a preference data set: prompt, chosen, rejected, as text or messages.

    A column weight, one number of 0 or more per row, is kept: training scales the pair's loss by it.

    Example: align tokenize preferences.jsonl tokenized.jsonl --model data/tiny-arithmetic/model
    """
    from .identity import model_identity
    from .models import load_tokenizer
    from .preferences import tokenize_pairs

    check_apart(source, out)
    print_counts(
        tokenize_pairs(
            source, load_tokenizer(model, trust_remote_code=trust_remote_code, revision=revision), out, split=split, subset=subset,
            limit=limit, chat=chat, system_prompt=unescape(system_prompt), max_prompt_length=max_prompt_length,
            chat_template_kwargs=json_object(chat_template_kwargs, "--chat-template-kwargs"),
            trl_completions=trl_completions, settings={"model": model_identity(model, revision=revision)},
        )
    )  # fmt: skip


@app.command()
def evaluate(
    completions: Annotated[str, typer.Argument(help="Verdicts, or, to be exported, samples.")],
    k: Annotated[list[int] | None, typer.Option(help="Adds pass@k and maj@k; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Numbers as JSON.")] = False,
    export: Annotated[
        str | None, typer.Option(help="alpaca-eval or arena-hard: writes the file that this judge reads, to --out.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="File of an export.")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name on the judge's leaderboard.")] = None,
    corrections: Annotated[
        str | None, typer.Option(help="Cue, \\n a line break: how often a model corrects itself, and what comes of it.")
    ] = None,
) -> None:
    """Accuracy with n and a 95 % interval; or completions for a win-rate judge.

    Example: align evaluate verdicts.jsonl --k 4

    Example: align evaluate verdicts.jsonl --corrections "Wait, that is not right."

    Example: align evaluate samples.jsonl --export alpaca-eval --out outputs.json --name my-model
    """
    from .errors import ConfigError
    from .evaluate import evaluate_verdicts, format_interval
    from .export import export_completions
    from .rac import correction_report
    from .records import read_records
    from .report import markdown_table

    check_apart(completions, out)
    if export is not None:
        if out is None or name is None:
            raise ConfigError("--export needs --out, the file to write, and --name, the model's name")
        if k or as_json or corrections is not None:
            raise ConfigError("--k, --json and --corrections belong to the table of verdicts; an export has none")
        print_counts(export_completions(read_records(completions, "sample"), out, export, name))
        return
    if out is not None or name is not None:
        raise ConfigError("--out and --name belong to --export; without it, the table is printed")
    verdicts = read_records(completions, "verdict")
    result = evaluate_verdicts(verdicts, k or ())
    if corrections is not None:
        result["corrections"] = correction_report(verdicts, unescape(corrections))
    if as_json or not is_first():
        print_counts(result)
        return
    rows = [
        {"metric": metric, "% [95 %]": format_interval(value), "n": result["n"]}
        for metric, value in result.items()
        if isinstance(value, dict) and "low" in value
    ]
    typer.echo(markdown_table(rows))
    typer.echo(f"completions per problem: {result['samples']}; without an answer: {result['no_answer']:.1%}")
    if corrections is not None:
        shares = [
            {"corrections": name.replace("_", " "), "%": f"{100 * share:.1f}"}
            for name, share in result["corrections"].items()
            if name != "n"
        ]
        typer.echo("\n" + markdown_table(shares))


@app.command()
def merge(
    out: Annotated[str, typer.Argument(help="Folder of the merged model.")],
    model: Model,
    adapter: Annotated[str, typer.Option(help="LoRA adapter to merge into it.")],
    dtype: Dtype = "bfloat16",
    trust_remote_code: Trust = False,
    revision: Revision = None,
) -> None:
    """Merges a LoRA adapter into its base: a model of its own, to train another adapter on.

    Example: align merge merged --model data/tiny-arithmetic/model --adapter runs/positive --dtype float32
    """
    from .merge import merge_adapter

    typer.echo(merge_adapter(model, adapter, out, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision))


def main() -> None:
    """Entry point: what is wrong with the input is one line on stderr and exit code 2, no traceback."""
    from .errors import AlignError
    from .processes import leave

    try:
        app()
    except AlignError as error:
        leave(error)
