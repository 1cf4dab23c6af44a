"""Prefix trees: the numbers of one sequence at a time, from fewer positions; and models that cannot share."""

import pytest
import torch
from conftest import tiny_llama
from families import tiny
from oracles import completion_logps
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM

from align.logps import shares_prefixes, token_logps
from align.prefix_tree import ancestor_mask, grow_trees

PROMPT = [5, 6, 7]
#: Completions that part early, late, never (one goes on where another ends), and of one token; and a repeated row.
ROWS = [
    (PROMPT, [8, 9, 10, 11]), (PROMPT, [8, 9, 12, 13, 14]), (PROMPT, [15]), (PROMPT, [8, 9, 10, 11, 20, 21]),
    (PROMPT, [16, 17]), ([5, 6], [7, 8, 9]), ([30], [31]), (PROMPT, [8, 9, 10, 11]),
]  # fmt: skip


def expected(model, rows):
    return [torch.stack(completion_logps(model.double(), list(p), list(c))).tolist() for p, c in rows]


def assert_equal(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, abs=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("budget", [1, 12, 1000])
def test_trees_give_the_numbers_of_single_sequences(attention, budget):
    model = tiny_llama(attn_implementation=attention)
    assert shares_prefixes(model)
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    found = token_logps(model, ROWS, pad_token_id=0, max_tokens_per_batch=budget)
    if budget == 1:  # no padding: what is computed is the trees' nodes
        assert sum(seen) < sum(len(p) + len(c) - 1 for p, c in {(tuple(p), tuple(c)) for p, c in ROWS})
    assert_equal(found, expected(tiny_llama(), ROWS))


def test_mask_is_of_ancestors():
    ((tree, members),) = grow_trees([([1], [2, 3, 9]), ([1], [2, 4, 9])])
    assert (tree.ids, tree.parents, tree.depths) == ([1, 2, 3, 4], [-1, 0, 1, 1], [0, 1, 2, 2])
    assert members == [0, 1] and tree.predictors == [[0, 1, 2], [0, 1, 3]]
    rows = ["10000", "11000", "11100", "11010", "00001"]  # the last is padding
    assert ancestor_mask([tree], 5)[0, 0].int().tolist() == [[int(c) for c in row] for row in rows]


def test_a_tree_does_not_outgrow_twice_its_longest_row():
    rows = [([1, 2], [token, token, token, token]) for token in range(3, 13)]
    trees = grow_trees(rows)
    assert sorted(i for _, members in trees for i in members) == list(range(10))
    assert len(trees) > 1 and all(len(tree) <= 12 for tree, _ in trees)
    assert len(grow_trees(rows, share=False)) == 10


def test_models_that_cannot_share_are_found_and_still_right():
    # Its configuration has a window that it does not follow. Windows that models do follow: see test_families.py.
    deceptive = tiny("olmoe", sliding_window=4096)
    assert not shares_prefixes(deceptive)
    found = token_logps(deceptive, ROWS, pad_token_id=0)
    assert_equal(found, expected(tiny("olmoe", experts_implementation="eager"), ROWS))

    torch.manual_seed(0)
    learned = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)).eval()
    assert shares_prefixes(learned)
    found = token_logps(learned, ROWS, pad_token_id=0)
    assert_equal(found, expected(learned, ROWS))

    deaf = tiny_llama()  # takes position ids and mask, and makes nothing of them
    original = deaf.model.forward
    deaf.model.forward = lambda *args, **kwargs: original(*args, **kwargs | {"position_ids": None})
    assert not shares_prefixes(deaf)
    found = token_logps(deaf, ROWS, pad_token_id=0)
    assert_equal(found, expected(tiny_llama(), ROWS))

    local = GPTNeoForCausalLM(
        GPTNeoConfig(vocab_size=400, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
                     window_size=4, max_position_embeddings=64)
    ).eval()  # fmt: skip
    assert not shares_prefixes(local)
    found = token_logps(local, ROWS, pad_token_id=0)
    assert_equal(found, expected(local, ROWS))


def test_rounding_is_told_from_a_mask_that_is_not_followed(monkeypatch):
    """What 16 bits did to the logits of a 7 B model on a GPU: 3 % of their norm, which moves the worst of many by far more."""
    from align import logps

    model, whole, draw = tiny_llama(vocab_size=150_000).bfloat16(), logps.completion_logits, torch.Generator()

    def rounded(share):
        def logits(*args):
            exact = whole(*args).float()
            return exact + share * exact.std() * torch.randn(exact.shape, generator=draw)

        return logits

    for share, follows in ((0.02, True), (0.2, False)):
        monkeypatch.setattr(logps, "completion_logits", rounded(share))
        model._align_shares_prefixes = None
        assert shares_prefixes(model) is follows
    monkeypatch.undo()
    deaf = tiny_llama().bfloat16()
    original = deaf.model.forward
    deaf.model.forward = lambda *args, **kwargs: original(*args, **kwargs | {"position_ids": None})
    assert shares_prefixes(deaf) is False
    assert shares_prefixes(tiny_llama(vocab_size=5)) is None  # too few tokens to try it on


@pytest.mark.parametrize("settings", [{}, {"lora_bias": True}, {"use_dora": True}, {"use_rslora": True}])
def test_adapters_folded_or_not_give_what_peft_gives(settings):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", **settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(parameter + 0.1 * torch.randn_like(parameter))
    found = token_logps(model, ROWS, pad_token_id=0, adapter="default")
    assert_equal(found, expected(model, ROWS))
