"""SFT with guards is TRL's SFT, to the last bit; the longest batch comes first."""

import json

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig
from test_self_generated import demonstrations
from trl import SFTConfig, SFTTrainer

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
