"""`align mix`: contexts of a model's own tokens, offline."""

from __future__ import annotations

from typing import Annotated

import typer

from .checks import check_apart
from .cli_common import (
    Adapter,
    ChatArguments,
    Dtype,
    MaxTokens,
    Model,
    Quantization,
    Revision,
    System,
    Trust,
    identity,
    json_object,
    load,
    print_counts,
    unescape,
)
from .records import READABLE

app = typer.Typer(
    help="Puts a model's own tokens into the contexts of demonstrations, to look at or to train on elsewhere: rows of "
    "input_ids and labels.",
    no_args_is_help=True,
)

Source = Annotated[
    str,
    typer.Argument(help=f"Demonstrations with ids; or problems with solutions, a file ({READABLE}) or a hub data set."),
]
Out = Annotated[str, typer.Argument(help="Contexts to write.")]
Template = Annotated[str | None, typer.Option(help="Text with {prompt} in it, \\n a line break.")]
Chat = Annotated[bool, typer.Option(help="Put the prompt through the chat template.")]
Limit = Annotated[int | None, typer.Option(help="Only the first so many rows.")]


@app.command()
def bash(
    source: Source,
    out: Out,
    model: Model,
    adapter: Adapter = None,
    epsilon: Annotated[float, typer.Option(help="Chance that a context token is the model's own.")] = 0.25,
    generation: Annotated[str, typer.Option(help="parallel or autoregressive.")] = "parallel",
    passes: Annotated[int, typer.Option(help="Passes of parallel draws.")] = 1,
    temperature: float = 1.0,
    seed: int = 0,
    max_tokens_per_batch: MaxTokens = 16384,
    split: str = "train",
    subset: str | None = None,
    limit: Limit = None,
    prompt_template: Template = None,
    chat: Chat = False,
    system_prompt: System = None,
    chat_template_kwargs: ChatArguments = None,
    dtype: Dtype = "bfloat16",
    quantization: Quantization = None,
    trust_remote_code: Trust = False,
    revision: Revision = None,
) -> None:
    """Interleaves ground truth and own tokens; labels are the ground truth.

    Example: align mix bash data/tiny-arithmetic/train.jsonl mixed.jsonl --model data/tiny-arithmetic/model --dtype float32 --limit 40
    """
    from .contexts import OwnTokens
    from .demonstrations import load_demonstrations
    from .mix_stage import mix_bash

    check_apart(source, out)
    config = OwnTokens(generation, passes, temperature, max_tokens_per_batch)
    loaded, tokenizer = load(model, adapter, dtype, quantization, trust_remote_code, revision)
    rows = load_demonstrations(
        source, tokenizer, split=split, subset=subset, limit=limit, prompt_template=unescape(prompt_template), chat=chat,
        system_prompt=unescape(system_prompt),
        chat_template_kwargs=json_object(chat_template_kwargs, "--chat-template-kwargs"),
    )  # fmt: skip
    depends = identity(model, dtype, quantization, revision, adapter=adapter)
    print_counts(mix_bash(loaded, tokenizer, rows, out, epsilon=epsilon, config=config, seed=seed, settings=depends))


@app.command()
def rac(
    source: Source,
    out: Out,
    model: Model,
    adapter: Adapter = None,
    cue: Annotated[str | None, typer.Option(help="Text between own tokens and reference, \\n a line break.")] = None,
    prefix_fraction: Annotated[
        tuple[float, float], typer.Option(help="Least and largest share of a generation that is kept.")
    ] = (0.0, 1.0),
    keep_correct_share: Annotated[float, typer.Option(help="Share of right generations left uncorrected.")] = 0.5,
    max_new_tokens: int = 512,
    temperature: float = 1.0,
    max_length: Annotated[int | None, typer.Option(help="Of an example, in tokens.")] = None,
    seed: int = 0,
    max_tokens_per_batch: MaxTokens = 16384,
    split: str = "train",
    subset: str | None = None,
    limit: Limit = None,
    prompt_template: Template = None,
    chat: Chat = False,
    system_prompt: System = None,
    chat_template_kwargs: ChatArguments = None,
    dtype: Dtype = "bfloat16",
    quantization: Quantization = None,
    trust_remote_code: Trust = False,
    revision: Revision = None,
) -> None:
    """Generates answers and puts cue and reference behind their beginnings; labels are cue and reference alone.

    Example: align mix rac data/tiny-arithmetic/train.jsonl corrections.jsonl --model data/tiny-arithmetic/model --dtype float32 --limit 40 --max-new-tokens 80
    """
    from .demonstrations import load_demonstrations
    from .mix_stage import mix_rac
    from .rac import CorrectionSettings

    check_apart(source, out)
    text = CorrectionSettings.cue if cue is None else unescape(cue)
    config = CorrectionSettings(
        text, prefix_fraction, keep_correct_share, max_new_tokens, temperature, max_length, max_tokens_per_batch
    )
    loaded, tokenizer = load(model, adapter, dtype, quantization, trust_remote_code, revision)
    rows = load_demonstrations(
        source, tokenizer, split=split, subset=subset, limit=limit, prompt_template=unescape(prompt_template), chat=chat,
        system_prompt=unescape(system_prompt),
        chat_template_kwargs=json_object(chat_template_kwargs, "--chat-template-kwargs"),
    )  # fmt: skip
    depends = identity(model, dtype, quantization, revision, adapter=adapter)
    print_counts(mix_rac(loaded, tokenizer, rows, out, config=config, seed=seed, settings=depends))
