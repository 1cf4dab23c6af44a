"""What the subcommands share: options, and what is asked before a model is loaded."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="Hub name or folder of the base model.")]
Adapter = Annotated[str | None, typer.Option(help="PEFT adapter to put on it; a hub name may end in @REVISION.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Quantization = Annotated[str | None, typer.Option(help="4bit (NF4) or 8bit.")]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit, where a hub name is given; main by default.")
]
Trust = Annotated[bool, typer.Option(help="Run code that comes with the model.")]
MaxTokens = Annotated[int, typer.Option(help="Token budget of a batch, padding included.")]
ChatArguments = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        help="JSON of arguments for the chat template, '{\"enable_thinking\": false}'; those of a row's column win.",
    ),
]
System = Annotated[
    str | None, typer.Option("--system-prompt", help="System message, \\n a line break; with --chat, or for messages.")
]
MaxLength = Annotated[int | None, typer.Option(help="Leave out (and count) pairs longer than so many tokens.")]


def is_first() -> bool:
    """Whether this is the one process, of several under accelerate, that prints."""
    return os.environ.get("RANK", "0") == "0"


def print_counts(counts: dict) -> None:
    """Prints a stage's counts as JSON, in one process."""
    if is_first():
        typer.echo(json.dumps(counts, indent=2, ensure_ascii=False))


def identity(
    model: str, dtype: str | None, quantization: str | None, revision: str | None = None, **adapters: str | None
) -> dict:
    """What an output depends on besides its inputs, for its manifest."""
    from .identity import model_identity

    found = {name: model_identity(path) if path else None for name, path in adapters.items()}
    return {"model": model_identity(model, revision=revision), **found, "dtype": dtype, "quantization": quantization}


def finished(out: str, stage: str, settings: dict) -> bool:
    """Whether there is nothing left to do; asked before a model is loaded."""
    from .stages import is_complete, read_manifest

    if not is_complete(out, stage, settings):
        return False
    print_counts(read_manifest(out)["counts"])
    return True


def load(model: str, adapter: str | None, dtype: str, quantization: str | None, trust: bool, revision: str | None):
    """Model and tokenizer."""
    from .models import load_model, load_tokenizer

    source = {"trust_remote_code": trust, "revision": revision}
    loaded = load_model(model, dtype=dtype, quantization=quantization, adapter=adapter, **source)
    return loaded, load_tokenizer(model, **source)


def unescape(text: str | None) -> str | None:
    """A shell leaves `\\n` as two characters, where a line break is meant."""
    return text and text.replace("\\n", "\n").replace("\\t", "\t")


def json_object(text: str | None, option: str) -> dict | None:
    """The object that an option's JSON text stands for; a ConfigError where it is something else."""
    from .errors import ConfigError
    from .records import parse_json

    if text is None:
        return None
    try:
        value = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{option} = {text[:80]!r} must be JSON of an object ({error}); fix it") from None
    if not isinstance(value, dict):
        raise ConfigError(f'{option} = {text[:80]!r} must be JSON of an object; write it as {{"name": value}}')
    return value
