"""What trainers are given: data sets without rows, unknown columns, layers that are not there, checkpoints of another kind."""

import json
import re
import shutil

import pytest
from conftest import byte_level_tokenizer, random_pairs, tiny_llama
from datasets import Dataset
from peft import LoraConfig
from trl import SFTTrainer

from align import (
    BASHConfig,
    BASHTrainer,
    CDPOConfig,
    CDPOTrainer,
    RACConfig,
    RACTrainer,
    TokenDPOConfig,
    TokenDPOTrainer,
)
from align.damage import missing_shard
from align.errors import AlignError, ConfigError, MissingColumnError, ModelLoadError, RecordError, RecordFileError
from align.models import load_adapters, load_model, load_tokenizer
from align.trainers.sft import GuardedSFTConfig, GuardedSFTTrainer
from align.trainers.training import train_preference, train_sft

SFT = {"sft": (GuardedSFTTrainer, GuardedSFTConfig), "bash": (BASHTrainer, BASHConfig), "rac": (RACTrainer, RACConfig)}
ALL = SFT | {"token_dpo": (TokenDPOTrainer, TokenDPOConfig), "cdpo": (CDPOTrainer, CDPOConfig)}
TEXT = Dataset.from_list([{"prompt": "Question: 1 + 1? ", "completion": "the answer is 42"}] * 4)
PAIRS = Dataset.from_list(random_pairs(4, columns=("ce_scores", "ref_logps")))
ARGS = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "report_to": "none", "dataloader_pin_memory": False, "check_reference": False}  # fmt: skip


def build(tmp_path, name, train, held_out=None, peft=None, **more):
    trainer, config = ALL[name]
    args = {key: value for key, value in ARGS.items() if name not in SFT or key != "check_reference"} | more
    return trainer(
        tiny_llama(), args=config(output_dir=str(tmp_path), **args), train_dataset=train, eval_dataset=held_out,
        processing_class=byte_level_tokenizer(), peft_config=peft,
    )  # fmt: skip


def rows_of(name):
    return TEXT if name in SFT else PAIRS


@pytest.mark.parametrize("name", ALL)
def test_data_sets_without_rows(tmp_path, name):
    rows = rows_of(name)
    for empty in (rows.select([]), Dataset.from_list([]), Dataset.from_dict({"prompt": []})):
        with pytest.raises(RecordError, match="train data set: it has no rows"):
            build(tmp_path, name, empty)
    with pytest.raises(RecordError, match="eval data set: it has no rows"):
        build(tmp_path, name, rows, rows.select([]))
    with pytest.raises(RecordError, match="hard data set: it has no rows"):
        build(tmp_path, name, rows, {"easy": rows, "hard": rows.select([])})
    with pytest.raises(ConfigError, match="`train_dataset` is required"):
        build(tmp_path, name, None)
    with pytest.raises(ConfigError, match=r"train data set is a list.*Dataset.from_list"):
        build(tmp_path, name, list(rows))


@pytest.mark.parametrize("name", SFT)
def test_a_data_set_to_evaluate_on_later(tmp_path, name):
    trainer = build(tmp_path, name, TEXT)
    with pytest.raises(RecordError, match="eval data set: it has no rows"):
        trainer.evaluate(TEXT.select([]))


@pytest.mark.parametrize("name", SFT)
def test_prompts_that_fill_max_length(tmp_path, name, caplog):
    with pytest.raises(RecordError, match=r"train data set: none of its 4 rows.*max_length = 4 "):
        build(tmp_path, name, TEXT, max_length=4)
    longer = Dataset.from_list([*TEXT, {"prompt": "apples " * 40, "completion": "7"}])
    trainer = build(tmp_path, name, longer, max_length=30)
    plain = SFTTrainer(
        tiny_llama(), args=SFT["sft"][1](output_dir=str(tmp_path), max_length=30, use_cpu=True, report_to="none"),
        train_dataset=longer, processing_class=byte_level_tokenizer(),
    )  # fmt: skip
    assert len(trainer.train_dataset) == len(plain.train_dataset) == 4
    assert trainer.data_report["train"] == {"rows": 5, "prompt_fills_max_length": 1}
    assert "1 of 5 rows dropped" in caplog.text


@pytest.mark.parametrize("name", SFT)
@pytest.mark.parametrize(
    "rows, error, words",
    [
        ([{"question": "a", "solution": "b"}], MissingColumnError, "its columns are question, solution; rename.*prompt and completion"),
        ([{"prompt": "a"}], MissingColumnError, "its columns are prompt;"),
        ([{"prompt": "a", "text": "b"}], MissingColumnError, "its columns are prompt, text;"),
        ([{"text": 5}], RecordError, "row 0: text = 5 must be text"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}], RecordError, "row 1: completion = None"),
        ([{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}], ConfigError, "row 0: completion is chat messages"),
        ([{"messages": [{"role": "user", "content": "x"}]}], ConfigError, "row 0: messages is chat messages.*chat template"),
        ([{"input_ids": [3, 4]}, {"input_ids": [900, 3]}], RecordError, r"row 1: input_ids\[0\] = 900 is not in the vocabulary of 400"),
        ([{"id": "x", "input_ids": [3, -4]}], RecordError, r"row 0.*: input_ids\[1\] = -4"),
    ],
)  # fmt: skip
def test_columns_and_values_that_sft_does_not_know(tmp_path, name, rows, error, words):
    with pytest.raises(error, match=f"train data set.*{words}"):
        build(tmp_path, name, Dataset.from_list(rows))


def test_text_under_a_name_of_ones_own_and_from_a_function(tmp_path):
    build(tmp_path, "sft", Dataset.from_list([{"body": "some text"}]), dataset_text_field="body")
    made = GuardedSFTTrainer(
        tiny_llama(), args=GuardedSFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
        train_dataset=Dataset.from_list([{"a": "x"}]), processing_class=byte_level_tokenizer(), formatting_func=lambda row: row["a"],
    )  # fmt: skip
    assert len(made.train_dataset) == 1


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "settings, words",
    [
        ({"target_modules": ["nowhere"]}, "nowhere"),
        (
            {"target_modules": ["q_proj", "nowhere"]},
            "target_modules = 'nowhere' must be a layer of LlamaForCausalLM.*v_proj",
        ),
        ({"target_modules": "no.*where"}, "no.*where"),
        ({"target_modules": "all-linear", "modules_to_save": ["nowhere"]}, "modules_to_save = 'nowhere'"),
        ({"target_modules": ["q_proj"], "target_parameters": ["nowhere"]}, "target_parameters = 'nowhere'"),
    ],
)
def test_layers_that_an_adapter_names_and_the_model_lacks(tmp_path, name, settings, words):
    with pytest.raises(ConfigError, match=words):
        build(tmp_path, name, rows_of(name), peft=LoraConfig(task_type="CAUSAL_LM", r=2, **settings))


def test_layers_that_are_there(tmp_path):
    for settings in ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {"target_modules": "all-linear"},
                     {"target_modules": ["self_attn.v_proj"]}, {"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]}, {"target_modules": r".*\.mlp\..*_proj"}, {},
                     {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}):  # fmt: skip
        trainer = build(tmp_path, "sft", TEXT, peft=LoraConfig(task_type="CAUSAL_LM", r=2, **settings))
        assert any("lora_" in name for name, weight in trainer.model.named_parameters() if weight.requires_grad)


STEPS = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
LORA = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders with checkpoints of full trainings and of adapters."""
    found = {}
    for kind, peft, more in (("full", None, {}), ("adapter", LORA, {}), ("weights", None, {"save_only_model": True})):
        found[kind] = tmp_path_factory.mktemp(kind)
        build(found[kind], "sft", TEXT, peft=peft, **STEPS | more).train()
    return found


@pytest.mark.parametrize(
    "kind, peft, spoil, words",
    [
        ("full", LORA, None, "checkpoint-2 is of a training of all weights, and this one trains an adapter"),
        ("adapter", None, None, "checkpoint-2 is of a training of an adapter, and this one trains all weights"),
        ("weights", None, None, "checkpoint-2: optimizer.pt is missing"),
        ("full", None, "-optimizer.pt", "checkpoint-2: optimizer.pt is missing"),
        ("full", None, "-scheduler.pt", "checkpoint-2: scheduler.pt is missing"),
        ("full", None, "-trainer_state.json", "checkpoint-2: trainer_state.json is missing"),
        ("full", None, "-model.safetensors", "checkpoint-2: .*model.safetensors.* is missing"),
        ("adapter", LORA, "-adapter_config.json", "checkpoint-2: adapter_config.json is missing"),
        ("adapter", LORA, "-adapter_model.safetensors", "checkpoint-2: .*adapter_model.safetensors, is missing"),
        ("full", None, "optimizer.pt", r"checkpoint-2: optimizer.pt \(100 bytes\) is cut off"),
        ("full", None, "rng_state.pth", r"checkpoint-2: rng_state.pth \(100 bytes\) is cut off"),
        ("full", None, "trainer_state.json", r"checkpoint-2: trainer_state.json \(100 bytes\) is cut off"),
        ("adapter", LORA, "adapter_model.safetensors", r"checkpoint-2: adapter_model.safetensors \(100 bytes\) is cut off"),
    ],
)  # fmt: skip
def test_checkpoints_that_a_training_cannot_go_on_from(tmp_path, trained, kind, peft, spoil, words):
    out = shutil.copytree(trained[kind], tmp_path / "out")
    if spoil:
        file = out / "checkpoint-2" / spoil.lstrip("-")
        whole = file.read_bytes()
        file.unlink()
        if not spoil.startswith("-"):
            file.write_bytes(whole[:100])
    trainer = build(out, "sft", TEXT, peft=peft, **STEPS | {"max_steps": 3})
    for given in (True, str(out / "checkpoint-2")):
        with pytest.raises(AlignError, match=words):
            trainer.train(resume_from_checkpoint=given)


def test_what_is_no_checkpoint(tmp_path, trained):
    trainer = build(tmp_path / "new", "sft", TEXT)
    with pytest.raises(RecordFileError, match="new: there is no checkpoint in it"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(RecordFileError, match="nowhere: no such checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_missing_random_numbers_are_said(tmp_path, trained, capsys):
    out = shutil.copytree(trained["full"], tmp_path / "out")
    (out / "checkpoint-2" / "rng_state.pth").unlink()
    trainer = build(out, "sft", TEXT, **STEPS | {"max_steps": 3})
    assert trainer.train(resume_from_checkpoint=True).global_step == 3
    assert re.search(r"checkpoint-2: rng_state.pth is missing; random numbers begin again", capsys.readouterr().err)


def test_a_missing_loss_scale_is_named(tmp_path, trained, monkeypatch):
    out = shutil.copytree(trained["full"], tmp_path / "out")
    trainer = build(out, "sft", TEXT, **STEPS | {"max_steps": 3})
    monkeypatch.setattr(trainer.accelerator, "scaler", object())  # as under fp16
    with pytest.raises(RecordFileError, match="scaler.pt, the state of fp16's loss scale, is missing"):
        trainer.train(resume_from_checkpoint=True)


def test_whole_checkpoints_are_gone_on_from(tmp_path, trained):
    for kind, peft in (("full", None), ("adapter", LORA)):
        out = shutil.copytree(trained[kind], tmp_path / kind)
        assert (
            build(out, "sft", TEXT, peft=peft, **STEPS | {"max_steps": 3})
            .train(resume_from_checkpoint=True)
            .global_step
            == 3
        )


DEMONSTRATIONS = [
    {"id": "a", "prompt": "x", "completion": "y", "prompt_ids": [5, 6], "completion_ids": [7, 8, 9]},
    {"id": "b", "prompt": "x", "completion": "y", "prompt_ids": [6, 5], "completion_ids": [9, 8, 7]},
]
QUICK = {"max_steps": 1, "disable_tqdm": True, "save_strategy": "no"}


def test_weights_alone_are_not_gone_on_from_in_a_recipe(tmp_path, model_dir, monkeypatch, capsys):
    """A run that is killed ends with the bytes of one that is not, so an optimizer must not begin in its middle."""
    args = QUICK | {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    original, model = SFTTrainer.train, {"path": model_dir, "dtype": "float32"}

    def killed(self, **kwargs):
        original(self, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(SFTTrainer, "train", killed)
        train_sft(model, DEMONSTRATIONS, tmp_path / "out", args=args)
    train_sft(model, DEMONSTRATIONS, tmp_path / "out", args=args)
    assert (
        "checkpoint-2 is incomplete and skipped: optimizer.pt is missing (save_only_model=True)"
        in capsys.readouterr().err
    )
    train_sft(model, DEMONSTRATIONS, tmp_path / "whole", args=args)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole"))
    assert one == other


@pytest.mark.parametrize(
    "args, words",
    [
        ({"learning_rate": "abc"}, "args: learning_rate = 'abc' must be a number"),
        ({"learning_rate": None}, "args: learning_rate = None must be a number"),
        ({"learning_rate": True}, "args: learning_rate = True must be a number"),
        ({"learning_rate": [1e-5]}, r"args: learning_rate = \[1e-05\] must be a number"),
        ({"per_device_train_batch_size": "2"}, "args: per_device_train_batch_size = '2' must be a whole number"),
        ({"per_device_train_batch_size": 0}, "args: per_device_train_batch_size = 0 must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "args: gradient_accumulation_steps = 0 must be at least 1"),
        ({"max_steps": 1.5}, "args: max_steps = 1.5 must be a whole number"),
        ({"max_length": "long"}, "args: max_length = 'long' must be a whole number or null"),
        ({"max_length": -3}, "args: max_length = -3 must be at least 1"),
        ({"bf16": "yes"}, "args: bf16 = 'yes' must be true or false"),
        ({"optim": "nix"}, "args: optim = 'nix' must be one of adamw_torch, "),
        ({"lr_scheduler_type": "nix"}, "args: lr_scheduler_type = 'nix' must be one of linear, "),
        ({"lr_scheduler_kwargs": "x"}, "args: lr_scheduler_kwargs = 'x' must be a mapping"),
        ({"truncation_mode": "x"}, "args: truncation_mode = 'x' must be one of keep_start, keep_end"),
        ({"seed": "x"}, "args: seed = 'x' must be a whole number"),
        ({"learning_rat": 1e-5}, "args: learning_rat: no field"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(tmp_path, model_dir, args, words):
    with pytest.raises(ConfigError, match=words):
        train_sft({"path": model_dir}, DEMONSTRATIONS, tmp_path / "out", args=args)
    with pytest.raises(ConfigError, match=words):
        train_preference("dpo", {"path": model_dir}, random_pairs(2), tmp_path / "out", args=args)
    if "learning_rat" not in args:  # Python itself names that one
        for _, config in ALL.values():
            with pytest.raises(ConfigError, match=words.removeprefix("args")):
                config(output_dir=str(tmp_path), report_to="none", **args)


@pytest.mark.parametrize(
    "lora, words",
    [
        ({"r": "two"}, "lora: r = 'two' must be a whole number"),
        ({"lora_dropout": "x"}, "lora: lora_dropout = 'x' must be a number"),
        ({"target_modules": 5}, "lora: target_modules = 5 must be "),
        ({"rank": 2}, "lora: rank: no field of LoraConfig"),
        ({"r": 0}, "r.* should be a positive integer"),
        ({"target_modules": ["q_proj", "nowhere"]}, "lora: target_modules = 'nowhere'"),
    ],
)
def test_settings_of_an_adapter_are_named(tmp_path, model_dir, lora, words):
    with pytest.raises(ConfigError, match=words):
        train_sft({"path": model_dir}, DEMONSTRATIONS, tmp_path / "out", args=QUICK, lora=lora)


def test_every_loss_type_of_trl_is_known(tmp_path):
    for unknown in ({"loss_type": ["nix"]}, {"f_divergence_type": "nix"}):
        with pytest.raises(ConfigError, match="= 'nix' must be one of"):
            TokenDPOConfig(output_dir=str(tmp_path), use_cpu=True, **unknown)
    known = re.findall(r"'([a-z_]+)'", ERROR_OF_TRL)
    for name in set(known) - {"aot"}:
        TokenDPOConfig(output_dir=str(tmp_path), use_cpu=True, loss_type=[name])


def _error_of_trl() -> str:
    """TRL's own list of loss types, from the message about an unknown one."""
    import inspect

    from trl import DPOTrainer

    source = inspect.getsource(DPOTrainer)
    place = source.index("Unknown loss type")
    return source[place : source.index("]", place)]


ERROR_OF_TRL = _error_of_trl()


def test_text_that_is_a_number_is_one(tmp_path, model_dir):
    """YAML reads 1e-2 as text."""
    for name, rate in (("text", "1e-2"), ("number", 1e-2)):
        train_sft(
            {"path": model_dir, "dtype": "float32"},
            DEMONSTRATIONS,
            tmp_path / name,
            args=QUICK | {"learning_rate": rate},
        )
    text, number = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("text", "number"))
    assert text == number


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:60])


def gone(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    "load, spoil, words",
    [
        (load_model, gone("config.json"), "config.json is missing"),
        (load_model, cut("config.json"), "config.json: not readable as JSON|config.json .* is cut off"),
        (load_model, gone("model.safetensors"), "model.safetensors is missing"),
        (load_model, cut("model.safetensors"), r"model.safetensors \(60 bytes\) is cut off"),
        (load_tokenizer, gone("tokenizer.json"), "tokenizer.json is missing"),
        (load_tokenizer, cut("tokenizer.json"), r"tokenizer.json \(60 bytes\) is cut off"),
        (load_tokenizer, cut("tokenizer_config.json"), r"tokenizer_config.json \(60 bytes\) is cut off"),
    ],
)
def test_half_a_model_is_named_by_its_file(folder, load, spoil, words):
    spoil(folder)
    with pytest.raises(ModelLoadError, match=f"{folder}.*({words})"):
        load(str(folder))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (
            lambda f: sorted(f.glob("model-*"))[1].unlink(),
            "model-00002-of-0000. is missing|model-00002-of-0000..safetensors is missing",
        ),
        (
            lambda f: sorted(f.glob("model-*"))[1].write_bytes(b"x" * 9),
            r"model-00002-of-0000..safetensors \(9 bytes\) is cut off",
        ),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "model.safetensors.index.json is missing"),
    ],
)
def test_a_shard_that_is_missing_is_named(folder, spoil, words):
    (folder / "model.safetensors").unlink()
    tiny_llama().save_pretrained(folder, max_shard_size="50KB")
    load_model(str(folder), dtype="float32")
    spoil(folder)
    with pytest.raises(ModelLoadError, match=words):
        load_model(str(folder))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (gone("adapter_model.safetensors"), "adapter_model.safetensors is missing"),
        (cut("adapter_model.safetensors"), r"adapter_model.safetensors \(60 bytes\) is cut off"),
        (cut("adapter_config.json"), r"adapter_config.json: not readable as JSON"),
    ],
)
def test_half_an_adapter_is_named_by_its_file(tmp_path, trained, spoil, words):
    adapter = shutil.copytree(trained["adapter"] / "checkpoint-2", tmp_path / "adapter")
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 2
    spoil(adapter)
    with pytest.raises(AlignError, match=words):
        load_adapters(tiny_llama(), {"default": str(adapter)})


def test_a_configuration_with_types_that_only_its_cell_knows(tmp_path):
    from dataclasses import dataclass

    @dataclass
    class Own(TokenDPOConfig):
        knob: "Unknown" = None  # noqa: F821 (as in a notebook)

    assert Own(output_dir=str(tmp_path), use_cpu=True, report_to="none", knob=3).knob == 3


@pytest.mark.parametrize("name", ["sft", "token_dpo"])
@pytest.mark.parametrize("spoil, words", [
    (gone("config.json"), "config.json is missing"), (gone("model.safetensors"), "model.safetensors is missing"),
    (cut("model.safetensors"), r"model.safetensors \(60 bytes\) is cut off"), (cut("tokenizer.json"), "tokenizer.json .* is cut off"),
])  # fmt: skip
def test_half_a_model_that_a_trainer_is_given_by_name(tmp_path, folder, name, spoil, words):
    spoil(folder)
    trainer, config = ALL[name]
    args = config(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none")
    with pytest.raises(ModelLoadError, match=words):
        trainer(str(folder), args=args, train_dataset=rows_of(name))


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"weight_map": 5}', '{"weight_map": {"w": [1]}}', '{"weight_map": {"w": 7}}', "[" * 100_000]
)
def test_an_index_of_something_else_is_damaged(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert missing_shard(tmp_path) == "model.safetensors.index.json is cut off or damaged"


def test_values_that_transformers_takes_and_declares_otherwise(tmp_path):
    from align import TokenDPOConfig

    assert TokenDPOConfig(str(tmp_path), use_cpu=True, fsdp=["full_shard"]).fsdp
    assert TokenDPOConfig(str(tmp_path), use_cpu=True, num_train_epochs=-1, max_steps=2).max_steps == 2


def test_an_adapter_is_not_a_model_to_train(tmp_path):
    from align import TokenDPOConfig
    from align.trainers.loading import config_of

    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="must be a whole model, and is an adapter"):
        config_of(str(tmp_path), TokenDPOConfig(str(tmp_path / "out"), use_cpu=True))
