"""A merged model is base and adapter, also where the base ties its embeddings and its head; or nothing is written."""

from pathlib import Path

import pytest
import torch
from conftest import random_pairs, tiny_llama
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from align import load_model
from align.cli import app
from align.errors import ModelMismatchError
from align.logps import token_logps
from align.merge import merge_adapter
from align.models import load_adapters
from align.scoring.contrastive import score_rows

EMBEDDED = str(Path(__file__).parent.parent / "data" / "tiny-arithmetic" / "model")

#: Kinds of adapters, and whether embeddings and head are still tied in the merged model.
KINDS = {
    "embeddings": ({"target_modules": ["embed_tokens"]}, False),
    "head": ({"target_modules": ["lm_head"]}, False),
    "both": ({"target_modules": ["embed_tokens", "lm_head"]}, False),
    "both, tied by PEFT": ({"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, None),
    "DoRA": ({"target_modules": ["embed_tokens", "lm_head", "q_proj"], "use_dora": True}, False),
    "rsLoRA": ({"target_modules": ["embed_tokens", "lm_head", "down_proj"], "use_rslora": True}, False),
    "head saved": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    "embeddings saved": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "both saved": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 200]}, True),
    "tokens of the head": ({"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 200]}}, False),
    "tokens of both": (
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3], "lm_head": [200]}}, False,
    ),
    "biases": ({"target_modules": ["q_proj"], "bias": "all"}, True),
    "layers": ({"target_modules": ["q_proj", "up_proj"]}, True),
}  # fmt: skip


def noisy(base, config, folder, seed=1):
    """Saves an adapter with 0.05 times noise in all of its weights."""
    model = get_peft_model(base, config)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


def prompts(vocabulary):
    ids = torch.randint(0, vocabulary, (8, 24), generator=torch.Generator().manual_seed(3))
    ids[0, :3] = torch.tensor([3, 200, 5])
    return ids


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits.float()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_on_a_tied_base(tmp_path, kind):
    settings, tied = KINDS[kind]
    adapter = noisy(AutoModelForCausalLM.from_pretrained(EMBEDDED), LoraConfig(r=4, **settings), tmp_path / "a")
    base, ids = AutoModelForCausalLM.from_pretrained(EMBEDDED), prompts(365)
    plain = logits(base, ids)
    expected = logits(PeftModel.from_pretrained(base, adapter), ids)
    merge_adapter(EMBEDDED, adapter, tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    found = logits(merged, ids)
    assert (found - expected).abs().max() < 1e-4 < 0.1 < (found - plain).abs().max()
    if tied is not None:
        assert merged.config.tie_word_embeddings is tied
        assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["embeddings", "head", "layers"])
def test_shorter_dtypes(tmp_path, kind, dtype):
    adapter = noisy(AutoModelForCausalLM.from_pretrained(EMBEDDED), LoraConfig(r=4, **KINDS[kind][0]), tmp_path / "a")
    merge_adapter(EMBEDDED, adapter, tmp_path / "merged", dtype=dtype)
    merged, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), prompts(365)
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(EMBEDDED), adapter), ids)
    assert merged.dtype == getattr(torch, dtype)
    assert (logits(merged, ids) - expected).square().mean().sqrt() < 0.02 * expected.std()


def test_other_architectures(tmp_path, tokenizer):
    """GPT-2 ties, and keeps the matrices of its layers the other way round."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=2, n_head=2, eos_token_id=0))
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = noisy(base, LoraConfig(r=4, target_modules=["wte", "c_attn"], fan_in_fan_out=True), tmp_path / "a")
    expected = logits(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter), prompts(400)
    )
    merge_adapter(str(tmp_path / "base"), adapter, tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged, prompts(400)) - expected).abs().max() < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == tokenizer.get_vocab()


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in ("a", ".merged.lock"))


@pytest.mark.parametrize(
    "config, match",
    [
        (LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), "cannot be merged .*bias"),
        (LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[3]), "cannot be merged"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "learns a prompt"),
    ],
    ids=["bias", "aLoRA", "prompt"],
)
def test_what_no_weights_can_hold_is_refused(tmp_path, config, match):
    adapter = noisy(AutoModelForCausalLM.from_pretrained(EMBEDDED), config, tmp_path / "a")
    with pytest.raises(ModelMismatchError, match=match):
        merge_adapter(EMBEDDED, adapter, tmp_path / "merged", dtype="float32")
    assert left(tmp_path) == []


def test_other_kinds_of_adapters(tmp_path):
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    adapter = noisy(AutoModelForCausalLM.from_pretrained(EMBEDDED), config, tmp_path / "a")
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(EMBEDDED), adapter), prompts(365))
    merge_adapter(EMBEDDED, adapter, tmp_path / "merged", dtype="float32")
    assert (
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), prompts(365)) - expected
    ).abs().max() < 1e-4


@pytest.mark.parametrize("spoil", ["tie", "weights", "nan"])
def test_a_merge_that_goes_wrong_is_not_written(tmp_path, monkeypatch, spoil):
    """PEFT's merge without untying, with a matrix that is off, or no numbers: exit code 2, and no folder."""
    kind = {"tie": "embeddings", "weights": "layers", "nan": "layers"}[spoil]
    adapter = noisy(AutoModelForCausalLM.from_pretrained(EMBEDDED), LoraConfig(r=4, **KINDS[kind][0]), tmp_path / "a")
    original = PeftModel.__getattr__

    def spoiled(self, name):
        if name != "merge_and_unload":
            return original(self, name)

        def merge(**kwargs):
            merged = self.base_model.merge_and_unload(**kwargs)
            merged.model.layers[0].mlp.up_proj.weight.data[0] += 1 if spoil == "weights" else float("nan")
            return merged

        return merge

    if spoil == "tie":
        monkeypatch.setattr("align.merge._untie", lambda model: None)
    else:
        monkeypatch.setattr(PeftModel, "__getattr__", spoiled)
    args = ["merge", str(tmp_path / "merged"), "--model", EMBEDDED, "--adapter", adapter, "--dtype", "float32"]
    result = CliRunner().invoke(app, args)
    assert isinstance(result.exception, ModelMismatchError)
    assert "logits differ from those of base and adapter" in str(result.exception)
    assert left(tmp_path) == []


@pytest.mark.parametrize("kind", KINDS)
def test_scores_under_adapters_of_tied_matrices(kind):
    """Scores have one adapter on, another, or none: each as PEFT's own pass has it, one row at a time."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(EMBEDDED), LoraConfig(r=4, **KINDS[kind][0])).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    rows = [(pair["prompt_ids"], pair["chosen_ids"]) for pair in random_pairs(4, vocab_size=360)]
    for adapter, alone in (("default", model), (None, AutoModelForCausalLM.from_pretrained(EMBEDDED))):
        found = token_logps(model, rows, pad_token_id=0, adapter=adapter)
        for (prompt, completion), numbers in zip(rows, found, strict=True):
            ids = torch.tensor([prompt + completion])
            logps = logits(alone, ids).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            assert numbers == pytest.approx(logps[len(prompt) - 1 :].tolist(), abs=1e-4)


def test_contrast_of_two_adapters_of_tied_matrices(tmp_path):
    """s_t of an adapter on the embeddings and one on the head, against two models that PEFT holds apart."""
    paths = {
        name: noisy(
            AutoModelForCausalLM.from_pretrained(EMBEDDED), LoraConfig(r=4, target_modules=[target]), tmp_path / name
        )
        for name, target in (("positive", "embed_tokens"), ("negative", "lm_head"))
    }
    rows = [(pair["prompt_ids"], pair["chosen_ids"]) for pair in random_pairs(4, vocab_size=360)]
    found = score_rows(load_adapters(load_model(EMBEDDED, dtype="float32"), paths), rows, pad_token_id=0)
    models = {n: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(EMBEDDED), p) for n, p in paths.items()}
    for (prompt, completion), scores in zip(rows, found, strict=True):
        ids = torch.tensor([prompt + completion])
        logps = {n: logits(m, ids).log_softmax(-1)[0, len(prompt) - 1 : -1] for n, m in models.items()}
        # s = softmax over the vocabulary of (1 + β) log p⁺ − β log p⁻, at the token.
        expected = (2 * logps["positive"] - logps["negative"]).softmax(-1)
        assert scores == pytest.approx(expected.gather(1, torch.tensor(completion)[:, None])[:, 0].tolist(), abs=1e-4)


def test_untied_bases_are_merged_as_before(tmp_path, model_dir):
    adapter = noisy(tiny_llama(), LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]), tmp_path / "a")
    merge_adapter(model_dir, adapter, tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = PeftModel.from_pretrained(tiny_llama(), adapter)
    assert (logits(merged, prompts(390)) - logits(expected, prompts(390))).abs().max() < 1e-4
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
