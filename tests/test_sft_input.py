"""What TRL's SFTTrainer takes, guarded SFT, BASH and RAC take: arguments by position, collators, transforms, parsers, processors."""

import inspect
from dataclasses import fields

import pytest
import torch
import yaml
from conftest import byte_level_tokenizer, tiny_llama
from datasets import Dataset
from peft import LoraConfig, PeftModel
from test_self_generated import OPTIONS, demonstrations
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, HfArgumentParser, TrainingArguments
from transformers import TrainerCallback as Callback
from trl import SFTConfig, SFTTrainer, TrlParser

from align import BASHConfig, BASHTrainer, RACConfig, RACTrainer, TokenDPOConfig
from align.errors import ConfigError, NonFiniteError
from align.records import read_records
from align.trainers.sft import GuardedSFTConfig, GuardedSFTTrainer

TRAINERS = {
    "guarded": (GuardedSFTTrainer, GuardedSFTConfig, {}),
    "bash": (BASHTrainer, BASHConfig, {"epsilon": 0.5, "refresh_steps": 2}),
    "rac": (RACTrainer, RACConfig, {"cue": " no:", "max_new_tokens": 4, "refresh_steps": 2}),
}
SHORT = OPTIONS | {"max_steps": 2}


def labelled(n: int = 8) -> Dataset:
    rows = demonstrations(n).to_list()
    labels = [[i if m else -100 for i, m in zip(row["input_ids"], row["completion_mask"], strict=True)] for row in rows]
    return Dataset.from_list(
        [{"input_ids": r["input_ids"], "labels": found} for r, found in zip(rows, labels, strict=True)]
    )


def make(kind: str, folder, tokenizer, data=None, *, model=None, collator=None, **settings):
    cls, config, own = TRAINERS[kind]
    return cls(
        model or tiny_llama(), config(str(folder), **SHORT | own | settings), collator, data or labelled(),
        processing_class=tokenizer,
    )  # fmt: skip


@pytest.mark.parametrize("cls", [GuardedSFTTrainer, BASHTrainer, RACTrainer])
def test_parameters_are_trls(cls):
    ours, theirs = inspect.signature(cls.__init__).parameters, inspect.signature(SFTTrainer.__init__).parameters
    assert list(ours) == list(theirs)
    assert all(ours[name].default == theirs[name].default for name in theirs)
    assert all(ours[name].kind == theirs[name].kind for name in theirs)


@pytest.mark.parametrize("kind", TRAINERS)
def test_arguments_by_position(kind, tmp_path, tokenizer):
    cls, config, own = TRAINERS[kind]
    seen, optimizers = [], []

    class Look(Callback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    class Adagrad(torch.optim.Adagrad):
        def __init__(self, *args, **kwargs):
            optimizers.append(kwargs)
            super().__init__(*args, **kwargs)

    def metrics(prediction):
        return {"given": float(prediction.predictions.sum())}

    args = config(str(tmp_path), **SHORT | own | {"eval_strategy": "steps", "eval_steps": 2})
    trainer = cls(
        tiny_llama(), args, None, labelled(), labelled(2), tokenizer, None, metrics, [Look()], (None, None), (Adagrad, {"lr": 0.01}),
        lambda logits, labels: torch.ones_like(labels), None, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), None,
    )  # fmt: skip
    assert isinstance(trainer.model, PeftModel)
    trainer.train()
    assert seen == [1, 2] and optimizers == [{"lr": 0.01}]
    given = [entry["eval_given"] for entry in trainer.state.log_history if "eval_given" in entry]
    assert len(given) == 1 and given[0] > 0


def test_an_adapter_given_by_position_is_checked(tmp_path, tokenizer):
    strange = LoraConfig(r=2, target_modules=["q_proj", "nothing"], task_type="CAUSAL_LM")
    others = [None] * 3 + [(None, None), None, None, None, strange]
    with pytest.raises(ConfigError, match="'nothing' must be a layer of LlamaForCausalLM"):
        GuardedSFTTrainer(
            tiny_llama(), GuardedSFTConfig(str(tmp_path), **SHORT), None, labelled(), None, tokenizer, *others
        )


@pytest.mark.parametrize("kind, name", [("guarded", "SFT"), ("bash", "BASH"), ("rac", "RAC")])
def test_no_settings_name_a_folder_after_the_model(kind, name, model_dir, tokenizer, tmp_path, monkeypatch):
    class Config(TRAINERS[kind][1]):
        bf16 = False  # which a CPU refuses, unless it is asked for

    class Trainer(TRAINERS[kind][0]):
        config_class = Config

    monkeypatch.setattr(Config, "__init__", lambda self, folder: TRAINERS[kind][1].__init__(self, folder, bf16=False))
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(model_dir, train_dataset=labelled(), processing_class=tokenizer)
    assert trainer.args.output_dir == f"{model_dir.rsplit('/', 1)[-1]}-{name}"


@pytest.mark.parametrize("kind", TRAINERS)
def test_arguments_of_transformers_are_taken_over(kind, tmp_path, tokenizer):
    given = TrainingArguments(str(tmp_path), learning_rate=0.25, use_cpu=True, report_to="none", seed=9, max_steps=3)
    trainer = TRAINERS[kind][0](tiny_llama(), given, train_dataset=labelled(), processing_class=tokenizer)
    assert type(trainer.args) is TRAINERS[kind][1]
    assert (trainer.args.learning_rate, trainer.args.seed, trainer.args.max_steps) == (0.25, 9, 3)
    theirs = SFTTrainer(tiny_llama(), given, train_dataset=labelled(), processing_class=tokenizer).args
    same = [field.name for field in fields(SFTConfig) if field.init]
    different = [name for name in same if str(getattr(theirs, name)) != str(getattr(trainer.args, name))]
    assert not different


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_collator_of_transformers(kind, side, tmp_path):
    """Whichever side it pads: numbers are those of TRL's collator, contexts too."""
    found = []
    for collator in (None, "seq2seq"):
        tokenizer = byte_level_tokenizer()
        if collator:
            tokenizer.padding_side = side
            collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
        trainer = make(kind, tmp_path / str(collator is None), tokenizer, collator=collator, preflight=False)
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(found[0]) == 2
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_bash_leaves_all_else_of_a_batch(tmp_path, tokenizer):
    """A collator that makes ids of text, and gives more than ids: contexts go into its batch, the rest stays."""
    seen = []

    def collator(rows):
        ids = torch.tensor([tokenizer(row["text"])["input_ids"][:6] for row in rows])
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(6)[None].expand(len(ids), -1)}  # fmt: skip

    class Look(BASHTrainer):
        def compute_loss(self, model, inputs, *others, **kwargs):
            seen.append({name: value.clone() for name, value in inputs.items()})
            return super().compute_loss(model, inputs, *others, **kwargs)

    args = BASHConfig(
        str(tmp_path), epsilon=0.5, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
        **SHORT | {"completion_only_loss": False},
    )  # fmt: skip
    texts = Dataset.from_list([{"text": "Janet sells 16 duck eggs a day for $2 each"}] * 8)
    Look(tiny_llama(), args, collator, texts, processing_class=tokenizer).train()
    true = torch.tensor(tokenizer(texts[0]["text"])["input_ids"][:6])
    assert len(seen) == 2
    for batch in seen:
        assert (batch["labels"] == true).all() and (batch["position_ids"] == torch.arange(6)).all()
        assert (batch["input_ids"] != true).any() and (batch["input_ids"][:, 0] == true[0]).all()


def without_mask(rows):
    ids = torch.tensor([row["input_ids"][:2] for row in rows])
    return {"input_ids": ids, "labels": ids}


def without_second_call(rows):
    if any("labels" not in row or len(row["input_ids"]) < 3 for row in rows):
        raise KeyError("completion_mask")
    return DataCollatorForSeq2Seq(byte_level_tokenizer())(rows)


@pytest.mark.parametrize(
    "kind, collator, words",
    [
        ("bash", without_mask, r"data_collator = function must give input_ids, labels and attention_mask of one shape"),
        ("rac", without_mask, r"data_collator = function must give input_ids, labels and attention_mask of one shape"),
        ("rac", without_second_call, r"data_collator = function must make a batch of rows.*KeyError: 'completion_mask'"),
        ("rac", "labels are ids", r"data_collator = DataCollatorForLanguageModeling must make a batch of rows"),
    ],
)  # fmt: skip
def test_a_collator_that_cannot_be_used(kind, collator, words, tmp_path, tokenizer):
    if collator == "labels are ids":  # and so own tokens would be learned
        collator, rows = DataCollatorForLanguageModeling(tokenizer, mlm=False), labelled().remove_columns("labels")
    else:
        rows = labelled()
    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    with pytest.raises(ConfigError, match=words):
        make(kind, tmp_path, tokenizer, rows, collator=collator, **skip)


def test_a_tokenizer_without_padding(tmp_path):
    """TRL gives it one only where the collator is its own."""
    for kind in ("bash", "rac"):
        tokenizer = byte_level_tokenizer()
        padded = byte_level_tokenizer()
        tokenizer.pad_token = None
        trainer = make(
            kind, tmp_path / kind, tokenizer, collator=DataCollatorForSeq2Seq(padded), generation_tokens=4096
        )
        trainer.train()
        assert tokenizer.pad_token is None
        assert trainer.state.global_step == 2


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("columns", ["text", "ids"])
def test_rows_of_a_transform(kind, columns, tmp_path, tokenizer):
    """The trainer reads the rows that the transform returns, not the stored ones."""

    def read(batch):
        if columns == "text":
            ids = [tokenizer(text)["input_ids"][:8] for text in batch["text"]]
        else:
            ids = [ids[1:] for ids in batch["input_ids"]]
        return {"input_ids": ids, "labels": [[-100] * 2 + row[2:] for row in ids]}

    if columns == "text":
        data = Dataset.from_list([{"text": f"Tom has {i} apples and buys 7 more"} for i in range(8)])
    else:
        data = Dataset.from_list([{"input_ids": [900 + i, *range(20 + i, 28 + i)]} for i in range(8)])  # 900: no token
    data.set_transform(read)
    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    trainer = make(kind, tmp_path, tokenizer, data, **skip)
    trainer.train()
    assert trainer.state.global_step == 2
    assert "rows" in (tmp_path / "preflight.json").read_text()
    if kind == "bash":
        known = [row["input_ids"] for row in data]
        assert all(r["source_ids"] in known for p in (tmp_path / "contexts").iterdir() for r in read_records(p))


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_transform_that_is_to_be_prepared_is_refused_as_by_trl(kind, tmp_path, tokenizer):
    data = Dataset.from_list([{"text": "a"}]).with_transform(lambda batch: {"words": batch["text"]})
    with pytest.raises(ValueError, match="cannot prepare a dataset that uses `Dataset.with_transform"):
        make(kind, tmp_path, tokenizer, data)


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("setting", ["pad_token", "eos_token"])
def test_an_unknown_token_is_refused_as_by_trl(kind, setting, tmp_path, tokenizer):
    before = len(tokenizer)
    with pytest.raises(ValueError, match=f"The specified `{setting}` \\('<nothing>'\\) is not found"):
        make(kind, tmp_path, tokenizer, **{setting: "<nothing>"})
    assert len(tokenizer) == before and tokenizer.pad_token == "<|endoftext|>"


def test_embeddings_of_a_collator_that_are_not_finite(tmp_path, tokenizer):
    """There are no ids to name rows by; the error is still the guard's."""

    def collator(rows):
        embeddings = torch.full((len(rows), 4, 32), float("nan"))
        ones = torch.ones(len(rows), 4, dtype=torch.long)
        return {"inputs_embeds": embeddings, "labels": ones * 5, "attention_mask": ones}

    with pytest.raises(NonFiniteError, match="step 1: not finite"):
        make("guarded", tmp_path, tokenizer, collator=collator, preflight=False).train()


@pytest.mark.slow
def test_a_compiled_model_draws_the_same(tmp_path, tokenizer):
    found = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        options = {
            "torch_compile": compiled,
            "torch_compile_backend": "eager" if compiled else None,
            "preflight": False,
        }
        for kind in ("bash", "rac"):
            make(kind, folder / kind, tokenizer, **options).train()
            found += [r["input_ids"] for p in sorted((folder / kind / "contexts").iterdir()) for r in read_records(p)]
    assert len(found) == 24 and found[:12] == found[12:]


@pytest.fixture(scope="module")
def images():
    """A model that takes images, and its processor."""
    pytest.importorskip("PIL")
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor
    from transformers import LlavaForConditionalGeneration as Llava

    def tokenizer_with_images():
        tokenizer = byte_level_tokenizer(chat=True)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        # A processor gives messages as lists of parts.
        part = "(m['content'] if m['content'] is string else m['content'][0]['text'])"
        tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", part)
        return tokenizer

    def processor():
        tokenizer = tokenizer_with_images()
        sides = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
        return LlavaProcessor(
            image_processor=sides, tokenizer=tokenizer, patch_size=4, vision_feature_select_strategy="default",
            chat_template=tokenizer.chat_template,
        )  # fmt: skip

    def model():
        torch.manual_seed(0)
        vision = CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        )
        text = LlamaConfig(
            vocab_size=420, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, eos_token_id=0, pad_token_id=0, bos_token_id=None, initializer_range=0.2,
        )  # fmt: skip
        place = processor().tokenizer.convert_tokens_to_ids("<image>")
        return Llava(LlavaConfig(vision_config=vision, text_config=text, image_token_index=place)).eval()

    return model, processor


PLAIN = [{"prompt": f"What is {i}?", "completion": f" It is {i}."} for i in range(6)]
CHAT = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
    for row in PLAIN
]


@pytest.mark.parametrize("rows", [PLAIN, CHAT], ids=["text", "chat"])
def test_a_processor_and_text_alone(rows, images, tmp_path):
    model, processor = images
    found = {}
    for kind in ("trl", *TRAINERS):
        cls, config, own = TRAINERS.get(kind, (SFTTrainer, SFTConfig, {}))
        for epsilon in (0.0, 0.5) if kind == "bash" else (None,):
            changed = {} if epsilon is None else {"epsilon": epsilon}
            trainer = cls(
                model(), config(str(tmp_path / f"{kind}{epsilon}"), **SHORT | own | changed),
                train_dataset=Dataset.from_list(rows), processing_class=processor(),
            )  # fmt: skip
            trainer.train()
            found[kind, epsilon] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found["trl", None] == found["guarded", None] == found["bash", 0.0] and len(found["trl", None]) == 2
    assert found["bash", 0.5] != found["trl", None] != found["rac", None]


def test_images_are_refused_where_tokens_are_drawn(images, tmp_path):
    from PIL import Image

    model, processor = images
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "images": [Image.new("RGB", (8, 8))]}]  # fmt: skip
    for kind in ("bash", "rac"):
        with pytest.raises(ConfigError, match="does not support images; use text data"):
            cls, config, own = TRAINERS[kind]
            cls(
                model(), config(str(tmp_path), **SHORT | own | {"max_length": None, "completion_only_loss": False}),
                train_dataset=Dataset.from_list(rows), processing_class=processor(),
            )  # fmt: skip


VALUES = {
    "preflight": (False, "false"), "trl_completions": (True, "true"), "refresh_steps": (3, "3"), "generation_tokens": (99, "99"),
    "contexts_limit": (5, "5"), "epsilon": (0.75, "0.75"), "epsilon_schedule": ("linear", "linear"),
    "generation": ("autoregressive", "autoregressive"), "passes": (1, "1"), "temperature": (0.5, "0.5"), "cue": (" no:", " no:"),
    "prefix_fraction": ((0.25, 0.5), ["0.25", "0.5"]), "keep_correct_share": (0.125, "0.125"), "max_new_tokens": (7, "7"),
}  # fmt: skip


@pytest.mark.parametrize("cls", [GuardedSFTConfig, BASHConfig, RACConfig])
def test_parsers_know_every_field(cls, tmp_path):
    own = sorted({field.name for field in fields(cls)} - {field.name for field in fields(SFTConfig)})
    assert set(own) <= set(VALUES)
    words = ["--output_dir", str(tmp_path), "--bf16", "false"]
    for parser in (HfArgumentParser(cls), TrlParser(cls)):
        assert all(f"--{name}" in parser.format_help() for name in own)
        [plain] = parser.parse_args_into_dataclasses(words)
        assert all(getattr(plain, name) == getattr(cls(str(tmp_path), bf16=False), name) for name in own)
        for name in own:
            value, text = VALUES[name]
            given = [f"--{name}", *([text] if isinstance(text, str) else text)]
            [parsed] = parser.parse_args_into_dataclasses([*words, *given])
            assert getattr(parsed, name) == value and type(getattr(parsed, name)) is type(value)
    file = tmp_path / "config.yaml"
    values = {name: list(VALUES[name][0]) if name == "prefix_fraction" else VALUES[name][0] for name in own}
    file.write_text(yaml.safe_dump({"output_dir": str(tmp_path), "bf16": False, **values}))
    [parsed] = TrlParser(cls).parse_args_and_config(["--config", str(file)])
    assert all(getattr(parsed, name) == VALUES[name][0] for name in own)


def test_parsers_know_a_preference_configuration(tmp_path):
    [parsed] = TrlParser(TokenDPOConfig).parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--bf16", "false"])
    assert parsed.check_reference is True
