"""TRL's SFT against BASH with ε = 0, guarded SFT, and RAC without cue and prefix: the same arguments, four steps, bit for bit."""

import gc
import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from datasets import Dataset, DatasetDict
from differential import DIFFERENCES, Case, check, differ, load
from families import FAMILIES, family_tokenizer
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    CPTConfig,
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RandLoraConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)  # fmt: skip
from transformers import DataCollatorForSeq2Seq, TrainerCallback
from trl import SFTConfig, SFTTrainer

from align import BASHConfig, BASHTrainer, RACConfig, RACTrainer
from align.trainers.sft import GuardedSFTConfig, GuardedSFTTrainer

#: Our class, its configuration, and what makes it TRL's.
OURS = {
    "bash": (BASHTrainer, BASHConfig, {"epsilon": 0.0, "refresh_steps": 3, "trl_completions": True}),
    "guarded": (GuardedSFTTrainer, GuardedSFTConfig, {"trl_completions": True}),
    "rac": (
        RACTrainer,
        RACConfig,
        {"cue": "", "prefix_fraction": [0, 0], "keep_correct_share": 0.0, "refresh_steps": 3, "trl_completions": True},
    ),
}
WORDS = ["apples", "12", "+", "7", "how many", "café", "answer", "the", "19", "sells", "eggs", "?"]


def _text(draw: random.Random, most: int = 9) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))


def rows_of(make, n: int = 10) -> list[dict]:
    draw = random.Random(0)
    return [make(draw) for _ in range(n)]


def _turn(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def _ids(draw: random.Random) -> dict:
    prompt, completion = ([draw.randrange(3, 390) for _ in range(draw.randint(1, 9))] for _ in range(2))
    return {"input_ids": prompt + completion, "completion_mask": [0] * len(prompt) + [1] * len(completion)}


def _labelled(draw: random.Random) -> dict:
    row = _ids(draw)
    labels = [i if learned else -100 for i, learned in zip(row["input_ids"], row["completion_mask"], strict=True)]
    return {"input_ids": row["input_ids"], "labels": labels}


ROWS = {
    "text": lambda d: {"text": _text(d)},
    "prompt and completion": lambda d: {"prompt": _text(d), "completion": " " + _text(d)},
    "messages": lambda d: {"messages": [_turn("user", _text(d)), _turn("assistant", _text(d))]},
    "turns": lambda d: {"messages": [_turn(r, _text(d)) for r in ("system", "user", "assistant", "user", "assistant")]},
    "chat completion": lambda d: {
        "prompt": [_turn("user", _text(d))],
        "completion": [_turn("assistant", _text(d))],
    },
    "conversations": lambda d: {
        "conversations": [{"from": "human", "value": _text(d)}, {"from": "gpt", "value": _text(d)}]
    },
    "ids": _ids,
    "labels": _labelled,
}


@cache
def form(name: str, n: int = 10):
    """What makes a data set of a form."""
    return lambda: Dataset.from_list(rows_of(ROWS[name], n))


#: Forms that have ids.
OF_IDS = (form("ids"), form("labels"))


TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
GENERATION = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
TOOLS = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"


def templated(template: str):
    def make():
        tokenizer = family_tokenizer()
        tokenizer.chat_template = template
        return tokenizer

    return make


def with_tools() -> Dataset:
    rows = [row | {"tools": [TOOL]} for row in rows_of(ROWS["messages"])]
    return Dataset.from_list(rows)


def ready(row: dict) -> dict:
    """What a transform makes of rows of ids."""
    return {"input_ids": row["input_ids"], "labels": row["input_ids"]}


def transformed() -> Dataset:
    return form("labels")().with_transform(ready)


def lora(**options):
    return lambda: LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "lora_dropout": 0.1, **options}
    )


def adapter(cls: type, **options):
    return lambda: cls(task_type="CAUSAL_LM", **options)


LAYERS = {"target_modules": ["q_proj", "v_proj"]}
ADAPTERS = {
    "lora": lora(),
    "all-linear": lora(target_modules="all-linear"),
    "dora": lora(use_dora=True),
    "rslora": lora(use_rslora=True),
    "pissa": lora(init_lora_weights="pissa"),
    "lora with saved embeddings": lora(modules_to_save=["embed_tokens"]),
    "lora with a saved head": lora(modules_to_save=["lm_head"]),
    "lora on the head": lora(target_modules=["q_proj", "lm_head"]),
    "lora on embeddings": lora(target_modules=["embed_tokens", "q_proj"]),
    "lora with trainable tokens": lora(trainable_token_indices=[5, 6, 7]),
    "lora with bias": lora(bias="lora_only"),
    "trainable tokens": adapter(TrainableTokensConfig, token_indices=list(range(3, 400))),
    "ia3": adapter(IA3Config, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adalora": adapter(AdaLoraConfig, total_step=10, tinit=1, tfinal=1, **LAYERS),
    "loha": adapter(LoHaConfig, r=4, **LAYERS),
    "lokr": adapter(LoKrConfig, r=4, **LAYERS),
    "oft": adapter(OFTConfig, r=0, oft_block_size=4, **LAYERS),
    "boft": adapter(BOFTConfig, boft_block_size=4, **LAYERS),
    "vera": adapter(VeraConfig, r=8, **LAYERS),
    "randlora": adapter(RandLoraConfig, r=4, **LAYERS),
    "vblora": adapter(VBLoRAConfig, r=4, num_vectors=8, vector_length=4, topk=2, **LAYERS),
    "fourierft": adapter(FourierFTConfig, n_frequency=16, **LAYERS),
    "miss": adapter(MissConfig, r=4, **LAYERS),
    "layer norms": adapter(LNTuningConfig, target_modules=["input_layernorm"]),
    "prompt tuning": adapter(PromptTuningConfig, num_virtual_tokens=4),
    "p-tuning": adapter(PromptEncoderConfig, num_virtual_tokens=4, encoder_hidden_size=16),
    "prefix tuning": adapter(PrefixTuningConfig, num_virtual_tokens=4),
    "cpt": adapter(CPTConfig, cpt_token_ids=[5, 6, 7], cpt_mask=[1] * 3, cpt_tokens_type_mask=[1, 2, 4]),
    "a layer that is not there": lora(target_modules=["nothing"]),
}


def mean_length(prediction) -> dict:
    return {"learned": float((prediction.label_ids != -100).sum()), "top": float(prediction.predictions.sum())}


def argmax(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def own_loss(outputs, labels, num_items_in_batch=None):
    found = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    return 0.5 * found / (num_items_in_batch or 1)


class StopsAtTwo(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


EVALUATION = {"eval_strategy": "steps", "eval_steps": 2}
CHAT = {"data": form("messages")}

#: Options of the configurations, one by one.
OPTIONS = [
    Case("defaults"),
    *(Case(f"loss_type {name}", {"loss_type": name}) for name in ("dft", "chunked_nll")),
    Case("loss_type unknown", {"loss_type": "unknown"}, raises=True),
    Case("label_smoothing_factor", {"label_smoothing_factor": 0.1}),
    Case("completion_only_loss", {"completion_only_loss": True}, form("prompt and completion")),
    Case("no completion_only_loss", {"completion_only_loss": False}, form("prompt and completion")),
    Case("completion_only_loss on text", {"completion_only_loss": True}),
    Case("assistant_only_loss", {"assistant_only_loss": True}, form("turns"), trainer={"processing_class": templated(GENERATION)}),
    Case("assistant_only_loss without marks", {"assistant_only_loss": True}, form("turns"), raises=True),
    Case("assistant_only_loss on text", {"assistant_only_loss": True}, raises=True),
    *(Case(f"max_length {n}", {"max_length": n}) for n in (8, None)),
    Case("prompts fill max_length", {"max_length": 6}, form("prompt and completion")),
    Case("keep_end", {"max_length": 8, "truncation_mode": "keep_end"}),
    Case("unknown truncation_mode", {"truncation_mode": "middle"}),
    Case("pad_to_multiple_of", {"pad_to_multiple_of": 16}),
    Case("packing", {"packing": True, "max_length": 32}),
    Case("packing_strategy wrapped", {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
    Case("eval_packing", {**EVALUATION, "eval_packing": True}, trainer={"eval_dataset": form("text")}),
    Case("padding_free", {"padding_free": True, "max_length": None}),
    Case("padding_free with max_length", {"padding_free": True}, raises=True),
    Case("shuffle_dataset", {"shuffle_dataset": True}),
    Case("dataset_text_field", {"dataset_text_field": "words"}, lambda: form("text")().rename_column("text", "words")),
    Case("dataset_num_proc", {"dataset_num_proc": 2}),
    Case("eos_token", {"eos_token": "<|endoftext|>"}),
    Case("unknown eos_token", {"eos_token": "<nothing>"}, raises=True),
    Case("pad_token", {"pad_token": "<|start|>"}),
    Case("unknown pad_token", {"pad_token": "<nothing>"}, raises=True),
    Case("chat_template_path", {"chat_template_path": "template.jinja"}, form("messages")),
    Case("activation_offloading", {"activation_offloading": True}, raises=True),
    Case("gradient_accumulation", {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}),
    Case("tokens per device", {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2}),
    Case("gradient_checkpointing", {"gradient_checkpointing": True}),
    Case("reentrant checkpointing", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    Case("selective checkpointing", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}}),
    Case("bf16", {"bf16": True}),
    Case("neftune", {"neftune_noise_alpha": 5.0}),
    Case("router_aux_loss_coef without experts", {"router_aux_loss_coef": 0.1}, raises=True),
    *(Case(name, {"optim": name}) for name in ("adamw_torch", "adafactor")),
    Case("max_grad_norm", {"max_grad_norm": 0.01}),
    Case("warm-up and decay", {"warmup_steps": 2, "lr_scheduler_type": "cosine", "weight_decay": 0.1}),
    Case("epochs", {"max_steps": -1, "num_train_epochs": 2}),
    Case("a part of an epoch", {"max_steps": -1, "num_train_epochs": 1.5}),
    Case("drop_last", {"dataloader_drop_last": True}),
    Case("workers", {"dataloader_num_workers": 1}),
    Case("batch of one", {"per_device_train_batch_size": 1}),
    Case("batch larger than the data", {"per_device_train_batch_size": 16}),
    Case("group_by_length", {"train_sampling_strategy": "group_by_length"}),
    Case("sequential", {"train_sampling_strategy": "sequential"}),
    Case("logging every 3", {"logging_steps": 3, "logging_first_step": True}),
    Case("tokens seen", {"include_num_input_tokens_seen": "all"}),
    Case("keeps unused columns", {"remove_unused_columns": False}),
    Case("data_seed", {"data_seed": 11}),
    Case("full_determinism", {"full_determinism": False, "seed": 9}),
    Case("torch_compile", {"torch_compile": True, "torch_compile_backend": "eager"}),
    Case("evaluation", EVALUATION, trainer={"eval_dataset": form("prompt and completion")}),
    Case("evaluation of several", EVALUATION, trainer={"eval_dataset": lambda: {"a": form("text")(), "b": form("messages")()}}),
    Case("evaluation of a DatasetDict", EVALUATION, trainer={"eval_dataset": lambda: DatasetDict({"a": form("text")()})}),
    Case("compute_metrics", EVALUATION, trainer={"eval_dataset": form("text"), "compute_metrics": lambda: mean_length,
         "preprocess_logits_for_metrics": lambda: argmax}),
    Case("loss alone", {**EVALUATION, "prediction_loss_only": True}, trainer={"eval_dataset": form("text")}),
    Case("evaluation later", trainer={}, after=lambda trainer: trainer.evaluate(form("messages")())["eval_loss"]),
    Case("formatting_func", {"completion_only_loss": False}, form("prompt and completion"),
         trainer={"formatting_func": lambda: lambda row: row["prompt"] + row["completion"]}),
    Case("formatting_func with completion_only_loss", {"completion_only_loss": True}, form("prompt and completion"),
         trainer={"formatting_func": lambda: lambda row: row["prompt"] + row["completion"]}, raises=True),
    Case("compute_loss_func", trainer={"compute_loss_func": lambda: own_loss}),
    Case("a callback", trainer={"callbacks": lambda: [StopsAtTwo()]}),
    Case("optimizer_cls_and_kwargs", trainer={"optimizer_cls_and_kwargs": lambda: (torch.optim.Adagrad, {"lr": 0.01})}),
    Case("a tokenizer of the model's folder", trainer={"processing_class": None}),
    Case("a name", model=lambda folder: folder),
    Case("a name and where it is from", {"model_init_kwargs": {"dtype": "bfloat16"}}, model=lambda folder: folder),
    Case("DataCollatorForSeq2Seq", trainer={"data_collator": lambda: DataCollatorForSeq2Seq(family_tokenizer())}, data=form("labels")),
    Case("saved", {"save_strategy": "steps", "save_steps": 2}),
    Case("max_steps 0", {"max_steps": 0}),
]  # fmt: skip

#: Forms of data sets.
FORMS = [
    *(Case(f"rows of {name}", {}, form(name)) for name in ROWS),
    Case("tools", {}, with_tools, trainer={"processing_class": templated(TOOLS + GENERATION)}),
    Case("a stream", {}, lambda: form("text", 40)().to_iterable_dataset()),
    Case(
        "a stream without max_steps", {"max_steps": -1}, lambda: form("text", 40)().to_iterable_dataset(), raises=True
    ),
    Case("a stream of chat completions", {}, lambda: form("chat completion", 40)().to_iterable_dataset()),
    Case("a DatasetDict", {}, lambda: DatasetDict({"train": form("text")()})),
    Case("no data", {}, lambda: None),
    Case("no rows", {}, lambda: form("text")().select([])),
    Case("a transform", {}, lambda: form("text")().with_transform(lambda rows: rows), raises=True),
    Case("a transform as it is", {"dataset_kwargs": {"skip_prepare_dataset": True}}, transformed),
    Case("ids as they are", {"dataset_kwargs": {"skip_prepare_dataset": True}}, form("labels")),
    Case("masks as they are", {"dataset_kwargs": {"skip_prepare_dataset": True}}, form("ids"), raises=True),
    Case("further columns", {}, lambda: form("text")().add_column("id", [f"r{i}" for i in range(10)])),
    Case("text under another name", {}, lambda: form("text")().rename_column("text", "words")),
    Case("prompts without completions", {}, lambda: form("prompt and completion")().remove_columns("completion")),
    Case("ids with evaluation", EVALUATION, form("ids"), trainer={"eval_dataset": form("labels")}),
]

#: Adapters that TRL's SFT does not train: its fused head has no logits for CPT's own loss, and reads the head's weight.
ERRORS = ("cpt", "lora on the head", "a layer that is not there")

#: Adapters, those of a model that has one already among them.
PEFT = [
    *(Case(name, trainer={"peft_config": make}, raises=name in ERRORS) for name, make in ADAPTERS.items()),
    Case("lora with checkpointing", {"gradient_checkpointing": True}, trainer={"peft_config": lora()}),
    Case("prefix tuning with checkpointing", {"gradient_checkpointing": True}, trainer={"peft_config": ADAPTERS["prefix tuning"]},
         ours={"preflight": False}, raises=True),  # whose batch is another, and so are the sizes in the error
    Case("an adapted model", model=lambda folder: get_peft_model(load(folder), lora()())),
    Case("an adapter on an adapter", model=lambda folder: get_peft_model(load(folder), lora()()), trainer={"peft_config": lora()}, raises=True),
    Case("settings of no adapter", trainer={"peft_config": lambda: {"r": 4}}, raises=True),
]  # fmt: skip

EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")
#: Families; of experts, with and without the routers' loss.
MODELS = [
    *(Case(f"family {name}", family=name) for name in FAMILIES if name not in EXPERTS),
    *(Case(f"family {name}", {"router_aux_loss_coef": c}, family=name) for name, c in zip(EXPERTS, (0.05, None, 0.0), strict=True)),
    Case("experts that ask for the loss", family="mixtral", family_config={"output_router_logits": True}),
    Case("prefix tuning of experts", family="mixtral", trainer={"peft_config": ADAPTERS["prefix tuning"]}),
    Case("attention_dropout", family_config={"attention_dropout": 0.2}),
    Case("tied embeddings", family_config={"tie_word_embeddings": True}),
    Case("rows longer than the positions", {"max_length": None}, form("turns"), family="gpt2",
         family_config={"n_positions": 16, "max_position_embeddings": 16}),
]  # fmt: skip

CASES = [*OPTIONS, *FORMS, *PEFT, *MODELS]

#: Cases of guarded SFT: those of its own code, and what BASH refuses.
GUARDED = ["defaults", "packing", "packing_strategy wrapped", "eval_packing", "padding_free", "padding_free with max_length", "unknown pad_token",
           "unknown eos_token", "torch_compile", "prompt tuning", "lora", "evaluation", "rows of messages", "a transform as it is",
           "DataCollatorForSeq2Seq", "family mixtral", "a stream", "gradient_accumulation", "assistant_only_loss", "compute_metrics"]  # fmt: skip
#: Cases of RAC, which corrects one answer to one prompt.
CORRECTED = ["defaults", "gradient_accumulation", "max_length 8", "bf16", "evaluation", "torch_compile", "neftune", "lora", "prompt tuning",
             "prefix tuning", "ia3", "family mixtral", "family gpt2", "family gemma3", "a stream of chat completions",
             "rows of chat completion", "rows of labels", "rows of text", "ids as they are", "DataCollatorForSeq2Seq", "packing"]  # fmt: skip

#: What takes longer than the rest, and what is much like another case.
SLOW = {
    "dataset_num_proc", "workers", "torch_compile", "adafactor", "warm-up and decay", "sequential", "logging every 3", "data_seed",
    "full_determinism", "tokens seen", "a part of an epoch", "evaluation of several", "loss alone", "keep_end", "batch of one",
    "batch larger than the data", "drop_last", "reentrant checkpointing", "selective checkpointing", "max_grad_norm",
    *set(ADAPTERS) - {"lora", "dora", "ia3", "trainable tokens", "prompt tuning", "p-tuning", "prefix tuning", *ERRORS},
    *{f"family {name}" for name in FAMILIES} - {f"family {name}" for name in ("gpt2", "mistral", "gemma3", *EXPERTS)},
}  # fmt: skip


def _named(kind: str, case: Case) -> Case:
    default = {} if case.data or kind != "rac" else {"data": form("prompt and completion")}
    # Of ids, there is nothing to tokenize as TRL does.
    ours = {"trl_completions": False} if case.data in OF_IDS else {}
    # The layout is TRL's, and so are all numbers, to the last bit.
    return replace(case, name=f"{kind}: {case.name}", tolerance=0.0, ours={**ours, **case.ours}, **default)


def _cases() -> list:
    by_name = {case.name: case for case in CASES}
    chosen = {"bash": list(by_name), "guarded": GUARDED, "rac": CORRECTED}
    return [
        pytest.param(
            kind, _named(kind, by_name[name]), id=f"{kind}: {name}", marks=[pytest.mark.slow] if name in SLOW else []
        )
        for kind, names in chosen.items()
        for name in names
    ]


_OWN_WORDS = "ours names the {} and what to do, before anything is tokenized"
_DRAWN = "contexts are drawn per row"

differ(
    {
        **{
            f"bash: {name}": ("refused", _DRAWN)
            for name in ("packing", "packing_strategy wrapped", "eval_packing", "padding_free")
        },
        "bash: padding_free with max_length": ("own words", _DRAWN),
        "rac: packing": ("refused", _DRAWN),
        "rac: rows of text": ("refused", "RAC corrects an answer to a prompt, and text is learned as a whole"),
        "bash: prefix tuning of experts": (
            "own words",
            "prefix tuning's positions have no router loss; TRL fails in the first step",
        ),
        "bash: unknown truncation_mode": ("own words", _OWN_WORDS.format("setting")),
        "bash: a DatasetDict": ("own words", _OWN_WORDS.format("data set")),
        "bash: no data": ("own words", _OWN_WORDS.format("data set")),
        "bash: no rows": ("own words", "TRL ends in a StopIteration"),
        "bash: text under another name": ("own words", _OWN_WORDS.format("columns") + "; TRL ends in a KeyError"),
        "bash: prompts without completions": ("own words", _OWN_WORDS.format("columns") + "; TRL ends in a KeyError"),
        "bash: a layer that is not there": ("own words", _OWN_WORDS.format("layer")),
        "bash: max_steps 0": ("other numbers", "max_steps = 0 takes no step; the Trainer takes one before it looks"),
        "bash: rows longer than the positions": (
            "own words",
            "a row has more tokens than positions; TRL ends in an IndexError",
        ),
    }
)


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """The Trainer collects garbage at each end of training. What was there before is passed over, which is most of its time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("kind, case", _cases())
def test_the_same_as_trl(kind, case, tmp_path, monkeypatch):
    (tmp_path / "template.jinja").write_text(GENERATION)
    monkeypatch.chdir(tmp_path)
    trainer, config, own = OURS[kind]
    check(case, (SFTTrainer, SFTConfig), (trainer, config), tmp_path, form("text"), **own)


def test_the_table_names_cases_that_are_there():
    names = {str(param.values[1]) for param in _cases()}
    stale = [name for name in DIFFERENCES if name.split(": ")[0] in OURS and name not in names]
    assert not stale and len(names) == len(_cases())
    assert sum(name.startswith("bash: ") for name in names) >= 50
