"""Keys and values by the name that the installed transformers, or a model written for an older one, gives them."""

import logging
import random
import warnings
from contextlib import contextmanager

import pytest
import torch
from conftest import byte_level_tokenizer, tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import GenerationMixin, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from align.continuations import Continuations, chain_draws
from align.decoding import Decoding, Policy
from align.models import cache_name
from align.rsd import RSDConfig, reverse_speculative_decode
from align.sample import SampleConfig

PROMPTS = [[5, 6, 7], [8, 9]]


@contextmanager
def no_deprecation():
    """Fails on what transformers says of names it is about to remove, as a warning or in its log."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = transformers_logging.get_logger("transformers")
    logger.addHandler(handler)
    logging.Logger.warning_once.cache_clear()  # each is said once in a process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            yield
    finally:
        logger.removeHandler(handler)
    assert not [message for message in said if "deprecated" in message]


def with_adapter(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()


class Output(dict):
    """An output with these keys and no others."""

    __getattr__ = dict.__getitem__


class OtherName(LlamaForCausalLM):
    """A model whose forward and output have the name that the installed transformers' have not."""


if cache_name(LlamaForCausalLM.forward) == "cache":

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        output = LlamaForCausalLM.forward(
            self, input_ids, attention_mask, position_ids, cache=past_key_values, **kwargs
        )
        return Output(logits=output.logits, past_key_values=output["cache"])

else:

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, **kwargs):
        output = LlamaForCausalLM.forward(
            self, input_ids, attention_mask, position_ids, past_key_values=cache, **kwargs
        )
        return Output(logits=output.logits, cache=output["past_key_values"])


OtherName.forward = forward


def decode(teacher, student) -> list[list[int]]:
    config = RSDConfig(lookahead=2, max_new_tokens=6)
    return [t.completion_ids for t in reverse_speculative_decode(teacher, student, PROMPTS, config, 0)]


def test_decoding_says_nothing_of_names():
    model, adapted = tiny_llama(), with_adapter(tiny_llama(1))  # PEFT's own use of old names is not ours to mend
    with no_deprecation():
        assert decode(model, adapted) and decode(model, model)


def test_continuations_say_nothing_of_names():
    config, models = SampleConfig(n=3, max_new_tokens=8), (tiny_llama(), with_adapter(tiny_llama()))
    with no_deprecation():
        for model in models:
            rows = [(prompt, [10, 11, 12]) for prompt in PROMPTS]
            drawn = Continuations(model, byte_level_tokenizer(), rows, config, 0, share=True)
            forks, _ = chain_draws(drawn, random.Random(0))
            assert forks and len(drawn.complete(forks)) == len(forks)


@pytest.mark.parametrize("wrap", [lambda model: model, with_adapter])
def test_a_model_of_the_other_name_decodes_the_same(wrap):
    """Token by token against one pass over everything: a cache that got lost would change the numbers."""
    plain, other = tiny_llama(), tiny_llama()
    other.__class__ = OtherName
    assert cache_name(type(plain).forward) != cache_name(type(other).forward)
    tokens = torch.tensor([[10, 11, 12], [13, 14, 15]])
    for model in (plain, other):
        policy = Policy(wrap(model))
        decoding = Decoding([policy], PROMPTS)
        decoding.feed(0, torch.tensor([[7], [9]]))
        decoding.commit(torch.ones(2, dtype=torch.long))
        with torch.no_grad():
            found = decoding.feed(0, tokens)
        for row, prompt in enumerate(PROMPTS):
            with torch.no_grad():
                whole = tiny_llama()(torch.tensor([[*prompt, *tokens[row].tolist()]])).logits[0, -3:]
            torch.testing.assert_close(found[row], whole, atol=1e-5, rtol=1e-5)


def test_generation_has_one_of_the_names():
    assert cache_name(GenerationMixin.prepare_inputs_for_generation) in ("cache", "past_key_values")
    assert cache_name(GenerationMixin.prepare_inputs_for_generation) == cache_name(LlamaForCausalLM.forward)
