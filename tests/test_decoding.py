"""Decoding in slots of one's own: batches after batches, rows that end, models that change in between, recordings."""

import itertools

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, get_peft_model
from test_rsd import prompts, wide

from align.decoding import Policy, warp
from align.errors import ConfigError, NonFiniteError
from align.rsd import RSDConfig, reverse_speculative_decode


def test_a_policy_serves_one_batch_after_another():
    """Its cache holds what earlier batches left, rows and slots of other numbers."""
    models, policies = wide(), [Policy(model) for model in wide()]
    config = RSDConfig(threshold=0.02, max_new_tokens=30, lookahead=3)
    for batch in (prompts(3), prompts(7, 1), [[1, 2]], prompts(5, 2), [[4], [5]]):
        fresh, again = (reverse_speculative_decode(*those, batch, config, 0) for those in (models, policies))
        assert [t.completion_ids for t in fresh] == [t.completion_ids for t in again]
    one = Policy(models[0])  # as teacher and as student
    twice, apart = reverse_speculative_decode(one, one, prompts(4), config, 0), Policy(models[0])
    expected = reverse_speculative_decode(one, apart, prompts(4), config, 0)
    assert [t.completion_ids for t in twice] == [t.completion_ids for t in expected]


def test_a_policy_sees_what_became_of_its_model():
    """Other weights in place, other tensors, another precision, another adapter: nothing of an earlier call is left."""
    model, config = tiny_llama(vocab_size=40), RSDConfig(threshold=0.0, max_new_tokens=12, teacher_temperature=0.0)
    student = tiny_llama(1, vocab_size=40)

    def agrees():
        found = reverse_speculative_decode(policy, student, prompts(3), config, 0)
        fresh = reverse_speculative_decode(model, student, prompts(3), config, 0)
        assert [t.teacher_probs for t in found] == [t.teacher_probs for t in fresh]
        return policy.cache

    policy = Policy(model)
    first = agrees()
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert agrees() is first  # in place: recordings read them where they lie
    model.load_state_dict(tiny_llama(2, vocab_size=40).state_dict(), assign=True)
    second = agrees()
    model.bfloat16()
    third = agrees()
    lora = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    model = get_peft_model(model.float(), LoraConfig(**lora))
    model.add_adapter("other", LoraConfig(**lora))
    policy = Policy(model.eval())
    fourth = agrees()
    model.set_adapter("other")
    fifth = agrees()
    model.merge_adapter()
    assert len({first, second, third, fourth, fifth, agrees()}) == 6


def test_probabilities_that_are_no_numbers_are_an_error_and_leave_nothing_behind():
    teacher, student = wide()
    config = RSDConfig(threshold=0.02, max_new_tokens=20, lookahead=2)
    policies = Policy(teacher), Policy(student)
    good = [t.completion_ids for t in reverse_speculative_decode(*policies, prompts(4), config, 0)]
    for model, role in ((teacher, "teacher"), (student, "student")):
        weight = model.get_input_embeddings().weight
        before = weight[7].clone()
        with torch.no_grad():
            weight[7] = float("inf")
        with pytest.raises(NonFiniteError, match=f"prompt 0: the {role}'s probabilities after 3 tokens.*bfloat16"):
            reverse_speculative_decode(*policies, [[1, 7, 2], [5]], config, 0)
        with torch.no_grad():
            weight[7] = before
        again = reverse_speculative_decode(*policies, prompts(4), config, 0)
        assert [t.completion_ids for t in again] == good


def test_a_draft_that_is_no_number_and_is_not_taken_spoils_nothing():
    """The greedy teacher never says a token after which the student's keys are NaN; the student drafts it."""
    teacher, student = wide()
    settings = {
        "threshold": 0.0,
        "max_new_tokens": 30,
        "teacher_temperature": 0.0,
        "student_temperature": 3.0,
        "top_k": 0,
        "top_p": 1.0,
    }

    def traces(lookahead):
        found = reverse_speculative_decode(teacher, student, prompts(9), RSDConfig(lookahead=lookahead, **settings), 99)
        return [trace.completion_ids for trace in found]

    plain = traces(0)
    unsaid = set(range(40)).difference(*prompts(9), *plain)
    assert len(unsaid) >= 3
    with torch.no_grad():
        student.get_input_embeddings().weight[sorted(unsaid)] = float("inf")
    assert traces(0) == traces(3) == plain
    with pytest.raises(NonFiniteError, match="the student's"):
        reverse_speculative_decode(teacher, student, [[5, min(unsaid), 3]], RSDConfig(lookahead=3, **settings), 99)


def test_a_model_without_numbers_is_told_so():
    broken = wide()[0]
    with torch.no_grad():
        broken.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="prompt 0: the teacher's probabilities .* are no numbers"):
        reverse_speculative_decode(broken, wide()[1], [[1, 2]], RSDConfig(max_new_tokens=3), 0)


def test_a_pass_that_cannot_be_recorded_runs_without_and_says_so(monkeypatch):
    from align import cuda_graphs

    def fails(*_):
        raise torch.OutOfMemoryError("too little\nand more")

    monkeypatch.setattr(cuda_graphs, "Recorded", fails)
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: None)
    monkeypatch.setattr("torch.cuda.Stream", lambda _device: None)
    graphs = cuda_graphs.Graphs(True)
    with pytest.warns(UserWarning, match="cannot be recorded: too little$"):
        assert graphs.run(("key",), torch.neg, torch.ones(1)) == -1
    assert not graphs.enabled and graphs.count == 0 and graphs.run(("other",), torch.neg, torch.ones(1)) == -1


def test_long_rows_beside_short_ones():
    """Caches grow and rows leave, so slots move; each row is what it is alone."""
    teacher, student = tiny_llama(5), tiny_llama(6, num_hidden_layers=1)
    config = RSDConfig(threshold=0.001, max_new_tokens=280, lookahead=2, teacher_temperature=1.5, top_k=0)
    those = [ids * 9 for ids in prompts(6)] + [[7], [7]]
    traces = reverse_speculative_decode(teacher, student, those, config, 0)
    lengths = [len(trace.completion_ids) for trace in traces]
    assert max(lengths) > 256 > min(lengths) and traces[6].completion_ids != traces[7].completion_ids
    for number in (0, int(torch.tensor(lengths).argmax()), 7):
        alone = reverse_speculative_decode(teacher, student, [those[number]], config, 0, [number])[0]
        assert alone.completion_ids == traces[number].completion_ids
        assert alone.student_probs == pytest.approx(traces[number].student_probs, abs=1e-5)


@pytest.mark.parametrize("lookahead", [0, 3])
def test_rows_that_have_ended_may_stay(monkeypatch, lookahead):
    """As on a GPU, where passes are recorded for a number of rows and a number of slots; here a recording is the pass again."""
    from align import cuda_graphs

    keys = []

    class Again:
        def __init__(self, function, inputs, _side, _pool):
            self.function, self.inputs = function, [tensor.clone() for tensor in inputs]
            keys.append(tuple(self.inputs[0].shape))

        def __call__(self, *inputs):
            for own, given in zip(self.inputs, inputs, strict=True):
                own.copy_(given)
            return self.function(*self.inputs)

    models = wide(3)
    config = RSDConfig(threshold=0.03, draws=2, lookahead=lookahead, max_new_tokens=150, top_k=0)
    plain = reverse_speculative_decode(*models, prompts(9), config, 0)
    monkeypatch.setattr(cuda_graphs, "Recorded", Again)
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: None)
    monkeypatch.setattr("torch.cuda.Stream", lambda _device: None)
    policies = [Policy(model) for model in models]
    for policy in policies:
        policy.look()
        policy.__dict__["graphs"] = cuda_graphs.Graphs(True)
    for _ in range(2):
        found = reverse_speculative_decode(*policies, prompts(9), config, 0)
        assert [(t.completion_ids, t.sources, t.rounds) for t in found] == [
            (t.completion_ids, t.sources, t.rounds) for t in plain
        ]
        known = len(keys)
    assert len(keys) == known and {rows for rows, _ in keys} >= {9, 4, 2, 1}


def test_models_that_take_no_mask_of_ours_are_refused():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="the student cannot be decoded row by row: .*sliding-window"):
        reverse_speculative_decode(tiny_llama(vocab_size=40), MistralForCausalLM(config).eval(), [[1]], RSDConfig(), 0)
    with pytest.raises(ConfigError, match="the teacher is in training mode"):
        reverse_speculative_decode(tiny_llama(vocab_size=40).train(), tiny_llama(vocab_size=40), [[1]], RSDConfig(), 0)


def test_warping_is_that_of_transformers():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits = torch.randn(50, 30) * 3
    for temperature, top_p, top_k in itertools.product((0.5, 1.3), (0.6, 0.95, 1.0), (0, 1, 7)):
        scores = TemperatureLogitsWarper(temperature)(None, logits)
        scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
        scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
        assert torch.allclose(warp(logits, temperature, top_p, top_k), scores.softmax(-1), atol=1e-6)
    assert (
        warp(logits, 0, 0.5, 3).argmax(-1).equal(logits.argmax(-1))
        and (warp(logits, 0, 1, 0).max(-1).values == 1).all()
    )
