"""Tokens per second of reverse speculative decoding by lookahead, batch, and how much larger the teacher is.

    python benchmarks/rsd_speed.py --json benchmarks/results/rsd_speed_cpu.json --plot benchmarks/results/rsd_speed_cpu.svg

Random weights of Llama's shape. The teacher is the student with layers behind it whose outputs are scaled down, so that drafts are
accepted about as often as among models of one family; the head is scaled up until a token has the certainty of text. Lookaheads
take turns; a figure is the median of the rounds. `bound`: what k tokens per pass of the teacher, as counted, allow where a pass of the
student costs c of the teacher's: k · (1 + c) / (1 + (γ + 1) c). It takes a pass over γ + 1 tokens to be as fast as one over one, and
everything beside the models to be free. Every teacher and batch is written down as it is done; started again, it goes on.
"""

import json
import os
import platform
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from align.models import cache_name
from align.report import markdown_table
from align.rsd import RSDConfig, reverse_speculative_decode

#: Shapes: width, of the feed-forward part, heads, vocabulary, layers of the student.
SHAPES = {"cpu": (1024, 2816, 16, 8192, 2), "cuda": (4096, 11008, 32, 151_936, 3), "tiny": (64, 128, 4, 512, 1)}
LOOKAHEADS = [0, 1, 2, 4, 6, 8]
NOWHERE = -1  # no token ends a trace: all are of one length


def make_models(shape: str, layers: int, scale: float, sharpness: float, device: str, dtype: str):
    """A teacher of so many layers, and a student that is its first ones."""
    width, inner, heads, vocabulary, own = SHAPES[shape]
    torch.manual_seed(0)
    config = {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": heads, "max_position_embeddings": 4096, "tie_word_embeddings": False, "bos_token_id": None,
    }  # fmt: skip
    with torch.device(device):
        teacher = LlamaForCausalLM(LlamaConfig(**config, num_hidden_layers=layers)).to(getattr(torch, dtype)).eval()
        student = LlamaForCausalLM(LlamaConfig(**config, num_hidden_layers=1)).to(getattr(torch, dtype)).eval()
    student.config.num_hidden_layers = own
    student.model.layers = teacher.model.layers[:own]
    student.model.embed_tokens, student.model.norm, student.lm_head = (
        teacher.model.embed_tokens,
        teacher.model.norm,
        teacher.lm_head,
    )
    with torch.no_grad():
        teacher.lm_head.weight.normal_(0, sharpness / width**0.5)
        teacher.model.embed_tokens.weight.normal_(0, 1.0)
        for layer in teacher.model.layers[own:]:
            layer.self_attn.o_proj.weight.mul_(scale / (layers - own) ** 0.5)
            layer.mlp.down_proj.weight.mul_(scale / (layers - own) ** 0.5)
    return teacher, student


def pass_seconds(model, batch: int, device: str, repeats: int = 7) -> float:
    """Median seconds of decoding one token behind 64."""
    name = cache_name(type(model).forward)
    with torch.inference_mode():
        cache = model(torch.ones(batch, 64, dtype=torch.long, device=device), use_cache=True)[name]
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            model(torch.ones(batch, 1, dtype=torch.long, device=device), use_cache=True, **{name: cache})
            if device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return median(times[1:])


def bound(tokens: float, ahead: int, cost: float) -> float:
    """Most that a lookahead with so many tokens per pass of the teacher can gain over none."""
    return tokens * (1 + cost) / (1 + (ahead + 1) * cost)


def measure(
    teacher, student, shape: str, batch: int, tokens: int, rounds: int, threshold: float
) -> list[dict[str, Any]]:
    """One teacher and batch, all lookaheads."""
    device = teacher.device.type
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, SHAPES[shape][3], (batch, 64), generator=generator).tolist()
    cost = pass_seconds(student, batch, device) / pass_seconds(teacher, batch, device)
    found: dict[int, dict[str, list]] = {ahead: {"speed": [], "gain": [], "accepted": []} for ahead in LOOKAHEADS}
    for number in range(rounds):
        for ahead in LOOKAHEADS:
            config = RSDConfig(threshold, lookahead=ahead, draws=5, max_new_tokens=tokens, seed=number)
            if device != "cpu":
                torch.cuda.synchronize()
            start = time.perf_counter()
            traces = reverse_speculative_decode(teacher, student, prompts, config, NOWHERE)
            seconds = time.perf_counter() - start
            found[ahead]["speed"].append(batch * tokens / seconds)
            found[ahead]["accepted"].append(sum(t.acceptance for t in traces) / batch)
            found[ahead]["gain"].append(sum(len(t.completion_ids) for t in traces) / sum(t.rounds for t in traces))
    drafts = sum(found[1]["gain"]) / rounds - 1
    plain = median(found[0]["speed"])
    results = []
    for ahead, those in found.items():
        speed = median(those["speed"])
        gain = sum(those["gain"]) / rounds
        results.append(
            {"batch": batch, "teacher / student": 1 / cost, "proposals accepted": sum(those["accepted"]) / rounds,
             "drafts accepted": drafts, "lookahead": ahead, "tokens per second": speed, "over lookahead 0": speed / plain,
             "tokens per teacher pass": gain, "bound": bound(gain, ahead, cost), "all": those["speed"]}
        )  # fmt: skip
    return results


def plot(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "align"
    import matplotlib.pyplot as plt

    batches = sorted({row["batch"] for row in results})
    figure, axes = plt.subplots(1, len(batches), figsize=(8.4, 3.2), sharey=True, squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        groups: dict[int, list[dict]] = {}
        for row in results:
            if row["batch"] == batch:
                groups.setdefault(row["teacher layers"], []).append(row)
        best = sorted(
            (max(rows, key=lambda r: r["over lookahead 0"]) for rows in groups.values()),
            key=lambda r: r["teacher / student"],
        )
        most = sorted(
            (max(rows, key=lambda r: r["bound"]) for rows in groups.values()), key=lambda r: r["teacher / student"]
        )
        axis.plot(
            [r["teacher / student"] for r in best],
            [r["over lookahead 0"] for r in best],
            marker="o",
            label="best lookahead",
        )
        axis.plot(
            [r["teacher / student"] for r in most],
            [r["bound"] for r in most],
            marker=".",
            linestyle="--",
            label="bound",
        )
        axis.set(title=f"batch {batch}", xlabel="cost of a teacher's pass over a student's")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("tokens per second over lookahead 0")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main(
    shape: Annotated[str, typer.Option(help=f"Of {', '.join(SHAPES)}.")] = "cpu",
    layers: Annotated[list[int] | None, typer.Option(help="Of the teacher; may be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Traces at a time; may be repeated.")] = None,
    tokens: int = 96,
    rounds: int = 3,
    scale: Annotated[float, typer.Option(help="Of what the layers that the student lacks add, all together.")] = 0.3,
    threshold: Annotated[float, typer.Option(help="τ.")] = 0.01,
    sharpness: Annotated[float, typer.Option(help="Standard deviation of the logits.")] = 6.0,
    dtype: Annotated[str, typer.Option(help="Of both models' weights.")] = "bfloat16",
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot")] = None,
) -> None:
    """Measures all of them and prints the table."""
    device = "cuda" if shape == "cuda" else "cpu"
    hardware = torch.cuda.get_device_name() if device != "cpu" else f"{os.cpu_count()} CPU cores, {platform.machine()}"
    settings = {
        "hardware": hardware, "torch": torch.__version__, "shape": list(SHAPES[shape]), "dtype": dtype, "new tokens": tokens,
        "rounds": rounds, "scale": scale, "sharpness": sharpness, "threshold": threshold,
    }  # fmt: skip
    results: list[dict[str, Any]] = []
    if json_path and json_path.exists():
        before = json.loads(json_path.read_text())
        results = before.pop("results")
        if before != settings:
            raise SystemExit(f"{json_path} is of other settings ({before}); remove it or name another file")
    for count in layers or [6, 12, 24, 36]:
        models = None
        for size in batch or [1, 8]:
            if any((row["teacher layers"], row["batch"]) == (count, size) for row in results):
                continue
            models = models or make_models(shape, count, scale, sharpness, device, dtype)
            for row in measure(*models, shape, size, tokens, rounds, threshold):
                results.append({"teacher layers": count} | row)
                print({k: v for k, v in results[-1].items() if k != "all"}, flush=True)
            if json_path:
                json_path.parent.mkdir(parents=True, exist_ok=True)
                json_path.write_text(json.dumps(settings | {"results": results}, indent=2) + "\n")
    shown = [{k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items() if k != "all"} for row in results]
    print(markdown_table(shown))
    for count in sorted({row["teacher layers"] for row in results}):
        rows = [row for row in results if row["teacher layers"] == count]
        speed = {(row["batch"], row["lookahead"]): row["tokens per second"] for row in rows}
        sizes = sorted({size for size, _ in speed})
        for size in sizes[1:]:
            each = {ahead: speed[size, ahead] / speed[sizes[0], ahead] for ahead in LOOKAHEADS}
            best = max(speed[size, a] for a in LOOKAHEADS) / max(speed[sizes[0], a] for a in LOOKAHEADS)
            shown = ", ".join(f"{ratio:.1f} at lookahead {ahead}" for ahead, ratio in each.items())
            print(f"{count} layers, batch {size} over {sizes[0]}: {shown}; the best of each: {best:.1f}")
    if plot_path:
        plot(results, plot_path)


if __name__ == "__main__":
    typer.run(main)
