"""A check of the seams into TRL, made with an untested version of TRL before a trainer loads or reads anything."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import DPOTrainer, SFTConfig, SFTTrainer

from .. import __version__, trl_versions
from ..errors import ConfigError
from .preference_data import has_reference
from .preflight import same_random_numbers
from .token_budget import metrics_aside
from .token_reference import PREFIX

if TYPE_CHECKING:
    from .sft import GuardedSFTTrainer
    from .token_dpo import TokenDPOTrainer

logger = get_logger(__name__)

#: Relative difference that rounding explains.
TOLERANCE = 1e-4

PAIRS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10, 1], "rejected_ids": [11, 1]},
    {"prompt_ids": [7, 6], "chosen_ids": [12, 1], "rejected_ids": [13, 14, 15, 1]},
]
ROWS = [
    {"input_ids": [5, 6, 7, 8, 9, 1], "completion_mask": [0, 0, 0, 1, 1, 1]},
    {"input_ids": [7, 6, 12, 13, 1], "completion_mask": [0, 0, 1, 1, 1]},
]
SETTINGS = {
    "report_to": "none", "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no",
    "per_device_train_batch_size": 2,
}  # fmt: skip

#: Variables of a launch that small trainers keep. They drop the others, which set sharding and precision.
DEVICE = ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE")

_checking = False


def check_trl(args: Any, difference: Callable[[bool], str | None]) -> None:
    """Checks that the installed TRL can train with a trainer's settings. Warns about an untested version, and tries it.

    Args:
        args: of the trainer.
        difference: takes whether to use the CPU, and returns how a small trainer differs from TRL's, or `None`.

    Raises:
        ConfigError: it cannot, or the small trainer differs or fails.
    """
    if _checking:
        return
    trl_versions.check_settings(args)
    if trl_versions.is_tested():
        return
    _warn(str(trl_versions.installed()))
    try:
        with _aside():
            found = difference(args.use_cpu)
    except Exception as error:
        raise ConfigError(_refused(f"{type(error).__name__}: {error}")) from error
    if found:
        raise ConfigError(_refused(found))


@cache
def _warn(version: str) -> None:
    """Warns once in a process."""
    logger.warning(
        f"TRL {version} is not tested with align {__version__}, whose tests run with TRL {trl_versions.OLDEST} to "
        f"{trl_versions.NEWEST}. Each trainer first checks on two rows that it computes what TRL computes."
    )


def _refused(found: str) -> str:
    return trl_versions.refusal(f"on two rows, the trainer does not compute what this TRL computes ({found})")


@contextmanager
def _aside() -> Iterator[None]:
    """Puts back what small trainers change: accelerate's state, random numbers, and the launch's settings."""
    global _checking
    states = [(each, dict(each._shared_state)) for each in (PartialState, AcceleratorState, GradientState)]
    launch = {
        name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_") and name not in DEVICE
    }
    for name in launch:
        del os.environ[name]
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    _checking = True
    try:
        with same_random_numbers(devices):
            yield
    finally:
        _checking = False
        if not bars:
            datasets.enable_progress_bars()
        os.environ.update(launch)
        for each, values in states:
            each._shared_state.clear()
            each._shared_state.update(values)


def _tiny() -> dict[str, Any]:
    """A model of 16 tokens and its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=None, eos_token_id=1, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    words = Tokenizer(models.WordLevel({f"{number}": number for number in range(16)}, unk_token="2"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="0")
    return {"model": LlamaForCausalLM(config), "processing_class": tokenizer}


def dpo_difference(trainer_class: type[TokenDPOTrainer], use_cpu: bool) -> str | None:
    """How loss and gradient differ from TRL's: with weights of 1, and with weights of 2, which are twice TRL's β.

    Rows come from the loader, and the loss from the public method, because those are what training takes.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"output_dir": folder, "use_cpu": use_cpu, "preflight": False, "prefix_sharing": False}
        options |= {"precompute_ref_log_probs": True, "cache_reference": False}
        trainer = trainer_class(
            args=trainer_class.config_class(**SETTINGS, **options), train_dataset=Dataset.from_list(PAIRS), **_tiny(),
            peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        )  # fmt: skip
    if not has_reference(trainer.train_dataset):
        return "precompute_ref_log_probs stores no log-probabilities of tokens"
    trainer.precompute_ref_logps = False
    model = trainer.model.eval()
    for weight in (1.0, 2.0):
        trainer.train_dataset = Dataset.from_list([_weighted(pair, weight) for pair in PAIRS])
        batch = next(iter(trainer.get_train_dataloader()))
        plain = {name: value for name, value in batch.items() if not name.startswith(PREFIX)}
        with metrics_aside(trainer):
            ours = _numbers(model, trainer.compute_loss(model, batch))
            beta, trainer.beta = trainer.beta, trainer.beta * weight
            theirs = _numbers(model, DPOTrainer._compute_loss(trainer, model, plain, False))
            trainer.beta = beta
        for name, mine, right in zip(("loss", "gradient"), ours, theirs, strict=True):
            if not (mine - right).abs().max() <= TOLERANCE * right.abs().max():  # NaN is neither
                return f"{name} with weights of {weight:g}: {mine.norm():.6g} in place of {right.norm():.6g}"
    return None


def _weighted(pair: dict[str, list[int]], weight: float) -> dict[str, list]:
    return pair | {f"{side}_weights": [weight] * len(pair[f"{side}_ids"]) for side in ("chosen", "rejected")}


def _numbers(model: torch.nn.Module, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss, and its gradient in one row."""
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return loss.detach(), torch.cat([grad.flatten() for grad in grads])


def sft_difference(trainer_class: type[GuardedSFTTrainer], use_cpu: bool, **settings: Any) -> str | None:
    """How the loss of one update differs from `SFTTrainer`'s.

    Args:
        settings: those with which the trainer is TRL's.
    """
    logs = []
    for each, config, own in (
        (SFTTrainer, SFTConfig, {}),
        (trainer_class, trainer_class.config_class, {"preflight": False, **settings}),
    ):
        with tempfile.TemporaryDirectory() as folder:
            args = config(
                folder, **SETTINGS, use_cpu=use_cpu, max_steps=1, logging_steps=1, completion_only_loss=True, **own
            )
            trainer = each(args=args, train_dataset=Dataset.from_list(ROWS), **_tiny())
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            logs.append(trainer.state.log_history[0])
    for name in ("loss", "grad_norm"):
        theirs, ours = (log[name] for log in logs)
        if not abs(ours - theirs) <= TOLERANCE * abs(theirs):  # NaN is neither
            return f"{name}: {ours:.6g} in place of {theirs:.6g}"
    return None
