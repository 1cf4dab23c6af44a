"""`align inspect`: pages to look at, of records and of whole runs."""

from __future__ import annotations

from typing import Annotated

import typer
from typer.core import TyperGroup

from .cli_common import Revision, Trust


class _Inspect(TyperGroup):
    """`align inspect FILE PAGE` means `align inspect records FILE PAGE`; no file of records is called like a command."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["records", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Inspect, no_args_is_help=True,
    help="Writes a page to look at: tokens coloured by a token-level column, or all of a run. The word `records` may be left out.",
)  # fmt: skip


@app.command()
def records(
    pairs: Annotated[str, typer.Argument(help="Scored pairs, or traces.")],
    out: Annotated[str, typer.Argument(help="HTML page to write.")],
    tokenizer: Annotated[str, typer.Option(help="Hub name or folder of the tokenizer that made the ids.")],
    column: Annotated[
        list[str] | None, typer.Option(help="Token-level column, of pairs without its side: ce_scores, student_probs.")
    ] = None,
    limit: int = 1000,
    title: str | None = None,
    trust_remote_code: Trust = False,
    revision: Revision = None,
) -> None:
    """Writes a page of pairs, or of traces, with tokens coloured by a token-level column.

    Example: align inspect records scored.jsonl pairs.html --tokenizer data/tiny-arithmetic/model
    """
    from .checks import check_apart
    from .models import load_tokenizer
    from .records import check_records, read_records
    from .report import inspect_pairs, inspect_traces

    check_apart(pairs, out)
    rows = read_records(pairs)
    loaded = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code, revision=revision)
    if rows and "from_teacher" in rows[0]:
        typer.echo(inspect_traces(rows, loaded, out, columns=column, limit=limit, title=title or "align: traces"))
        return
    check_records(rows, "pair", source=pairs)
    typer.echo(inspect_pairs(rows, loaded, out, columns=column, limit=limit, title=title or "align: pairs"))


@app.command()
def run(
    folder: Annotated[str, typer.Argument(help="Folder that a recipe was given as --output.", metavar="DIR")],
    out: Annotated[str | None, typer.Option(help="HTML page to write; DIR/run.html by default.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="For the examples' tokens; by default the one that a training left in the folder."),
    ] = None,
    limit: Annotated[int, typer.Option(help="Examples of every file.")] = 50,
    trust_remote_code: Trust = False,
    revision: Revision = None,
) -> None:
    """Writes a page of a run: stages, counts, drops, curves, score histograms, the evaluation, examples.

    The run may be going on, or have been interrupted: what is missing or damaged stands on the page and on stderr.

    Example: align inspect run runs/tiny-arithmetic
    """
    from .errors import ConfigError
    from .run_report import inspect_run

    loaded = None
    if revision is not None and tokenizer is None:
        raise ConfigError("--revision belongs to --tokenizer; give a hub name there, or leave it out")
    if tokenizer is not None:
        from .models import load_tokenizer

        loaded = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code, revision=revision)
    page, problems = inspect_run(folder, out, tokenizer=loaded, limit=limit)
    for problem in problems:
        typer.echo(f"align: {problem}", err=True)
    typer.echo(page)
