"""TGDPO against the authors' formula in float64 loops, against TRL, and its guidance against two models."""

import json
import shutil

import pytest
import torch
from conftest import byte_level_tokenizer, random_pairs, tiny_llama
from datasets import Dataset
from oracles import completion_logps
from peft import LoraConfig, get_peft_model
from test_token_dpo import assert_close, batch_loss, options, oracle, separate_reference
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from align import TGDPOConfig, TGDPOTrainer
from align.errors import ConfigError, MissingColumnError, ModelMismatchError
from align.models import base_fingerprint, load_adapters, load_model, write_base_file
from align.records import read_records
from align.scoring.guidance import check_guide, check_same_vocabulary, score_guidance


def guided_pairs(n=8, scale=40.0):
    """Random log-ratios of both signs, large enough that some weights are negative."""
    pairs = random_pairs(n, columns=("guidance_logratios",))
    for pair in pairs:
        for side in ("chosen", "rejected"):
            name = f"{side}_guidance_logratios"
            pair[name] = [scale * (value - 0.5) for value in pair[name]]
    return pairs


def build(tmp_path, policy, pairs, tokenizer, reference=None, **kwargs):
    return TGDPOTrainer(
        policy, ref_model=reference, args=TGDPOConfig(**options(tmp_path, **kwargs)), processing_class=tokenizer,
        train_dataset=Dataset.from_list(pairs),
    )  # fmt: skip


@pytest.mark.parametrize(
    "settings, alpha, beta, floor",
    [
        ({}, 0.5, 0.3, None),  # β is the loss's own, 0.3 here
        ({"alpha": 2.0, "guidance_beta": 0.1}, 2.0, 0.1, None),
        ({"alpha": 2.0, "weight_floor": 0.25}, 2.0, 0.3, 0.25),
    ],
)
def test_loss_and_gradient_match_the_formula(tmp_path, model_dir, tokenizer, settings, alpha, beta, floor):
    policy, reference = separate_reference(model_dir)
    pairs = guided_pairs()
    trainer = build(tmp_path, policy, pairs, tokenizer, reference, **settings)

    def weights(pair):
        both = []
        for sign, side in ((1, "chosen"), (-1, "rejected")):
            row = [1 + sign * alpha * beta * ratio for ratio in pair[f"{side}_guidance_logratios"]]
            both.append(row if floor is None else [max(floor, weight) for weight in row])
        return both

    every = [weight for pair in pairs for side in weights(pair) for weight in side]
    assert (min(every) < 0) == (floor is None)
    loss, grads = batch_loss(trainer, pairs)
    assert_close(loss, grads, *oracle(model_dir, pairs, weights, "sequence"), 1e-5)
    logged = trainer._metrics["train"]
    for number, side in enumerate(("chosen", "rejected")):
        row = [weight for pair in pairs for weight in weights(pair)[number]]
        assert logged[f"weights/{side}"][-1] == pytest.approx(sum(row) / len(row), rel=1e-4)
        assert logged[f"weights/{side}_negative"][-1] == pytest.approx(sum(w < 0 for w in row) / len(row), abs=1e-6)


@pytest.mark.parametrize(
    "loss_type", ["sigmoid", "ipo", "hinge", "exo_pair", "robust", "apo_down", "sppo_hard", "discopop", "sigmoid_norm"]
)
def test_alpha_zero_is_dpo(tmp_path, model_dir, tokenizer, loss_type):
    pairs = guided_pairs()
    policy, reference = (model.double() for model in separate_reference(model_dir))
    settings = {"loss_type": [loss_type], "label_smoothing": 0.1 * (loss_type in ("exo_pair", "robust"))}
    ours = build(tmp_path, policy, pairs, tokenizer, reference, alpha=0.0, **settings)
    loss, grads = batch_loss(ours, pairs)
    policy, reference = (model.double() for model in separate_reference(model_dir))
    text = [{key: pair[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")} for pair in pairs]
    # TRL's tokenizes whatever it is given, so its preparation is set aside.
    theirs = type("IdsDPOTrainer", (DPOTrainer,), {"_prepare_dataset": lambda self, dataset, *_: dataset})(
        policy, ref_model=reference, args=DPOConfig(**options(tmp_path, **settings)),
        processing_class=tokenizer, train_dataset=Dataset.from_list(text),
    )  # fmt: skip
    assert_close(loss, grads, *batch_loss(theirs, text), 1e-6)  # some sums are in float32 even so
    rewards = ours._metrics["train"]
    assert rewards["rewards/chosen_unweighted"][-1] == pytest.approx(rewards["rewards/chosen"][-1], abs=1e-5)


def test_unweighted_rewards_are_without_weights(tmp_path, model_dir, tokenizer):
    pairs = guided_pairs()
    logged = []
    for alpha in (0.0, 2.0):
        trainer = build(tmp_path, *separate_reference(model_dir)[:1], pairs, tokenizer,
                        separate_reference(model_dir)[1], alpha=alpha)  # fmt: skip
        batch_loss(trainer, pairs)
        logged.append({key: values[-1] for key, values in trainer._metrics["train"].items()})
    plain, bent = logged
    assert bent["rewards/rejected_unweighted"] == pytest.approx(plain["rewards/rejected"], abs=1e-5)
    assert abs(bent["rewards/rejected"] - plain["rewards/rejected"]) > 1e-3


def test_refused_settings_and_columns(tmp_path, model_dir, tokenizer):
    for wrong in ({"alpha": -1.0}, {"guidance_beta": 0.0}, {"weight_floor": 1.5}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            TGDPOConfig(**options(tmp_path, **wrong))
    with pytest.raises(MissingColumnError, match="chosen_guidance_logratios, rejected_guidance_logratios missing"):
        build(tmp_path, tiny_llama(), random_pairs(2), tokenizer)


@pytest.fixture(scope="module")
def guide_adapter(tmp_path_factory, model_dir):
    torch.manual_seed(5)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    base = load_model(model_dir, dtype="float32")
    fingerprint = base_fingerprint(base)
    folder = tmp_path_factory.mktemp("guide")
    model = get_peft_model(base, lora)
    model.save_pretrained(folder)
    write_base_file(folder, model, fingerprint)
    return str(folder)


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_guidance_is_the_log_ratio_of_two_models(tmp_path, model_dir, guide_adapter, kind):
    pairs = random_pairs(6)
    guide = load_adapters(load_model(model_dir, dtype="float32"), {"default": guide_adapter})
    merged = load_adapters(load_model(model_dir, dtype="float32"), {"default": guide_adapter}).merge_and_unload()
    reference = None
    if kind == "model":
        guide, reference = merged, load_model(model_dir, dtype="float32")
    counts = score_guidance(guide, reference, pairs, tmp_path / "out.jsonl", pad_token_id=0)
    assert counts["rows"] == 6
    exact, plain = merged.double(), load_model(model_dir, dtype="float32").double()
    for row in read_records(tmp_path / "out.jsonl", "pair"):
        for side in ("chosen", "rejected"):
            ids = row["prompt_ids"], row[f"{side}_ids"]
            with torch.no_grad():
                new, old = completion_logps(exact, *ids), completion_logps(plain, *ids)
            wanted = [float(a - b) for a, b in zip(new, old, strict=True)]
            assert row[f"{side}_guidance_logratios"] == pytest.approx(wanted, abs=5e-5)
            assert row[f"{side}_ref_logps"] == pytest.approx([float(b) for b in old], abs=5e-5)
            assert max(map(abs, wanted)) > 0.01


def test_a_guide_must_share_the_vocabulary(tmp_path, model_dir, guide_adapter):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    check_same_vocabulary(tokenizer, byte_level_tokenizer())
    other = byte_level_tokenizer()
    state = json.loads(other.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    one, two = (next(token for token, i in vocabulary.items() if i == wanted) for wanted in (300, 301))
    vocabulary[one], vocabulary[two] = 301, 300
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    swapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=other.eos_token, pad_token=other.pad_token
    )
    with pytest.raises(ModelMismatchError, match=r"the guide has another tokenizer: id 300 is .*2 ids differ"):
        check_same_vocabulary(swapped, tokenizer)
    assert len(check_guide({"path": model_dir}, guide_adapter)) == len(tokenizer)  # saved without one: its base's
    own = tmp_path / "adapter"
    shutil.copytree(guide_adapter, own)
    swapped.save_pretrained(own)
    with pytest.raises(ModelMismatchError, match=r"adapter has another tokenizer: id 300 is"):
        check_guide({"path": model_dir}, str(own))
    with pytest.raises(ModelMismatchError, match="no adapter to switch off"):
        score_guidance(tiny_llama(), None, random_pairs(2), tmp_path / "out.jsonl", pad_token_id=0)
