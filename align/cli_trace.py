"""`align trace` and `align select`: traces of reverse speculative decoding, and which of them to train on."""

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
    finished,
    identity,
    json_object,
    load,
    print_counts,
    unescape,
)
from .records import READABLE


def trace(
    problems: Annotated[str, typer.Argument(help=f"Problems: a file ({READABLE}), or a hub data set.")],
    out: Annotated[str, typer.Argument(help="Traces to write.")],
    kept: Annotated[str, typer.Option(help="Demonstrations to write: the traces to train on.")],
    teacher: Annotated[str, typer.Option(help="Hub name or folder of the teacher.")],
    student: Annotated[str, typer.Option(help="Hub name or folder of the student.")],
    teacher_adapter: Annotated[str | None, typer.Option(help="PEFT adapter to put on the teacher.")] = None,
    student_adapter: Annotated[str | None, typer.Option(help="PEFT adapter to put on the student.")] = None,
    special_token: Annotated[
        list[str] | None, typer.Option(help="TEACHER=STUDENT: a special token under another name; may be repeated.")
    ] = None,
    never: Annotated[
        list[str] | None, typer.Option(help="A token that only one of the two has, never to be drawn; may be repeated.")
    ] = None,
    n: Annotated[int, typer.Option(help="Traces per problem.")] = 16,
    threshold: Annotated[float, typer.Option(help="Least probability under the student that it accepts.")] = 0.01,
    draws: Annotated[int, typer.Option(help="Draws of the teacher before the student's own.")] = 5,
    lookahead: Annotated[int, typer.Option(help="Tokens drafted per pass of the teacher; speed alone.")] = 4,
    max_new_tokens: int = 8192,
    teacher_temperature: float = 0.7,
    student_temperature: float = 0.7,
    top_p: float = 0.95,
    top_k: int = 20,
    seed: int = 0,
    max_student_share: Annotated[float, typer.Option(help="Rejects traces of which more is the student's.")] = 0.5,
    prefix_tokens: Annotated[int, typer.Option(help="Beginnings to keep of problems without a kept trace.")] = 128,
    max_prompt_length: int | None = None,
    batch_size: Annotated[int, typer.Option(help="Traces drawn together.")] = 16,
    cuda_graphs: Annotated[
        bool, typer.Option(help="Record passes on a GPU and replay them: faster by far, the same but for rounding.")
    ] = True,
    split: str = "train",
    subset: str | None = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many problems.")] = None,
    prompt_template: Annotated[str | None, typer.Option(help="Text with {prompt} in it, \\n a line break.")] = None,
    chat: Annotated[bool, typer.Option(help="Put the prompt through the chat template.")] = False,
    system_prompt: System = None,
    chat_template_kwargs: ChatArguments = None,
    dtype: Dtype = "bfloat16",
    quantization: Quantization = None,
    trust_remote_code: Trust = False,
    teacher_revision: Revision = None,
    student_revision: Revision = None,
) -> None:
    """Draws traces by reverse speculative decoding, verifies them, and keeps the ones to train on.

    Example: align trace data/tiny-arithmetic/train.jsonl traces.jsonl --kept kept.jsonl --teacher data/tiny-arithmetic/model --teacher-adapter runs/positive --student data/tiny-arithmetic/model --dtype float32 --limit 40 --n 4 --max-new-tokens 80
    """
    from .errors import ConfigError
    from .identity import model_identity
    from .problems import load_problems
    from .rsd import RSDConfig
    from .stages import is_complete, read_manifest
    from .trace import TraceConfig, load_policies, trace_problems, trace_settings

    check_apart(problems, out, kept)
    rsd = RSDConfig(
        threshold, draws, lookahead, max_new_tokens, teacher_temperature, student_temperature, top_p, top_k, seed
    )
    config = TraceConfig(n, max_student_share, prefix_tokens, max_prompt_length, batch_size)
    mapping = {}
    for pair in special_token or ():
        theirs, separator, ours = pair.partition("=")
        if not separator:
            raise ConfigError(f"--special-token {pair!r}: write it as TEACHER=STUDENT")
        mapping[theirs] = ours
    rows = load_problems(
        problems, split=split, subset=subset, limit=limit, prompt_template=unescape(prompt_template), chat=chat,
        system_prompt=unescape(system_prompt),
        chat_template_kwargs=json_object(chat_template_kwargs, "--chat-template-kwargs"),
    )  # fmt: skip
    adapters = {"student_adapter": student_adapter, "teacher_adapter": teacher_adapter}
    depends = identity(student, dtype, quantization, student_revision, **adapters)
    depends |= {"teacher": model_identity(teacher, revision=teacher_revision)}
    depends |= {"special_tokens": mapping, "never": list(never or ())}
    whole, drawn = trace_settings(rows, rsd, config, depends)
    if is_complete(out, "trace", drawn) and is_complete(kept, "trace kept", whole):
        print_counts(read_manifest(out)["counts"] | read_manifest(kept)["counts"])
        return
    options = {"dtype": dtype, "quantization": quantization, "trust_remote_code": trust_remote_code}
    *policies, tokenizer = load_policies(
        {"path": teacher, "adapter": teacher_adapter, "revision": teacher_revision, **options},
        {"path": student, "adapter": student_adapter, "revision": student_revision, **options},
        mapping,
        never or (),
        cuda_graphs,
    )
    print_counts(trace_problems(*policies, tokenizer, rows, out, kept, rsd, config, depends))


def select(
    traces: Annotated[str, typer.Argument(help="Traces or verdicts.")],
    out: Annotated[str, typer.Argument(help="The kept ones, with their scores.")],
    model: Model,
    adapter: Adapter = None,
    rule: Annotated[str, typer.Option(help="rsr, aslec-drop, aslec-casl or mean-logp.")] = "rsr",
    keep_share: Annotated[float | None, typer.Option(help="Share of all traces to keep.")] = None,
    keep_per_problem: Annotated[int | None, typer.Option(help="Traces to keep of each problem.")] = None,
    step_separator: Annotated[str, typer.Option(help="Text that ends a step, \\n a line break.")] = "\\n",
    only_correct: Annotated[bool, typer.Option(help="Leave wrong traces out first.")] = True,
    only_ended: Annotated[bool, typer.Option(help="Leave traces out that were cut.")] = True,
    max_student_share: Annotated[float, typer.Option(help="Leave traces out of which more is the student's.")] = 0.5,
    max_tokens_per_batch: MaxTokens = 8192,
    dtype: Dtype = "bfloat16",
    quantization: Quantization = None,
    trust_remote_code: Trust = False,
    revision: Revision = None,
) -> None:
    """Ranks traces by what the student makes of them, and keeps the best.

    Example: align select traces.jsonl selected.jsonl --model data/tiny-arithmetic/model --dtype float32 --rule rsr --keep-per-problem 1
    """
    from .records import read_records
    from .select import SelectConfig, select_settings, select_traces

    check_apart(traces, out)
    config = SelectConfig(
        rule, keep_share, keep_per_problem, unescape(step_separator), only_correct, only_ended, max_student_share
    )
    rows = read_records(traces)
    depends = identity(model, dtype, quantization, revision, adapter=adapter)
    if finished(out, "select", select_settings(rows, config, depends)):
        return
    loaded, tokenizer = load(model, adapter, dtype, quantization, trust_remote_code, revision)
    print_counts(
        select_traces(loaded, tokenizer, rows, out, config, max_tokens_per_batch=max_tokens_per_batch, settings=depends)
    )
