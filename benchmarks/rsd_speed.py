"""Tokens per second of reverse speculative decoding by lookahead, batch, and how much larger the teacher is.

    python benchmarks/rsd_speed.py --json rsd_speed.json --plot rsd_speed.svg
    python benchmarks/rsd_speed.py --shape 7b-0.6b --batch 1 --batch 8 --batch 32 --json rsd_speed_cuda.json

Random weights. In the Llama shapes the teacher is the student with layers behind it whose outputs are scaled down; in the Qwen shapes
(s1.1-7B's and Qwen3-0.6B's) the student's embedding and head are the first numbers of the teacher's, and what the layers add is
scaled until the two share so much of the mass on random text; of text of their own, which they get surer of, they share less. The
head is scaled up until a token has the certainty of text. Lookaheads
take turns; a figure is the median of the rounds. `bound`: what k tokens per pass of the teacher, as counted, allow where a pass of the
student costs c of the teacher's: k · (1 + c) / (1 + (γ + 1) c). It takes a pass over γ + 1 tokens to be as fast as one over one, and
everything beside the models to be free. On a GPU passes are CUDA graphs, recorded before the first round (those of one token even
before the `first batch`), and lookaheads 0 and 4 are measured without them as well. Every teacher and batch is written down as it is
done; started again, it goes on.
"""

import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen3Config

from align.decoding import Decoding, Policy, warp
from align.report import markdown_table
from align.rsd import RSDConfig, reverse_speculative_decode

#: Llama's shapes: width, of the feed-forward part, heads, vocabulary, layers of the student.
LLAMA = {"cpu": (1024, 2816, 16, 8192, 2), "tiny": (64, 128, 4, 512, 1)}
#: Qwen's, of teacher and student: width, of the feed-forward part, layers, heads, of keys and values, vocabulary.
QWEN = {
    "7b-0.6b": ((3584, 18944, 28, 28, 4, 152_064), (1024, 3072, 28, 16, 8, 151_936)),
    "tiny-qwen": ((96, 128, 3, 4, 2, 520), (32, 64, 2, 2, 1, 512)),
}
LOOKAHEADS = [0, 1, 2, 4, 6, 8]
#: Those that are measured without CUDA graphs, too.
UNRECORDED = [0, 4]
NOWHERE = -1  # no token ends a trace: all are of one length


def make_llamas(shape: str, layers: int, scale: float, sharpness: float, device: str, dtype: str):
    """A teacher of so many layers, and a student that is its first ones."""
    width, inner, heads, vocabulary, own = LLAMA[shape]
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
        scale_layers(teacher, scale, own)
    return teacher, student


def scale_layers(model: PreTrainedModel, scale: float, first: int = 0) -> None:
    """Scales what layers from `first` on add, all together."""
    layers = model.model.layers[first:]
    for layer in layers:
        layer.self_attn.o_proj.weight.mul_(scale / len(layers) ** 0.5)
        layer.mlp.down_proj.weight.mul_(scale / len(layers) ** 0.5)


def make_qwens(shape: str, shared: float, sharpness: float, device: str, dtype: str):
    """Two models of shapes of their own that agree about the next token as far as their layers let them; what these add is scaled
    until they share the mass asked for on random text."""
    models = []
    for kind, (width, inner, layers, heads, kv, vocabulary) in zip(
        (Qwen2Config, Qwen3Config), QWEN[shape], strict=True
    ):
        config = kind(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=8192, tie_word_embeddings=False,
        )  # fmt: skip
        torch.manual_seed(len(models))
        with torch.device(device):
            models.append(AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval())
    teacher, student = models
    known, common = student.config.hidden_size, student.config.vocab_size
    with torch.no_grad():
        student.model.embed_tokens.weight.normal_(0, 1.0)
        student.lm_head.weight.normal_(0, sharpness / known**0.5)
        for theirs, ours in (
            (teacher.model.embed_tokens, student.model.embed_tokens),
            (teacher.lm_head, student.lm_head),
        ):
            theirs.weight.zero_()
            theirs.weight[:common, :known] = ours.weight
        # As long a vector over more numbers is of less length each.
        teacher.model.norm.weight.fill_((known / teacher.config.hidden_size) ** 0.5)
        low, high, scale = 0.01, 3.0, 1.0
        for _ in range(10):
            middle = (low * high) ** 0.5
            for model in models:
                scale_layers(model, middle / scale * len(model.model.layers) ** 0.5)
            scale = middle
            low, high = (middle, high) if agreement(teacher, student) > shared else (low, middle)
    return teacher, student


def agreement(teacher: PreTrainedModel, student: PreTrainedModel) -> float:
    """The mass that p_T and p_S share, on average over positions of random text."""
    config, common = RSDConfig(), student.config.vocab_size
    ids = torch.randint(0, common, (4, 32), device=teacher.device)
    theirs, ours = (model(ids).logits[..., :common].float() for model in (teacher, student))
    warped = [
        warp(logits, temperature, config.top_p, config.top_k)
        for logits, temperature in ((theirs, config.teacher_temperature), (ours, config.student_temperature))
    ]
    return float(torch.minimum(*warped).sum(-1).detach().mean())


def now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def pass_seconds(policy: Policy, batch: int, repeats: int = 9) -> float:
    """Median seconds of decoding one token behind 64."""
    decoding, device = Decoding([policy], [[1] * 65] * batch), policy.device
    token, times = torch.ones(batch, 1, dtype=torch.long, device=device), []
    for _ in range(repeats):
        start = now(device.type)
        decoding.feed(0, token)
        times.append(now(device.type) - start)
    return median(times[1:])


def bound(tokens: float, ahead: int, cost: float) -> float:
    """Most that a lookahead with so many tokens per pass of the teacher can gain over none."""
    return tokens * (1 + cost) / (1 + (ahead + 1) * cost)


def measure(
    models: Sequence[PreTrainedModel], batch: int, tokens: int, rounds: int, threshold: float
) -> list[dict[str, Any]]:
    """One teacher and batch, all lookaheads."""
    device = models[0].device.type
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, models[1].config.vocab_size, (batch, 64), generator=generator).tolist()
    kinds = [(True, ahead) for ahead in LOOKAHEADS]
    if device != "cpu":
        kinds += [(False, ahead) for ahead in UNRECORDED]
    policies = {graphs: [Policy(model, cuda_graphs=graphs) for model in models] for graphs in (True, False)}
    passes = {graphs: [pass_seconds(policy, batch) for policy in those] for graphs, those in policies.items()}
    found: dict[tuple, dict[str, list]] = {kind: {"speed": [], "gain": [], "accepted": []} for kind in kinds}
    first: dict[tuple, float] = {}
    for number in range(-1 if device != "cpu" else 0, rounds):
        for kind in kinds:
            graphs, ahead = kind
            if not graphs and number < 0:
                continue  # nothing to record
            config = RSDConfig(threshold, lookahead=ahead, draws=5, max_new_tokens=tokens, seed=number)
            start = now(device)
            traces = reverse_speculative_decode(*policies[graphs], prompts, config, NOWHERE)
            seconds = now(device) - start
            if number < 0:
                first[kind] = seconds
                continue
            found[kind]["speed"].append(batch * tokens / seconds)
            found[kind]["accepted"].append(sum(t.acceptance for t in traces) / batch)
            found[kind]["gain"].append(sum(len(t.completion_ids) for t in traces) / sum(t.rounds for t in traces))
    drafts = sum(found[True, 1]["gain"]) / rounds - 1
    results = []
    for (graphs, ahead), those in found.items():
        speed, plain = median(those["speed"]), median(found[graphs, 0]["speed"])
        gain, (teacher, student) = sum(those["gain"]) / rounds, passes[graphs]
        row = {
            "batch": batch, "teacher pass, ms": 1e3 * teacher, "teacher / student": teacher / student, "proposals accepted": sum(those["accepted"]) / rounds,
            "drafts accepted": drafts, "lookahead": ahead, "tokens per second": speed, "over lookahead 0": speed / plain,
            "tokens per teacher pass": gain, "bound": bound(gain, ahead, student / teacher), "all": those["speed"],
        }  # fmt: skip
        if device != "cpu":
            row |= {"cuda graphs": graphs, "first batch, seconds": first.get((graphs, ahead)), "peak GB": peak()}
        results.append(row)
    return results


def peak() -> float:
    return torch.cuda.max_memory_allocated() / 1e9


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
    shape: Annotated[str, typer.Option(help=f"Of {', '.join([*LLAMA, *QWEN])}.")] = "cpu",
    layers: Annotated[list[int] | None, typer.Option(help="Of a Llama teacher; may be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Traces at a time; may be repeated.")] = None,
    tokens: int = 96,
    rounds: int = 3,
    scale: Annotated[float, typer.Option(help="Of what a Llama teacher's own layers add, all together.")] = 0.3,
    shared: Annotated[float, typer.Option(help="Mass on random text that Qwen's shapes are scaled to share.")] = 0.88,
    threshold: Annotated[float, typer.Option(help="τ.")] = 0.01,
    sharpness: Annotated[float, typer.Option(help="Standard deviation of the logits.")] = 6.0,
    dtype: Annotated[str, typer.Option(help="Of both models' weights.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="By default a GPU for shape 7b-0.6b.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot")] = None,
) -> None:
    """Measures all of them and prints the table."""
    device = device or ("cuda" if shape == "7b-0.6b" else "cpu")
    hardware = torch.cuda.get_device_name() if device != "cpu" else f"{os.cpu_count()} CPU cores, {platform.machine()}"
    settings = {
        "hardware": hardware, "torch": torch.__version__, "shape": [list(s) if isinstance(s, tuple) else s for s in (LLAMA | QWEN)[shape]],
        "dtype": dtype, "new tokens": tokens, "rounds": rounds, **({"scale": scale} if shape in LLAMA else {"shared": shared}), "sharpness": sharpness,
        "threshold": threshold,
    }  # fmt: skip
    results: list[dict[str, Any]] = []
    if json_path and json_path.exists():
        before = json.loads(json_path.read_text())
        results = before.pop("results")
        if before != settings:
            raise SystemExit(f"{json_path} is of other settings ({before}); remove it or name another file")
    for count in (layers or [6, 12, 24, 36]) if shape in LLAMA else [QWEN[shape][0][2]]:
        models = None
        for size in batch or [1, 8]:
            if any((row["teacher layers"], row["batch"]) == (count, size) for row in results):
                continue
            if models is None and shape in LLAMA:
                models = make_llamas(shape, count, scale, sharpness, device, dtype)
            elif models is None:
                models = make_qwens(shape, shared, sharpness, device, dtype)
            for row in measure(models, size, tokens, rounds, threshold):
                results.append({"teacher layers": count} | row)
                print({k: v for k, v in results[-1].items() if k != "all"}, flush=True)
            if json_path:
                json_path.parent.mkdir(parents=True, exist_ok=True)
                json_path.write_text(json.dumps(settings | {"results": results}, indent=2) + "\n")
    shown = [{k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items() if k != "all"} for row in results]
    print(markdown_table(shown))
    for count in sorted({row["teacher layers"] for row in results}):
        rows = [row for row in results if row["teacher layers"] == count and row.get("cuda graphs", True)]
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
