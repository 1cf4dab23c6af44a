"""Makes the embedded default from nothing: tokenizer, problems, and a base model trained on demonstrations.

python recipes/make_tiny.py --out data/tiny-arithmetic
"""

import random
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import trange
from transformers import LlamaForCausalLM, get_cosine_schedule_with_warmup

from align.records import write_records
from align.sample import SampleConfig, generate
from align.tiny import (
    build_config,
    build_tokenizer,
    draw_demonstration,
    first_error,
    make_problems,
    miscalculations,
    restyle,
)
from align.tokens import add_eos, pad_rows


def train_base(tokenizer, steps: int, batch_size: int, learning_rate: float, seed: int) -> LlamaForCausalLM:
    """Trains the base on freshly drawn demonstrations, prompt and solution."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = LlamaForCausalLM(build_config(len(tokenizer)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    for step in (bar := trange(steps, desc="base model", mininterval=5)):
        texts = ["".join(draw_demonstration(rng)) for _ in range(batch_size)]
        rows = [add_eos(ids, tokenizer.eos_token_id) for ids in tokenizer(texts)["input_ids"]]
        labels = pad_rows(rows, -100)
        loss = model(input_ids=pad_rows(rows, tokenizer.pad_token_id), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def examine(model, tokenizer, problems: list[dict]) -> dict[str, float]:
    """Share of sampled solutions that are right, and of those with a wrong calculation."""
    prompts = tokenizer([problem["prompt"] for problem in problems])["input_ids"]
    drawn = generate(model, tokenizer, prompts, SampleConfig(max_new_tokens=80), seed=0)
    right = miscalculated = 0
    for problem, [(ids, _)] in zip(problems, drawn, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        solution = add_eos(tokenizer(problem["solution"])["input_ids"], tokenizer.eos_token_id)
        right += first_error(ids, solution) is None
        miscalculated += miscalculations(text) > 0
    return {"accuracy": right / len(problems), "miscalculated": miscalculated / len(problems)}


def main(
    out: Annotated[Path, typer.Option(help="Folder for model/, train.jsonl and test.jsonl.")],
    seed: int = 0,
    train_problems: int = 3000,
    test_problems: int = 1000,
    steps: int = 1400,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
) -> None:
    """Makes the embedded task; about ten minutes on two CPU cores."""
    tokenizer = build_tokenizer()
    write_records(out / "train.jsonl", make_problems(train_problems, seed, "train"))
    rng = random.Random(seed)
    teacher = [
        {**row, "solution": restyle(row["solution"], rng)} for row in make_problems(train_problems, seed, "train")
    ]
    write_records(out / "teacher.jsonl", teacher)
    test = make_problems(test_problems, seed, "test")
    write_records(out / "test.jsonl", test)
    model = train_base(tokenizer, steps, batch_size, learning_rate, seed)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    found = examine(model, tokenizer, test)
    print(f"sampled solutions right: {found['accuracy']:.1%}; with a wrong calculation: {found['miscalculated']:.1%}")


if __name__ == "__main__":
    typer.run(main)
