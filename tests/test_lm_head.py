"""Token log-probabilities without logits: values and gradients of the plain computation in float64."""

import pytest
import torch
from conftest import tiny_llama

from align import lm_head
from align.lm_head import TokenLogProbs, knows_head


def plain_logits(hidden, weight, bias, cap=None):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def plain(hidden, weight, bias, targets, cap=None):
    return plain_logits(hidden, weight, bias, cap).log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("chunk", [1, 150, 1 << 20])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_values_and_gradients(monkeypatch, chunk, frozen, biased, cap):
    monkeypatch.setattr(lm_head, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator, requires_grad=True)
    weight = torch.randn(50, 5, generator=generator, requires_grad=not frozen)
    bias = torch.randn(50, generator=generator, requires_grad=not frozen) if biased else None
    targets = torch.randint(0, 50, (7,), generator=generator)
    upstream = torch.randn(7, generator=generator)
    logps, entropy, means, top1 = TokenLogProbs.apply(hidden, weight, bias, targets, cap)
    (logps * upstream).sum().backward()
    doubles = [x if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in (hidden, weight, bias)]
    expected = plain(*doubles, targets, cap)
    (expected * upstream).sum().backward()
    assert (logps - expected).abs().max() < 1e-5
    for found, wanted in zip((hidden, weight, bias), doubles, strict=True):
        if found is not None and wanted.grad is not None:
            assert (found.grad - wanted.grad).abs().max() < 1e-5
    assert hidden.grad.abs().max() > 0.1 and (weight.grad is None) == frozen
    logits = plain_logits(*doubles, cap).detach()
    full = logits.log_softmax(-1)
    assert (entropy + (full.exp() * full).sum(-1)).abs().max() < 1e-5
    assert (means - logits.mean(-1)).abs().max() < 1e-5
    assert top1.tolist() == (logits.argmax(-1) == targets).tolist()


def test_bfloat16_and_no_gradient():
    hidden, weight = torch.randn(4, 8), torch.randn(30, 8)
    targets = torch.tensor([0, 5, 29, 7])
    exact = plain(hidden, weight, None, targets)
    with torch.no_grad():
        assert (TokenLogProbs.apply(hidden, weight, None, targets)[0] - exact).abs().max() < 1e-5
        found = TokenLogProbs.apply(hidden.bfloat16(), weight.bfloat16(), None, targets)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = TokenLogProbs.apply(hidden, weight, None, targets)[0]
    assert found.dtype == cast.dtype == torch.float32
    assert (found - exact).abs().max() < 0.1 and (cast - exact).abs().max() < 0.1
    assert not torch.equal(cast, exact)


def test_heads_with_something_behind_them_are_left_to_trl():
    assert knows_head(tiny_llama())
    model = tiny_llama()
    model.config.final_logit_softcapping = 30.0
    assert knows_head(model)
    model.config.logit_scale = 0.5
    assert not knows_head(model)
