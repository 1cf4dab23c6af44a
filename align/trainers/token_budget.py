"""Training steps in passes of at most so many tokens: a batch stays a number of pairs, and memory that of a number of tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler, Sampler
from transformers import Trainer

from ..errors import ConfigError
from ..logps import length_dependent
from ..packing import IGNORED
from ..tokens import truncate
from ..trl_versions import DPOTrainer, FusedCausalLMOutput
from .row_data import tables_of

#: Per-token fields of a model's outputs that TRL's loss and metrics read.
FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1")


class LongestFirst(Sampler[int]):
    """Another sampler's order, but the first epoch begins with the rows that take most memory.

    Args:
        sampler: gives every index once, or some of them.
        sizes: of every row.
        lead: how many of the largest rows come first.
        parts: processes that take batches in turn; each gets its share of the largest.
    """

    def __init__(self, sampler: Sampler[int], sizes: Sequence[int], lead: int, parts: int) -> None:
        self.sampler, self.epoch = sampler, 0
        largest = sorted(range(len(sizes)), key=lambda i: -sizes[i])[:lead]
        self.first = [index for part in range(parts) for index in largest[part::parts]]

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        if self.epoch:
            yield from self.sampler
            return
        order = list(self.sampler)
        there = set(order)
        first = [index for index in self.first if index in there]
        yield from first
        first = set(first)
        yield from (index for index in order if index not in first)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


@dataclass
class Part:
    """Some pairs of a batch.

    Args:
        pairs: their indices.
        columns: the positions of the batch that their rows reach into.
        share: of the batch's pairs.
        chosen_share: of the batch's chosen tokens.
        outputs: per field of `FIELDS`, (2 · pairs, columns - 1), set by the pass.
    """

    pairs: list[int]
    columns: slice
    share: float
    chosen_share: float
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)


def take(inputs: dict[str, Any], part: Part) -> dict[str, Any]:
    """The part of a batch: of what has a row per sequence, chosen ones first, or a row per pair."""
    count = len(inputs["input_ids"]) // 2
    rows = torch.tensor(part.pairs, device=inputs["input_ids"].device)
    both = torch.cat((rows, rows + count))
    taken = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            value = value[both if len(value) == 2 * count else rows]
            value = value[:, part.columns] if value.dim() == 2 else value
        taken[name] = value
    return taken


def put_together(parts: Sequence[Part], rows: int, width: int) -> dict[str, torch.Tensor]:
    """Fields (rows, width) of a batch from those of its parts, 0 where no part reaches."""
    whole: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, value in part.outputs.items():
            into = whole.setdefault(name, value.new_zeros(rows, width))
            pairs = torch.tensor(part.pairs, device=value.device)
            into[torch.cat((pairs, pairs + rows // 2)), part.columns.start : part.columns.stop - 1] = value
    return whole


@contextmanager
def metrics_aside(trainer: Trainer) -> Iterator[None]:
    """Lets the metrics of TRL's trainers go nowhere. Nothing is gathered for them: other processes have other passes."""
    accelerator = trainer.accelerator
    kept = trainer._metrics, trainer._total_train_tokens
    gathers = {name: vars(accelerator).get(name) for name in ("gather", "gather_for_metrics")}
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    accelerator.gather = accelerator.gather_for_metrics = lambda numbers: numbers
    try:
        yield
    finally:
        trainer._metrics, trainer._total_train_tokens = kept
        for name, gather in gathers.items():
            if gather is None:
                delattr(accelerator, name)
            else:  # within another's
                setattr(accelerator, name, gather)


class TokenBudget(DPOTrainer):
    """The half of `TokenDPOTrainer` that honours `max_tokens_per_batch`.

    A batch of pairs is cut into parts that the budget allows, each with a forward and a backward pass of its own. A
    part's loss counts by its share of the pairs, so the gradients add up to the batch's. Metrics are computed once,
    for the whole batch, from numbers that the passes left.
    """

    #: The part whose loss is being computed; `None` while a batch is done as a whole.
    _part: Part | None = None

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if self.args.max_tokens_per_batch is None or sampler is None:
            return sampler
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if type(sampler) is RandomSampler:  # accelerate would do this where it sees one, and does not see into ours
            sampler = SeedableRandomSampler(dataset, data_seed=self.args.data_seed)
        cut = self.args.max_length, self.args.truncation_mode
        sizes = [
            self._layout.size(
                *(truncate([*row["prompt_ids"], *row[f"{side}_ids"]], *cut) for side in ("chosen", "rejected")),
                len(row["prompt_ids"]),
            )
            for table in tables_of(dataset, ("prompt_ids", "chosen_ids", "rejected_ids"))
            for row in table.to_pylist()
        ]
        processes = self.accelerator.num_processes
        return LongestFirst(sampler, sizes, self._train_batch_size * processes, processes)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.args.max_tokens_per_batch is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._with_reference(self._prepare_inputs(inputs))
        parts = self._parts(inputs)
        losses = []
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            self._part = part
            try:
                with nullcontext() if last else self.accelerator.no_sync(model), metrics_aside(self):
                    losses.append(super().training_step(model, take(inputs, part), num_items_in_batch))
            finally:
                self._part = None
        rows, length = inputs["input_ids"].shape
        outputs = FusedCausalLMOutput(**put_together(parts, rows, length - 1))
        with torch.no_grad():
            self._loss(lambda **_: outputs, inputs, return_outputs=False)
        return torch.stack(losses).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return result if self._part is None else result * self._part.share

    def _check_token_budget(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ConfigError(
                "max_tokens_per_batch: under DeepSpeed and FSDP, processes take part in each other's passes, whose numbers "
                "would differ; unset it, or train with DDP"
            )
        if self.aux_loss_enabled:
            raise ConfigError(
                "max_tokens_per_batch cuts the batch that a router loss is computed of; set router_aux_loss_coef=0, or unset it"
            )

    @staticmethod
    def check_budget_settings(args: Any, config: Any) -> None:
        """Raises a ConfigError for what `max_tokens_per_batch` cannot be used with, before anything is computed."""
        optimizer = str(getattr(args.optim, "value", args.optim))
        if optimizer.endswith("layerwise") or optimizer in ("lomo", "adalomo"):
            raise ConfigError(
                f"max_tokens_per_batch runs several backward passes for one update, and optim={optimizer!r} updates within each; "
                "unset one of them"
            )
        if reason := length_dependent(config):
            raise ConfigError(f"max_tokens_per_batch: {reason}, so a batch cut in parts has other numbers; unset it")

    def _sft_by_tokens(self, logps: torch.Tensor, mask: torch.Tensor, part: Part) -> torch.Tensor:
        """What the term `sft` of a part lacks: it is a mean over tokens, so it counts by its share of tokens, not of pairs."""
        chosen = mask.chunk(2)[0]
        term = -(logps * mask).chunk(2)[0].sum() / chosen.sum()
        weight = self.loss_weights[self.loss_types.index("sft")]
        return weight * (part.chosen_share / part.share - 1) * term

    def _parts(self, inputs: dict[str, Any]) -> list[Part]:
        """The batch, cut by the budget; a pair is never cut, so one that is larger makes a part of its own."""
        # The loss of the released code of cDPO counts positions of padding.
        whole = getattr(self.args, "loss_aggregation", None) == "position"
        mask, padded = inputs["attention_mask"], whole and not self._layout.shares
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
        groups = self._layout.groups(inputs["input_ids"], torch.ones_like(mask) if padded else mask, labels)
        count, width = len(inputs["input_ids"]) // 2, inputs["input_ids"].shape[1]
        chosen = inputs["completion_mask"][:count, 1:].sum(1).tolist()
        used = (mask.view(2, count, width) != 0).any(0).cpu()
        parts = []
        for group in groups:
            reached = used[group].any(0).nonzero()
            columns = slice(0, width) if whole else slice(reached.min().item(), reached.max().item() + 1)
            share = sum(chosen[i] for i in group) / max(sum(chosen), 1)
            parts.append(Part(group, columns, len(group) / count, share))
        return parts
