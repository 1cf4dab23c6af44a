"""A DPO training step: TRL's DPOTrainer without its reference pass, ours, and the floor, side by side.

    python benchmarks/dpo_step.py --json benchmarks/results/dpo_step_cpu.json

All three take the same pairs on the same weights (random ones), on a CPU in turn; a time is a median, a ratio one of medians. A
step is the loss and its gradient, without the optimizer's update, which is the same for all. The floor is one
forward and backward pass of the bare model on exactly the tokens that have to be computed, each once: rows of equal length,
attention as the bare model has it, no padding and no mask of ours, the head on labelled positions alone, no loss of a
router; on a CPU all at once or in groups of about
1,024 tokens, with all logits at once or with our head, whichever is fastest. Peak memory is that of a process of its own (CPU), or of the allocator (CUDA).
"""

import copy
import gc
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

#: Shape -> prompt and completion lengths, uniform between the two; `gsm8k` has real ones.
SHAPES = {
    "few-shot maths": ((200, 400), (64, 200)),
    "UltraFeedback-like": ((64, 128), (128, 384)),
    "gsm8k": None,
    "4k": ((3000, 3000), (1000, 1096)),
}
#: Model -> configuration, and its type where that is not a Llama's; dtype, LoRA or not, quantization; attention where it has one kind.
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 683,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
#: Layers with a window of 128 (gpt-oss's own; Gemma 2's is 4,096, longer than these rows) and without in turn.
ALTERNATING = {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 3, "head_dim": 32}
GEMMA2 = SMALL | ALTERNATING | {
    "vocab_size": 32000, "num_key_value_heads": 4, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip
GPT_OSS = SMALL | ALTERNATING | {
    "vocab_size": 32000, "num_key_value_heads": 2, "intermediate_size": 256, "num_local_experts": 16, "num_experts_per_tok": 4,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "small, V=400": {"config": SMALL | {"vocab_size": 400}, "dtype": "float32"},
    "small, V=32k": {"config": SMALL | {"vocab_size": 32000}, "dtype": "float32"},
    "small, V=32k, LoRA": {"config": SMALL | {"vocab_size": 32000}, "dtype": "float32", "lora": True},
    "Gemma-2-like, V=32k": {"type": "gemma2", "config": GEMMA2, "dtype": "float32", "attention": "eager"},
    "gpt-oss-like, V=32k": {"type": "gpt_oss", "config": GPT_OSS, "dtype": "float32", "attention": "eager"},
    "Llama-3-8B, LoRA": {"config": LLAMA_8B, "dtype": "bfloat16", "lora": True, "checkpointing": True},
    "Llama-3-8B, QLoRA": {
        "config": LLAMA_8B,
        "dtype": "bfloat16",
        "lora": True,
        "checkpointing": True,
        "quantization": "4bit",
    },
}
#: Dense bfloat16 TFLOP/s by the maker's data sheet.
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def make_pairs(shape: str, count: int, vocabulary: int = 360, seed: int = 0) -> list[dict]:
    """Pairs of random ids with the lengths of a shape; the embedded tokenizer knows a few hundred."""
    draw = random.Random(seed)
    lengths = SHAPES[shape]
    if lengths is None:
        known = json.loads(Path(__file__).with_name("gsm8k_lengths.json").read_text())["lengths"]
        rows = draw.sample(known, count)
    else:
        rows = [[draw.randint(*lengths[0]), draw.randint(*lengths[1]), draw.randint(*lengths[1])] for _ in range(count)]
    return [random_pair(draw, *row, vocabulary) for row in rows]


def random_pair(draw: random.Random, prompt: int, chosen: int, rejected: int, vocabulary: int = 360) -> dict:
    """Random ids of these lengths, with reference log-probabilities."""
    lengths = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    pair = {f"{name}_ids": [draw.randrange(3, vocabulary) for _ in range(n)] for name, n in lengths.items()}
    return pair | {"chosen_ref_logps": [-1.0] * chosen, "rejected_ref_logps": [-1.0] * rejected}


def slots_of(pair: dict) -> int:
    """Tokens of a pair that have to be computed."""
    from align.packing import pair_slots

    prompt = pair["prompt_ids"]
    return pair_slots(prompt + pair["chosen_ids"], prompt + pair["rejected_ids"], len(prompt))


def make_model(spec: dict[str, Any], device: str, attention: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    attention = spec.get("attention", attention)
    config = AutoConfig.for_model(
        spec.get("type", "llama"), **{"tie_word_embeddings": False} | spec["config"], max_position_embeddings=8704, pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    # Experts one by one: the kernel that takes them at once is many times slower on a CPU.
    experts = {"experts_implementation": "eager"} if device == "cpu" and spec.get("type") == "gpt_oss" else {}
    make = partial(
        AutoModelForCausalLM.from_config, config, dtype=getattr(torch, spec["dtype"]), attn_implementation=attention, **experts
    )  # fmt: skip
    if spec.get("quantization"):
        from align.models import quantization_config

        with tempfile.TemporaryDirectory() as folder:
            with torch.device(device):
                make().save_pretrained(folder)
            gc.collect()
            return AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=quantization_config(spec["quantization"], spec["dtype"]), device_map=device,
                dtype=getattr(torch, spec["dtype"]), attn_implementation=attention,
            )  # fmt: skip
    with torch.device(device):
        return make()


class Sides:
    """TRL's trainer, ours and the floor on one batch.

    Args:
        which: `trl`, `ours` or `floor`.
    """

    def __init__(self, which: str, spec: dict[str, Any], pairs: list[dict], device: str, attention: str) -> None:
        from datasets import Dataset
        from peft import LoraConfig, get_peft_model
        from transformers import AutoTokenizer
        from trl import DPOConfig, DPOTrainer

        from align import TokenDPOConfig, TokenDPOTrainer

        self.which, self.pairs, self.device = which, pairs, device
        self.model = make_model(spec, device, "sdpa" if which == "trl" and attention == "flex_attention" else attention)
        tokenizer = AutoTokenizer.from_pretrained("data/tiny-arithmetic/model")
        lora = LoraConfig(task_type="CAUSAL_LM", **LORA) if spec.get("lora") else None
        checkpointing = spec.get("checkpointing", False)
        options = {
            "per_device_train_batch_size": len(pairs), "bf16": False, "use_cpu": device == "cpu", "report_to": "none",
            "max_length": None, "gradient_checkpointing": checkpointing, "disable_tqdm": True, "save_strategy": "no",
            "dataloader_pin_memory": False, "seed": 0,
        }  # fmt: skip
        folder = tempfile.mkdtemp()
        if which == "floor":
            if lora is not None:
                torch.manual_seed(0)
                self.model = get_peft_model(self.model, lora)
            if checkpointing:
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
                self.model.enable_input_require_grads()
            self.groups = self._floor_batches()
            return
        data = Dataset.from_list(pairs)
        torch.manual_seed(0)
        if which == "ours":
            self.trainer = TokenDPOTrainer(
                self.model, args=TokenDPOConfig(folder, check_reference=False, **options), train_dataset=data,
                processing_class=tokenizer, peft_config=lora,
            )  # fmt: skip
            if not self.trainer._layout.shares:
                raise RuntimeError("prefix sharing is off; see the warning above")
        else:
            # It tokenizes whatever it is given, so its preparation is set aside; its reference pass, too.
            cls = type("IdsDPOTrainer", (DPOTrainer,), {"_prepare_dataset": lambda self, dataset, *_: dataset})
            self.trainer = cls(
                self.model, ref_model=None if lora else copy.deepcopy(self.model), args=DPOConfig(folder, **options), train_dataset=data,
                processing_class=tokenizer, peft_config=lora,
            )  # fmt: skip
            self.trainer.ref_model, self.trainer.precompute_ref_logps = None, True
            if lora is None:  # accelerate keeps what it has prepared
                self.trainer.accelerator._models = [
                    m for m in self.trainer.accelerator._models if m is self.trainer.model
                ]
        self.model = self.trainer.model
        rows = pairs if which == "ours" else [{k: v for k, v in p.items() if k.endswith("_ids")} for p in pairs]
        batch = self.trainer._prepare_inputs(self.trainer.data_collator(rows))
        if which == "trl":
            for side in ("chosen", "rejected"):
                batch[f"ref_{side}_logps"] = torch.tensor([sum(p[f"{side}_ref_logps"]) for p in pairs], device=device)
        self.batch = batch

    def _floor_batches(self) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Ids in rows of equal length, and the labelled positions, all at once and in groups."""
        sizes = [slots_of(p) for p in self.pairs]
        labelled = sum(len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in self.pairs)
        width = max(1, round(sum(sizes) / len(sizes)))
        ids = torch.randint(3, 360, (len(sizes), width), device=self.device)
        positions = torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(0))[:labelled].sort().values
        self.tokens = sum(sizes)
        groups = {"all at once": [(ids, positions.to(self.device))]}
        if self.device == "cpu":
            rows = max(1, 1024 // width)
            groups["groups of 1,024"] = [
                (ids[i : i + rows], p[(p >= i * width) & (p < (i + rows) * width)] - i * width)
                for p in (positions,)
                for i in range(0, len(ids), rows)
            ]
            groups |= {f"{how}, our head": batches for how, batches in groups.items()}
        return groups

    def step(self, how: str = "all at once") -> float:
        """Seconds of one step; the loss is left in `loss`, gradients in the model."""
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        self._wait()
        start = time.perf_counter()
        if self.which == "floor":
            from align.lm_head import TokenLogProbs

            base = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
            losses = []
            for ids, positions in self.groups[how]:
                hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[positions]
                targets = ids.flatten()[(positions + 1).clamp(max=ids.numel() - 1)]
                cap = getattr(base.config, "final_logit_softcapping", None)
                if how.endswith("our head"):
                    losses.append(-TokenLogProbs.apply(hidden, base.lm_head.weight, None, targets, cap)[0].sum())
                else:
                    logits = base.lm_head(hidden).float()
                    logits = logits if cap is None else cap * torch.tanh(logits / cap)
                    losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            loss = torch.stack(losses).sum()
        else:
            loss = self.trainer.compute_loss(self.model, dict(self.batch))
        loss.backward()
        self._wait()
        self.loss = loss.item()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def gradients(self) -> dict[str, torch.Tensor]:
        return {n: p.grad.float() for n, p in self.model.named_parameters() if p.grad is not None}

    def flops(self) -> float:
        """Of a step on the tokens that have to be computed, each once: 2 per weight and token forward, 2 for the gradient of
        activations, 2 for that of trained weights; the head on labelled positions; attention from each token to what it sees."""
        base = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        config = base.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention = config.hidden_size * (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * head_dim
        experts = getattr(config, "num_experts_per_tok", 1)
        linear = config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size * experts)
        head = config.hidden_size * config.vocab_size
        factor = 4 if hasattr(self.model, "peft_config") else 6
        tokens = labelled = scores = 0
        for p in self.pairs:
            slots = slots_of(p)
            tokens, labelled = tokens + slots, labelled + len(p["chosen_ids"]) + len(p["rejected_ids"])
            prompt, sides = len(p["prompt_ids"]), (len(p["chosen_ids"]), len(p["rejected_ids"]))
            scores += prompt**2 / 2 + sum(n * (prompt + n / 2) for n in sides)
        return (
            factor * (linear * tokens + head * labelled)
            + 6 * config.num_hidden_layers * 2 * config.hidden_size * scores
        )


def compare(name: str, shape: str, count: int, steps: int, device: str, attention: str) -> dict[str, Any]:
    spec = MODELS[name]
    pairs = make_pairs(shape, count)
    seconds: dict[str, list[float]] = {}
    result: dict[str, Any] = {
        "model": name,
        "shape": shape,
        "pairs": count,
        "attention": MODELS[name].get("attention", attention),
        "peak memory, GB": {},
    }
    if device == "cpu":  # in turn, so that whatever else the machine does falls on all of them alike
        sides = {which: Sides(which, spec, pairs, device, attention) for which in ("trl", "ours", "floor")}
        for step in range(steps + 1):
            for which, side in sides.items():
                for how in side.groups if which == "floor" else ["all at once"]:
                    taken = side.step(how)
                    if step:
                        seconds.setdefault(which if which != "floor" else f"floor, {how}", []).append(taken)
        losses = {which: side.loss for which, side in sides.items()}
        gradients = {which: sides[which].gradients() for which in ("trl", "ours")}
        flops, tokens = sides["ours"].flops(), sides["floor"].tokens
    else:  # one model at a time in memory
        losses, gradients = {}, {}
        for which in ("trl", "ours", "floor"):
            side = Sides(which, spec, pairs, device, "sdpa" if which == "floor" else attention)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            for step in range(steps + 2):
                taken = side.step()
                if step > 1:
                    seconds.setdefault(which if which != "floor" else "floor, all at once", []).append(taken)
            result["peak memory, GB"][which] = torch.cuda.max_memory_allocated() / 1e9
            losses[which] = side.loss
            if which == "floor":
                tokens = side.tokens
            else:
                gradients[which] = {n: g.cpu() for n, g in side.gradients().items()}
                flops = side.flops()
            del side
            gc.collect()
    times = {which: median(values) for which, values in seconds.items()}
    floor = min(value for which, value in times.items() if which.startswith("floor"))
    largest = max(g.abs().max() for g in gradients["trl"].values())
    apart = max((gradients["ours"][n] - g).abs().max() for n, g in gradients["trl"].items())
    width = {s: max(len(p["prompt_ids"]) + len(p[f"{s}_ids"]) for p in pairs) for s in ("chosen", "rejected")}
    result |= {
        "seconds": times, "TRL / ours": times["trl"] / times["ours"], "ours / floor": times["ours"] / floor,
        "pairs per second": count / times["ours"], "tokens per second": tokens / times["ours"],
        "tokens, each once": tokens, "tokens of TRL": 2 * count * max(width.values()),
        "relative difference of losses": abs(losses["ours"] - losses["trl"]) / abs(losses["trl"]),
        "relative difference of gradients": (apart / largest).item(), "all seconds": seconds,
    }  # fmt: skip
    if device != "cpu":
        card = torch.cuda.get_device_name()
        result["card"] = card
        peak = next((tflops for part, tflops in PEAKS.items() if part in card), None)
        if peak:
            result["model FLOP utilisation"] = flops / times["ours"] / peak / 1e12
    return result


def peak_memory(name: str, shape: str, count: int, attention: str) -> dict[str, float]:
    """GB that a process holds at most, by which side it runs."""
    found = {}
    for which in ("trl", "ours"):
        what = json.dumps({"which": which, "name": name, "shape": shape, "count": count, "attention": attention})
        done = subprocess.run([sys.executable, __file__, "--one", what], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        found[which] = float(done.stdout.split("PEAK")[-1])
    return found


def main(
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(MODELS)}; by default small ones on a CPU, large ones on a GPU."),
    ] = None,
    shape: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SHAPES)}; all by default.")] = None,
    pairs: Annotated[int, typer.Option(help="Pairs per step; one for shape 4k.")] = 8,
    steps: int = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    attention: Annotated[str, typer.Option(help="sdpa, eager or flex_attention (ours; TRL's has sdpa then)")] = "sdpa",
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
    one: Annotated[str | None, typer.Option(help="Internal: peak memory of one side.")] = None,
) -> None:
    """Runs every model on every shape and prints the table."""
    if one is not None:
        o = json.loads(one)
        side = Sides(o["which"], MODELS[o["name"]], make_pairs(o["shape"], o["count"]), "cpu", o["attention"])
        side.step()
        side.step()
        # Not getrusage's, which counts what the parent held before this program began.
        status = Path("/proc/self/status").read_text()
        print("PEAK", int(status.split("VmHWM:")[1].split()[0]) / 1e6)
        return
    from align.report import markdown_table

    names = model or [n for n, spec in MODELS.items() if (device == "cpu") == (spec["dtype"] == "float32")]
    results = []
    for name in names:
        for kind in shape or SHAPES:
            count = 1 if kind == "4k" else pairs
            found = compare(name, kind, count, steps, device, attention)
            if device == "cpu":
                found["peak memory, GB"] = peak_memory(name, kind, count, attention)
            print(json.dumps({k: v for k, v in found.items() if k != "all seconds"}), flush=True)
            results.append(found)
    rows = [
        {
            "model": r["model"],
            "shape": r["shape"],
            "TRL, s": f"{r['seconds']['trl']:.2f}",
            "ours, s": f"{r['seconds']['ours']:.2f}",
            "TRL / ours": f"{r['TRL / ours']:.2f}",
            "ours / floor": f"{r['ours / floor']:.2f}",
            "memory, ours / TRL": f"{r['peak memory, GB']['ours'] / r['peak memory, GB']['trl']:.2f}",
        }
        for r in results
    ]
    print(markdown_table(rows))
    if json_path:
        hardware = (
            torch.cuda.get_device_name()
            if device != "cpu"
            else f"{torch.get_num_threads()} CPU threads, {platform.machine()}"
        )
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(
            json.dumps({"hardware": hardware, "torch": torch.__version__, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    typer.run(main)
