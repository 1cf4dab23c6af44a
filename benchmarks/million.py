"""Memory and time of a pair file that does not fit into memory: scoring from end to end, and setting a training up to its
first step, each in a process of its own.

    python benchmarks/million.py --json benchmarks/results/million.json

Peak memory is what the kernel says of the child (`ru_maxrss`, pages of memory-mapped files included), and what of it was
the process's own (`RssAnon`, sampled): the system takes pages of files back when it needs them. Time is the CPU's, in one
thread where OMP_NUM_THREADS=1. The models are made on the spot and tiny, so that it is that of the rows.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated

import numpy
import typer

VOCABULARY = 100


def write_pairs(path: Path, rows: int, prompt: int, completion: int, columns: tuple[str, ...]) -> None:
    """Pairs of random ids, lengths uniform between half and one and a half times `prompt` and `completion`."""
    rng = numpy.random.default_rng(0)

    def lengths(mean: int) -> list[int]:
        return rng.integers(max(1, mean // 2), mean + mean // 2, rows, endpoint=True).tolist()

    prompts, sides = lengths(prompt), {side: lengths(completion) for side in ("chosen", "rejected")}
    with open(path, "w", encoding="utf-8") as file:
        for index in range(rows):
            row = {"id": f"pair-{index}", "prompt": "p", "chosen": "c", "rejected": "r"}
            row["prompt_ids"] = rng.integers(3, VOCABULARY, prompts[index]).tolist()
            for side in ("chosen", "rejected"):
                length = sides[side][index]
                row[f"{side}_ids"] = rng.integers(3, VOCABULARY, length).tolist()
                for column in columns:
                    scale = -3e-6 if column == "ref_logps" else 1e-6
                    row[f"{side}_{column}"] = (rng.integers(1, 10**6, length) * scale).tolist()
            file.write(json.dumps(row) + "\n")


def make_model(folder: Path) -> None:
    """A model of one layer of width 8, and a tokenizer of as many tokens."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<eos>": 0, **{f"t{i}": i for i in range(1, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t1"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=4096, eos_token_id=0, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


class Stopwatch:
    """CPU seconds and the process's own memory, from stage to stage."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self.own = 0
        self._last = time.process_time()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            self.own = max(self.own, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))
            time.sleep(0.05)

    def lap(self, name: str) -> None:
        now = time.process_time()
        self.stages[name], self._last = round(now - self._last, 2), now

    def report(self) -> dict[str, object]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak_mib": round(peak / 1024), "own_mib": round(self.own / 1024), "cpu_seconds": self.stages}


def score(folder: Path, pairs: Path, out: Path) -> dict[str, object]:
    """`align score reference`, as the command does it."""
    watch = Stopwatch()
    from align import RecordFile, load_model, load_tokenizer, score_reference
    from align.stages import records_hash

    model, tokenizer = load_model(str(folder), dtype="float32"), load_tokenizer(str(folder))
    watch.lap("start")
    rows = RecordFile(pairs, "pair")
    watch.lap("open and check")
    records_hash(rows)
    watch.lap("hash")
    counts = score_reference(model, rows, out, pad_token_id=tokenizer.pad_token_id, max_tokens_per_batch=4096)
    watch.lap("score and merge")
    return {**watch.report(), "counts": counts}


class _FirstStep(Exception):
    """The first step has been taken."""


def train(method: str, folder: Path, pairs: Path, out: Path, max_tokens: int | None) -> dict[str, object]:
    """`train_preference` up to the end of its first step."""
    watch = Stopwatch()
    from align import RecordFile, train_preference
    from align.trainers.preflight import Preflight

    watch.lap("start")
    rows = RecordFile(pairs, "pair")
    watch.lap("open and check")
    preflight, step = Preflight.run_preflight, Preflight.training_step

    def first_step(self, *args, **kwargs):
        step(self, *args, **kwargs)
        watch.lap("first step")
        raise _FirstStep

    def before_it(self):
        watch.lap("set up")
        preflight(self)
        watch.lap("preflight")
        Preflight.training_step = first_step

    Preflight.run_preflight = before_it
    args = {
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "max_tokens_per_batch": max_tokens,
        "check_reference": True,
    }
    try:
        train_preference(method, {"path": str(folder), "dtype": "float32"}, rows, out, args=args, lora={"r": 2})
    except _FirstStep:
        return watch.report()
    raise AssertionError("no step was taken")


def in_a_child(*arguments: object) -> dict[str, object]:
    """The report of this file, called with these arguments, in a process of its own."""
    command = [sys.executable, __file__, *map(str, arguments)]
    found = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    return json.loads(found.stdout.splitlines()[-1])


def main(
    folder: Annotated[Path, typer.Option(help="Where the files go; they take tens of gigabytes.")] = Path(
        "runs/million"
    ),
    rows: int = 1_000_000,
    prompt: Annotated[int, typer.Option(help="Mean tokens of a prompt.")] = 60,
    completion: Annotated[int, typer.Option(help="Mean tokens of a completion.")] = 100,
    score_prompt: Annotated[int, typer.Option(help="Mean tokens of a prompt in the file that is scored.")] = 60,
    score_completion: Annotated[int, typer.Option(help="Mean tokens of a completion there.")] = 100,
    only: Annotated[list[str] | None, typer.Option(help="score, cdpo, tgdpo; may be repeated.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    wanted = only or ["score", "cdpo", "tgdpo"]
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model"
    if not model.exists():
        make_model(model)
    results = {"rows": rows, "runs": {}}
    if json_path is not None and json_path.exists():
        known = json.loads(json_path.read_text())
        results["runs"] = known["runs"] if known["rows"] == rows else {}
    for name in wanted:
        lengths = (score_prompt, score_completion) if name == "score" else (prompt, completion)
        columns = {"score": (), "cdpo": ("ce_scores", "ref_logps"), "tgdpo": ("guidance_logratios", "ref_logps")}[name]
        pairs = folder / f"{name}.jsonl"
        write_pairs(pairs, rows, *lengths, columns)
        found = in_a_child("--child", name, model, pairs, folder / f"{name}-out")
        found |= {"mean_tokens": lengths, "file_mib": round(pairs.stat().st_size / 2**20)}
        pairs.unlink()
        results["runs"][name] = found
        print(f"{name}: {json.dumps(found)}", flush=True)
        if json_path is not None:
            json_path.write_text(json.dumps(results, indent=2) + "\n")


def child(name: str, model: str, pairs: str, out: str) -> None:
    paths = Path(model), Path(pairs)
    found = score(*paths, Path(f"{out}.jsonl")) if name == "score" else train(name, *paths, Path(out), 4096)
    print(json.dumps(found))


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else typer.run(main)
