"""SFT with guards is TRL's SFT, to the last bit; the longest batch comes first."""

import json
from dataclasses import dataclass

import pytest
import torch
from conftest import tiny_llama
from datasets import Dataset
from peft import LoraConfig
from test_self_generated import demonstrations
from trl import SFTConfig, SFTTrainer

from align.errors import ConfigError, ModelLoadError
from align.trainers.sft import GuardedSFTConfig, GuardedSFTTrainer


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 16}, {"gradient_accumulation_steps": 2}])
def test_it_is_trls(tmp_path, tokenizer, settings):
    common = {
        "per_device_train_batch_size": 2, "max_steps": 3, "bf16": False, "report_to": "none", "logging_steps": 1,
        "learning_rate": 1e-2, "save_strategy": "no", "completion_only_loss": False, "disable_tqdm": True,
    } | settings  # fmt: skip
    ends, logs = [], []
    for trainer_class, config_class in ((SFTTrainer, SFTConfig), (GuardedSFTTrainer, GuardedSFTConfig)):
        trainer = trainer_class(
            tiny_llama(), args=config_class(str(tmp_path / config_class.__name__), **common), processing_class=tokenizer,
            train_dataset=demonstrations(), peft_config=LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5),
        )  # fmt: skip
        trainer.train()
        ends.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        timed = ("runtime", "per_second")
        logs.append([{k: v for k, v in e.items() if not any(t in k for t in timed)} for e in trainer.state.log_history])
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert logs[0] == logs[1] and len(logs[0]) == 4
    report = json.loads((tmp_path / "GuardedSFTConfig/preflight.json").read_text())
    lengths = sorted((len(row["input_ids"]) for row in trainer.train_dataset), reverse=True)
    assert [row["tokens"] for row in report["batches"][0]["rows"]] == [[length] for length in lengths[:2]]
    assert lengths[0] > lengths[-1]


CPU = {"bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_steps": 1}


def test_trls_config_is_refused_by_name_and_none_is_its_own(tmp_path, tokenizer, monkeypatch):
    rows = {"train_dataset": demonstrations(), "processing_class": tokenizer}
    with pytest.raises(ConfigError, match="GuardedSFTTrainer takes a GuardedSFTConfig, not a SFTConfig"):
        GuardedSFTTrainer(tiny_llama(), SFTConfig(str(tmp_path), **CPU), **rows)

    @dataclass
    class Config(GuardedSFTConfig):
        bf16: bool = False  # which a CPU refuses, unless it is asked for

    class Trainer(GuardedSFTTrainer):
        config_class = Config

    monkeypatch.chdir(tmp_path)
    assert isinstance(Trainer(tiny_llama(), **rows).args, Config)


def test_a_pickle_is_refused(tmp_path, tokenizer):
    model = tiny_llama()
    model.config.save_pretrained(tmp_path / "model")
    torch.save(model.state_dict(), tmp_path / "model/pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="pytorch_model.bin"):
        GuardedSFTTrainer(
            str(tmp_path / "model"), GuardedSFTConfig(str(tmp_path), **CPU), train_dataset=demonstrations(),
            processing_class=tokenizer,
        )  # fmt: skip


def test_rows_that_a_collator_makes_have_no_preflight(tmp_path, tokenizer):
    def collator(rows):
        ids = torch.tensor([tokenizer(row["text"])["input_ids"][:1] * 4 for row in rows])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    args = GuardedSFTConfig(
        str(tmp_path), dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, **CPU
    )
    trainer = GuardedSFTTrainer(
        tiny_llama(), args, collator, train_dataset=Dataset.from_list([{"text": "a"}] * 8), processing_class=tokenizer
    )
    assert trainer.train().global_step == 1
    assert "rows have no input_ids" in json.loads((tmp_path / "preflight.json").read_text())["skipped"]
