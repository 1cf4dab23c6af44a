"""Reverse speculative decoding: the teacher proposes a token, the student accepts it where it is probable enough (Kim et al.,
2025, arXiv 2509.22230).

With teacher p_T, student p_S (both after temperature, top-p and top-k), A the tokens whose raw probability under the student is
at least τ, a = p_T(A) and n draws of the teacher, one step draws v from

    q(v) = (1 − (1−a)ⁿ) · p_T(v) · 1[v ∈ A] / a + (1−a)ⁿ · p_S(v)        (a = 0: q = p_S)

With `lookahead` 0 the draws are made one by one, as the method is told. With γ > 0 the student drafts γ tokens and the teacher
sees them all in one pass: speculative sampling (Leviathan et al. 2023) with target q and draft p_S gives the same distribution.
Which model a token came from is then drawn given the token: P(teacher | v) is the first summand's share of q(v).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .checks import check_seed, check_share, check_temperature, check_whole
from .decoding import Decoding, Policy, warp
from .errors import ConfigError, NonFiniteError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Where a token comes from.
TEACHER, STUDENT = "teacher", "student"


@dataclass(frozen=True)
class RSDConfig:
    """How traces are drawn. Temperature, top-p, top-k and threshold are the probable author script's, which draws up to 5 times.

    Args:
        threshold: τ, the least raw probability under the student of a token that it accepts.
        draws: n, how often the teacher may propose before the student's own sample is taken.
        lookahead: γ, tokens that the student drafts per pass of the teacher; 0 is the plain loop. It changes speed alone, and with
            greedy policies not even the tokens, but for what rounding does in 16 bits.
        max_new_tokens: longest trace, end token included.
        teacher_temperature, student_temperature: 0 is greedy.
        top_p, top_k: of both distributions; `top_k` 0 is the whole vocabulary.
        seed: decides, with the number of a prompt, all of its draws.
    """

    threshold: float = 0.01
    draws: int = 1
    lookahead: int = 4
    max_new_tokens: int = 8192
    teacher_temperature: float = 0.7
    student_temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("threshold", self.threshold)
        for name, low in (("draws", 1), ("lookahead", 0), ("max_new_tokens", 1), ("top_k", 0)):
            check_whole(name, getattr(self, name), low)
        for name in ("teacher_temperature", "student_temperature"):
            check_temperature(name, getattr(self, name))
        check_seed("seed", self.seed)
        check_share("top_p", self.top_p)
        if self.top_p == 0:
            raise ConfigError("top_p = 0 must lie in (0, 1]")


@dataclass
class Trace:
    """What was drawn after one prompt.

    Args:
        completion_ids: end token included, where it ended.
        sources: per token, `teacher` or `student`.
        teacher_probs, student_probs: per token, its raw probability under either model, before temperature, top-p and top-k.
        finish_reason: `stop`; `length` at `max_new_tokens`; `context` where a model's context is full; `empty_prompt` and
            `prompt_too_long` where nothing could be drawn.
        rounds: passes of the teacher that it took part in, the prompt's not counted.
        acceptance: mean over the tokens of a = p_T(A), the chance that the student accepts what the teacher proposes.
    """

    completion_ids: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    teacher_probs: list[float] = field(default_factory=list)
    student_probs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    rounds: int = 0
    acceptance: float = 0.0


def target_distribution(
    teacher: torch.Tensor, student: torch.Tensor, accepted: torch.Tensor, draws: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and its teacher's summand.

    Args:
        teacher, student: (…, V) probabilities p_T and p_S.
        accepted: (…, V) bool, A.
        draws: n.

    Returns:
        Two (…, V) tensors; the first sums to 1, the second to 1 − (1−a)ⁿ.
    """
    inside = teacher * accepted
    mass = inside.sum(-1, keepdim=True)
    # 1 − (1−a)ⁿ, also for an a that 1 would swallow.
    refusal = draws * torch.log1p(-mass.clamp(max=1))
    proposed = torch.where(mass > 0, -torch.expm1(refusal) * inside / mass.clamp(min=1e-30), torch.zeros_like(inside))
    return proposed + refusal.exp() * student, proposed


def reverse_speculative_decode(
    teacher: PreTrainedModel | tuple[Any, str | None],
    student: PreTrainedModel | tuple[Any, str | None],
    prompt_ids: Sequence[Sequence[int]],
    config: RSDConfig,
    eos_token_id: int | Sequence[int],
    numbers: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> list[Trace]:
    """Draws a trace after every prompt, all of them at once.

    Args:
        teacher, student: causal LMs in eval mode with the same token ids (see `align.vocabulary`), of full attention; or pairs of
            a PEFT model and the name of its adapter (`None`: the bare base), so that both may share a base; or
            `align.decoding.Policy` of either, which keeps its cache and its CUDA graphs for the next call.
        prompt_ids: ids of each prompt.
        eos_token_id: what ends a trace.
        numbers: of every prompt, what decides its draws beside the seed; its place by default. With it, a trace does not depend
            on which others are drawn with it, but for what rounding does in 16 bits.
        names: what errors call each prompt; by its place by default.

    Returns:
        One trace per prompt, in their order.

    Raises:
        ConfigError: a model in training mode, or one that takes no mask and positions of ours; an id that a model does not know.
        NonFiniteError: a model's probabilities are no numbers.
    """
    policies = Policy.of(teacher), Policy.of(student)
    for policy, role in zip(policies, (TEACHER, STUDENT), strict=True):
        policy.check(role)
    known = min(policy.vocabulary for policy in policies)
    names = [f"prompt {index}" for index in range(len(prompt_ids))] if names is None else names
    for what, given in (("numbers", numbers), ("names", names)):
        if given is not None and len(given) != len(prompt_ids):
            raise ConfigError(f"{len(prompt_ids)} prompts and {len(given)} {what}; give one for each")
    for name, ids in zip(names, prompt_ids, strict=True):
        if strange := [token for token in ids if not 0 <= token < known]:
            raise ConfigError(f"{name} has id {strange[0]}; the models know 0 to {known - 1}")
    context = min((policy.context for policy in policies if policy.context is not None), default=None)
    traces, rows = [Trace() for _ in prompt_ids], []
    for index, ids in enumerate(prompt_ids):
        if not ids:
            traces[index].finish_reason = "empty_prompt"
        elif context is not None and len(ids) >= context:
            traces[index].finish_reason = "prompt_too_long"
        else:
            number = index if numbers is None else numbers[index]
            room = config.max_new_tokens if context is None else min(config.max_new_tokens, context - len(ids))
            reason = "length" if room == config.max_new_tokens else "context"
            draw = random.Random(f"{config.seed}-{number}")
            rows.append(_Row(names[index], list(ids), traces[index], draw, room, reason))
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    try:
        if rows:
            with torch.inference_mode():
                _draw(policies, rows, config, ends)
    except BaseException:
        for policy in policies:
            policy.let_go()  # a batch that ended halfway may have left anything
        raise
    return traces


@dataclass
class _Row:
    """A row that is being drawn: at most `room` tokens, and why it ends there."""

    name: str
    prompt: list[int]
    trace: Trace
    draw: random.Random
    room: int
    reason: str

    @property
    def last(self) -> int:
        return (self.trace.completion_ids or self.prompt)[-1]


@dataclass
class _Seen:
    """What both models make of a round's positions: (B, γ+1, V) each.

    Args:
        teacher, student: p_T and p_S.
        raw_teacher, raw_student: the same before temperature, top-p and top-k.
        accepted: A.
    """

    teacher: torch.Tensor
    student: torch.Tensor
    raw_teacher: torch.Tensor
    raw_student: torch.Tensor
    accepted: torch.Tensor


def _draw(policies: tuple[Policy, Policy], rows: list[_Row], config: RSDConfig, ends: set[int]) -> None:
    """Rounds of drafts and a pass of the teacher, until all rows have ended; those that end leave the batch."""
    decoding, device = Decoding(policies, [row.prompt for row in rows]), policies[0].device
    ahead = config.lookahead
    while True:
        chances = _uniforms(rows, 3 * ahead + 2 if ahead else config.draws + 1, device)
        fed = [torch.tensor([[row.last] for row in rows], device=device)]
        students = []
        for number in range(ahead + 1):
            logits = decoding.feed(1, fed[-1], before=number)[:, 0].float().to(device)
            warped = warp(_allowed(logits, policies, 1), config.student_temperature, config.top_p, config.top_k)
            students.append((warped, _raw(logits, policies, 1)))
            if number < ahead:
                fed.append(_inverse(warped, chances[:, number])[:, None])
        teacher = decoding.feed(0, torch.cat(fed, 1)).float()
        seen = _see(teacher, *(torch.stack(those, 1) for those in zip(*students, strict=True)), policies, config)
        drawn = _speculate(seen, torch.cat(fed[1:], 1), chances[:, ahead:], config) if ahead else _step(seen, chances)
        decoding.commit(_append(seen, *drawn, rows, ends))
        alive = [i for i, row in enumerate(rows) if not row.trace.finish_reason]
        if not alive:
            return
        if len(alive) <= len(rows) // 2 if decoding.lingering else len(alive) < len(rows):
            rows = [rows[i] for i in alive]
            decoding.keep_rows(alive)


def _raw(logits: torch.Tensor, policies: Sequence[Policy], number: int) -> torch.Tensor:
    """What policy `number` makes of the ids that all know, whatever else it knows: vocabularies padded to different sizes are one."""
    known = min(policy.vocabulary for policy in policies)
    return policies[number].common(logits.softmax(-1), 0.0)[..., :known]


def _allowed(logits: torch.Tensor, policies: Sequence[Policy], number: int) -> torch.Tensor:
    """Its logits of these ids, without the tokens that are never drawn."""
    logits = policies[number].common(logits, float("-inf"))[..., : min(policy.vocabulary for policy in policies)]
    never = sorted({token for policy in policies for token in policy.never if token < logits.shape[-1]})
    return logits.index_fill(-1, torch.tensor(never, device=logits.device), float("-inf")) if never else logits


def _uniforms(rows: Sequence[_Row], each: int, device: torch.device) -> torch.Tensor:
    """(B, each) numbers in [0, 1), each row's from its own generator."""
    numbers = [[row.draw.random() for _ in range(each)] for row in rows]
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _inverse(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """(B, V) weights, and (B,) or (B, n) numbers in [0, 1) -> as many tokens."""
    passed = probabilities.double().cumsum(-1)
    wanted = uniforms.view(len(uniforms), -1) * passed[:, -1:]
    found = torch.searchsorted(passed, wanted, right=True).view(uniforms.shape)
    return found.clamp(max=probabilities.shape[-1] - 1)


def _see(
    logits: torch.Tensor,
    student: torch.Tensor,
    raw_student: torch.Tensor,
    policies: Sequence[Policy],
    config: RSDConfig,
) -> _Seen:
    """`logits` are the teacher's, (B, γ+1, V); what the student makes of the positions is known from its drafts."""
    teacher = warp(_allowed(logits, policies, 0), config.teacher_temperature, config.top_p, config.top_k)
    raw_teacher = _raw(logits, policies, 0)
    return _Seen(teacher, student, raw_teacher, raw_student, raw_student >= config.threshold)


def _step(seen: _Seen, chances: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The plain step: the teacher draws until the student accepts, n times at most; then the student draws.

    Args:
        chances: (B, n + 1) numbers in [0, 1), one for each draw of the teacher and the student's.

    Returns:
        (B, 1) tokens, (B,) how many drafts were accepted (none: there are none), (B, 1) whether the teacher's.
    """
    proposals = _inverse(seen.teacher[:, 0], chances[:, :-1])
    accepted = seen.accepted[:, 0].gather(1, proposals)
    proposed, first = accepted.any(1), accepted.long().argmax(1)
    theirs = proposals.gather(1, first[:, None])[:, 0]
    tokens = torch.where(proposed, theirs, _inverse(seen.student[:, 0], chances[:, -1]))
    return tokens[:, None], torch.zeros_like(tokens), proposed[:, None]


def _speculate(
    seen: _Seen, drafts: torch.Tensor, chances: torch.Tensor, config: RSDConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Speculative sampling with target q and draft p_S.

    Args:
        drafts: (B, γ) tokens drawn from p_S.
        chances: (B, 2γ + 2) numbers in [0, 1): whether each draft stays, what follows the last that does, whose each token is.

    Returns:
        (B, γ+1) tokens, of which a row's first `accepted` + 1 count, (B,) how many drafts were accepted, (B, γ+1) whether a
        token is the teacher's.
    """
    (count, ahead), device = drafts.shape, drafts.device
    target, share = target_distribution(seen.teacher, seen.student, seen.accepted, config.draws)
    ours, theirs = (p[:, :ahead].gather(2, drafts[:, :, None])[:, :, 0] for p in (target, seen.student))
    good = chances[:, :ahead] * theirs.double() < ours.double()
    kept = good.long().cumprod(1).sum(1)
    at = torch.arange(count, device=device)
    # Behind the last draft there is none to refuse: what is missing there is all of q.
    draft = seen.student[at, kept] * (kept < ahead)[:, None]
    missing = (target[at, kept] - draft).clamp(min=0)
    # q and p_S are then the same but for rounding, and any draw of q is right.
    missing = torch.where(missing.sum(-1, keepdim=True) > 0, missing, target[at, kept])
    tokens = torch.cat([drafts, torch.zeros_like(drafts[:, :1])], 1)
    tokens[at, kept] = _inverse(missing, chances[:, ahead])
    whole, of_teacher = (p.gather(2, tokens[:, :, None])[:, :, 0] for p in (target, share))
    return tokens, kept, chances[:, ahead + 1 :] * whole < of_teacher


def _append(
    seen: _Seen, tokens: torch.Tensor, kept: torch.Tensor, proposed: torch.Tensor, rows: list[_Row], ends: set[int]
) -> torch.Tensor:
    """Adds a round's tokens to the traces of the rows that have not ended; (B,) how many of the tokens fed stay."""
    raw = [p.gather(2, tokens[:, :, None])[:, :, 0] for p in (seen.raw_teacher, seen.raw_student)]
    accepted = (seen.teacher * seen.accepted).sum(-1)
    counts = (kept + 1)[:, None].expand_as(tokens)
    # One way from the device to the host; float64 holds all of them.
    of_round = torch.stack([t.double() for t in (tokens, proposed, *raw, accepted, counts)], -1).tolist()
    stay = []
    for row, drawn in zip(rows, of_round, strict=True):
        trace, count = row.trace, int(drawn[0][-1])
        stay.append(0 if trace.finish_reason else count)
        if trace.finish_reason:
            continue
        trace.rounds += 1
        for token, is_teachers, of_teacher, of_student, chance, _ in drawn[:count]:
            for p, role in ((of_teacher, TEACHER), (of_student, STUDENT)):
                if not math.isfinite(p):
                    raise NonFiniteError(
                        f"{row.name}: the {role}'s probabilities after {len(row.prompt)} tokens and {len(trace.completion_ids)} drawn "
                        "ones are no numbers; a model that leaves float16 needs dtype bfloat16 or float32"
                    )
            trace.completion_ids.append(int(token))
            trace.sources.append(TEACHER if is_teachers else STUDENT)
            trace.teacher_probs.append(of_teacher)
            trace.student_probs.append(of_student)
            trace.acceptance += (chance - trace.acceptance) / len(trace.completion_ids)
            if token in ends:
                trace.finish_reason = "stop"
            elif len(trace.completion_ids) == row.room:
                trace.finish_reason = row.reason
            if trace.finish_reason:
                break
    return torch.tensor(stay)
