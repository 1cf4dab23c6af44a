"""What TRL's `DPOTrainer` takes, given to ours: arguments in TRL's order, parsers, rows, processors, compiled models."""

import dataclasses
import inspect
import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import byte_level_tokenizer, llama_tokenizer, random_pairs, tiny_llama
from datasets import Dataset, IterableDataset
from families import multimodal_folder, multimodal_processor
from transformers import AutoProcessor, Gemma3ForConditionalGeneration
from trl import DPOConfig, DPOTrainer, TrlParser, data_utils

from align import CDPOConfig, CDPOTrainer, TGDPOConfig, TGDPOTrainer, TokenDPOConfig, TokenDPOTrainer
from align.errors import ConfigError, MissingColumnError, RecordError
from align.preferences import tokenize_pairs
from align.records import read_records
from align.scoring.guidance import score_guidance
from align.tokens import CompletionRule, encode_pair
from align.trainers.token_dpo import TokenPreferenceCollator

TRAINERS = [TokenDPOTrainer, CDPOTrainer, TGDPOTrainer]
CONFIGS = [TokenDPOConfig, CDPOConfig, TGDPOConfig]
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def options(folder, **kwargs):
    return {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "max_steps": 1,
        "save_strategy": "no", "logging_steps": 1, "per_device_train_batch_size": 4, "gradient_checkpointing": False,
    } | kwargs  # fmt: skip


SINCE_1_15 = pytest.mark.skipif(
    not hasattr(data_utils, "common_prefix_length"),
    reason="TRL 1.14 cuts a text after as many tokens as its prompt has, even where the two differ, and so loses tokens",
)


def trainer_of(cls, folder, tokenizer, rows, model=None, given=None, **kwargs):
    config = DPOConfig if cls is DPOTrainer else cls.config_class
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    args = config(**options(folder, **kwargs))
    return cls(model or tiny_llama(), args=args, train_dataset=data, processing_class=tokenizer, **(given or {}))


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# Arguments -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", TRAINERS)
def test_positional_arguments_are_those_of_trl(cls):
    ours, theirs = (list(inspect.signature(one.__init__).parameters.values()) for one in (cls, DPOTrainer))
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_parsed_from_a_file(config, tmp_path):
    """TRL's parser reads a YAML file of all fields, each with a value; what it makes is what the class makes of them."""
    plain = config(**options(tmp_path))
    values = {field.name: getattr(plain, field.name) for field in dataclasses.fields(config) if field.init}
    values = {name: value for name, value in values.items() if type(value) in (bool, int, float, str)}
    values |= {"beta": 0.7, "loss_type": ["ipo"], "max_tokens_per_batch": 4096, "prefix_sharing": False}
    if config is CDPOConfig:
        values |= {"weight_chosen": True}
    if config is TGDPOConfig:
        values |= {"alpha": 0.25, "guidance_beta": 0.2, "weight_floor": -1.0}
    assert set(config.__annotations__) <= {*values, "guidance_beta", "weight_floor"}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    (parsed,) = TrlParser(config).parse_args_and_config(["--config", str(file)])
    made = config(**values)
    for name in values:
        assert getattr(parsed, name) == getattr(made, name), name


@pytest.mark.parametrize("config", CONFIGS)
def test_own_fields_are_parsed_from_a_command_line(config, tmp_path):
    line = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--report_to", "none"]
    own = {
        "check_reference": False, "cache_reference": False, "prefix_sharing": False, "max_tokens_per_batch": 100,
        "preflight": False, "trl_completions": True,
    }  # fmt: skip
    own |= {CDPOConfig: {"weight_chosen": True, "loss_aggregation": "position"},
            TGDPOConfig: {"alpha": 0.25, "guidance_beta": 0.2, "weight_floor": 0.5}}.get(config, {})  # fmt: skip
    declared = {
        name
        for one in config.__mro__
        for name in vars(one).get("__annotations__", {})
        if issubclass(one, TokenDPOConfig)
    }
    assert declared == set(own)
    for name, value in own.items():
        line += [f"--{name}", str(value)]
    (parsed,) = TrlParser(config).parse_args_and_config(line)
    assert {name: getattr(parsed, name) for name in own} == own


@pytest.mark.parametrize(
    "cls, method", zip(TRAINERS, ("TokenDPO", "CDPO", "TGDPO"), strict=True), ids=lambda x: getattr(x, "__name__", x)
)
def test_the_folder_of_a_trainer_without_args_has_no_space(cls, method, model_dir, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "transformers.training_args.is_torch_bf16_gpu_available", lambda: True
    )  # TRL computes in bfloat16
    columns = ("weights", "ce_scores", "guidance_logratios")
    name = Path(model_dir).name
    trainer = cls(
        model_dir, train_dataset=Dataset.from_list(random_pairs(4, columns=columns)), processing_class=tokenizer
    )
    assert trainer.args.output_dir == f"{name}-{method}"
    theirs = DPOTrainer(model_dir, train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]))
    assert theirs.args.output_dir == f"{name}-DPO"  # their scheme


def test_an_unknown_padding_token_is_refused_and_not_added(tmp_path):
    tokenizer = byte_level_tokenizer()
    size = len(tokenizer)
    with pytest.raises(ConfigError, match="pad_token = '<pad>' must be in the tokenizer's vocabulary"):
        trainer_of(TokenDPOTrainer, tmp_path, tokenizer, random_pairs(4), pad_token="<pad>")
    assert len(tokenizer) == size and tokenizer.pad_token == "<|endoftext|>"
    trainer = trainer_of(TokenDPOTrainer, tmp_path, tokenizer, random_pairs(4), pad_token="<|start|>")
    assert trainer.data_collator.pad_token_id == tokenizer.convert_tokens_to_ids("<|start|>") == 1


# Compiled models -------------------------------------------------------------------------------------------------------


@pytest.fixture
def eager():
    """Compiled models run as they are: what is tested is that nothing asks for their truth value."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("cls", TRAINERS)
def test_a_compiled_reference_is_a_reference(cls, precompute, tmp_path, tokenizer, eager):
    rows = random_pairs(6, columns=("weights", "ce_scores", "guidance_logratios"))
    found = []
    for compiled in (False, True):
        settings = {"torch_compile": compiled, "torch_compile_backend": "eager" if compiled else None}
        given = {"ref_model": tiny_llama(seed=1)}
        trainer = trainer_of(
            cls, tmp_path, tokenizer, rows, given=given, precompute_ref_log_probs=precompute, cache_reference=False,
            max_steps=2, **settings,
        )  # fmt: skip
        assert isinstance(trainer.ref_model, torch._dynamo.OptimizedModule) is compiled
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-5) and len(found[0]) == 2
    assert found[0][0] != pytest.approx(0.6931, abs=1e-3)  # the reference is another model, and was called


def test_a_compiled_model_scores(tmp_path, eager):
    for name, wrap in (("plain", lambda model: model), ("compiled", torch.compile)):
        score_guidance(
            wrap(tiny_llama(seed=1)), wrap(tiny_llama()), random_pairs(3), tmp_path / f"{name}.jsonl", pad_token_id=0
        )
    plain, compiled = (list(read_records(tmp_path / f"{name}.jsonl")) for name in ("plain", "compiled"))
    assert len(plain) == len(compiled) == 3
    for row, other in zip(plain, compiled, strict=True):
        assert other["rejected_guidance_logratios"] == pytest.approx(row["rejected_guidance_logratios"], abs=1e-4)


# Rows ------------------------------------------------------------------------------------------------------------------

HH = [
    {
        "chosen": "\n\nHuman: What is 12 + 7?\n\nAssistant: It is 19, Tom.",
        "rejected": "\n\nHuman: What is 12 + 7?\n\nAssistant: I think eggs.",
    },
    {
        "chosen": "\n\nHuman: Apples?\n\nAssistant: Yes.\n\nHuman: How many?\n\nAssistant: forty-two",
        "rejected": "\n\nHuman: Apples?\n\nAssistant: Yes.\n\nHuman: How many?\n\nAssistant: forty-six apples",
    },
    {"chosen": "Q: naïve café? A: yes", "rejected": "Q: naïve café? A: yes, and duck eggs"},  # one begins the other
    {"chosen": "Q: eggs? A: 16 a day", "rejected": "Q: eggs? A: 9 every day"},
]


@SINCE_1_15
@pytest.mark.parametrize("trl", [False, True])
@pytest.mark.parametrize("make", [byte_level_tokenizer, llama_tokenizer])
def test_implicit_prompts_in_text_give_the_rows_of_trl(make, trl, tmp_path):
    model = tiny_llama(vocab_size=700)
    theirs = trainer_of(DPOTrainer, tmp_path, make(), HH, model, given={"ref_model": tiny_llama(vocab_size=700)})
    ours = trainer_of(TokenDPOTrainer, tmp_path, make(), HH, tiny_llama(vocab_size=700), trl_completions=trl)
    for expected, row in zip(theirs.train_dataset, ours.train_dataset, strict=True):
        assert {name: row[name] for name in IDS} == {name: expected[name] for name in IDS}
    # What is checked is not what any cut gives: the prompt of the second row ends within a word.
    assert (
        theirs.train_dataset[1]["prompt_ids"]
        != make()(HH[1]["chosen"])["input_ids"][: len(theirs.train_dataset[1]["prompt_ids"]) + 1]
    )


@SINCE_1_15
def test_trl_completions_cut_a_text_prompt_where_tokens_merge_and_say_so(tmp_path, tokenizer):
    rows = [{"prompt": "Question: Tom has 12 app", "chosen": "les and buys 7", "rejected": "les, 16"}]
    theirs = trainer_of(DPOTrainer, tmp_path, byte_level_tokenizer(), rows, given={"ref_model": tiny_llama()})
    with pytest.warns(UserWarning, match="tokens merge across the end of a text prompt"):
        ours = trainer_of(TokenDPOTrainer, tmp_path, tokenizer, rows, trl_completions=True)
    assert [ours.train_dataset[0][name] for name in IDS] == [theirs.train_dataset[0][name] for name in IDS]
    assert len(ours.train_dataset[0]["prompt_ids"]) < len(tokenizer(rows[0]["prompt"])["input_ids"])


def test_implicit_prompts_are_tokenized_by_the_stage_as_by_the_trainer(tmp_path, tokenizer):
    source = tmp_path / "hh.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [*HH, {"chosen": "", "rejected": "x"}]))
    counts = tokenize_pairs(str(source), tokenizer, tmp_path / "pairs.jsonl")
    assert counts["rows"] == len(HH) and counts["empty"] == 1
    trainer = trainer_of(TokenDPOTrainer, tmp_path / "run", tokenizer, HH)
    for pair, row in zip(read_records(tmp_path / "pairs.jsonl"), trainer.train_dataset, strict=True):
        assert {name: pair[name] for name in IDS} == {name: row[name] for name in IDS}
    assert next(iter(read_records(tmp_path / "pairs.jsonl")))["prompt"] == "\n\nHuman: What is 12 + 7?\n\nAssistant: I"
    with pytest.raises(ConfigError, match="chat needs a prompt apart from the answers"):
        tokenize_pairs(str(source), byte_level_tokenizer(chat=True), tmp_path / "chat.jsonl", chat=True)


@pytest.mark.parametrize(
    "row, error, words",
    [
        ({"chosen": "Yes", "rejected": "No"}, RecordError, "must begin with the same prompt"),
        ({"chosen": "", "rejected": "No"}, RecordError, "must begin with the same prompt"),
        ({"chosen": "Yes", "rejected": [{"role": "user", "content": "x"}]}, RecordError, "chosen is text, rejected is messages"),
        ({"prompt": None, "chosen": "Yes", "rejected": "Yet"}, MissingColumnError, "column 'prompt' is empty"),
    ],
)  # fmt: skip
def test_text_without_a_common_prompt_is_named(row, error, words, tokenizer):
    with pytest.raises(error, match=f"row 3: .*{words}"):
        encode_pair(tokenizer, row, "row 3", CompletionRule.of(tokenizer))


TEXT = [{"prompt": f"Question: {i} + {i} = ?\nAnswer:", "chosen": f" {2 * i}", "rejected": f" {i}!"} for i in range(4)]


def test_a_stream_is_not_precomputed_whatever_the_cache_has(tmp_path, tokenizer):
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def build(data, **given):
        return trainer_of(TokenDPOTrainer, tmp_path, tokenizer, data, str(folder), given, precompute_ref_log_probs=True)

    def stream():
        return IterableDataset.from_generator(lambda: iter(TEXT))

    for _ in range(2):  # with an empty cache, and with one that has all rows
        with pytest.raises(
            ConfigError, match="train data set: precompute_ref_log_probs=True is not supported with Iterable"
        ):
            build(stream())
        with pytest.raises(
            ConfigError, match="some data set: precompute_ref_log_probs=True is not supported with Iterable"
        ):
            build(TEXT, eval_dataset={"some": stream()})
        trainer = build(TEXT)
    with pytest.raises(
        ConfigError, match="eval data set: precompute_ref_log_probs=True is not supported with Iterable"
    ):
        trainer.evaluate(stream())
    # Before the model is loaded.
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="train data set: precompute_ref_log_probs=True"):
        build(stream())


def test_a_stream_that_has_the_reference_needs_no_computing(tmp_path, tokenizer):
    rows = random_pairs(4, columns=("ref_logps",))
    data = IterableDataset.from_generator(lambda: iter(rows))
    streamed = trainer_of(
        TokenDPOTrainer, tmp_path, tokenizer, data, check_reference=False, precompute_ref_log_probs=True
    )
    mapped = trainer_of(
        TokenDPOTrainer, tmp_path, tokenizer, rows, check_reference=False, train_sampling_strategy="sequential"
    )
    assert losses(streamed) == pytest.approx(losses(mapped), rel=1e-5)


def test_rows_that_a_transform_makes_are_the_rows(tmp_path, tokenizer):
    made = {row["prompt"]: row for row in TEXT}

    def transform(batch):
        return {name: [made[key][name] for key in batch["key"]] for name in ("prompt", "chosen", "rejected")}

    # The column of its own that the transform hides would be an error: numbers beside text.
    hidden = Dataset.from_dict({"key": list(made), "chosen_weights": [[1.0]] * 4})
    lazy = trainer_of(TokenDPOTrainer, tmp_path, tokenizer, hidden.with_transform(transform))
    plain = trainer_of(TokenDPOTrainer, tmp_path, tokenizer, TEXT)
    assert [{n: row[n] for n in IDS} for row in lazy.train_dataset] == [
        {n: row[n] for n in IDS} for row in plain.train_dataset
    ]
    assert losses(lazy) == losses(plain)
    assert lazy.evaluate(hidden.with_transform(transform)) ["eval_loss"] == pytest.approx(plain.evaluate(Dataset.from_list(TEXT))["eval_loss"])  # fmt: skip


@pytest.mark.parametrize("form", ["numpy", "torch", "pandas", "arrow"])
def test_a_format_changes_no_row_and_hides_its_columns(form, tmp_path, tokenizer):
    rows = random_pairs(4, columns=("weights",))
    data = Dataset.from_list(rows)
    seen = trainer_of(TokenDPOTrainer, tmp_path, tokenizer, data.with_format(form))
    hiding = trainer_of(TokenDPOTrainer, tmp_path, tokenizer, data.with_format(form, columns=[*IDS]))
    whole, narrow = (
        trainer_of(TokenDPOTrainer, tmp_path, tokenizer, part) for part in (data, data.select_columns([*IDS]))
    )
    assert losses(seen) == losses(whole) and losses(hiding) == losses(narrow)
    # The losses of a first step are all ln 2, whatever the weights.
    weights = [trainer.state.log_history[0]["weights/chosen"] for trainer in (seen, whole, hiding, narrow)]
    assert weights[0] == weights[1] != 1 and weights[2] == weights[3] == 1


# Processors ------------------------------------------------------------------------------------------------------------


def test_a_processor_trains_on_text_and_is_saved(tmp_path):
    model = Gemma3ForConditionalGeneration.from_pretrained(multimodal_folder())
    trainer = trainer_of(TokenDPOTrainer, tmp_path, multimodal_processor(), TEXT, model)
    assert losses(trainer) == pytest.approx([0.6931], abs=1e-4)
    trainer.save_model(str(tmp_path / "saved"))
    assert type(AutoProcessor.from_pretrained(tmp_path / "saved")) is type(multimodal_processor())


@pytest.mark.parametrize("column", ["image", "images"])
def test_images_are_refused(column, tmp_path):
    rows = [row | {column: [0]} for row in TEXT]
    with pytest.raises(ConfigError, match=f"column {column} has images, and TokenDPOTrainer trains on text alone"):
        trainer_of(TokenDPOTrainer, tmp_path, multimodal_processor(), rows, "no/model")
    with pytest.raises(ConfigError, match=f"eval data set: column {column} has images"):
        trainer_of(
            TokenDPOTrainer, tmp_path, multimodal_processor(), TEXT, "no/model", given={"eval_dataset": Dataset.from_list(rows)}
        )  # fmt: skip


def test_a_function_that_calls_our_collator_is_taken(tmp_path, tokenizer):
    """Its batch decides, not its type: with the weights it trains, without them it is refused."""
    rows = [
        pair | {f"{side}_weights": [0.5] * len(pair[f"{side}_ids"]) for side in ("chosen", "rejected")}
        for pair in random_pairs(4)
    ]
    own = TokenPreferenceCollator(pad_token_id=0, columns=("weights", "ref_logps"))
    trainer = trainer_of(TokenDPOTrainer, tmp_path, tokenizer, rows, given={"data_collator": lambda batch: own(batch)})
    trainer.train()
    assert trainer.state.log_history[0]["weights/chosen"] == pytest.approx(0.5)
    plain = TokenPreferenceCollator(pad_token_id=0)
    with pytest.raises(ConfigError, match="data_collator leaves chosen_weights, rejected_weights"):
        trainer_of(TokenDPOTrainer, tmp_path, tokenizer, rows, given={"data_collator": lambda batch: plain(batch)})
