"""Several versions of TRL: the window, the seams' check on an untested one, and what TRL 1.14 lacks."""

import importlib.util
import logging
import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import trl
from conftest import random_pairs, tiny_llama
from datasets import Dataset
from packaging.requirements import Requirement
from peft import LoraConfig

from align import (
    BASHConfig,
    BASHTrainer,
    CDPOConfig,
    CDPOTrainer,
    RACConfig,
    RACTrainer,
    TokenDPOConfig,
    TokenDPOTrainer,
    trl_versions,
)
from align.errors import ConfigError
from align.trainers import token_dpo, trl_check
from align.trainers.self_generated import SelfGeneratedTrainer
from align.trainers.sft import GuardedSFTConfig, GuardedSFTTrainer

ROOT = Path(__file__).parent.parent
SFT = {
    GuardedSFTTrainer: GuardedSFTConfig,
    BASHTrainer: partial(BASHConfig, epsilon=0.5),
    RACTrainer: partial(RACConfig, max_new_tokens=4),
}
ROWS = [{"prompt": f"Question: {i}?", "completion": f" It is {i}."} for i in range(4)]
OPTIONS = {
    "per_device_train_batch_size": 2, "max_steps": 2, "bf16": False, "report_to": "none", "use_cpu": True, "logging_steps": 1,
    "disable_tqdm": True, "save_strategy": "no",
}  # fmt: skip


def dpo(tmp_path, tokenizer, model=None, cls=TokenDPOTrainer, config=TokenDPOConfig, column="weights"):
    return cls(
        model or tiny_llama(), args=config(str(tmp_path), **OPTIONS), processing_class=tokenizer,
        train_dataset=Dataset.from_list(random_pairs(4, columns=(column,))),
        peft_config=LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
    )  # fmt: skip


def sft(cls, tmp_path, tokenizer, model=None):
    config = SFT[cls](str(tmp_path), **OPTIONS)
    return cls(model or tiny_llama(), config, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)


@pytest.fixture
def untested(monkeypatch):
    """A TRL that is newer than all tested ones."""
    trl_check._warn.cache_clear()
    monkeypatch.setattr(trl, "__version__", "1.99.0")


def test_the_window_counts_patch_releases_as_their_minor_version(monkeypatch):
    assert trl_versions.is_tested()  # or this run of the tests counts for nothing
    for version, tested in (
        ("1.13.2", False), ("1.14.0", True), ("1.15.3", True), ("1.16.0", True), ("1.16.9", True), ("1.17.0.dev0", False),
        ("1.17.0", False), ("2.0.0", False), ("2.15.0", False),
    ):  # fmt: skip
        monkeypatch.setattr(trl, "__version__", version)
        assert trl_versions.is_tested() == tested, version


def test_installation_refuses_older_versions_and_none_that_is_newer():
    text = (ROOT / "pyproject.toml").read_text()
    requirement = Requirement(re.search(r'"(trl[^"]*)"', text)[1])
    allowed = [
        version for version in ("1.13.9", "1.14.0", "1.16.0", "1.17.0", "1.40.0") if version in requirement.specifier
    ]
    assert allowed == ["1.14.0", "1.16.0", "1.17.0", "1.40.0"]


def test_make_tests_the_oldest_and_the_newest_version():
    line = re.search(r"^test-versions:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert line.split() == [f"test-trl-{version}" for version in (trl_versions.OLDEST, trl_versions.NEWEST)]


def test_a_tested_version_is_neither_checked_nor_warned_of(tmp_path, tokenizer, monkeypatch, caplog):
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(trl_check, "_aside", never)
    dpo(tmp_path, tokenizer)
    sft(GuardedSFTTrainer, tmp_path, tokenizer)
    assert "not tested" not in caplog.text


def test_an_untested_version_warns_once_and_trains_the_same(tmp_path, tokenizer, monkeypatch, caplog):
    """The check leaves nothing behind: losses are those of a version that is not checked."""
    runs = []
    for version in (trl.__version__, "1.99.0"):
        monkeypatch.setattr(trl, "__version__", version)
        trl_check._warn.cache_clear()
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            trainers = [dpo(tmp_path, tokenizer), *(sft(cls, tmp_path, tokenizer) for cls in SFT)]
            warnings = [record.getMessage() for record in caplog.records if "not tested" in record.getMessage()]
        assert len(warnings) == (version == "1.99.0")
        for trainer in trainers:
            trainer.train()
        runs.append([[log["loss"] for log in t.state.log_history if "loss" in log] for t in trainers])
    assert "TRL 1.99.0" in warnings[0] and "TRL 1.14 to 1.16" in warnings[0]
    assert runs[0] == runs[1] and all(len(losses) == 2 for losses in runs[0])


def test_every_preference_trainer_is_checked(tmp_path, tokenizer, untested, monkeypatch):
    monkeypatch.setattr(trl_check, "_numbers", lambda *_: (_ for _ in ()).throw(RuntimeError("seen")))
    with pytest.raises(ConfigError, match="RuntimeError: seen"):
        dpo(tmp_path, tokenizer, cls=CDPOTrainer, config=CDPOConfig, column="ce_scores")


def gone(self, model, inputs, return_outputs):
    raise AttributeError("'DPOTrainer' object has no attribute '_compute_loss'")


def without_weights(self, **kwargs):
    outputs = self.call(**kwargs)
    self.logps = outputs.log_probs
    return outputs


def half_the_gradient(logps, ref_logps, weights):
    right = ref_logps + weights * (logps - ref_logps)
    return (right + right.detach()) / 2


def not_a_number(self, model, inputs, return_outputs):
    return COMPUTE_LOSS(self, model, inputs, return_outputs) * (float("nan") if hasattr(model, "ref_logps") else 1.0)


def past_the_seam(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    plain = {name: value for name, value in inputs.items() if not name.startswith("token_")}
    return COMPUTE_LOSS(self, model, plain, return_outputs)


COMPUTE_LOSS = trl.DPOTrainer._compute_loss


@pytest.mark.parametrize(
    ("owner", "name", "broken", "found"),
    [
        (trl.DPOTrainer, "_compute_loss", not_a_number, "loss with weights of 1: nan in place of"),
        # Hooks that nothing calls any more: of the loss, of the reference, of the columns that the loader keeps.
        (trl.DPOTrainer, "compute_loss", past_the_seam, "loss with weights of 2: "),
        (TokenDPOTrainer, "_precompute_ref_logps", lambda self, dataset, *_: dataset, "precompute_ref_log_probs stores no"),
        (TokenDPOTrainer, "_set_signature_columns_if_needed", trl.DPOTrainer._set_signature_columns_if_needed,
         "leaves chosen_ref_logps, rejected_ref_logps out of the batch"),
        (trl.DPOTrainer, "_compute_loss", gone, "AttributeError: 'DPOTrainer' object has no attribute '_compute_loss'"),
        # Another loss, and weights that reach nothing.
        (token_dpo, "weighted_logps", lambda logps, ref, weights: 1.1 * logps, "loss with weights of 1: "),
        (token_dpo._TokenWeightedModel, "__call__", without_weights, "loss with weights of 2: "),
        (TokenDPOTrainer, "_weights", lambda self, inputs, mask: torch.ones_like(mask), "loss with weights of 2: "),
        # The right value without its gradient.
        (token_dpo, "weighted_logps", half_the_gradient, "gradient with weights of 1: "),
    ],
)  # fmt: skip
def test_a_broken_seam_ends_before_anything_is_loaded(
    tmp_path, tokenizer, untested, monkeypatch, owner, name, broken, found
):
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(ConfigError, match=re.escape(found)) as raised:
        dpo(tmp_path, tokenizer, model="no/such/model")
    message = str(raised.value)
    assert message.startswith("TRL = 1.99.0 must be 1.14 to 1.16 for align ")
    assert message.endswith('; install a tested version: pip install "trl>=1.14,<1.17"')


@pytest.mark.parametrize("cls", SFT)
def test_a_broken_sft_ends_before_anything_is_loaded(tmp_path, tokenizer, untested, monkeypatch, cls):
    own = GuardedSFTTrainer.compute_loss
    monkeypatch.setattr(GuardedSFTTrainer, "compute_loss", lambda self, *a, **k: 1.1 * own(self, *a, **k))
    with pytest.raises(ConfigError, match="loss: ") as raised:
        sft(cls, tmp_path, tokenizer, model="no/such/model")
    assert "TRL = 1.99.0 must be 1.14 to 1.16" in str(raised.value)


def test_contexts_that_are_read_wrongly_are_found(tmp_path, tokenizer, untested, monkeypatch):
    """BASH and RAC hand out other batches than the loader's; TRL's own SFT does not."""
    read = SelfGeneratedTrainer._read_window

    def shifted(self):
        read(self)
        self._ready = [batch | {"labels": batch["labels"].roll(1, 1)} for batch in self._ready]

    monkeypatch.setattr(SelfGeneratedTrainer, "_read_window", shifted)
    for cls in (BASHTrainer, RACTrainer):
        with pytest.raises(ConfigError, match="loss: "):
            sft(cls, tmp_path, tokenizer, model="no/such/model")
    sft(GuardedSFTTrainer, tmp_path, tokenizer)


def test_what_the_check_sets_aside_comes_back(tmp_path, tokenizer, untested, monkeypatch):
    launch = {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    args = TokenDPOConfig(str(tmp_path), **OPTIONS)
    state = dict(trl_check.PartialState._shared_state)

    def fails(use_cpu):
        assert [name for name in launch if name in os.environ] == ["ACCELERATE_USE_CPU"]
        TokenDPOConfig(str(tmp_path / "other"), **OPTIONS)
        raise RuntimeError

    with pytest.raises(ConfigError):
        trl_check.check_trl(args, fails)
    assert trl_check.PartialState._shared_state == state
    assert {name: os.environ[name] for name in launch} == launch
    assert not trl_check._checking


def test_triton_s_version_is_refused_on_a_cpu(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.15.0")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for make in (dpo, partial(sft, GuardedSFTTrainer)):
        with pytest.raises(ConfigError, match=r'Triton, which does not run on cpu.*"trl>=1.14,<1.17,!=1.15.\*"'):
            make(tmp_path, tokenizer, model="no/such/model")


def test_a_trl_that_renames_its_internals_is_named(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.99.0")
    monkeypatch.delattr(trl_versions.utils, "get_config_model_id")
    again = importlib.util.spec_from_file_location("align.again", trl_versions.__file__)
    with pytest.raises(
        ConfigError, match=r"TRL = 1.99.0 must be .*cannot import name 'get_config_model_id'.*pip install"
    ):
        again.loader.exec_module(importlib.util.module_from_spec(again))


@pytest.mark.skipif(trl_versions.FUSED_HEAD, reason="since 1.15, TRL trains with Liger's layers and its own head")
def test_liger_bypasses_the_head_of_trl_1_14(tmp_path):
    with pytest.raises(ConfigError, match="use_liger_kernel = True must be False"):
        trl_versions.check_settings(TokenDPOConfig(str(tmp_path), **OPTIONS, use_liger_kernel=True))


@pytest.mark.parametrize("shifted", [False, True])
def test_numbers_from_logits_match_a_loop(shifted):
    """The head that models get with TRL 1.14, in float64."""
    model, oracle = tiny_llama().double(), tiny_llama().double()
    trl_versions._add_head_of_logits(model)
    ids = torch.randint(3, 390, (2, 7), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 1, 1]]).bool(), -100)
    named = {"shift_labels": labels[:, 1:]} if shifted else {"labels": labels}
    outputs = model(input_ids=ids, **named, fused_lm_head=True)
    assert torch.equal(model(input_ids=ids).logits, oracle(input_ids=ids).logits)
    for row in range(2):
        for place in range(6):
            found = [outputs[name][row, place].item() for name in ("log_probs", "entropy", "mean_logits", "is_top1")]
            label = labels[row, place + 1].item()
            if label == -100:
                assert found == [0, 0, 0, 0]
                continue
            logits = oracle(input_ids=ids[row : row + 1, : place + 1]).logits[0, -1]
            probabilities = [x / sum(logits.exp().tolist()) for x in logits.exp().tolist()]
            entropy = -sum(p * torch.tensor(p).log().item() for p in probabilities)
            expected = [torch.tensor(probabilities[label]).double().log().item(), entropy, sum(logits.tolist()) / 400]
            assert found[:3] == pytest.approx(expected, rel=1e-5)
            assert found[3] == (label == probabilities.index(max(probabilities)))
