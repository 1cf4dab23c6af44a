"""BASH and RAC as trainers: against TRL's SFT, and against themselves, interrupted and in pieces."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import byte_level_tokenizer, tiny_llama
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from align import BASHConfig, BASHTrainer, RACConfig, RACTrainer
from align.contexts import OwnTokens, draw_contexts, mixed_row
from align.errors import ConfigError, RecordError
from align.mix import IGNORED, Example
from align.rac import CorrectionSettings, longest_correction
from align.records import read_records

OPTIONS = {
    "per_device_train_batch_size": 3, "max_steps": 7, "bf16": False, "use_cpu": True, "report_to": "none", "learning_rate": 1e-2,
    "save_strategy": "no", "logging_steps": 1, "dataloader_pin_memory": False, "disable_tqdm": True, "seed": 3,
    "gradient_checkpointing": False, "max_length": 64, "completion_only_loss": True,
}  # fmt: skip
KINDS = {
    "sft": (SFTTrainer, SFTConfig, {}),
    "bash": (BASHTrainer, BASHConfig, {"epsilon": 0.5, "refresh_steps": 3}),
    "rac": (RACTrainer, RACConfig, {"cue": " no:", "max_new_tokens": 6, "refresh_steps": 3}),
}


def demonstrations(n: int = 14, seed: int = 0) -> Dataset:
    draw, rows = random.Random(seed), []
    for _ in range(n):
        prompt, completion = ([draw.randrange(3, 390) for _ in range(draw.randint(1, 9))] for _ in range(2))
        mask = [0] * len(prompt) + [1] * (len(completion) + 1)
        rows.append({"input_ids": [*prompt, *completion, 0], "completion_mask": mask})
    return Dataset.from_list(rows)


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def make(kind, folder, tokenizer, lora: bool = False, data=None, model=None, held_out=None, **settings):
    cls, config, own = KINDS[kind]
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1) if lora else None
    torch.manual_seed(1)  # of the adapter, which TRL seeds since 1.15
    return cls(
        model or tiny_llama(vocab_size=len(tokenizer)), args=config(str(folder), **OPTIONS | own | settings),
        train_dataset=data or demonstrations(), processing_class=tokenizer, peft_config=peft,
        eval_dataset=held_out,
    )  # fmt: skip


def contexts(folder) -> list[dict]:
    return [row for path in sorted(Path(folder, "contexts").glob("*.jsonl")) for row in read_records(path)]


def same_weights(one, other) -> bool:
    pairs = zip(one.model.named_parameters(), other.model.named_parameters(), strict=True)
    return all(torch.equal(a, b) for (_, a), (_, b) in pairs)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "kind, settings",
    [("bash", {"epsilon": 0.0}), ("rac", {"cue": "", "prefix_fraction": (0, 0), "keep_correct_share": 0.0})],
)
def test_without_own_tokens_it_is_sft(kind, settings, lora, tmp_path, tokenizer):
    """Losses, metrics and trained weights, over two epochs of uneven batches and accumulated gradients, with dropout."""
    sft = make("sft", tmp_path / "a", tokenizer, lora, gradient_accumulation_steps=2)
    sft.train()
    ours = make(kind, tmp_path / "b", tokenizer, lora, gradient_accumulation_steps=2, **settings)
    ours.train()
    assert losses(ours) == pytest.approx(losses(sft), rel=1e-6) and len(losses(sft)) == 7
    for theirs, mine in zip(sft.state.log_history, ours.state.log_history, strict=True):
        for name in ("grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "learning_rate", "epoch"):
            assert name not in theirs or mine[name] == pytest.approx(theirs[name], rel=1e-5), name
    for (name, theirs), (_, mine) in zip(sft.model.named_parameters(), ours.model.named_parameters(), strict=True):
        assert torch.allclose(theirs, mine, atol=1e-6), name


def test_bash_trains_on_mixed_contexts_and_true_labels(tmp_path, tokenizer):
    """Every number by a loop over what the trainer stored: contexts are those of the policy at the window's beginning, labels
    the ground truth, the loss that of the mixed context."""
    trainer = make("bash", tmp_path, tokenizer, contexts_limit=None, max_steps=5, num_train_epochs=1)
    before = {}

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            before[state.global_step] = {k: v.detach().clone() for k, v in model.state_dict().items()}

    trainer.add_callback(Keep())
    trainer.train()
    rows, known = contexts(tmp_path), [row["input_ids"] for row in demonstrations()]
    assert [row["step"] for row in rows] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 2
    assert sorted(row["source_ids"] for row in rows) == sorted(known)
    model, changed = tiny_llama(vocab_size=len(tokenizer)), 0
    for step in range(5):
        model.load_state_dict(before[step - step % 3])  # drawn at updates 0 and 3
        mine = [row for row in rows if row["step"] == step]
        expected = []
        for row in mine:
            prompt = sum(label == IGNORED for label in row["labels"])
            assert row["labels"] == [IGNORED] * prompt + row["source_ids"][prompt:]
            assert row["input_ids"][:prompt] == row["source_ids"][:prompt]
            expected.append(mixed_row(row["source_ids"], row["labels"], 0.5, 3, step, row["position"]))
        draw_contexts(model, expected, OwnTokens(), 0)
        assert [row["input_ids"] for row in mine] == [row.context for row in expected]
        changed += sum(row["input_ids"] != row["source_ids"] for row in mine)
        model.load_state_dict(before[step])
        total, count = 0.0, 0
        for row in mine:
            logps = model(torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
            for position, label in enumerate(row["labels"]):
                if label != IGNORED:
                    total, count = total - logps[position - 1, label].item(), count + 1
        assert losses(trainer)[step] == pytest.approx(total / count, rel=1e-5)
    assert changed > 7
    logged = trainer.state.log_history[0]
    assert 0.3 < logged["bash/own_tokens"] < 0.7 and logged["bash/own_tokens_that_differ"] > 0.5


def test_rac_never_learns_what_it_generated(tmp_path, tokenizer):
    trainer = make("rac", tmp_path, tokenizer, contexts_limit=None, max_steps=6)
    trainer.train()
    cue = tokenizer(" no:", add_special_tokens=False)["input_ids"]
    rows = contexts(tmp_path)
    for row in rows:
        prompt = next(d for d in demonstrations() if d["input_ids"] == row["source_ids"])["completion_mask"].count(0)
        reference, k = row["source_ids"][prompt:], row["own_tokens"]
        assert not row["kept"]  # random weights do not match
        assert row["input_ids"] == [*row["source_ids"][:prompt], *row["generated_ids"][:k], *cue, *reference]
        assert row["labels"] == [IGNORED] * (prompt + k) + [*cue, *reference]
    assert len({row["own_tokens"] for row in rows}) > 3 and any(row["generated_ids"] for row in rows)
    assert 0 < trainer.state.log_history[0]["rac/own_tokens"] <= 6


def test_rac_leaves_right_answers_alone(tmp_path):
    """A model that has learned its references by heart generates them; in the share that is asked for, they are kept."""
    tokenizer = byte_level_tokenizer()
    texts = [(f"Q{i}", f" It makes {i}.\n#### {i}") for i in range(4)]
    data = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in texts])
    sft = make(
        "sft", tmp_path / "sft", tokenizer, data=data, max_steps=60, per_device_train_batch_size=4, learning_rate=5e-3
    )
    sft.train()
    for share in (1.0, 0.0):
        options = {
            "keep_correct_share": share,
            "max_new_tokens": 30,
            "temperature": 0.0,
            "max_steps": 1,
            "learning_rate": 0.0,
        }
        out = tmp_path / f"rac-{share}"
        make("rac", out, tokenizer, data=data, model=sft.model, per_device_train_batch_size=4, **options).train()
        rows = contexts(out)
        assert all(row["matches"] and row["ended"] and row["kept"] == bool(share) for row in rows)
        for row in rows if share else ():
            assert row["input_ids"] == row["source_ids"] and row["labels"][:-1] == [IGNORED] * (len(row["labels"]) - 1)
            assert row["labels"][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["bash", "rac"])
@pytest.mark.parametrize("saved_at", [2, 3, 5])  # within the first window, between two, at the end of an epoch
def test_resumed_equals_uninterrupted(kind, saved_at, tmp_path, tokenizer):
    options = {"save_strategy": "steps", "save_steps": saved_at, "max_steps": 9, "contexts_limit": None}
    whole = make(kind, tmp_path / "whole", tokenizer, lora=True, **options)
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{saved_at}"
    other = tmp_path / "other" / checkpoint.name
    shutil.copytree(checkpoint, other)
    resumed = make(kind, tmp_path / "other", tokenizer, lora=True, **options)
    resumed.train(resume_from_checkpoint=str(other))
    assert losses(resumed) == losses(whole) and same_weights(resumed, whole)
    later = [row for row in contexts(tmp_path / "whole") if row["step"] >= 6]
    assert later and [row for row in contexts(tmp_path / "other") if row["step"] >= 6] == later


@pytest.mark.parametrize("kind", ["bash", "rac"])
def test_resumed_with_accumulated_gradients(kind, tmp_path, tokenizer):
    """Two micro-batches per update, epochs that end in the middle of one, windows across a checkpoint."""
    options = {
        "save_strategy": "steps",
        "save_steps": 4,
        "max_steps": 8,
        "contexts_limit": None,
        "gradient_accumulation_steps": 2,
    }
    whole = make(kind, tmp_path / "whole", tokenizer, **options)
    whole.train()
    other = tmp_path / "other" / "checkpoint-4"
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", other)
    resumed = make(kind, tmp_path / "other", tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(other))
    assert losses(resumed) == losses(whole) and same_weights(resumed, whole)
    # Places count through an update: 3 rows of each of its micro-batches, 2 in an epoch's last.
    by_step: dict[int, list[int]] = {}
    for row in contexts(tmp_path / "whole"):
        by_step.setdefault(row["step"], []).append(row["position"])
    assert [by_step[step] for step in range(3)] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1]]


@pytest.mark.parametrize("rows", [12, 13, 14, 15, 16])
def test_the_loader_is_never_at_its_end_while_a_window_is_trained_on(rows, tmp_path, tokenizer):
    """It would cut what is gathered of several processes to the rows of a batch that is not this one."""
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(trainer.accelerator.gradient_state.end_of_dataloader)

    trainer = make("bash", tmp_path, tokenizer, data=demonstrations(rows), refresh_steps=4, max_steps=10)
    trainer.add_callback(Look())
    trainer.train()
    assert len(seen) == 10 and not any(seen)


@pytest.mark.parametrize("kind", ["bash", "rac"])
def test_mixed_rows_are_not_taken_for_ground_truth(kind, tmp_path, tokenizer):
    """Rows of `align mix`: their ids are the model's own in places, their labels are not."""
    rows = [{"input_ids": [5, 6, 200, 201, 0], "labels": [-100, -100, 10, 20, 0]} for _ in range(6)]
    trainer = make(
        kind, tmp_path, tokenizer, data=Dataset.from_list(rows), dataset_kwargs={"skip_prepare_dataset": True}
    )
    with pytest.raises(RecordError, match="labels that are not its ids, as rows of `align mix` do"):
        trainer.train()


def test_every_token_learned_is_said(tmp_path, tokenizer):
    with pytest.warns(UserWarning, match="prompts and the user's turns too"):
        make("bash", tmp_path, tokenizer, completion_only_loss=False, max_steps=1).train()


def test_answers_are_the_same_only_where_they_are_marked(tokenizer):
    from align.rac import _same_answer

    def same(*texts: str) -> bool:
        return _same_answer(tokenizer, *(tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts))

    assert same("3+4=7 #### 7", "4+3=7; #### 7.0") and same("It is $\\boxed{7}$.", "#### 7")
    assert not same("#### 7", "#### 8") and not same("She was born in 1990.", "The war ended in 1990.")
    assert same("It is 7.", "It is 7.") and not same("It is 7.", "#### 7")


def test_contexts_of_an_earlier_run_do_not_stay(tmp_path, tokenizer):
    make("bash", tmp_path, tokenizer, max_steps=9).train()
    make("bash", tmp_path, tokenizer, max_steps=5).train()
    names = [path.name for path in sorted((tmp_path / "contexts").iterdir())]
    assert names == ["step-00000000.jsonl", "step-00000003.jsonl"]


def test_a_checkpoint_without_its_contexts_says_so(tmp_path, tokenizer, capsys):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make("bash", tmp_path, tokenizer, **options).train()
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "contexts.jsonl").unlink()
    make("bash", tmp_path, tokenizer, **options).train(resume_from_checkpoint=str(checkpoint))
    assert "has no contexts.jsonl; contexts are drawn anew" in capsys.readouterr().out


def test_a_stream_that_has_ended(tmp_path, tokenizer):
    assert make("bash", tmp_path, tokenizer).get_batch_samples(iter([]), 2, "cpu") == ([], None)


def test_contexts_kept_to_look_at(tmp_path, tokenizer):
    make("bash", tmp_path / "two", tokenizer, max_steps=9).train()
    names = [path.name for path in sorted((tmp_path / "two" / "contexts").iterdir())]
    assert names == ["step-00000005.jsonl", "step-00000008.jsonl"]  # windows end with their epoch of five updates
    make("bash", tmp_path / "none", tokenizer, contexts_limit=0).train()
    assert not (tmp_path / "none" / "contexts").exists()


def test_conversations_and_evaluation(tmp_path):
    """Chat data; evaluation is on ground truth, whatever epsilon. TRL's ids, since it trains on what follows the end token."""
    tokenizer = byte_level_tokenizer(chat=True)
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {i}?"}], "completion": [{"role": "assistant", "content": f"It is {i}."}]}
        for i in range(6)
    ]  # fmt: skip
    found = {}
    for kind in KINDS:
        options = {"max_length": None, "max_steps": 2, "learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 1}
        data = Dataset.from_list(rows)
        ids = {} if kind == "sft" else {"trl_completions": True}
        trainer = make(kind, tmp_path / kind, tokenizer, data=data, held_out=data, **options | ids)
        trainer.train()
        found[kind] = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert found["bash"] == found["rac"] == pytest.approx(found["sft"], rel=1e-6) and len(found["sft"]) == 2


@pytest.mark.parametrize("kind", ["bash", "rac"])
def test_quantized_base(tmp_path, tokenizer, kind):
    """Drawing in eval mode leaves the 4-bit weights as training needs them: the next gradient is that of a model that never drew."""
    pytest.importorskip("bitsandbytes")
    from align import load_model

    tiny_llama(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    gradients, options = [], {"max_steps": 1, "cue": " no:", "max_new_tokens": 6} if kind == "rac" else {"max_steps": 1}
    for draws in (True, False):
        model = load_model(str(tmp_path / "model"), dtype="float32", quantization="4bit")
        trainer = make(kind, tmp_path / "out", tokenizer, lora=True, model=model, **options)
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(3)]))
        if draws:
            trainer.state.max_steps = 1
            trainer.get_batch_samples(iter([batch]), 1, "cpu")
        trainer.model.eval()  # no dropout
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 2 * 7 * 2  # A and B of seven projections in two layers
    assert (
        sum(bool(gradient.any()) for gradient in gradients[0].values()) == 14
    )  # B is 0 at first, so A has no gradient
    for name, gradient in gradients[1].items():
        assert torch.equal(gradients[0][name], gradient), name


def test_drawing_from_shards_of_deepspeed_is_refused(tmp_path, tokenizer, monkeypatch):
    def make_accelerator(self):
        made(self)
        self.is_deepspeed_enabled = True

    made = SFTTrainer.create_accelerator_and_postprocess
    monkeypatch.setattr(SFTTrainer, "create_accelerator_and_postprocess", make_accelerator)
    monkeypatch.setattr(
        "align.trainers.sft.check_sharding", lambda trainer: None
    )  # there is no engine to ask for its stage
    for kind in ("bash", "rac"):
        with pytest.raises(ConfigError, match="draws with the whole model in every process; DeepSpeed.*fsdp2.yaml"):
            make(kind, tmp_path, tokenizer)


def test_what_is_refused(tmp_path, tokenizer, monkeypatch):
    for kind, settings, words in (
        ("bash", {"packing": True}, "packing is not supported by BASHConfig"),
        ("rac", {"padding_free": True}, "padding_free is not supported by RACConfig"),
        ("bash", {"epsilon": 2}, "epsilon = 2 must lie in"),
        ("bash", {"epsilon_schedule": "step"}, "'step' is unknown"),
        ("bash", {"generation": "x"}, "'x' is unknown"),
        ("bash", {"refresh_steps": 0}, "refresh_steps = 0 must be at least 1"),
        ("rac", {"prefix_fraction": (0.5, 0.2)}, "must be two numbers"),
        ("rac", {"prefix_fraction": [1]}, "must be two numbers"),
        ("rac", {"keep_correct_share": -1}, "keep_correct_share = -1"),
        ("rac", {"max_new_tokens": 0}, "max_new_tokens = 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            make(kind, tmp_path, tokenizer, **settings)
    with pytest.raises(ConfigError, match="BASHTrainer takes a BASHConfig, not a SFTConfig"):
        BASHTrainer(tiny_llama(), args=SFTConfig(str(tmp_path), bf16=False), train_dataset=demonstrations())
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")  # as its launcher does, where there is no GPU
        with pytest.raises(ConfigError, match="launched with FSDP, but accelerate shards on GPUs only"):
            make("bash", tmp_path, tokenizer)
    text = Dataset.from_list([{"text": "all of it is learned"}])
    trainer = make("rac", tmp_path, tokenizer, data=text, completion_only_loss=False)
    with pytest.raises(RecordError, match="row 0: RAC corrects one answer to one prompt"):
        trainer.train()
    make("bash", tmp_path, tokenizer, data=text, completion_only_loss=False, max_steps=1).train()


@pytest.mark.parametrize(
    "settings, tokens",
    [
        ({}, 2 + 10 + 3 + 4), ({"max_length": 15}, 15), ({"max_length": 8}, 8), ({"prefix_fraction": (0.0, 0.5)}, 2 + 5 + 3 + 4),
        ({"prefix_fraction": (0.0, 0.0)}, 2 + 10 + 1), ({"prefix_fraction": (0.0, 0.0), "keep_correct_share": 0.0}, 2 + 3 + 4),
        ({"prefix_fraction": (0.0, 0.0), "max_length": 12}, 2 + 3 + 4),
    ],
    ids=str,
)  # fmt: skip
def test_the_longest_correction(settings, tokens):
    """A prompt of 2 tokens, up to 10 of its own, a cue of 3, a reference of 4; or one that is right, and its end."""
    settings = CorrectionSettings(**{"max_new_tokens": 10, "cue": "abc"} | settings)
    found = longest_correction(
        lambda text, **_: {"input_ids": [ord(c) for c in text]},
        Example([1, 2, 3, 4, 5, 0], [IGNORED] * 2 + [3, 4, 5, 0]), "row 0", settings,
    )  # fmt: skip
    assert len(found.input_ids) == len(found.labels) == tokens
