"""TRL's `DPOTrainer` and ours on the same arguments, setting by setting; see `differential`."""

from dataclasses import replace

import peft
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from differential import DIFFERENCES, PADDED, Case, check, differ
from families import FAMILIES, family_tokenizer, multimodal_folder, multimodal_processor
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForCausalLM, Gemma3ForConditionalGeneration, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from align import TokenDPOConfig, TokenDPOTrainer

LLAMA = ["q_proj", "down_proj"]


# Data ------------------------------------------------------------------------------------------------------------------


def rows(count=12):
    return [
        {"prompt": f"Question: {i} + {i} = ?\nAnswer:", "chosen": f" it is {2 * i}", "rejected": f" {i}" * (i % 4 + 1)}
        for i in range(count)
    ]


def text():
    return Dataset.from_list(rows())


def message(role, content):
    return {"role": role, "content": content}


def chat_rows():
    return [
        {
            "prompt": [message("user", f"What is {i} + {i}?")],
            "chosen": [message("assistant", f"It is {2 * i}.")],
            "rejected": [message("assistant", f"{i} " * (i % 4 + 1))],
        }
        for i in range(12)
    ]


def implicit_text():
    return Dataset.from_list(
        [{side: f"Human: add {i} and {i}. Assistant:{row[side]}" for side in ("chosen", "rejected")} for i, row in enumerate(rows())]
    )  # fmt: skip


def implicit_chat():
    return Dataset.from_list(
        [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in chat_rows()]
    )


def turns_in_completion():
    found = chat_rows()
    for row in found:
        row["chosen"] += [message("user", "Sure?"), message("assistant", "Yes.")]
    return Dataset.from_list(found)


def uneven_words():
    """Columns that no trainer reads."""
    return Dataset.from_list(
        [row | {"score": i / 3, "source": "made", "extra": [1, i]} for i, row in enumerate(rows())]
    )


def stream(make=rows):
    return IterableDataset.from_generator(lambda: iter(make()))


def ids():
    tokenizer = family_tokenizer()
    return Dataset.from_list(
        [
            {
                "prompt_ids": tokenizer(row["prompt"])["input_ids"],
                **{f"{side}_ids": tokenizer(row[side])["input_ids"] + [tokenizer.eos_token_id] for side in ("chosen", "rejected")},
            }
            for row in rows()
        ]
    )  # fmt: skip


def lazily_made():
    """Rows that exist when they are read, and not before."""
    made = {row["prompt"]: row for row in rows()}
    dataset = Dataset.from_dict({"key": list(made)})
    return dataset.with_transform(
        lambda batch: {name: [made[key][name] for key in batch["key"]] for name in ("prompt", "chosen", "rejected")}
    )


def with_images():
    return Dataset.from_list([row | {"images": [Image.new("RGB", (16, 16))]} for row in chat_rows()])


EOS_AT_END = [row | {"chosen": row["chosen"] + "<|end|>"} for row in rows()]


# Arguments -------------------------------------------------------------------------------------------------------------


class Counting(TrainerCallback):
    """Logs a number of its own."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs["seen"] = float(state.global_step)


def counted():
    return [Counting()]


def mean_margin(prediction):
    return {"margin": float(abs(prediction.predictions).mean())}


def reference(folder):
    """A reference that the policy differs from."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return model


def adapted(folder):
    """A model that an adapter was trained on."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return get_peft_model(model, LoraConfig(r=4, target_modules=LLAMA, init_lora_weights=False))


def lora(**options):
    return {
        "peft_config": lambda: LoraConfig(**{"r": 4, "target_modules": LLAMA, "init_lora_weights": False, **options})
    }


def adapter(kind, **options):
    return {"peft_config": lambda: getattr(peft, kind)(task_type="CAUSAL_LM", **options)}


def half(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def dropping(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attention_dropout=0.1)


def name(folder):
    return folder


def multimodal():
    return Gemma3ForConditionalGeneration.from_pretrained(multimodal_folder())


PROCESSOR = {"processing_class": multimodal_processor}


def settings(**named):
    return [Case(name.replace("__", " "), config) for name, config in named.items()]


LOSSES = [
    *(Case(f"loss {kind}", {"loss_type": kind}) for kind in ("sigmoid", "hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard")),
    *(Case(f"loss {kind}", {"loss_type": kind}) for kind in ("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")),
    Case("loss exo_pair", {"loss_type": "exo_pair", "label_smoothing": 1e-3}),
    Case("loss exo_pair without smoothing", {"loss_type": "exo_pair"}, raises=True),
    Case("loss unknown", {"loss_type": "sigmoids"}),
    Case("losses sigmoid and sft", {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]}),
    Case("losses MPO", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
    Case("losses without weights", {"loss_type": ["hinge", "ipo"]}),
    Case("losses, one weight too few", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, raises=True),
    Case("beta", {"beta": 0.5}),
    Case("label_smoothing", {"label_smoothing": 0.2}),
    Case("label_smoothing robust", {"loss_type": "robust", "label_smoothing": 0.2}),
    Case("ld_alpha", {"ld_alpha": 0.5}),
    Case("ld_alpha 0", {"ld_alpha": 0.0}),
    Case("ld_alpha ipo", {"ld_alpha": 0.3, "loss_type": "ipo"}),
    Case("discopop_tau", {"loss_type": "discopop", "discopop_tau": 0.2}),
    Case("use_weighting", {"use_weighting": True}),
    *(Case(f"divergence {kind}", {"f_divergence_type": kind}) for kind in ("forward_kl", "js_divergence", "alpha_divergence")),
    Case("divergence coefficient", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.4}),
    Case("divergence hinge", {"f_divergence_type": "js_divergence", "loss_type": "hinge"}),
    Case("divergence of a loss without", {"f_divergence_type": "js_divergence", "loss_type": "apo_zero"}, raises=True),
    Case("divergence unknown", {"f_divergence_type": "kl"}),
]  # fmt: skip

LENGTHS = [
    Case("max_length 16", {"max_length": 16}),
    Case("max_length 16, keep_end", {"max_length": 16, "truncation_mode": "keep_end"}),
    Case("max_length None", {"max_length": None}),
    Case("max_length fills prompts", {"max_length": 4}),
    Case("truncation_mode unknown", {"truncation_mode": "keep_middle", "max_length": 16}),
    Case("pad_to_multiple_of", {"pad_to_multiple_of": 16}),
    Case("padding_free", {"padding_free": True}),
    Case("pad_token", {"pad_token": "<|start|>"}),
    Case("pad_token unknown", {"pad_token": "<pad>"}),
]

REFERENCES = [
    Case("precompute", {"precompute_ref_log_probs": True}),
    Case("precompute in batches of 2", {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 2}),
    Case("precompute with LoRA", {"precompute_ref_log_probs": True}, trainer=lora()),
    Case("precompute ld_alpha", {"precompute_ref_log_probs": True, "ld_alpha": 0.5}),
    Case("precompute evaluation", {"precompute_ref_log_probs": True, "eval_strategy": "steps", "eval_steps": 2}, trainer={"eval_dataset": text}),
    Case("precompute a stream", {"precompute_ref_log_probs": True}, data=stream),
    Case("precompute, a stream to evaluate", {"precompute_ref_log_probs": True, "eval_strategy": "steps", "eval_steps": 2}, trainer={"eval_dataset": lambda: stream()}),
    Case("ref_model", trainer={"ref_model": reference}),
    Case("ref_model ipo", {"loss_type": "ipo"}, trainer={"ref_model": reference}),
    Case("ref_model is a string", trainer={"ref_model": name}),
    Case("ref_model with LoRA", trainer={"ref_model": reference, **lora()}),
    Case("sync_ref_model", {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}),
    Case("sync_ref_model with LoRA", {"sync_ref_model": True}, trainer=lora(), raises=True),
    Case("sync_ref_model and precompute", {"sync_ref_model": True, "precompute_ref_log_probs": True}, raises=True),
    Case("adapted before", model=adapted),
    Case("adapted before, precompute", {"precompute_ref_log_probs": True}, model=adapted),
    Case("adapted before, ref_model", model=adapted, trainer={"ref_model": reference}),
    Case("adapted twice", model=adapted, trainer=lora(), raises=True),
]  # fmt: skip

TRAINING = [
    *settings(
        plain={},
        gradient_accumulation={"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        gradient_checkpointing={"gradient_checkpointing": True},
        reentrant_checkpointing={"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        batch__of__1={"per_device_train_batch_size": 1},
        max_grad_norm={"max_grad_norm": 0.1},
        no__clipping={"max_grad_norm": 0.0},
        cosine={"lr_scheduler_type": "cosine", "warmup_steps": 1},
        cosine__with__min_lr={"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.01}},
        weight_decay={"weight_decay": 0.1},
        adafactor={"optim": "adafactor", "learning_rate": 1e-3},
        rmsprop={"optim": "rmsprop", "learning_rate": 1e-4},
        drop_last={"dataloader_drop_last": True, "per_device_train_batch_size": 5},
        sequential={"train_sampling_strategy": "sequential"},
        data_seed={"data_seed": 7},
        workers={"dataloader_num_workers": 1},
        dataset_num_proc={"dataset_num_proc": 2},
        torch_compile={"torch_compile": True, "torch_compile_backend": "eager"},
        all__columns={"remove_unused_columns": False},
        save={"save_strategy": "steps", "save_steps": 2},
        tokens__seen={"include_num_input_tokens_seen": True},
        epochs={"max_steps": -1, "num_train_epochs": 1},
        disable_dropout__off={"disable_dropout": False},
        neftune={"neftune_noise_alpha": 5.0},
        label_names={"label_names": ["chosen_ids"]},
        empty_cache={"torch_empty_cache_steps": 1},
    ),
    Case("activation_offloading", {"activation_offloading": True}, raises=True),
    Case("group_by_length", {"train_sampling_strategy": "group_by_length", "length_column_name": "length"}, raises=True),
    Case("router_aux_loss_coef of a dense model", {"router_aux_loss_coef": 0.1}, raises=True),
    Case("liger fused loss", {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}}, raises=True),
    Case("adamw", {"optim": "adamw_torch", "learning_rate": 1e-4}, tolerance=1e-4),
    Case("bf16", {"bf16": True}, tolerance=0.1),
    Case("bf16, padded rows", {"bf16": True}, ours={"prefix_sharing": False}, tolerance=PADDED),
    Case("model in bfloat16", model=half, tolerance=0.1),
    Case("model in bfloat16, padded rows", model=half, ours={"prefix_sharing": False}, tolerance=PADDED),
    Case("padded rows", ours={"prefix_sharing": False}, tolerance=PADDED),
    Case("dropout", {"disable_dropout": False}, model=dropping),
    Case("dropout disabled", model=dropping),
    Case("evaluation", {"eval_strategy": "steps", "eval_steps": 2}, trainer={"eval_dataset": text}),
    Case("evaluation at start", {"eval_strategy": "epoch", "eval_on_start": True}, trainer={"eval_dataset": text}),
    Case("evaluation of a dict", {"eval_strategy": "steps", "eval_steps": 2}, trainer={"eval_dataset": lambda: {"a": text(), "b": Dataset.from_list(rows(5))}}),
    Case("evaluation of a DatasetDict", {"eval_strategy": "steps", "eval_steps": 2}, trainer={"eval_dataset": lambda: DatasetDict(a=text())}),
    Case("evaluation of a stream", {"eval_strategy": "steps", "eval_steps": 2}, trainer={"eval_dataset": lambda: stream()}),
    Case("compute_metrics", {"eval_strategy": "steps", "eval_steps": 2}, trainer={"eval_dataset": text, "compute_metrics": lambda: mean_margin}),
    Case("evaluation without data", {"eval_strategy": "steps", "eval_steps": 2}, raises=True),
    Case("best model", {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}, trainer={"eval_dataset": text}),
    Case("callbacks", trainer={"callbacks": counted}),
    Case("optimizers", trainer={"optimizers": lambda: (None, None)}),
    Case("model by its name", model=name),
    Case("model_init_kwargs", {"model_init_kwargs": {"dtype": "float32", "attn_implementation": "eager"}}, model=name),
    Case("eager attention", model=lambda f: AutoModelForCausalLM.from_pretrained(f, attn_implementation="eager")),
    Case("no processing_class", trainer={"processing_class": lambda: None}),
    Case("processing_class of another kind", trainer={"processing_class": lambda: "tokenizer"}, raises=True),
    Case("data_collator of TRL", trainer={"data_collator": lambda: DataCollatorForPreference(pad_token_id=0)}),
    Case("data_collator of TRL, precompute", {"precompute_ref_log_probs": True}, trainer={"data_collator": lambda: DataCollatorForPreference(pad_token_id=0)}),
    Case("peft_config of another kind", trainer={"peft_config": lambda: {"r": 4}}, raises=True),
]  # fmt: skip

ADAPTERS = [
    Case("LoRA", trainer=lora()),
    Case("LoRA, new", {"learning_rate": 1.0}, trainer=lora(init_lora_weights=True)),
    Case("LoRA, gradient checkpointing", {"gradient_checkpointing": True}, trainer=lora()),
    Case("LoRA, dropout off", {"disable_dropout": True}, trainer=lora(lora_dropout=0.1)),
    Case("LoRA, dropout on", {"disable_dropout": False}, trainer=lora(lora_dropout=0.1)),
    Case("LoRA, all layers", trainer=lora(target_modules="all-linear")),
    Case("LoRA, bias", trainer=lora(bias="lora_only")),
    Case("LoRA, head", trainer=lora(target_modules=["lm_head"]), raises=True),
    Case("LoRA, embeddings", trainer=lora(target_modules=["embed_tokens", "q_proj"])),
    Case("LoRA, parameters", trainer=lora(target_modules=[], target_parameters=["q_proj.weight"])),
    Case("LoRA, some layers", trainer=lora(layers_to_transform=[1], layers_pattern="layers")),
    Case("rsLoRA", trainer=lora(use_rslora=True)),
    Case("DoRA", trainer=lora(use_dora=True)),
    Case("PiSSA", trainer=lora(init_lora_weights="pissa")),
    Case("modules_to_save", trainer=lora(modules_to_save=["lm_head"])),
    Case("modules_to_save embeddings", trainer=lora(modules_to_save=["embed_tokens"])),
    Case("trainable_token_indices", trainer=lora(trainable_token_indices=[1, 2, 30])),
    Case("no such layer", trainer=lora(target_modules=["no_proj"])),
    Case("IA3", {"learning_rate": 1.0}, trainer=adapter("IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    Case("AdaLoRA", {"learning_rate": 1.0}, trainer=adapter("AdaLoraConfig", target_modules=LLAMA, total_step=10, tinit=1, tfinal=2)),
    Case("LoHa", trainer=adapter("LoHaConfig", r=4, target_modules=LLAMA)),
    Case("LoKr", trainer=adapter("LoKrConfig", r=4, target_modules=LLAMA)),
    Case("OFT", trainer=adapter("OFTConfig", r=0, oft_block_size=8, target_modules=LLAMA)),
    Case("BOFT", trainer=adapter("BOFTConfig", boft_block_size=4, target_modules=LLAMA)),
    Case("VeRA", {"learning_rate": 1.0}, trainer=adapter("VeraConfig", r=4, target_modules=["q_proj", "o_proj"])),
    Case("HRA", {"learning_rate": 1.0}, trainer=adapter("HRAConfig", r=4, target_modules=LLAMA)),
    Case("FourierFT", {"learning_rate": 1.0}, trainer=adapter("FourierFTConfig", n_frequency=10, target_modules=LLAMA)),
    Case("MiSS", {"learning_rate": 1.0}, trainer=adapter("MissConfig", r=4, target_modules=LLAMA)),
    Case("RandLoRA", {"learning_rate": 0.01}, trainer=adapter("RandLoraConfig", r=4, target_modules=["q_proj", "o_proj"])),
    Case("VBLoRA", {"learning_rate": 1.0}, trainer=adapter("VBLoRAConfig", r=2, num_vectors=8, vector_length=8, topk=2, target_modules=["q_proj"])),
    Case("LayerNorm tuning", trainer=adapter("LNTuningConfig", target_modules=["input_layernorm"])),
    Case("trainable tokens", trainer=adapter("TrainableTokensConfig", token_indices=[223, 28, 33, 201])),
    Case("prompt tuning", trainer=adapter("PromptTuningConfig", num_virtual_tokens=4)),
    Case("p-tuning", {"learning_rate": 1e-3}, trainer=adapter("PromptEncoderConfig", num_virtual_tokens=4, encoder_hidden_size=16)),
    Case("prefix tuning", trainer=adapter("PrefixTuningConfig", num_virtual_tokens=4)),
    Case("prompt tuning, precompute", {"precompute_ref_log_probs": True}, trainer=adapter("PromptTuningConfig", num_virtual_tokens=4)),
]  # fmt: skip

DATA = [
    Case("implicit prompts in text", data=implicit_text),
    Case("implicit prompts in chat", data=lambda: implicit_chat()),
    Case("chat", data=lambda: Dataset.from_list(chat_rows())),
    Case("chat, turns of others in a completion", data=turns_in_completion),
    Case("chat with tools", data=lambda: Dataset.from_list([row | {"tools": "[]"} for row in chat_rows()])),
    Case("ids", data=ids, ours={"trl_completions": False}),
    Case("stream", data=stream),
    Case("stream of chat", data=lambda: stream(chat_rows)),
    Case("stream of implicit prompts", data=lambda: implicit_text().to_iterable_dataset()),
    Case("set_transform", data=lazily_made),
    Case("columns of others", data=uneven_words),
    Case("columns of others, kept", {"remove_unused_columns": False}, data=uneven_words),
    Case("EOS in the text", data=lambda: Dataset.from_list(EOS_AT_END)),
    Case("numpy format", data=lambda: text().with_format("numpy")),
    Case("torch format", data=lambda: text().with_format("torch")),
    Case("torch format of ids", data=lambda: ids().with_format("torch"), ours={"trl_completions": False}),
    Case("empty completion", data=lambda: Dataset.from_list([row | {"rejected": ""} for row in rows()])),
    Case("images", data=with_images, raises=True),
    Case("data in a list", data=rows),
    Case("no data", data=lambda: None),
    Case("whole conversations beside a prompt", data=lambda: Dataset.from_list([{"prompt": row["prompt"][0]["content"], **{s: row["prompt"] + row[s] for s in ("chosen", "rejected")}} for row in chat_rows()])),
    Case("equal pairs among others", {"per_device_train_batch_size": 2}, data=lambda: Dataset.from_list([*rows(), rows()[0] | {"rejected": rows()[0]["chosen"]}])),
    Case("no rejected column", data=lambda: text().remove_columns("rejected")),
    Case("empty prompt", data=lambda: Dataset.from_list([*rows(), rows()[0] | {"prompt": ""}])),
    Case("implicit prompts, one without", data=lambda: Dataset.from_list([*implicit_text(), {"chosen": "Yes.", "rejected": "No."}])),
    Case("null in a row", data=lambda: Dataset.from_list([*rows(), rows()[0] | {"rejected": None}])),
]  # fmt: skip

AUX = {"router_aux_loss_coef": 0.1}
MODELS = [
    *(Case(f"family {family}", family=family) for family in FAMILIES if family != "llama"),
    Case("family mixtral, auxiliary loss", AUX, family="mixtral"),
    Case("family qwen3_moe, auxiliary loss", AUX, family="qwen3_moe"),
    Case("family gpt_oss, auxiliary loss", AUX, family="gpt_oss"),
    Case("family mixtral, no auxiliary loss", {"router_aux_loss_coef": 0.0}, family="mixtral"),
    Case("family mixtral, prefix tuning", AUX, family="mixtral", trainer=adapter("PrefixTuningConfig", num_virtual_tokens=4)),
    Case("family gemma2, LoRA", family="gemma2", trainer=lora()),
    Case("family gpt_oss, LoRA", {"router_aux_loss_coef": 0.0}, family="gpt_oss", trainer=lora(target_modules=["q_proj"])),
    Case("family opt, without dropout", family="opt", family_config={"dropout": 0.0}),
    Case("processor, text", model=multimodal, trainer=PROCESSOR),
    Case("processor, chat", model=multimodal, trainer=PROCESSOR, data=lambda: Dataset.from_list(chat_rows())),
    Case("processor, images", model=multimodal, trainer=PROCESSOR, data=with_images, config={"max_length": None}),
    Case("processor, precompute", {"precompute_ref_log_probs": True}, model=multimodal, trainer=PROCESSOR),
    Case("processor of a model by its name", model=lambda: multimodal_folder(), trainer={"processing_class": lambda: None}),
    Case("family llama, tied", family_config={"tie_word_embeddings": True}),
]  # fmt: skip

CASES = [*LOSSES, *LENGTHS, *REFERENCES, *TRAINING, *ADAPTERS, *DATA, *MODELS]

OWN_WORDS = "refused before the model is loaded, naming the value and the remedy"
NAMED_ROW = "TRL fails on the row without naming it; the error here names row, column and remedy"
PYTHON_VALUES = "TRL fails on rows in this form; they are read here as Python values"

differ(
    {
        "dpo: loss aot": (
            "refused",
            "`aot` sorts policy and reference ratios apart, so no function of weighted log-ratios is left",
        ),
        **{
            f"dpo: {name}": ("refused", "nothing predicts a completion's first token, which TRL leaves out of the loss")
            for name in ("empty prompt", "implicit prompts, one without")
        },
        "dpo: family mixtral, prefix tuning": (
            "own words",
            "prefix tuning's positions have no router loss; TRL fails in the first step",
        ),
        "dpo: use_weighting": (
            "refused",
            "`use_weighting` computes weights of its own from log-probabilities without token weights",
        ),
        "dpo: loss unknown": ("own words", OWN_WORDS),
        "dpo: divergence unknown": ("own words", OWN_WORDS),
        "dpo: truncation_mode unknown": ("own words", OWN_WORDS),
        "dpo: pad_token unknown": ("own words", OWN_WORDS),
        "dpo: max_length fills prompts": ("own words", "TRL drops all rows and then fails on an empty data set"),
        "dpo: precompute a stream": ("own words", OWN_WORDS),
        "dpo: precompute, a stream to evaluate": ("own words", OWN_WORDS),
        "dpo: ref_model is a string": ("own words", OWN_WORDS),
        "dpo: dropout disabled": (
            "other numbers",
            "`disable_dropout=True` of TRL reaches modules alone; here it also reaches `attention_dropout`, a function",
        ),
        "dpo: data_collator of TRL, precompute": (
            "refused",
            "the reference's numbers are token-level columns, which TRL's collator leaves out of the batch",
        ),
        "dpo: processor, images": ("refused", "token-level columns beside images are not supported"),
        "dpo: family opt": (
            "other numbers",
            "OPT's dropout is a function, which `disable_dropout=True` of TRL does not reach; here it is disabled",
        ),
        "dpo: no such layer": ("own words", "the error also names the layers that the model has"),
        "dpo: ids": ("accepted", "TRL takes no ids; here, text is never tokenized twice"),
        "dpo: set_transform": (
            "accepted",
            "TRL's own columns are hidden by a data set's transform; here, it makes each row once",
        ),
        "dpo: numpy format": ("accepted", PYTHON_VALUES),
        "dpo: torch format": ("accepted", PYTHON_VALUES),
        "dpo: torch format of ids": ("accepted", PYTHON_VALUES),
        "dpo: empty completion": ("refused", "nothing was answered, and only an end token would be trained on"),
        "dpo: data in a list": ("own words", OWN_WORDS),
        "dpo: no data": ("own words", OWN_WORDS),
        "dpo: whole conversations beside a prompt": ("own words", NAMED_ROW),
        "dpo: no rejected column": ("own words", NAMED_ROW),
        "dpo: null in a row": ("own words", NAMED_ROW),
        "dpo: equal pairs among others": (
            "other numbers",
            "pairs whose sides are equal are dropped and counted, because their loss is ln 2 whatever the model does",
        ),
    }
)


#: One case of each kind; the others are minutes rather than seconds.
QUICK = {
    "plain", "padded rows", "bf16, padded rows", "losses MPO", "loss aot", "use_weighting", "ld_alpha ipo", "divergence hinge", "loss unknown", "max_length 16",
    "max_length 16, keep_end", "pad_to_multiple_of", "pad_token unknown", "precompute", "precompute a stream", "ref_model ipo",
    "sync_ref_model", "adapted before", "gradient_accumulation", "gradient_checkpointing", "evaluation of a dict",
    "compute_metrics", "neftune", "dropout disabled", "data_collator of TRL", "LoRA, dropout on", "LoRA, head", "DoRA",
    "modules_to_save", "IA3", "prompt tuning", "prefix tuning", "no such layer", "implicit prompts in text",
    "implicit prompts in chat", "chat with tools", "ids", "stream", "set_transform", "columns of others", "empty completion",
    "null in a row", "equal pairs among others", "whole conversations beside a prompt", "family gpt2", "family mistral",
    "family gemma2", "family mixtral, auxiliary loss", "family mixtral, prefix tuning", "empty prompt", "processor, chat",
    "processor, images",
}  # fmt: skip


def _cases():
    return [
        pytest.param(
            replace(case, name=f"dpo: {case.name}"),
            id=case.name,
            marks=[] if case.name in QUICK else [pytest.mark.slow],
        )
        for case in CASES
    ]


@pytest.mark.parametrize("case", _cases())
def test_same_as_trl(case, tmp_path):
    check(case, (DPOTrainer, DPOConfig), (TokenDPOTrainer, TokenDPOConfig), tmp_path, text, trl_completions=True)


def test_the_table_names_cases_that_are_there():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= 90 and set(names) >= QUICK
    assert {name.removeprefix("dpo: ") for name in DIFFERENCES if name.startswith("dpo: ")} <= set(names)
