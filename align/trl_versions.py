"""What differs between the versions of TRL that align supports. No other module depends on TRL's version.

Since 1.15, TRL's DPO calls a model that has a fused LM head, `model(..., labels=labels, fused_lm_head=True)`, which
returns per-token numbers. TRL 1.14 computes the same numbers from the model's logits, within its loss. Here its models
get a head of that signature. Its loss takes the numbers through the path that 1.14 has for chunked projections. The
numbers are those that 1.14 computes from logits. The loss stays TRL's.
"""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import trl
from packaging.version import Version
from transformers.utils import ModelOutput

from . import __version__
from .errors import ConfigError
from .lm_head import own_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The oldest and the newest minor version that the trainers' tests pass on: `make test-versions`.
OLDEST, NEWEST = "1.14", "1.16"

#: The label of positions that no loss is computed for, as in transformers.
_IGNORED = -100


def installed() -> Version:
    """The version of TRL that runs."""
    return Version(trl.__version__)


def is_tested() -> bool:
    """Whether the trainers' tests pass on the installed TRL. Patch releases count as their minor version."""
    return Version(OLDEST).release <= installed().release[:2] <= Version(NEWEST).release


def refusal(found: str, without: str = "") -> str:
    """The text of an error.

    Args:
        found: what does not work.
        without: versions that pip must leave out, such as `,!=1.15.*`.
    """
    newest = Version(NEWEST)
    requirement = f"trl>={OLDEST},<{newest.major}.{newest.minor + 1}{without}"
    return (
        f"TRL = {installed()} must be {OLDEST} to {NEWEST} for align {__version__}: {found}; install a tested version: "
        f'pip install "{requirement}"'
    )


# TRL's trainers are made of these, which it may move or rename at any time.
try:
    from trl.models import prepare_deepspeed
    from trl.trainer import utils
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.utils import get_config_model_id, global_then_local_main_first, selective_log_softmax_and_entropy
except ImportError as error:
    raise ConfigError(refusal(f"{error}")) from error

__all__ = [
    "NEWEST", "OLDEST", "DPOTrainer", "DataCollatorForPreference", "FusedCausalLMOutput", "add_missing_heads", "check_settings",
    "get_config_model_id", "global_then_local_main_first", "installed", "is_tested", "prepare_deepspeed", "refusal",
]  # fmt: skip


def check_settings(args: Any) -> None:
    """Refuses what the installed TRL cannot train with, and reports late or not at all.

    Args:
        args: of a DPO or SFT trainer.
    """
    version = installed()
    if args.use_liger_kernel and not FUSED_HEAD and isinstance(args, trl.DPOConfig):
        raise ConfigError(
            f"use_liger_kernel = True must be False with TRL {version}, whose loss then bypasses the model's forward; "
            "set it to False, or install trl>=1.15"
        )
    if version.release[:2] == (1, 15) and not _runs_triton(args.device.type):
        raise ConfigError(
            refusal(f"it computes losses with Triton, which does not run on {args.device.type}", ",!=1.15.*")
        )


def _runs_triton(device: str) -> bool:
    if utils._ChunkedLogProbFunction is None:  # Triton is not installed
        return False
    return device in ("cuda", "xpu") or os.environ.get("TRITON_INTERPRET") == "1"


@dataclass
class _TokenOutput(ModelOutput):
    """The fields of TRL's `FusedCausalLMOutput` that its DPO reads, (B, T) each, 0 where the label is ignored."""

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def _from_logits(outputs: Any, labels: torch.Tensor) -> _TokenOutput:
    """Per-token numbers of (B, T) labels, computed as TRL 1.14's loss computes them.

    Args:
        outputs: of the model; its logits, (B, T, V), each predict the label beside them.
    """
    logits = outputs.logits[:, : labels.size(1)]
    if torch.is_autocast_enabled(logits.device.type):
        logits = logits.float()  # because accelerate does so with all that a prepared model returns
    mask = labels != _IGNORED
    targets = labels.masked_fill(~mask, 0)
    logps, entropy = selective_log_softmax_and_entropy(
        logits, targets, entropy_requires_grad=False, row_mask=mask.long()
    )
    with torch.no_grad():
        means = logits.mean(-1).masked_fill(~mask, 0)
        is_top1 = (logits.argmax(-1) == targets) & mask
    return _TokenOutput(
        log_probs=logps, entropy=entropy, mean_logits=means, is_top1=is_top1, label_mask=mask,
        aux_loss=outputs.get("aux_loss"),
    )  # fmt: skip


def _add_head_of_logits(model: PreTrainedModel) -> None:
    """Lets `model(..., labels=labels, fused_lm_head=True)` return a `_TokenOutput`.

    `shift_labels` are labels that stand beside the positions that predict them.
    """
    own = own_forward(model)

    @functools.wraps(type(model).forward)  # because `generate` checks its arguments against the signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return own(self, *args, **kwargs)
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        return _from_logits(own(self, *args, **kwargs), labels[:, 1:] if shifted is None else shifted)

    forward.has_token_head = True
    model.forward = types.MethodType(forward, model)


class _DPOTrainerOfLogits(trl.DPOTrainer):
    """TRL 1.14's trainer, whose loss calls the model as TRL 1.15's does."""

    def _get_per_token_logps_and_entropies(self, model, model_kwargs, input_ids, completion_mask):
        labels = input_ids.masked_fill(completion_mask == 0, _IGNORED)
        outputs = self._token_outputs = model(**model_kwargs, labels=labels, fused_lm_head=True)
        width = input_ids.size(1) - 1  # prompt-learning adapters put positions in front
        entropy = None if outputs.entropy is None else outputs.entropy[:, -width:]  # a reference has none
        return outputs.log_probs[:, -width:], entropy, outputs

    @contextmanager
    def _by_token_outputs(self) -> Iterator[None]:
        """Within the block, TRL's loss takes per-token numbers from the method above."""
        self.use_liger_kernel = True
        try:
            yield
        finally:
            self.use_liger_kernel = False

    def compute_ref_log_probs(self, model, inputs):
        with self._by_token_outputs():
            return self._compute_ref_log_probs(model, inputs)

    def _compute_loss(self, model, inputs, return_outputs):
        with self._by_token_outputs():
            loss = super()._compute_loss(model, inputs, return_outputs=False)
        self._log_logits(inputs["completion_mask"][:, 1:].bool())
        if not return_outputs:
            return loss
        with torch.no_grad():  # the caller reads logits
            return loss, model(
                **{name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
            )

    def _log_logits(self, mask: torch.Tensor) -> None:
        """Logs the metrics that TRL's chunked path leaves out."""
        metrics, gather = self._metrics["train" if self.model.training else "eval"], self.accelerator.gather_for_metrics
        outputs, width = self._token_outputs, mask.size(1)
        for side, means, kept in zip(
            ("chosen", "rejected"), outputs.mean_logits[:, -width:].chunk(2), mask.chunk(2), strict=True
        ):
            total, tokens = gather(means[kept].sum()).sum().item(), gather(kept.sum()).sum().item()
            metrics[f"logits/{side}"].append(total / tokens if tokens > 0 else 0.0)
        chosen = mask.chunk(2)[0]
        correct = gather((outputs.is_top1[:, -width:].chunk(2)[0] & chosen).sum()).sum()
        tokens = gather(chosen.sum()).sum()
        metrics["mean_token_accuracy"].append((correct / tokens).item() if tokens > 0 else 0.0)


#: Whether TRL's trainers give their models a fused LM head: since 1.15.
FUSED_HEAD = hasattr(utils, "add_fused_lm_head")
FusedCausalLMOutput = utils.FusedCausalLMOutput if FUSED_HEAD else _TokenOutput
DPOTrainer = trl.DPOTrainer if FUSED_HEAD else _DPOTrainerOfLogits


def add_missing_heads(trainer: trl.DPOTrainer) -> None:
    """Gives policy and reference the LM head that TRL gives them since 1.15. Models that have one stay as they are."""
    for model in (trainer.model, trainer.ref_model):
        if FUSED_HEAD or model is None:
            continue
        model = trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        if not hasattr(base.forward, "has_token_head"):
            _add_head_of_logits(base)
