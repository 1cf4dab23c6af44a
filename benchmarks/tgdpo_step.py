"""One TGDPO training step: guidance and reference from columns, against three models at every step.

    python benchmarks/tgdpo_step.py --json benchmarks/results/tgdpo_step.json

The second way is what the paper's released code does: policy, reference and guide run on every batch. Both take the same
steps on the same batches, in turn; the ratio is of medians. Random weights. With LoRA the reference is the base.
"""

import copy
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from align import TGDPOConfig, TGDPOTrainer
from align.records import read_records
from align.report import markdown_table
from align.scoring.guidance import score_guidance
from align.tokens import shift_to_labels

SIDES = ("chosen", "rejected")


class ThreeModelsTrainer(TGDPOTrainer):
    """TGDPO that runs the guide beside policy and reference on every batch."""

    guide = None

    def required_columns(self, args):
        return ()

    def _compute_loss(self, model, inputs, return_outputs):
        ids, mask = inputs["input_ids"], inputs["completion_mask"]
        labels = ids.masked_fill(mask == 0, -100)
        with torch.no_grad():
            guided = self.guide(
                input_ids=ids, attention_mask=inputs["attention_mask"], labels=labels, fused_lm_head=True
            )
            plain, _ = self._reference(inputs)
        ratios = (guided.log_probs - plain) * shift_to_labels(mask)
        for side, part in zip(SIDES, torch.nn.functional.pad(ratios, (1, 0)).chunk(2), strict=True):
            inputs[f"token_{side}_guidance_logratios"] = part
        # The reference has run; handing its numbers on keeps this trainer at one pass of each model.
        for side, part in zip(SIDES, torch.nn.functional.pad(plain, (1, 0)).chunk(2), strict=True):
            inputs[f"token_{side}_ref_logps"] = part
        return super()._compute_loss(model, inputs, return_outputs)


def tiny(seed: int, layers: int, hidden: int, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=1024, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def held_mb(trainer) -> float:
    """MB of the weights of all models that a trainer holds."""
    models = [value for value in vars(trainer).values() if isinstance(value, torch.nn.Module)]
    parameters = {id(p): p for model in models for p in model.parameters()}
    return sum(p.numel() * p.element_size() for p in parameters.values()) / 1e6


def main(
    layers: int = 6,
    hidden: int = 256,
    pairs_per_step: int = 4,
    prompt: int = 100,
    completion: int = 150,
    steps: int = 15,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Times both ways in turn, full fine-tuning and LoRA, checks that their losses agree, and prints the table."""
    found = [compare(layers, hidden, pairs_per_step, prompt, completion, steps, lora) for lora in (False, True)]
    shown = [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in result.items()} for result in found]
    print(markdown_table([{"what": key, "full": shown[0][key], "LoRA": shown[1][key]} for key in shown[0]]))
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(found, indent=2) + "\n")


def compare(
    layers: int, hidden: int, pairs_per_step: int, prompt: int, completion: int, steps: int, lora: bool
) -> dict[str, Any]:
    """Both ways on one model."""
    tokenizer = AutoTokenizer.from_pretrained("data/tiny-arithmetic/model")
    policy, guide = (tiny(seed, layers, hidden, len(tokenizer)) for seed in (0, 1))
    reference = copy.deepcopy(policy)
    draw = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(3, len(tokenizer), (n,), generator=draw).tolist()

    rows = [
        {"id": str(i), "prompt": "", "chosen": "", "rejected": "", "prompt_ids": ids(prompt), "chosen_ids": ids(completion), "rejected_ids": ids(completion)}
        for i in range(pairs_per_step * steps)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        score_guidance(guide, reference, rows, f"{folder}/scored.jsonl", pad_token_id=0)
        once = time.perf_counter() - start
        scored = read_records(f"{folder}/scored.jsonl", "pair")
        args = TGDPOConfig(
            folder, per_device_train_batch_size=pairs_per_step, bf16=False, use_cpu=True, gradient_checkpointing=False,
            report_to="none", check_reference=False, max_length=None,
        )  # fmt: skip
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if lora else None
        common = {"args": args, "processing_class": tokenizer, "peft_config": config}
        cached = TGDPOTrainer(copy.deepcopy(policy), train_dataset=Dataset.from_list(scored), **common)
        plain_rows = [{k: row[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in rows]
        three = ThreeModelsTrainer(
            copy.deepcopy(policy),
            ref_model=None if lora else reference,
            train_dataset=Dataset.from_list(plain_rows),
            **common,
        )
        add_fused_lm_head(guide)
        three.guide = guide
    seconds: dict[str, list[float]] = {"cached": [], "three": []}
    apart = 0.0
    for step in range(steps):
        losses = []
        for name, trainer, data in (("cached", cached, scored), ("three", three, plain_rows)):
            batch = trainer._prepare_inputs(
                trainer.data_collator(data[step * pairs_per_step : (step + 1) * pairs_per_step])
            )
            start = time.perf_counter()
            trainer.model.train()
            loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            with torch.no_grad():
                for parameter in filter(lambda p: p.requires_grad, trainer.model.parameters()):
                    parameter -= 1e-3 * parameter.grad
                    parameter.grad = None
            seconds[name].append(time.perf_counter() - start)
            losses.append(loss.item())
        apart = max(apart, abs(losses[0] - losses[1]) / abs(losses[1]))
    medians = {name: median(values[1:]) for name, values in seconds.items()}
    result = {
        "trained": "LoRA" if lora else "all weights", "parameters": sum(p.numel() for p in policy.parameters()), "pairs per step": pairs_per_step, "steps": steps,
        "prompt and completion tokens": [prompt, completion], "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "seconds per step, all models every step": medians["three"], "seconds per step, cached": medians["cached"],
        "ratio": medians["three"] / medians["cached"], "seconds of scoring, once, per step's pairs": once / steps,
        "weights MB, every step": held_mb(three), "weights MB, cached": held_mb(cached),
        "largest relative difference of a loss": apart,
    }  # fmt: skip
    return result


if __name__ == "__main__":
    typer.run(main)
