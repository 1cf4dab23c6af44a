"""Prompt-learning adapters put virtual tokens before each row: what is drawn is what one forward pass per row would give."""

import pytest
import torch
from conftest import tiny_llama
from oracles import own_context
from peft import CPTConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import BloomConfig, GPT2Config
from transformers.models.bloom import BloomForCausalLM
from transformers.models.gpt2 import GPT2LMHeadModel

from align.contexts import OwnTokens, draw_contexts, mixed_row
from align.logps import token_logps
from align.mix import IGNORED
from align.sample import SampleConfig, generate

ROWS = [[5, 6, 7, 8, 9, 10, 11, 40, 41, 0], [20, 21, 22, 23], [50, 51, 52, 53, 54, 55], [60, 61]]


def adapter(kind: str):
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    return {
        "prompt tuning": lambda: PromptTuningConfig(**common),
        "p-tuning": lambda: PromptEncoderConfig(**common, encoder_hidden_size=16),
        "prefix tuning": lambda: PrefixTuningConfig(**common),
        "cpt": lambda: CPTConfig(
            task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7], cpt_mask=[1] * 3, cpt_tokens_type_mask=[1, 2, 4]
        ),
    }[kind]()


def base(family: str):
    torch.manual_seed(0)
    if family == "gpt2":  # positions from a table
        return GPT2LMHeadModel(GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()
    if family == "bloom":  # positions as distances in the attention mask
        return BloomForCausalLM(BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4)).eval()
    return tiny_llama()


def adapted(kind: str, family: str = "llama"):
    model = get_peft_model(base(family), adapter(kind)).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.5)
    return model


CASES = [("prompt tuning", "llama"), ("p-tuning", "llama"), ("prefix tuning", "llama"), ("cpt", "llama"),
         ("prompt tuning", "gpt2"), ("prefix tuning", "gpt2"), ("prompt tuning", "bloom")]  # fmt: skip


def last_logits(model, ids: list[int]) -> torch.Tensor:
    """The oracle: PEFT's own forward pass of one row, no cache, no padding."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits[
            :, -1
        ]


@pytest.mark.parametrize("generation", ["parallel", "autoregressive"])
@pytest.mark.parametrize("kind, family", CASES)
def test_own_tokens_are_those_of_rows_one_by_one(kind, family, generation):
    model = adapted(kind, family)
    rows = [mixed_row(ids, [IGNORED, *ids[1:]], 0.6, 3, 0, place) for place, ids in enumerate(ROWS)]
    draw_contexts(model, rows, OwnTokens(generation, max_tokens_per_batch=64), 0)
    for row in rows:
        assert row.context == own_context(row, generation, lambda before: last_logits(model, before))
    assert sum(map(sum, (row.own for row in rows))) >= 7


@pytest.mark.parametrize("kind, family", CASES)
def test_greedy_generations_are_those_of_rows_one_by_one(kind, family, tokenizer):
    model, prompts = adapted(kind, family), [ids[:-1] for ids in ROWS]
    found = generate(model, tokenizer, prompts, SampleConfig(temperature=0.0, max_new_tokens=6), 0)
    for prompt, [(ids, reason)] in zip(prompts, found, strict=True):
        expected = list(prompt)
        while len(expected) < len(prompt) + 6 and (expected[-1] != 0 or len(expected) == len(prompt)):
            expected.append(int(last_logits(model, expected).argmax()))
        assert ids == expected[len(prompt) :] and reason == ("stop" if ids[-1] == 0 else "length")


def test_samples_follow_the_distribution(tokenizer):
    """Chi-square of 2000 first tokens of one prompt, several copies of a row among them, against the forward pass."""
    model, prompt, n = adapted("prompt tuning"), [5, 6, 7], 2000
    probs = last_logits(model, prompt)[0].double().softmax(-1)
    found = generate(model, tokenizer, [prompt, [9]], SampleConfig(n=n, max_new_tokens=1, batch_size=4 * n), 0)
    counts = torch.tensor([ids[0] for ids, _ in found[0]]).bincount(minlength=len(probs)).double()
    often = probs * n >= 5
    observed, expected = torch.cat((counts[often], counts[~often].sum()[None])), torch.cat(
        (probs[often], probs[~often].sum()[None])
    ) * n  # fmt: skip
    statistic, freedom = ((observed - expected) ** 2 / expected).sum().item(), len(observed) - 1
    # Wilson and Hilferty: the cube root of chi-square over its freedom is normal; 4 standard deviations.
    spread = 2 / (9 * freedom)
    assert (statistic / freedom) ** (1 / 3) < 1 - spread + 4 * spread**0.5
    assert len(found[0]) == len(found[1]) == n and freedom > 10


def test_a_stop_text_ends_a_generation(tokenizer):
    model, prompt = adapted("p-tuning"), [5, 6, 7]
    [[(ids, _)]] = generate(model, tokenizer, [prompt], SampleConfig(temperature=0.0, max_new_tokens=8), 0)
    text = tokenizer.decode(ids[2:3])
    assert text and text not in tokenizer.decode(ids[:2])
    [[(cut, reason)]] = generate(
        model, tokenizer, [prompt], SampleConfig(temperature=0.0, max_new_tokens=8, stop=(text,)), 0
    )
    assert cut == [*ids[:2], tokenizer.eos_token_id] and reason == "stop"


@pytest.mark.parametrize("kind", ["prompt tuning", "prefix tuning"])
def test_log_probabilities_are_those_of_rows_one_by_one(kind):
    model = adapted(kind)
    rows = [(ids[:2], ids[2:]) for ids in ROWS[:3]]
    found = token_logps(model, rows, pad_token_id=0, adapter="default")
    for (prompt, completion), logps in zip(rows, found, strict=True):
        for t, token in enumerate(completion):
            expected = last_logits(model, [*prompt, *completion[:t]]).log_softmax(-1)[0, token].item()
            assert logps[t] == pytest.approx(expected, abs=1e-4)
