"""Not a test: trainings, and what comes before them, in which the last process fails, or all do. Launched by
test_rank_errors.py."""

import sys
import time
from pathlib import Path

from conftest import random_pairs
from datasets import Dataset, IterableDataset
from parallel_losses import build

from align import CDPOConfig, CDPOTrainer
from align.engines import EngineConfig, open_engine
from align.errors import AlignError, RecordError
from align.models import load_tokenizer
from align.processes import leave, process_state
from align.record_file import RecordFile
from align.sample import SampleConfig, sample_completions
from align.trainers.training import train_preference

MODEL = "data/tiny-arithmetic/model"
kind, out = sys.argv[1:]
COLUMNS = ("ce_scores",)


def last() -> bool:
    return process_state().process_index == process_state().num_processes - 1


def fails_in(trainer, name: str, error: Exception) -> None:
    """Lets a method of the trainer fail in its third call, in the last process."""
    method, calls = getattr(trainer, name), []

    def failing(*args, **kwargs):
        calls.append(name)
        if last() and len(calls) == 3:
            raise error
        return method(*args, **kwargs)

    setattr(trainer, name, failing)


def cdpo(train, **options):
    trained = build("cdpo", out, lora=True)
    return CDPOTrainer(
        trained.model, args=trained.args, train_dataset=train, processing_class=trained.processing_class, **options
    )


def collator() -> None:
    """A row that only the process sees that has it."""
    trainer = build("cdpo", out, lora=True, max_steps=6)
    fails_in(trainer, "data_collator", RecordError("row p7: bad"))
    trainer.train()


def stream() -> None:
    """Rows that the first process reads, for all; the others wait for its share."""
    rows = random_pairs(40, columns=COLUMNS)
    rows[10]["rejected_ce_scores"] = [0.5] * 99
    cdpo(IterableDataset.from_generator(lambda: iter(rows))).train()


def held_out() -> None:
    """A row that every process reads, in a data set that is checked while the others wait."""
    rows = random_pairs(8, columns=COLUMNS)
    rows[3]["rejected_ce_scores"] = [0.5] * 99
    cdpo(Dataset.from_list(random_pairs(16, columns=COLUMNS)), eval_dataset=Dataset.from_list(rows))


def constructor() -> None:
    held_out_args = CDPOConfig(out, use_cpu=True, bf16=False, report_to="none", max_length=1)
    trained = build("cdpo", out, lora=False)
    CDPOTrainer(trained.model, args=held_out_args, train_dataset=Dataset.from_list(random_pairs(4, columns=COLUMNS)),
                processing_class=trained.processing_class)  # fmt: skip


def places() -> None:
    """A row of the process that has it, found where BASH gathers the rows of all."""
    trainer = build("bash", out, lora=False)
    fails_in(trainer, "_places", RecordError("update 2: bad"))
    trainer.train()


def file() -> None:
    """Of one file, as of a folder that machines share no more, a process finds less than the others."""
    process_state()
    name = "damaged" if last() else "pairs"
    pairs = RecordFile(Path(out).parent / f"{name}.jsonl", "pair")
    train_preference("dpo", {"path": MODEL, "dtype": "float32"}, pairs, out, args={"max_steps": 2})


def waiting() -> None:
    """The others are where no connection that breaks can reach them."""
    process_state()
    if last():
        raise RecordError("row 1: bad")
    while True:
        time.sleep(1)


def engine() -> None:
    """The others have begun to draw."""
    dead = EngineConfig("server", server_url="http://127.0.0.1:9/v1")
    model = {"path": MODEL}
    tokenizer = load_tokenizer(MODEL)
    problems = [{"id": "a", "prompt": "1 + 1 = ", "answer": "2"}]
    with open_engine(dead if last() else EngineConfig(), model, tokenizer) as opened:
        sample_completions(opened, tokenizer, problems, out, SampleConfig(n=1, max_new_tokens=4))


def bug() -> None:
    trainer = build("cdpo", out, lora=True, max_steps=6)
    fails_in(trainer, "compute_loss", KeyError("a bug"))
    trainer.train()


if __name__ == "__main__":
    if kind in ("constructor", "bug"):  # as in a script that catches nothing
        globals()[kind]()
    else:
        try:
            globals()[kind]()
        except AlignError as error:
            leave(error)
