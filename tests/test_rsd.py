"""Reverse speculative decoding against its closed form, enumerated."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, get_peft_model
from test_contexts import p_value

from align.decoding import warp
from align.errors import ConfigError
from align.models import active_adapter
from align.rsd import RSDConfig, reverse_speculative_decode, target_distribution

V, LENGTH = 5, 3
PLAIN = {"teacher_temperature": 1.0, "student_temperature": 1.0, "top_p": 1.0, "top_k": 0}


def models(seed: int = 0, **kwargs):
    """A teacher and a student that share little."""
    options = {"vocab_size": V, "initializer_range": 0.5, **kwargs}
    return tiny_llama(seed, **options), tiny_llama(seed + 1, **options, num_hidden_layers=1)


def probabilities(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].double()


def step_distribution(teacher, student, ids, threshold, draws, warps) -> tuple[dict, dict]:
    """q by a loop over what the draws may be: token -> chance, and that of the teacher's."""
    raw = probabilities(student, ids).softmax(-1)
    p, s = (warp(probabilities(m, ids), *w).double() for m, w in zip((teacher, student), warps, strict=True))
    found, of_teacher = dict.fromkeys(range(V), 0.0), dict.fromkeys(range(V), 0.0)
    reached = 1.0  # chance that the teacher draws another time
    for _ in range(draws):
        refused = 0.0
        for v in range(V):
            if raw[v] >= threshold:
                found[v] += reached * float(p[v])
                of_teacher[v] += reached * float(p[v])
            else:
                refused += float(p[v])
        reached *= refused
    for v in range(V):
        found[v] += reached * float(s[v])
    return found, of_teacher


def exact(teacher, student, prompt, threshold, draws, warps=((1.0, 1.0, 0),) * 2) -> dict:
    """Chance of every (tokens, sources) of LENGTH tokens, 0 ending a sequence."""
    done, open_ = {}, {((), ()): 1.0}
    for _ in range(LENGTH):
        longer = {}
        for (tokens, sources), chance in open_.items():
            q, of_teacher = step_distribution(teacher, student, [*prompt, *tokens], threshold, draws, warps)
            for v in range(V):
                for source, part in (("teacher", of_teacher[v]), ("student", q[v] - of_teacher[v])):
                    key = ((*tokens, v), (*sources, source))
                    (done if v == 0 else longer)[key] = chance * part
        open_ = longer
    return done | open_


def sample(teacher, student, prompt, count: int, **settings) -> dict:
    found = {}
    for first in range(0, count, 5000):
        config = RSDConfig(**{**PLAIN, "max_new_tokens": LENGTH, **settings})
        numbers = range(first, min(first + 5000, count))
        for trace in reverse_speculative_decode(teacher, student, [prompt] * len(numbers), config, 0, numbers):
            key = tuple(trace.completion_ids), tuple(trace.sources)
            found[key] = found.get(key, 0) + 1
    return found


def fit(found: dict, expected: dict, count: int) -> float:
    assert set(found) <= {key for key, chance in expected.items() if chance > 0}
    keys = [key for key in expected if expected[key] > 0]
    return p_value(torch.tensor([found.get(k, 0) for k in keys]), count * torch.tensor([expected[k] for k in keys]))


@pytest.mark.parametrize("lookahead", [0, 1, 4])
@pytest.mark.parametrize("draws", [1, 3])
def test_sequences_and_sources_are_distributed_as_the_closed_form_says(lookahead, draws):
    teacher, student = models()
    expected = exact(teacher, student, [3, 1], 0.15, draws)
    assert sum(expected.values()) == pytest.approx(1)
    found = sample(teacher, student, [3, 1], 10_000, threshold=0.15, draws=draws, lookahead=lookahead, seed=5)
    assert fit(found, expected, 10_000) > 0.001


@pytest.mark.slow
@pytest.mark.parametrize("lookahead", [0, 1, 4])
@pytest.mark.parametrize("draws", [1, 3])
def test_a_hundred_thousand_sequences(lookahead, draws):
    teacher, student = models(7)
    warps = ((0.8, 0.9, 4), (1.2, 0.9, 4))
    settings = {"teacher_temperature": 0.8, "student_temperature": 1.2, "top_p": 0.9, "top_k": 4}
    expected = exact(teacher, student, [2], 0.12, draws, warps)
    found = sample(teacher, student, [2], 100_000, threshold=0.12, draws=draws, lookahead=lookahead, **settings)
    assert fit(found, expected, 100_000) > 0.001


@pytest.mark.parametrize("draws", [1, 3])
def test_a_broken_rule_is_found(monkeypatch, draws):
    """The same test rejects: drafts that are accepted too often, and a threshold that is not looked at."""
    from align import rsd

    teacher, student = models()
    expected = exact(teacher, student, [3, 1], 0.15, draws)
    whole = rsd.target_distribution

    def too_kind(teacher, student, accepted, draws):
        q, share = whole(teacher, student, accepted, draws)
        return torch.maximum(q, student), share

    def no_threshold(teacher, student, accepted, draws):
        return whole(teacher, student, torch.ones_like(accepted), draws)

    for broken in (too_kind, no_threshold):
        monkeypatch.setattr(rsd, "target_distribution", broken)
        found = sample(teacher, student, [3, 1], 10_000, threshold=0.15, lookahead=4, draws=draws)
        assert set(found) - {k for k, chance in expected.items() if chance > 0} or fit(found, expected, 10_000) < 1e-9


def test_a_broken_plain_loop_is_found(monkeypatch):
    """The same test rejects a student that accepts whatever is proposed."""
    from align import rsd

    teacher, student = models()
    expected, see = exact(teacher, student, [3, 1], 0.15, 1), rsd._see

    def anything(*args):
        seen = see(*args)
        seen.accepted = torch.ones_like(seen.accepted)
        return seen

    monkeypatch.setattr(rsd, "_see", anything)
    found = sample(teacher, student, [3, 1], 10_000, threshold=0.15, lookahead=0)
    assert set(found) - {k for k, chance in expected.items() if chance > 0} or fit(found, expected, 10_000) < 1e-9


def test_the_closed_form():
    teacher = torch.tensor([[0.5, 0.3, 0.2], [0.0, 0.0, 1.0], [0.2, 0.3, 0.5]])
    student = torch.tensor([[0.1, 0.2, 0.7], [0.6, 0.4, 0.0], [0.2, 0.3, 0.5]])
    accepted = torch.tensor([[True, False, True], [True, True, False], [True, True, True]])
    q, share = target_distribution(teacher, student, accepted, 2)
    refused = 0.3**2
    assert q[0].tolist() == pytest.approx(
        [(1 - refused) * 0.5 / 0.7 + refused * 0.1, refused * 0.2, (1 - refused) * 0.2 / 0.7 + refused * 0.7]
    )
    assert share[0].tolist() == pytest.approx([(1 - refused) * 0.5 / 0.7, 0, (1 - refused) * 0.2 / 0.7])
    assert q[1].tolist() == pytest.approx([0.6, 0.4, 0.0]) and share[1].sum() == 0  # nothing acceptable: the student's
    assert q[2].tolist() == pytest.approx([0.2, 0.3, 0.5]) and share[2].sum() == pytest.approx(1)
    for tiny in (1e-6, 1e-9, 1e-20):  # beside 1, float32 does not see them
        _, share = target_distribution(
            torch.tensor([[tiny, 1.0]]), torch.tensor([[0.9, 0.1]]), torch.tensor([[True, False]]), 3
        )
        assert share[0].tolist() == pytest.approx([3 * tiny, 0.0], rel=1e-5)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 40, (1 + i % 7,), generator=draw).tolist() for i in range(count)]


def wide(seed: int = 0):
    return tiny_llama(seed, vocab_size=40), tiny_llama(seed + 1, vocab_size=40, num_hidden_layers=1)


def test_greedy_traces_do_not_depend_on_lookahead_or_company():
    teacher, student = wide()
    settings = {"threshold": 0.02, "teacher_temperature": 0.0, "student_temperature": 0.0, "max_new_tokens": 40}
    those, found = prompts(6), []
    for lookahead in (0, 1, 3, 8):
        config = RSDConfig(**settings, lookahead=lookahead)
        together = reverse_speculative_decode(teacher, student, those, config, 0)
        alone = [reverse_speculative_decode(teacher, student, [ids], config, 0)[0] for ids in those]
        found += [[(t.completion_ids, t.sources, t.finish_reason) for t in traces] for traces in (together, alone)]
    assert all(one == found[0] for one in found)
    # Against a loop.
    for ids, (tokens, sources, _) in zip(those, found[0], strict=True):
        context = list(ids)
        for token, source in zip(tokens, sources, strict=True):
            first, other = (probabilities(m, context) for m in (teacher, student))
            proposal = int(first.argmax())
            good = other.softmax(-1)[proposal] >= 0.02
            assert (token, source) == ((proposal, "teacher") if good else (int(other.argmax()), "student"))
            context.append(token)
    assert {source for _, sources, _ in found[0] for source in sources} == {"teacher", "student"}


@pytest.mark.parametrize("lookahead", [0, 4])
def test_recorded_probabilities_are_those_of_a_full_pass(lookahead):
    teacher, student = wide(3)
    config = RSDConfig(threshold=0.03, draws=2, lookahead=lookahead, max_new_tokens=150, top_k=0)
    traces = reverse_speculative_decode(teacher, student, prompts(9), config, 0)
    alone = reverse_speculative_decode(teacher, student, prompts(9)[4:5], config, 0, numbers=[4])[0]
    assert alone.completion_ids == traces[4].completion_ids  # company does not matter to what is drawn, either
    checked = 0
    for ids, trace in zip(prompts(9), traces, strict=True):
        whole = torch.tensor([ids + trace.completion_ids])
        for model, recorded in ((teacher, trace.teacher_probs), (student, trace.student_probs)):
            with torch.no_grad():
                p = model(whole).logits[0, len(ids) - 1 : -1].softmax(-1)
            truth = p.gather(1, torch.tensor(trace.completion_ids)[:, None])[:, 0]
            assert torch.allclose(torch.tensor(recorded), truth, atol=1e-4)
        for source, p_student in zip(trace.sources, trace.student_probs, strict=True):
            assert source == "student" or p_student >= 0.03
            checked += source == "teacher"
        assert (trace.completion_ids[-1] == 0) == (trace.finish_reason == "stop")
    assert checked > 50 and len({len(trace.completion_ids) for trace in traces}) > 3


@pytest.mark.parametrize("roles", [("other", None), ("other", "default"), (None, "other")])
def test_one_base_with_two_adapters(roles):
    model = get_peft_model(
        tiny_llama(vocab_size=40), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.eval()
    config = RSDConfig(threshold=0.02, max_new_tokens=20)
    traces = reverse_speculative_decode(*((model, name) for name in roles), prompts(4), config, 0)
    for ids, trace in zip(prompts(4), traces, strict=True):
        whole = torch.tensor([ids + trace.completion_ids])
        for name, recorded in zip(roles, (trace.teacher_probs, trace.student_probs), strict=True):
            with torch.no_grad(), active_adapter(model, name):
                p = model(whole).logits[0, len(ids) - 1 : -1].softmax(-1)
            truth = p.gather(1, torch.tensor(trace.completion_ids)[:, None])[:, 0]
            assert torch.allclose(torch.tensor(recorded), truth, atol=1e-4)


@pytest.mark.parametrize(
    "prompt_ids, numbers, words",
    [
        ([[1], [2, 40]], None, "prompt 1 has id 40; the models know 0 to 39"),
        ([[-1, 3]], None, "prompt 0 has id -1"),
        ([[1], [2]], [5], "2 prompts and 1 numbers"),
    ],
)
def test_prompts_that_cannot_be_drawn_for(prompt_ids, numbers, words):
    with pytest.raises(ConfigError, match=words):
        reverse_speculative_decode(*wide(), prompt_ids, RSDConfig(), 0, numbers)


def test_vocabularies_padded_to_different_sizes():
    teacher, student = tiny_llama(0, vocab_size=48), tiny_llama(1, vocab_size=40)
    config = RSDConfig(threshold=0.0, max_new_tokens=30, top_k=0, teacher_temperature=3.0)
    for trace in reverse_speculative_decode(teacher, student, prompts(6), config, 0):
        assert max(trace.completion_ids) < 40


def test_rows_that_go_nowhere_end_cleanly():
    teacher, student = (tiny_llama(i, vocab_size=40, max_position_embeddings=24) for i in (0, 1))
    those = [[], [5, 6], list(range(1, 25)), [3] * 20, [7]]
    config = RSDConfig(threshold=0.0, max_new_tokens=10, lookahead=3)
    traces = reverse_speculative_decode(teacher, student, those, config, 99)  # an end token that never comes
    assert [trace.finish_reason for trace in traces] == [
        "empty_prompt",
        "length",
        "prompt_too_long",
        "context",
        "length",
    ]
    assert [len(trace.completion_ids) for trace in traces] == [0, 10, 0, 4, 10]
    alone = reverse_speculative_decode(teacher, student, [[5, 6]], config, 99, numbers=[1])
    assert alone[0].completion_ids == traces[1].completion_ids
    assert reverse_speculative_decode(teacher, student, [], config, 0) == []
    nothing = RSDConfig(threshold=1.0, max_new_tokens=10)  # no token of this student is that probable
    for lookahead in (0, 4):
        trace = reverse_speculative_decode(
            teacher, student, [[5, 6]], SimpleNamespace(**{**vars(nothing), "lookahead": lookahead}), 99
        )[0]
        assert trace.sources == ["student"] * 10


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"threshold": 2}, "threshold = 2 must lie in"),
        ({"threshold": "1e-5"}, "threshold = '1e-5' must lie in .*, and no text: YAML reads 1e-5 as one"),
        ({"threshold": float("nan")}, "threshold = nan must lie in"),
        ({"draws": 0}, "draws = 0"),
        ({"lookahead": -1}, "lookahead = -1"),
        ({"top_p": 0}, "top_p = 0"),
        ({"teacher_temperature": -1}, "teacher_temperature = -1"),
    ],
)
def test_settings_that_mean_nothing(settings, words):
    with pytest.raises(ConfigError, match=words):
        RSDConfig(**settings)
