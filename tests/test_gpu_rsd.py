"""On CUDA: traces from recorded passes are those of passes that run one kernel at a time, and those of a CPU."""

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, get_peft_model
from test_rsd import prompts

from align.decoding import Policy
from align.models import active_adapter, load_model
from align.rsd import RSDConfig, reverse_speculative_decode

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
GREEDY = {"teacher_temperature": 0.0, "student_temperature": 0.0}


def pair(device: str = "cuda", **sizes):
    """Wide enough for both ways of writing a mask, with grouped heads."""
    sizes = {"vocab_size": 40, "hidden_size": 64, **sizes}
    return tiny_llama(0, **sizes).to(device), tiny_llama(1, **sizes, num_hidden_layers=1).to(device)


def tokens(traces):
    return [(t.completion_ids, t.sources, t.finish_reason) for t in traces]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lookahead", [0, 4])
def test_recorded_passes_draw_the_same(lookahead, attention):
    models = pair(attn_implementation=attention)
    config = RSDConfig(threshold=0.02, lookahead=lookahead, max_new_tokens=400, **GREEDY)
    recorded = [Policy(model) for model in models]
    found = [tokens(reverse_speculative_decode(*recorded, prompts(9), config, 0)) for _ in range(2)]
    assert all(policy.graphs.enabled and policy.graphs.count for policy in recorded)
    plain = tokens(reverse_speculative_decode(*(Policy(m, cuda_graphs=False) for m in models), prompts(9), config, 0))
    on_cpu = tokens(reverse_speculative_decode(*pair("cpu", attn_implementation=attention), prompts(9), config, 0))
    assert found[0] == found[1] == plain == on_cpu
    # Rows left along the way, caches grew (more than 256 slots), and there were batches of other sizes.
    assert max(len(ids) for ids, *_ in plain) > 256 > 100 > min(len(ids) for ids, *_ in plain)
    alone = tokens(reverse_speculative_decode(*recorded, prompts(9)[3:5], config, 0, numbers=[3, 4]))
    assert alone == plain[3:5]


def test_probabilities_are_those_of_a_full_pass():
    models = pair()
    config = RSDConfig(threshold=0.03, draws=2, lookahead=3, max_new_tokens=300, top_k=0)
    traces = reverse_speculative_decode(*models, prompts(6), config, 0)
    for ids, trace in zip(prompts(6), traces, strict=True):
        whole = torch.tensor([ids + trace.completion_ids], device="cuda")
        for model, recorded in zip(models, (trace.teacher_probs, trace.student_probs), strict=True):
            with torch.no_grad():
                p = model(whole).logits[0, len(ids) - 1 : -1].softmax(-1).cpu()
            truth = p.gather(1, torch.tensor(trace.completion_ids)[:, None])[:, 0]
            assert torch.allclose(torch.tensor(recorded), truth, atol=1e-4)


def test_adapters_of_one_base():
    model = get_peft_model(
        tiny_llama(vocab_size=40), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).cuda()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.cuda().eval()
    teacher, student = Policy(model, "other"), Policy(model, None)
    config = RSDConfig(threshold=0.02, max_new_tokens=60, lookahead=2)
    for trace, ids in zip(reverse_speculative_decode(teacher, student, prompts(4), config, 0), prompts(4), strict=True):
        whole = torch.tensor([ids + trace.completion_ids], device="cuda")
        for name, recorded in (("other", trace.teacher_probs), (None, trace.student_probs)):
            with torch.no_grad(), active_adapter(model, name):
                p = model(whole).logits[0, len(ids) - 1 : -1].softmax(-1).cpu()
            truth = p.gather(1, torch.tensor(trace.completion_ids)[:, None])[:, 0]
            assert torch.allclose(torch.tensor(recorded), truth, atol=1e-4)
    assert teacher.graphs.enabled and student.graphs.enabled


def test_a_pass_that_reads_values_back_runs_unrecorded():
    teacher, student = pair()
    teacher.model.layers[0].register_forward_hook(lambda *args: args[2] if args[1][0].sum().item() < 1e9 else None)
    config = RSDConfig(threshold=0.02, max_new_tokens=40, lookahead=2, **GREEDY)
    with pytest.warns(UserWarning, match="cannot be recorded"):
        found = reverse_speculative_decode(teacher, student, prompts(5), config, 0)
    assert tokens(found) == tokens(reverse_speculative_decode(*pair(), prompts(5), config, 0))


def test_four_bits(model_dir):
    pytest.importorskip("bitsandbytes")
    quantized = load_model(model_dir, dtype="bfloat16", quantization="4bit")
    student = tiny_llama().to("cuda")
    config = RSDConfig(threshold=0.001, max_new_tokens=40, lookahead=3, top_k=0)
    traces = reverse_speculative_decode(quantized, student, prompts(4), config, 0)
    plain = reverse_speculative_decode(
        Policy(quantized, cuda_graphs=False), Policy(student, cuda_graphs=False), prompts(4), config, 0
    )
    assert [t.completion_ids[0] for t in traces] == [t.completion_ids[0] for t in plain]
    for ids, trace in zip(prompts(4), traces, strict=True):
        whole = torch.tensor([ids + trace.completion_ids], device="cuda")
        with torch.no_grad():
            p = quantized(whole).logits[0, len(ids) - 1 : -1].float().softmax(-1).cpu()
        truth = p.gather(1, torch.tensor(trace.completion_ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(trace.teacher_probs), truth, rtol=0.2, atol=1e-3)
