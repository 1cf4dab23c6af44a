"""Not a test: trains one method and prints its logged losses as JSON. Launched by test_parallel.py, by one process or two,
whole or sharded."""

import json
import os
import sys
from pathlib import Path

from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from conftest import byte_level_tokenizer, random_pairs
from datasets import Dataset
from peft import LoraConfig
from test_self_generated import demonstrations
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from transformers import AutoModelForCausalLM

from align import BASHConfig, BASHTrainer, CDPOConfig, CDPOTrainer, RACConfig, RACTrainer, TGDPOConfig, TGDPOTrainer
from align.processes import launched_with_deepspeed, process_state

METHODS = {
    "cdpo": (CDPOTrainer, CDPOConfig, ("ce_scores",), {}),
    "tgdpo": (TGDPOTrainer, TGDPOConfig, ("guidance_logratios", "ref_logps"), {"alpha": 0.5}),
    "bash": (BASHTrainer, BASHConfig, None, {"epsilon": 0.5, "refresh_steps": 3}),
    "rac": (RACTrainer, RACConfig, None, {"cue": " no:", "max_new_tokens": 6, "refresh_steps": 3}),
}


def shard_on_the_cpu() -> None:
    """Lets accelerate shard without an accelerator: it asks for FSDP on GPUs alone, and on a CPU would take DDP. Everything
    after this choice is what runs on GPUs, with gloo for NCCL."""
    made = AcceleratorState.__init__

    def make(self, *args, fsdp_plugin=None, **kwargs):
        plugin = fsdp_plugin or self._shared_state.get("fsdp_plugin")
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)  # which takes the type from PartialState each time
        if plugin is not None:
            self._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)

    AcceleratorState.__init__ = make
    gathered = Accelerator.get_state_dict

    def gather(self, *args, **kwargs):
        # Gathered tensors are promises, which a GPU's copy to the CPU waits for; where they are there already, nobody does.
        found = gathered(self, *args, **kwargs)
        return {k: v.wait() if isinstance(v, AsyncCollectiveTensor) else v for k, v in found.items()}

    Accelerator.get_state_dict = gather


def talk_over_gloo() -> None:
    """Lets DeepSpeed's processes begin at once: on a CPU, it would compile kernels of its own for talking."""
    if launched_with_deepspeed():
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False


def build(method: str, out: str, lora: bool, **settings):
    """A trainer of the method on a tiny model, four rows a step in all."""
    trainer, config, columns, own = METHODS[method]
    tokenizer = byte_level_tokenizer()
    args = config(
        out, **{
            "per_device_train_batch_size": 4 // process_state().num_processes, "max_steps": 6, "bf16": False,
            "report_to": "none", "logging_steps": 1, "learning_rate": 1e-3, "seed": 3,
            "gradient_checkpointing": False, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
            "max_length": 64, "dataloader_pin_memory": False, **({} if columns else {"completion_only_loss": True}),
        } | own | settings,
    )  # fmt: skip
    data = Dataset.from_list(random_pairs(16, columns=columns)) if columns else demonstrations(16)
    peft = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False) if lora else None
    # Loaded, not made: a reference that is sharded is loaded once more from where the policy was.
    model = AutoModelForCausalLM.from_pretrained(Path(out).parent / "base")
    return trainer(model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=peft)


if __name__ == "__main__":
    method, out, lora, settings = sys.argv[1:]
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_the_cpu()
    talk_over_gloo()
    trainer = build(method, out, lora == "lora", **json.loads(settings))
    resumed = {"resume_from_checkpoint": str(next(Path(out).glob("checkpoint-*"), "")) or None}
    trainer.train(**resumed)
    trainer.save_model(f"{out}/final")
    if process_state().is_main_process:
        keys = ("loss", "rewards/margins") if method.endswith("dpo") else ("loss",)
        logged = [[entry[key] for key in keys] for entry in trainer.state.log_history if "loss" in entry]
        kind = trainer.accelerator.distributed_type.value
        print("LOGGED", json.dumps({"processes": process_state().num_processes, "kind": kind, "logged": logged}))
