"""Mixtures of experts whose configuration asks for the routers' loss: what only draws leaves it out, training has TRL's."""

import pytest
import torch
from datasets import Dataset
from oracles import own_context
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from align import BASHConfig, BASHTrainer, RACConfig, RACTrainer
from align.contexts import OwnTokens, draw_contexts, mixed_row
from align.decoding import Decoding, Policy
from align.logps import token_logps
from align.mix import IGNORED
from align.sample import SampleConfig, generate

COMMON = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**COMMON, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(**COMMON, num_experts=4, moe_intermediate_size=16),
    "gpt_oss": lambda: GptOssConfig(**COMMON, num_local_experts=4, sliding_window=6),
}
ROWS = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22, 23], [30, 31, 32, 33, 34, 35]]


def experts(family: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()


def one_by_one(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), output_router_logits=False).logits[:, -1]


@pytest.fixture
def no_router_loss(monkeypatch):
    """Fails where the routers' loss is computed."""
    import transformers.models.gpt_oss.modeling_gpt_oss as gpt_oss
    import transformers.models.mixtral.modeling_mixtral as mixtral
    import transformers.models.qwen3_moe.modeling_qwen3_moe as qwen3_moe

    def refuse(*_, **__):
        raise AssertionError("the routers' loss is computed")

    for module in (gpt_oss, mixtral, qwen3_moe):
        monkeypatch.setattr(module, "load_balancing_loss_func", refuse)


@pytest.mark.parametrize("generation", ["parallel", "autoregressive"])
@pytest.mark.parametrize("family", CONFIGS)
def test_drawing_contexts(family, generation, no_router_loss):
    model = experts(family)
    rows = [mixed_row(ids, [IGNORED, *ids[1:]], 0.6, 3, 0, place) for place, ids in enumerate(ROWS)]
    draw_contexts(model, rows, OwnTokens(generation, max_tokens_per_batch=64), 0)
    for row in rows:
        assert row.context == own_context(row, generation, lambda before: one_by_one(model, before))
    assert any(row.context != row.ids for row in rows)
    assert model.config.output_router_logits is True  # as it was


@pytest.mark.parametrize("family", CONFIGS)
def test_other_passes_without_labels(family, tokenizer, no_router_loss):
    """Generations, log-probabilities, decoding at own positions."""
    model = experts(family)
    [[(ids, _)], _] = generate(model, tokenizer, ROWS[:2], SampleConfig(temperature=0.0, max_new_tokens=3), 0)
    expected = list(ROWS[0])
    for _ in ids:
        expected.append(int(one_by_one(model, expected).argmax()))
    assert ids == expected[len(ROWS[0]) :]
    [logps] = token_logps(model, [(ROWS[0][:3], ROWS[0][3:])], pad_token_id=0)
    last = one_by_one(model, ROWS[0][:-1]).log_softmax(-1)[0, ROWS[0][-1]].item()
    assert logps[-1] == pytest.approx(last, abs=1e-4)
    if family != "gpt_oss":  # whose windows are refused there
        decoding = Decoding([Policy(model)], ROWS[:2])
        logits = decoding.feed(0, torch.tensor([[ROWS[0][-1]], [ROWS[1][-1]]]))
        assert torch.allclose(logits[0], one_by_one(model, ROWS[0]), atol=1e-4)


@pytest.mark.parametrize("coefficient", [None, 0.0])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", ["bash", "rac"])
def test_training_draws_and_has_the_routers_loss(kind, family, coefficient, tmp_path, tokenizer):
    cls, config, own = {
        "bash": (BASHTrainer, BASHConfig, {"epsilon": 0.5, "generation": "autoregressive"}),
        "rac": (RACTrainer, RACConfig, {"cue": " no:", "max_new_tokens": 4}),
    }[kind]
    args = config(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to="none",
        save_strategy="no", logging_steps=1, disable_tqdm=True, refresh_steps=1, router_aux_loss_coef=coefficient, **own,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": [IGNORED, IGNORED, *ids[2:]]} for ids in ROWS]
    trainer = cls(experts(family), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert ("aux_loss" in logged) == (coefficient is None) == trainer.model.config.output_router_logits
    assert coefficient is not None or logged["aux_loss"] > 0.5  # even routing gives the number of experts per token
