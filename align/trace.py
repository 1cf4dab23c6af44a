"""The stage `align trace`: problems in, traces of reverse speculative decoding out, verified, and the ones to train on."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .checks import check_share, check_whole
from .errors import RecordError
from .hub import FETCHING, source_of
from .locks import locked
from .records import Record, check_records, read_records
from .rsd import TEACHER, RSDConfig, Trace, reverse_speculative_decode
from .sample import end_token_ids
from .select import good_traces
from .stages import records_hash, run_in_parts, write_chosen
from .tokens import decode_completion, encode_problem
from .verify import verify_completion
from .vocabulary import never_ids, shared_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .decoding import Policy


@dataclass(frozen=True)
class TraceConfig:
    """How many traces are drawn, and which are kept; the defaults are the probable author script's.

    Args:
        n: traces per problem.
        max_student_share: a trace with a larger share of tokens from the student is rejected.
        prefix_tokens: of a problem without a kept trace, the first so many tokens of one, and at most half of it, serve as a
            demonstration without an end; 0 leaves such problems out.
        max_prompt_length: longer prompts are left out and counted.
        batch_size: traces drawn together.
    """

    n: int = 16
    max_student_share: float = 0.5
    prefix_tokens: int = 128
    max_prompt_length: int | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name, low in (("n", 1), ("prefix_tokens", 0), ("batch_size", 1)):
            check_whole(name, getattr(self, name), low)
        if self.max_prompt_length is not None:
            check_whole("max_prompt_length", self.max_prompt_length, 1)
        check_share("max_student_share", self.max_student_share)


def trace_problems(
    teacher: Policy,
    student: Policy,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Record],
    out_path: str | os.PathLike,
    kept_path: str | os.PathLike,
    rsd: RSDConfig | None = None,
    config: TraceConfig | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Draws and verifies n traces per problem, and keeps at most one.

    Args:
        teacher, student: as `load_policies` gives them, or `align.decoding.Policy(model)`.
        problems: problem records.
        out_path: all traces: verdict records with, per token of `completion_ids`, `from_teacher`, `teacher_probs` and
            `student_probs`, and with `student_share`.
        kept_path: demonstration records, see `choose`.
        settings: what else the traces depend on (hashes of the models), for resuming.

    Returns:
        Counts: `rows`, `tokens`, `correct`, `stop`, `length`, `context`, `empty_prompt`, `prompt_too_long`, `acceptance` of the
        teacher's proposals, `teacher_share` of all tokens, `tokens_per_teacher_pass`, and what `choose` counts.

    Raises:
        RecordError, MissingColumnError: a problem that does not fit the schema.
    """
    rsd, config = rsd or RSDConfig(), config or TraceConfig()
    problems = list(problems)
    check_records(problems, "problem", source="problems")
    prompts = [_encode(tokenizer, p) for p in problems]
    known = min(teacher.vocabulary, student.vocabulary)
    for problem, ids in zip(problems, prompts, strict=True):
        if (highest := max(ids, default=0)) >= known:
            raise RecordError(f"problem {problem['id']!r}: its prompt has id {highest}, the models know {known}")
    longest = config.max_prompt_length
    places = [i for i, ids in enumerate(prompts) if longest is None or len(ids) <= longest]
    if not places:
        raise RecordError(f"none of the {len(problems)} prompts fits max_prompt_length = {longest}; raise it")
    # Prompts of one length share a batch; draws of a problem do, too.
    draws = [(i, draw) for i in sorted(places, key=lambda i: len(prompts[i])) for draw in range(config.n)]
    batches = [draws[i : i + config.batch_size] for i in range(0, len(draws), config.batch_size)]
    common = {theirs: ours for ours, theirs in teacher.ids.items()}
    ends = end_token_ids(student.model, tokenizer.eos_token_id)
    # A teacher's turn may end otherwise than the student's.
    own = teacher.ids.get(tokenizer.eos_token_id, tokenizer.eos_token_id)
    # A number that the teacher has for a token that nobody else knows is another token's.
    theirs = [common.get(t, t) for t in end_token_ids(teacher.model, own) if t in common or t not in teacher.ids]
    ends = sorted({*ends, *theirs})

    def compute(_number: int, batch: list[tuple[int, int]]) -> list[Record]:
        numbers = [i * config.n + draw for i, draw in batch]
        start = time.perf_counter()
        found = reverse_speculative_decode(
            teacher, student, [prompts[i] for i, _ in batch], rsd, ends, numbers,
            [f"problem {problems[i]['id']!r}, sample {draw}" for i, draw in batch],
        )  # fmt: skip
        seconds = (time.perf_counter() - start) / len(batch)
        return [
            {
                "_row": number,
                **problems[i],
                "sample": draw,
                "prompt_ids": prompts[i],
                **_columns(tokenizer, problems[i], trace),
            }
            | {"seconds": seconds}
            for (i, draw), number, trace in zip(batch, numbers, found, strict=True)
        ]

    def note(rows: Sequence[Record]) -> str:
        tokens = sum(len(row["completion_ids"]) for row in rows)
        speed = tokens / max(1e-9, sum(row["seconds"] for row in rows))
        return f"{speed:.0f} tokens/s, {_acceptance(rows):.0%} of proposals accepted"

    def finish(rows: Sequence[Record]) -> Iterator[Record]:
        # The rows of two runs are the same.
        return ({key: value for key, value in row.items() if key != "seconds"} for row in rows)

    depends, drawn = trace_settings(problems, rsd, config, settings)
    with locked(kept_path):
        counts = run_in_parts(
            out_path, batches, compute, stage="trace", settings=drawn, order=lambda row: row.pop("_row"), finish=finish,
            count=lambda rows: _count(rows) | {"prompt_too_long_for_us": len(problems) - len(places)}, note=note,
        )  # fmt: skip
        chosen, more = choose(read_records(out_path), config)
        write_chosen(kept_path, chosen, "trace kept", depends, more)
    return counts | more


def trace_settings(
    problems: Sequence[Record], rsd: RSDConfig, config: TraceConfig, settings: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the kept traces depend on, and what all of them do: that is without what decides only which are kept."""
    depends = {**asdict(rsd), **asdict(config), **(settings or {}), "problems": records_hash(problems)}
    return depends, {k: v for k, v in depends.items() if k not in ("max_student_share", "prefix_tokens")}


def load_policies(
    teacher: Mapping[str, Any],
    student: Mapping[str, Any],
    special_tokens: Mapping[str, str] | None = None,
    never: Sequence[str] = (),
    cuda_graphs: bool = True,
) -> tuple[Policy, Policy, PreTrainedTokenizerBase]:
    """Both models, checked to have the same token ids before either is loaded, and the student's tokenizer.

    Args:
        teacher, student: arguments of `align.load_model`, `path` among them. Two adapters on one base share it in memory.
        special_tokens, never: see `align.vocabulary.shared_ids`.
        cuda_graphs: see `align.decoding.Policy`.

    Raises:
        ModelMismatchError: the tokenizers differ.
    """
    from .decoding import Policy
    from .models import load_adapters, load_model, load_tokenizer

    tokenizers = [load_tokenizer(m["path"], **source_of(m)) for m in (teacher, student)]
    renamed = shared_ids(*tokenizers, special_tokens, never)
    # A token that only one of them has stands at an id of its own, except where the other's is mapped.
    theirs, ours = (never_ids(tokenizer, never) for tokenizer in tokenizers)
    barred = tuple(sorted({*ours, *(i for i in theirs if i not in renamed)}))
    base, same = ({k: v for k, v in m.items() if k != "adapter"} for m in (teacher, student))
    if base == same:
        adapters = {r: m["adapter"] for r, m in (("teacher", teacher), ("student", student)) if m.get("adapter")}
        fetching = {name: value for name, value in source_of(base).items() if name in FETCHING}
        model = load_adapters(load_model(**base), adapters, **fetching) if adapters else load_model(**base)
        names = [role if role in adapters else None for role in ("teacher", "student")]
        models = (model, names[0]), (model, names[1])
    else:
        models = (load_model(**teacher), ...), (load_model(**student), ...)
    policies = [Policy(*m, ids, barred, cuda_graphs) for m, ids in zip(models, (renamed, {}), strict=True)]
    return *policies, tokenizers[1]


def _columns(tokenizer: PreTrainedTokenizerBase, problem: Record, trace: Trace) -> Record:
    text = decode_completion(tokenizer, trace.completion_ids)
    verdict = verify_completion(text, problem["answer"])
    from_teacher = [source == TEACHER for source in trace.sources]
    return {
        "completion_ids": trace.completion_ids, "completion": text, "finish_reason": trace.finish_reason,
        "extracted": verdict.extracted, "rule": verdict.rule, "correct": verdict.correct,
        "from_teacher": from_teacher, "teacher_probs": trace.teacher_probs, "student_probs": trace.student_probs,
        "acceptance": trace.acceptance, "student_share": 1 - sum(from_teacher) / len(from_teacher) if from_teacher else 0.0, "rounds": trace.rounds,
    }  # fmt: skip


def _count(rows: Sequence[Record]) -> dict[str, Any]:
    tokens = sum(len(row["completion_ids"]) for row in rows)
    reasons = ("stop", "length", "context", "empty_prompt", "prompt_too_long")
    return {
        "tokens": tokens, "correct": sum(row["correct"] for row in rows),
        **{reason: sum(row["finish_reason"] == reason for row in rows) for reason in reasons},
        "acceptance": _acceptance(rows), "teacher_share": sum(sum(row["from_teacher"]) for row in rows) / max(1, tokens),
        "tokens_per_teacher_pass": tokens / max(1, sum(row["rounds"] for row in rows)),
    }  # fmt: skip


def _acceptance(rows: Sequence[Record]) -> float:
    """Mean over all tokens of the chance that a proposal of the teacher is accepted."""
    tokens = sum(len(row["completion_ids"]) for row in rows)
    return sum(row["acceptance"] * len(row["completion_ids"]) for row in rows) / max(1, tokens)


def _encode(tokenizer: PreTrainedTokenizerBase, problem: Record) -> list[int]:
    """Ids of a problem's prompt; none for an empty text, which costs the other problems nothing."""
    prompt = problem["prompt"]
    if isinstance(prompt, str) and not prompt and not tokenizer(prompt)["input_ids"]:
        return []
    return encode_problem(tokenizer, problem, f"problem {problem['id']!r}")


def choose(rows: Sequence[Record], config: TraceConfig) -> tuple[list[Record], dict[str, int]]:
    """Of every problem the shortest of its good traces; of those without one, a beginning.

    Returns:
        Demonstration records, `prefix_only` true for a beginning, and counts: `kept`, `prefix_only`, `left_out`, and those of
        `align.select.good_traces`.
    """
    good, refused = good_traces(rows, config.max_student_share)
    counts = dict.fromkeys(("kept", "prefix_only", "left_out"), 0) | refused
    of_problem: dict[str, list[Record]] = defaultdict(list)
    for row in good:
        of_problem[row["id"]].append(row)
    problems: dict[str, list[Record]] = defaultdict(list)
    for row in rows:
        problems[row["id"]].append(row)
    chosen = []
    for name, traces in problems.items():
        longest = max(traces, key=lambda row: len(row["completion_ids"]))
        if those := of_problem.get(name):
            chosen.append(_demonstration(min(those, key=lambda row: len(row["completion_ids"])), None))
            counts["kept"] += 1
        elif (length := min(config.prefix_tokens, len(longest["completion_ids"]) // 2)) > 0:
            # Never the whole of a wrong answer, nor its end.
            chosen.append(_demonstration(longest, length))
            counts["prefix_only"] += 1
        else:
            counts["left_out"] += 1
    return chosen, counts


def _demonstration(row: Record, prefix: int | None) -> Record:
    kept = {name: row[name] for name in ("id", "prompt", "answer", "prompt_ids", "completion", "sample")}
    return kept | {"completion_ids": row["completion_ids"][:prefix], "prefix_only": prefix is not None}
