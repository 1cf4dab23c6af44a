"""Contrastive scores against the ground truth of rollouts on the embedded task: agreement, and what each costs.

    python benchmarks/critical_tokens.py --run runs/tiny-arithmetic --json benchmarks/results/critical_tokens.json

`--run` is the folder of a finished `make quickstart`. Cost is counted in tokens that a model is fed; training the two
contrastive models counts three times its tokens, for the backward pass.
"""

import json
import os
import platform
import time
from pathlib import Path
from typing import Annotated

import typer

from align.models import load_model, load_tokenizer
from align.records import read_records
from align.report import markdown_table
from align.sample import SampleConfig, generate
from align.scoring.rollout import RolloutConfig, roll_out
from align.tiny import mark_first_errors
from align.verify import verify_completion

MODEL = "data/tiny-arithmetic/model"


def fed(rows: list[dict], *columns: str) -> int:
    return sum(len(row[column]) for row in rows for column in columns)


def independent(model, tokenizer, pairs: list[dict], n: int) -> tuple[int, float]:
    """n continuations of every prefix, each computed from the prompt on: tokens fed, and seconds."""
    prompts = [
        ([*pair["prompt_ids"], *pair["rejected_ids"][:t]], pair)
        for pair in pairs
        for t in range(len(pair["rejected_ids"]))
    ]
    prompts.sort(key=lambda item: len(item[0]))
    start, tokens = time.perf_counter(), 0
    for first in range(0, len(prompts), 64):
        batch = prompts[first : first + 64]
        config = SampleConfig(n=n, max_new_tokens=80)
        for (ids, pair), drawn in zip(
            batch, generate(model, tokenizer, [p for p, _ in batch], config, first), strict=True
        ):
            tokens += sum(len(ids) + len(found) - 1 for found, _ in drawn)
            for found, _ in drawn:
                verify_completion(tokenizer.decode(found), pair["answer"])
    return tokens, time.perf_counter() - start


def main(
    run: Annotated[Path, typer.Option(help="Folder of a finished run of the embedded recipe.")] = Path(
        "runs/tiny-arithmetic"
    ),
    n: Annotated[int, typer.Option(help="Continuations per position.")] = 64,
    limit: Annotated[int, typer.Option(help="Pairs.")] = 300,
    few: Annotated[int, typer.Option(help="Pairs whose independent continuations are really drawn.")] = 10,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Rolls out, compares, and prints two tables."""
    model, tokenizer = load_model(MODEL, dtype="float32"), load_tokenizer(MODEL)
    pairs = read_records(run / "scored.jsonl", "pair")[:limit]
    mark_first_errors(pairs, tokenizer)
    rows = [(pair["prompt_ids"], pair["rejected_ids"]) for pair in pairs]
    answers = [pair["answer"] for pair in pairs]
    seconds, rollouts = {}, {}
    for search in ("all", "bisection"):
        config, start, rollouts[search] = (
            RolloutConfig(n=n, search=search, max_new_tokens=80, batch_size=512),
            time.perf_counter(),
            [],
        )
        for first in range(0, len(rows), 20):
            part = slice(first, first + 20)
            rollouts[search] += roll_out(model, tokenizer, rows[part], answers[part], config, seed=first)
        seconds[search] = time.perf_counter() - start
        print(f"{search}: {seconds[search]:.0f} s", flush=True)
    truth = [(pair, r) for pair, r in zip(pairs, rollouts["all"], strict=True) if r.critical is not None]

    def share(point) -> float:
        return sum(point(pair) == r.critical for pair, r in truth) / len(truth)

    def lowest(pair: dict) -> int:
        return min(range(len(pair["rejected_ids"])), key=pair["rejected_ce_scores"].__getitem__)

    halves = [
        b.critical == r.critical
        for r, b in zip(rollouts["all"], rollouts["bisection"], strict=True)
        if r.critical is not None
    ]
    first_below = lambda pair: next((t for t, s in enumerate(pair["rejected_ce_scores"]) if s < 0.5), None)  # noqa: E731
    trained = sum(
        fed(read_records(run / f"{side}.jsonl"), "prompt_ids", "completion_ids") for side in ("positive", "negative")
    )
    everything = read_records(run / "scored.jsonl")
    contrastive = 2 * fed(pairs, "prompt_ids", "rejected_ids")
    # Training serves all pairs of the run; its cost is shared out evenly.
    training = 3 * 2 * trained * len(pairs) / len(everything)
    few_pairs = pairs[:few]
    real_tokens, real_seconds = independent(model, tokenizer, few_pairs, 8)
    config, start = RolloutConfig(n=8, max_new_tokens=80, batch_size=512), time.perf_counter()
    shared_few = roll_out(model, tokenizer, rows[:few], answers[:few], config)
    shared_seconds = time.perf_counter() - start
    cost = {name: sum(r.forward_tokens for r in those) for name, those in rollouts.items()}
    naive = {name: sum(r.independent_tokens for r in those) for name, those in rollouts.items()}
    result = {
        "pairs": len(pairs), "continuations per position": n, "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "rejected solutions with a critical token": len(truth),
        "critical token is: the lowest contrastive score": share(lowest),
        "critical token is: the first contrastive score under 0.5": share(first_below),
        "critical token is: the first error": share(lambda pair: pair["first_error"]),
        "critical token is: what bisection finds": sum(halves) / len(halves),
        "forward tokens per pair": {
            "contrastive, scoring": contrastive / len(pairs), "contrastive, its share of training": training / len(pairs),
            "rollouts, every position": cost["all"] / len(pairs), "rollouts, every position, independent": naive["all"] / len(pairs),
            "rollouts, bisection": cost["bisection"] / len(pairs), "rollouts, bisection, independent": naive["bisection"] / len(pairs),
        },
        "seconds": {"rollouts, every position": seconds["all"], "rollouts, bisection": seconds["bisection"]},
        "really drawn, n = 8": {
            "pairs": few, "independent tokens": real_tokens, "independent seconds": real_seconds,
            "shared tokens": sum(r.forward_tokens for r in shared_few), "shared seconds": shared_seconds,
            "independent tokens, as counted from shared draws": sum(r.independent_tokens for r in shared_few),
        },
    }  # fmt: skip
    shares = [
        {"critical token is": k.split(": ")[1], "%": f"{100 * v:.1f}"}
        for k, v in result.items()
        if k.startswith("critical token is")
    ]
    print(markdown_table(shares))
    print(
        markdown_table(
            [{"forward tokens per pair": k, "": f"{v:,.0f}"} for k, v in result["forward tokens per pair"].items()]
        )
    )
    print(json.dumps(result["really drawn, n = 8"], indent=1))
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
