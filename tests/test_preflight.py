"""The longest batch before the first step: which it is, what is reported, what is left of it (nothing), and what it finds."""

import json
import random
from dataclasses import fields
from pathlib import Path

import numpy
import pytest
import torch
from conftest import byte_level_tokenizer, random_pairs, tiny_llama
from datasets import Dataset
from peft import LoraConfig
from test_parallel import ROOT, TESTS, launch
from test_self_generated import make
from test_token_dpo import LORA, options
from transformers import AutoModelForCausalLM, TrainerCallback

from align import CDPOConfig, CDPOTrainer
from align.errors import AlignError, DeviceMemoryError, NonFiniteError
from align.run_folder import read_run
from align.run_report import inspect_run
from align.tokens import truncate
from align.trainers.longest import fullest_pass, pair_sizes
from align.trainers.memory import optimizer_states
from align.trainers.prefix_sharing import PaddedRows, PrefixSharing
from align.trainers.training import train_preference

PAIRS = random_pairs(24, columns=("ce_scores",))
#: transformers 5.16 and 5.17 know the setting by its old name.
NEW_NAME = "activation_checkpointing" in {field.name for field in fields(CDPOConfig)}
CHECKPOINTING = "activation_checkpointing" if NEW_NAME else "gradient_checkpointing"


def trainer_of(tmp_path, tokenizer, pairs=PAIRS, lora=True, model=None, dropout=0.0, **settings):
    torch.manual_seed(1)  # of the adapter, which TRL seeds since 1.15
    return CDPOTrainer(
        model or tiny_llama(), args=CDPOConfig(**options(tmp_path, max_steps=4) | settings), processing_class=tokenizer,
        train_dataset=Dataset.from_list(pairs), peft_config=LoraConfig(**LORA, lora_dropout=dropout) if lora else None,
    )  # fmt: skip


def watched(trainer) -> list[dict]:
    """Inputs, and what holds then, of every `training_step`."""
    seen, step = [], trainer.training_step

    def training_step(model, inputs, *args, **kwargs):
        there = sum(p.grad is not None for p in trainer.model.parameters())
        seen.append({"ids": inputs["input_ids"].clone(), "grads": there, "mask": inputs["attention_mask"].clone()})
        loss = step(model, inputs, *args, **kwargs)
        seen[-1]["training"] = trainer.model.training
        return loss

    trainer.training_step = training_step
    return seen


def real_rows(step: dict) -> list[list[int]]:
    return [row[mask.bool()].tolist() for row, mask in zip(step["ids"], step["mask"], strict=True)]


def report_of(trainer) -> dict:
    return json.loads((Path(trainer.args.output_dir) / "preflight.json").read_text())


def longest(pairs, size, count):
    return sorted(pairs, key=lambda pair: -size(pair))[:count]


def lengths(pair, most=512):
    return [min(len(pair["prompt_ids"]) + len(pair[f"{side}_ids"]), most) for side in ("chosen", "rejected")]


@pytest.mark.parametrize("shares, most", [(True, 512), (False, 512), (False, 14)])
def test_the_longest_batch_comes_first_and_is_counted(tmp_path, tokenizer, shares, most):
    def size(pair):  # a slot per token that predicts another, the prompt's, but for its last, once
        once = len(pair["prompt_ids"]) - 1
        return sum(lengths(pair, most)) - 2 - once if shares else max(lengths(pair, most))

    pairs = [pair for pair in PAIRS if len(pair["prompt_ids"]) < most]
    trainer = trainer_of(
        tmp_path, tokenizer, pairs, per_device_train_batch_size=3, prefix_sharing=shares, max_length=most
    )
    seen = watched(trainer)
    trainer.train()
    assert trainer._layout.shares == shares and len(seen) == 5  # and four steps
    first = longest(pairs, size, 3)
    assert real_rows(seen[0]) == [
        (pair["prompt_ids"] + pair[f"{side}_ids"])[:most] for side in ("chosen", "rejected") for pair in first
    ]
    report = report_of(trainer)
    (batch,) = report["batches"]
    assert batch["rows"] == [{"id": pair["id"], "tokens": lengths(pair, most)} for pair in first]
    assert batch["tokens"] == sum(sum(lengths(pair, most)) for pair in first) == int(seen[0]["mask"].sum())
    assert report["step"] == 1 and report["processes"] == 1 and report["seconds"] > 0 and not report["accumulated"]
    states = sum(2 * 4 * p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert report["optimizer_states"] == states  # AdamW's two, in float32


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("most", [None, 16])
def test_sizes_are_those_of_the_layouts(mode, most):
    pairs = [p for p in random_pairs(64, seed=3) if mode == "keep_end" or most is None or len(p["prompt_ids"]) < most]
    for pair in pairs[::3]:  # cut by the same number
        pair["rejected_ids"] = pair["chosen_ids"][::-1]
    found = {f"{n}_ids": numpy.array([len(p[f"{n}_ids"]) for p in pairs]) for n in ("prompt", "chosen", "rejected")}
    for layout in (PaddedRows(), PrefixSharing(tiny_llama())):
        sizes = []
        for pair in pairs:
            rows = [truncate(pair["prompt_ids"] + pair[f"{s}_ids"], most, mode) for s in ("chosen", "rejected")]
            # What is left of the prompt in both, since a layout goes by the labels.
            left = min(len(row) - len(pair[f"{s}_ids"]) for s, row in zip(("chosen", "rejected"), rows, strict=True))
            sizes.append(layout.size(*rows, len(pair["prompt_ids"]) if mode == "keep_start" else max(left, 0)))
        assert pair_sizes(found, most, mode, layout.shares).tolist() == sizes


def test_a_pass_that_is_fuller_than_the_longest_pairs_is_tried_too(tmp_path, tokenizer):
    """Of two tokens each, thirty: one such pair leaves the budget of 50 half empty, three pairs of 16 do not."""
    assert fullest_pass([30, 30, 16, 16, 16, 2], 4, 50, sum) == (2, 6)
    assert fullest_pass([70, 30, 16, 16, 16, 2], 4, 50, sum) == (0, 1)
    assert fullest_pass([30, 30, 16, 16, 16, 2], 2, 50, sum) == (1, 3)
    pairs = [
        {"id": f"p{i}", "prompt_ids": [5], "chosen_ids": [6] * length, "rejected_ids": [7] * length}
        | {f"{side}_ce_scores": [0.5] * length for side in ("chosen", "rejected")}
        for i, length in enumerate([5, 14, 7, 14, 7, 7])
    ]
    trainer = trainer_of(
        tmp_path, tokenizer, pairs, per_device_train_batch_size=3, prefix_sharing=False, max_tokens_per_batch=50
    )
    trainer.train()
    batches = report_of(trainer)["batches"]
    assert [[row["id"] for row in batch["rows"]] for batch in batches] == [["p1", "p3", "p2"], ["p2", "p4", "p5"]]


class Watch(TrainerCallback):
    """Random numbers at every step's beginning, and the optimizer's states at the end."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.append((random.random(), numpy.random.random(), torch.rand(1).item()))

    def on_train_end(self, args, state, control, optimizer, **kwargs):
        self.states = [
            value.clone()
            for one in optimizer.state.values()
            for value in one.values()
            if isinstance(value, torch.Tensor)
        ]


def run(tmp_path, tokenizer, model_dir, preflight, **settings):
    torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    # Numbers that a forward pass moves.
    model.model.norm.register_buffer("steps", torch.zeros(1))

    def count(module, *_):
        module.steps.add_(int(module.training))

    model.model.norm.register_forward_hook(count)
    trainer = trainer_of(tmp_path / str(preflight), tokenizer, model=model, preflight=preflight, **settings)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    assert (tmp_path / str(preflight) / "preflight.json").exists() == preflight
    kept = [
        {k: v for k, v in e.items() if "_second" not in k and "runtime" not in k} for e in trainer.state.log_history
    ]
    found = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
    return kept, found, watch, trainer


@pytest.mark.parametrize(
    "settings",
    [
        {"dropout": 0.5, "disable_dropout": False},
        {"dropout": 0.5, "disable_dropout": False, "gradient_accumulation_steps": 2},
        {"max_tokens_per_batch": 30, "dropout": 0.5, "disable_dropout": False},
        {"lora": False, "max_tokens_per_batch": 30, "gradient_accumulation_steps": 2},
        {"lora": False, "precompute_ref_log_probs": True, "cache_reference": False, "logging_steps": 2},
    ],
    ids=str,
)
def test_the_training_is_what_it_is_without(tmp_path, tokenizer, model_dir, settings):
    """To the last bit: everything logged, weights, buffers, random numbers and the optimizer's states."""
    (logs, weights, watch, trainer), (plain_logs, plain_weights, plain_watch, _) = (
        run(tmp_path, tokenizer, model_dir, preflight, **settings) for preflight in (True, False)
    )
    assert logs == plain_logs and len(logs) > 2
    assert weights.keys() == plain_weights.keys()
    assert all(torch.equal(value, plain_weights[name]) for name, value in weights.items())
    assert watch.seen == plain_watch.seen and len(watch.seen) == 4
    assert len(watch.states) > 4
    assert all(torch.equal(*states) for states in zip(watch.states, plain_watch.states, strict=True))
    assert "gather" not in vars(trainer.accelerator)


def test_nothing_of_it_is_there_at_the_first_step(tmp_path, tokenizer):
    """Accumulated gradients are there in its second pass, and gone at the first step."""
    trainer = trainer_of(tmp_path, tokenizer, gradient_accumulation_steps=3, max_steps=1)
    trainer.model.eval()
    found = {}

    class Look(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            found["grads"] = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            found["metrics"] = dict(trainer._metrics["train"]), trainer._total_train_tokens
            found["update"], found["training"] = list(trainer._update), trainer.model.training
            found["divisor"] = vars(trainer).get("current_gradient_accumulation_steps")

    trainer.add_callback(Look())
    seen = watched(trainer)
    trainer.train()
    assert found == {"grads": [], "metrics": ({}, 0), "update": [], "training": False, "divisor": None}
    trained = sum(p.requires_grad for p in trainer.model.parameters())
    assert [step["grads"] for step in seen] == [0, trained, 0, trained, trained]
    assert all(step["training"] for step in seen)
    assert report_of(trainer)["accumulated"]


def failing(trainer, error, longer):
    """Lets the model fail at rows of more tokens, whatever their layout."""
    embeddings = trainer.accelerator.unwrap_model(trainer.model).get_input_embeddings()

    def fail(module, args):
        if args[0].numel() > longer:
            raise error

    embeddings.register_forward_pre_hook(fail)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried 8 bytes."),
        MemoryError("no more"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, tokenizer, error):
    trainer = trainer_of(tmp_path, tokenizer, prefix_sharing=False)
    failing(trainer, error, 1)
    with pytest.raises(DeviceMemoryError, match="preflight, before step 1: the longest batch does not fit") as caught:
        trainer.train()
    assert isinstance(caught.value, AlignError) and caught.value.__context__ is None
    message = str(caught.value)
    for pair in longest(PAIRS, lambda pair: max(lengths(pair)), 4):
        assert f"{pair['id']} ({' + '.join(map(str, lengths(pair)))} tokens)" in message
    assert str(error)[:30] in message and trainer.state.global_step == 0
    words = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "max_tokens_per_batch")
    assert all(word in message for word in (*words, f"{CHECKPOINTING}=True"))
    assert all(p.grad is None for p in trainer.model.parameters()) and not trainer._metrics["train"]


def test_remedies_are_those_that_are_left(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, per_device_train_batch_size=1, **{CHECKPOINTING: True})
    failing(trainer, MemoryError("no more"), 1)
    with pytest.raises(DeviceMemoryError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.endswith(f"Lower max_length below {max(lengths(longest(PAIRS, lambda p: sum(lengths(p)) - len(p['prompt_ids']), 1)[0]))}")  # fmt: skip


def test_other_errors_are_not_taken_for_it(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer)
    failing(trainer, RuntimeError("a bug"), 1)
    with pytest.raises(RuntimeError, match="a bug"):
        trainer.train()


def test_a_smaller_batch_is_looked_for_where_that_is_asked_for(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, auto_find_batch_size=True, prefix_sharing=False, max_steps=2)
    failing(trainer, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), 100)
    trainer.train()
    assert trainer._train_batch_size < 4 and trainer.state.global_step == 2
    assert len(report_of(trainer)["batches"][0]["rows"]) == trainer._train_batch_size


def test_a_loss_that_is_not_finite_is_found(tmp_path, tokenizer):
    first = longest(PAIRS, lambda pair: max(lengths(pair)), 4)
    trainer = trainer_of(tmp_path, tokenizer, prefix_sharing=False)
    step = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: step(*args, **kwargs) * float("nan")
    with pytest.raises(NonFiniteError, match="^preflight, before step 1: not finite: losses nan") as caught:
        trainer.train()
    assert all(pair["id"] in str(caught.value) for pair in first)
    (process,) = json.loads((tmp_path / "non_finite.json").read_text())["processes"]
    assert {name for row in process["micro_batches"][0]["rows"] for name in row["ids"]} == {p["id"] for p in first}
    assert trainer._update == [] and all(p.grad is None for p in trainer.model.parameters())


def test_a_resumed_training_has_one_too_and_goes_on_as_if_not(tmp_path, tokenizer, model_dir):
    ends = []
    for preflight in (True, False):
        out = tmp_path / str(preflight)
        for steps, resume in ((2, None), (4, True)):
            trainer = trainer_of(
                out, tokenizer, model=AutoModelForCausalLM.from_pretrained(model_dir), dropout=0.5, disable_dropout=False,
                max_steps=steps, preflight=preflight, save_strategy="steps", save_steps=2,
            )  # fmt: skip
            seen = watched(trainer)
            trainer.train(resume_from_checkpoint=resume)
            assert len(seen) == 2 + preflight
            if preflight:
                report = report_of(trainer)
                assert report["step"] == steps - 1 and (report["optimizer_states"] == 0) == bool(resume)
        ends.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        (out / "preflight.json").unlink(missing_ok=True)
        trainer.run_preflight()
        assert not (out / "preflight.json").exists()  # nothing is left to train
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_states_of_optimizers():
    weight = torch.nn.Parameter(torch.zeros(3, 5, dtype=torch.bfloat16))
    frozen = torch.nn.Parameter(torch.zeros(9), requires_grad=False)
    for made, states in (
        (torch.optim.AdamW([weight, frozen]), 2), (torch.optim.Adam([weight], amsgrad=True), 3),
        (torch.optim.SGD([weight]), 0), (torch.optim.SGD([weight], momentum=0.9), 1),
    ):  # fmt: skip
        assert sum(optimizer_states(made).values()) == states * 2 * 15
    assert optimizer_states(torch.optim.Adagrad([weight])) is None


@pytest.mark.parametrize("kind", ["bash", "rac"])
def test_contexts_are_as_long_as_they_can_get(tmp_path, tokenizer, kind):
    """And drawn as they are without: they hang on update and place, and so does what is learned."""
    ends = []
    for preflight in (True, False):
        trainer = make(kind, tmp_path / str(preflight), tokenizer, lora=True, preflight=preflight, max_steps=4)
        seen = watched(trainer)
        trainer.train()
        ends.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        if preflight:
            first, report = seen[0], report_of(trainer)
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    data = list(trainer.train_dataset)
    order = sorted(range(len(data)), key=lambda i: -len(data[i]["input_ids"]))[:3]
    more = 6 + len(tokenizer(" no:", add_special_tokens=False)["input_ids"]) if kind == "rac" else 0
    wanted = [{"id": f"row {i}", "tokens": [len(data[i]["input_ids"]) + more]} for i in order]
    assert report["batches"] == [{"rows": wanted, "tokens": sum(row["tokens"][0] for row in wanted)}]
    assert [len(row) for row in real_rows(first)] == [row["tokens"][0] for row in wanted]
    if kind == "bash":
        assert real_rows(first) == [data[i]["input_ids"] for i in order]


def test_where_it_cannot_be_done_that_is_said(tmp_path, tokenizer):
    stream = Dataset.from_list(PAIRS).to_iterable_dataset()
    rope = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    for name, model, data, settings, words in (
        ("stream", tiny_llama(), stream, {}, "which rows of a stream"),
        ("rope", tiny_llama(**rope), Dataset.from_list(PAIRS), {}, "depends on the longest row"),
        ("optim", tiny_llama(), Dataset.from_list(PAIRS), {"optim": "adalomo"}, "updates the weights within"),
    ):
        args = CDPOConfig(**options(tmp_path / name, max_steps=1) | settings)
        trainer = CDPOTrainer(
            model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=LoraConfig(**LORA)
        )
        seen = watched(trainer)
        trainer.state.max_steps = 1
        trainer.run_preflight()
        assert words in report_of(trainer)["skipped"] and not seen


def test_a_stage_keeps_the_report_and_a_page_shows_it(tmp_path, model_dir, capsys):
    args = options(tmp_path, max_steps=1)
    del args["output_dir"]
    train_preference(
        "cdpo", {"path": model_dir, "dtype": "float32"}, PAIRS, tmp_path / "run/cdpo", args=args, lora=LORA
    )
    report = json.loads((tmp_path / "run/cdpo/preflight.json").read_text())
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("align: preflight")]
    assert lines == [f"align: {report['summary']}"] and report["batches"][0]["rows"][0]["id"] in lines[0]
    (training,) = read_run(tmp_path / "run").trainings
    assert training.preflight == report["summary"]
    page, _ = inspect_run(tmp_path / "run")
    assert "Preflight: the longest batch, " in page.read_text()
    (tmp_path / "run/cdpo/preflight.json").write_text('{"summary": 7}')
    assert read_run(tmp_path / "run").trainings[0].preflight == ""


@pytest.mark.slow
def test_two_processes_are_what_they_are_without_and_end_together(tmp_path):
    """DDP's buckets and buffers too; and where one of them has no memory, one message says so."""
    tiny_llama(vocab_size=len(byte_level_tokenizer())).save_pretrained(tmp_path / "base")
    script = [str(TESTS / "ddp_preflight.py"), str(tmp_path / "out")]
    done = launch(ROOT / "recipes/accelerate/cpu.yaml", 2, *script, timeout=200)
    assert "SAME 2\n" in done.stdout, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("align: ")]
    assert done.returncode != 0 and len(lines) == 2
    assert lines[0].startswith("align: preflight: the longest batch, p") and "of 2 processes" in lines[0]
    assert lines[1].startswith("align: preflight, before step 1: the longest batch does not fit into memory: p")
