"""`TokenDPOTrainer`: the one seam into TRL's `DPOTrainer`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from peft import PeftModel
from trl import DPOConfig

from ..checks import fit_fields
from ..damage import whole_folders
from ..errors import ConfigError
from ..losses import weighted_logps
from ..models import keep_trainable, vocab_size
from ..positions import check_positions
from ..processes import check_group
from ..records import PAIR_WEIGHT
from ..safety import no_pickles
from ..tokens import CompletionRule, label_values, pad_rows, shift_to_labels, truncate
from ..trl_versions import DataCollatorForPreference
from .adapters import check_layers, check_router_loss, checked_layers
from .loading import (
    check_without_images,
    config_of,
    default_output,
    processing_class_of,
    set_pad_token,
    source_of_trainer,
    tokenizer_of,
    whole_source,
    with_revision,
)  # fmt: skip
from .longest import LongestBatch, longest_pairs
from .pair_weights import PAIR_WEIGHTS, check_collator, check_weighable, groups_of
from .preference_data import SIDES, check_precomputable, column_names, has_reference, prepare_preference_dataset
from .prefix_sharing import PaddedRows, PrefixSharing, layout_of
from .preflight import Preflight, same_random_numbers
from .reference_check import check_reference_columns
from .reference_model import check_adapters, copy_partitioned, frozen_copy, is_partitioned
from .row_checks import check_not_empty, check_pair_lengths, data_sets
from .sharding import check_offloaded, check_sharding, launched_with_fsdp
from .token_budget import FIELDS, FusedCausalLMOutput, Part, TokenBudget, metrics_aside, take
from .token_reference import PREFIX, TokenReference
from .trackers import check_trackers
from .trl_check import check_trl, dpo_difference
from .weight_check import ConstantWeights

#: TRL's loss types and divergences, which it looks up within the first step.
LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass
class TokenDPOConfig(DPOConfig):
    """[`~trl.DPOConfig`] with six new fields. `use_weighting` and the loss type `aot` are refused, because they are not functions
    of the sequence log-ratios that the weights change.

    Args:
        check_reference (`bool`, defaults to `True`):
            Compares stored reference log-probabilities with the reference model on a few rows before training, so that
            numbers shifted by one position are found.
        cache_reference (`bool`, defaults to `True`):
            Whether reference log-probabilities that `precompute_ref_log_probs` computes are kept on disk (below
            `$ALIGN_CACHE`, by default `~/.cache/align`), and taken from there by any run with the same ids and weights.
        prefix_sharing (`bool`, defaults to `True`):
            Whether what both sides of a pair begin with is computed once. Numbers stay the same; where a model cannot do
            it, a warning says why, and rows are computed one by one.
        max_tokens_per_batch (`int`, *optional*):
            Tokens that a forward and backward pass holds at most, padding included. `per_device_train_batch_size` stays
            the number of pairs of a batch, and the loss a mean over them; a batch is done in as many passes as it takes,
            and the first batch has the longest pairs, so that memory runs out at once or never. Without gradients
            (evaluation, reference), passes hold no more either. A longer pair has a pass of its own.
        preflight (`bool`, defaults to `True`):
            Whether the longest batch has a forward and backward pass before the first step, so that what does not fit into
            memory is known at once; see [`~align.trainers.preflight.Preflight`].
        trl_completions (`bool`, defaults to `False`):
            Makes completions of text and messages as TRL does: all that the chat template writes after the prompt, turns of
            others included, without an end token where it writes none and with what it writes after one. By default a
            completion is what is sampled: the model's own turn, up to and including its end token; see
            [`~align.tokens.CompletionRule`].
    """

    check_reference: bool = field(
        default=True,
        metadata={"help": "Compare stored reference log-probabilities with the reference model before training."},
    )

    cache_reference: bool = field(
        default=True,
        metadata={
            "help": "Keep precomputed reference log-probabilities on disk, for other runs with the same weights."
        },
    )

    prefix_sharing: bool = field(default=True, metadata={"help": "Compute what both sides of a pair begin with once."})

    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={"help": "Tokens of a forward and backward pass; a batch is done in as many as it takes."},
    )

    preflight: bool = field(default=True, metadata={"help": "Take the longest batch once before the first step."})

    trl_completions: bool = field(
        default=False, metadata={"help": "Make completions of text and messages as TRL does, end tokens included."}
    )

    def __post_init__(self) -> None:
        fit_fields(self)
        super().__post_init__()
        for name, known in (("loss_type", LOSS_TYPES), ("f_divergence_type", DIVERGENCES)):
            given = getattr(self, name)
            if unknown := [one for one in ([given] if isinstance(given, str) else given) if one not in known]:
                raise ConfigError(f"{name} = {unknown[0]!r} must be one of {', '.join(known)}; correct the name")
        check_trackers(self.report_to)
        if self.use_weighting:
            raise ConfigError(
                "use_weighting=True reads unweighted log-probabilities; unset it, or train with TRL's DPOTrainer"
            )
        if "aot" in self.loss_type:
            raise ConfigError(
                "loss_type 'aot' sorts policy and reference ratios apart; use 'aot_unpaired' or another type"
            )
        if self.max_tokens_per_batch is not None:
            if self.max_tokens_per_batch < 1:
                raise ConfigError(f"max_tokens_per_batch = {self.max_tokens_per_batch} must be at least 1, or None")
            if "aot_unpaired" in self.loss_type:
                raise ConfigError(
                    "loss_type 'aot_unpaired' sorts all pairs of a batch; unset max_tokens_per_batch, which cuts the batch"
                )


@dataclass
class TokenPreferenceCollator(DataCollatorForPreference):
    """TRL's collator, plus token-level columns: for each of `columns` and each side that the examples have, the batch
    gets `token_<side>_<column>` of shape (B, L), laid out, truncated and padded like the side's `input_ids`, 0 outside
    the completions. Where the examples have a `weight`, the batch gets `token_pair_weights` of shape (B,)."""

    columns: tuple[str, ...] = ()

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        width = batch["input_ids"].shape[1]
        if PAIR_WEIGHT in examples[0]:
            batch[PAIR_WEIGHTS] = torch.tensor([float(example[PAIR_WEIGHT]) for example in examples])
        for name in [f"{side}_{column}" for side in SIDES for column in self.columns]:
            if name in examples[0]:
                rows = [label_values(example[name], len(example["prompt_ids"])) for example in examples]
                rows = [truncate(row, self.max_length, self.truncation_mode) for row in rows]
                batch[PREFIX + name] = pad_rows(rows, 0.0, width)
        return batch


def _vocab_size(model, args: TokenDPOConfig) -> int:
    """How many ids a model, loaded or named, can be fed."""
    return config_of(model, args).get_text_config().vocab_size if isinstance(model, str) else vocab_size(model)


class _TokenWeightedModel:
    """What TRL's loss calls in place of the model: the same outputs, with log-probabilities whose sum over the tokens
    exceeds the reference's by Σ_t w_t Δ_t.

    Args:
        call: takes what TRL gives the model.
    """

    def __init__(self, call: Callable[..., Any], ref_logps: torch.Tensor, weights: torch.Tensor) -> None:
        self.call = call
        self.ref_logps = ref_logps
        self.weights = weights
        self.logps: torch.Tensor | None = None  # (2B, T), unweighted, set by the call
        self.fields: dict[
            str, torch.Tensor
        ] = {}  # all per-token fields, (2B, T) each, without gradient, set by the call
        self.aux_loss: torch.Tensor | None = None  # of a model's router, set by the call

    def __call__(self, **kwargs):
        outputs = self.call(**kwargs)
        if kwargs.get("fused_lm_head"):
            # Prompt-learning adapters prepend positions; those of the real tokens are the last ones.
            width = self.weights.size(1)
            self.logps = outputs.log_probs[:, -width:]
            self.fields = {n: outputs[n][:, -width:].detach() for n in FIELDS if outputs.get(n) is not None}
            outputs.log_probs = weighted_logps(self.logps, self.ref_logps, self.weights)
            self.aux_loss = outputs.get("aux_loss")
        return outputs

    def rows(self, rows: torch.Tensor) -> _TokenWeightedModel:
        """Some rows of what was called, without a router's loss, which is the whole batch's."""
        fields = {name: value[rows] for name, value in self.fields.items()} | {"log_probs": self.logps[rows]}
        outputs = FusedCausalLMOutput(**fields)
        outputs.aux_loss = self.logps.new_zeros(())
        return _TokenWeightedModel(lambda **_: outputs, self.ref_logps[rows], self.weights[rows])


class TokenDPOTrainer(Preflight, TokenBudget, TokenReference):
    """DPO with a weight for every token: TRL's Σ_t Δ_t becomes Σ_t w_t Δ_t, and nothing else changes.

    The seam is `_compute_loss`: TRL's own runs on a model whose per-token log-probabilities carry the weights, so every
    loss type that is a function of sequence log-ratios, every f-divergence, `ld_alpha` and every metric stays TRL's.
    With all weights 1 it is TRL's `DPOTrainer`, bit for bit.

    A method is a subclass that names its columns in `token_columns` and overrides `token_weights`.

    Data sets have text (`prompt`, `chosen`, `rejected`, plain or conversational) or ids (`prompt_ids`, `chosen_ids`,
    `rejected_ids`) with token-level columns: `chosen_weights`, `rejected_weights`, and `chosen_ref_logps`,
    `rejected_ref_logps` (nats), one number per id, EOS included. Without reference columns the reference is computed
    token by token: by switching the adapter off, or with TRL's `ref_model` in full fine-tuning.

    A column `weight`, one finite number of 0 or more per pair, scales the pair's loss: (1/B) Σ_i weight_i f_i. B is the
    number of pairs in the batch. A pair of weight 0 adds exactly 0. All 1 equals no column, bit for bit.

    Text rows without `prompt` have it as the beginning that chosen and rejected share, as in TRL.

    Args:
        See [`~trl.DPOTrainer`].

    Raises:
        RecordError, MissingColumnError, ConfigError: before training, naming the row, the value and the remedy.
    """

    _tag_names = ["trl", "dpo", "align", "token-dpo"]
    _name = "token-weighted DPO"
    #: Token-level columns, without `chosen_` / `rejected_`, that `token_weights` reads.
    token_columns: tuple[str, ...] = ("weights",)
    config_class: type[TokenDPOConfig] = TokenDPOConfig

    def __init__(
        self, model, ref_model=None, args=None, data_collator=None, train_dataset=None, eval_dataset=None,
        processing_class=None, compute_metrics=None, callbacks=None, optimizers=(None, None), quantization_config=None,
        peft_config=None,
    ) -> None:  # fmt: skip
        if args is None:
            args = self.config_class(default_output(model, type(self).__name__.removesuffix("Trainer")))
        if not isinstance(args, self.config_class):
            raise ConfigError(
                f"args is a {type(args).__name__}; {type(self).__name__} needs {self.config_class.__name__}"
            )
        check_trl(args, partial(dpo_difference, TokenDPOTrainer))
        check_group(args.world_size)
        for dataset_name, dataset in data_sets(train_dataset, eval_dataset):
            check_not_empty(dataset, dataset_name)
            check_weighable(dataset, dataset_name, args)
        if processing_class is None:
            processing_class = processing_class_of(model, args)
        tokenizer = tokenizer_of(processing_class)
        for dataset_name, dataset in data_sets(train_dataset, eval_dataset):
            check_without_images(processing_class, column_names(dataset), dataset_name, type(self).__name__)
        if type(data_collator) is DataCollatorForPreference:  # others are tried on the first row, by `check_collator`
            self._check_plain_collator(data_collator, args, train_dataset, eval_dataset)
        if data_collator is None:
            set_pad_token(tokenizer, args)
            data_collator = TokenPreferenceCollator(
                pad_token_id=tokenizer.pad_token_id,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                pad_to_multiple_of=args.pad_to_multiple_of,
                columns=(*self.token_columns, "ref_logps"),
            )
        if args.max_tokens_per_batch is not None:
            self.check_budget_settings(args, config_of(model, args))
        #: Rows, dropped and truncated rows of every data set, by its name.
        self.data_report: dict[str, dict[str, int]] = {}
        self._rule = CompletionRule.of(
            tokenizer, getattr(model, "generation_config", model), args.trl_completions, source_of_trainer(args)
        )
        if isinstance(ref_model, str):
            raise ConfigError(f"ref_model = {ref_model!r} must be a model; load it, as with align.load_model")
        models = [model] if ref_model is None else [model, ref_model]
        self._vocabulary = min(len(tokenizer), *(_vocab_size(each, args) for each in models))
        stored = has_reference(train_dataset)
        if stored and ref_model is not None:
            raise ConfigError(
                "the data set has reference log-probabilities and ref_model is given; leave one of them out"
            )
        peft_config = with_revision(peft_config, model, args)
        adapted = peft_config is not None or isinstance(model, PeftModel)
        # In full fine-tuning, stored references stand in for TRL's precomputed sums, so that it loads no second model.
        args = copy.copy(args)  # the caller's own may serve another trainer
        args.precompute_ref_log_probs = args.precompute_ref_log_probs or (stored and not adapted)
        if args.precompute_ref_log_probs:
            for dataset_name, dataset in data_sets(train_dataset, eval_dataset):
                check_precomputable(dataset, dataset_name)
        if peft_config is None:
            check_offloaded(model)
        copied = ref_model is None and not adapted and self._copies_reference(model, args)
        if copied:
            ref_model = frozen_copy(model)
        self._adapted_before = ref_model is None and isinstance(model, PeftModel)
        if self._adapted_before:
            check_adapters(model)
        with (
            no_pickles(model, ref_model, subfolder=source_of_trainer(args).get("subfolder")),
            whole_folders(model, ref_model),
            whole_source(model, args),
            checked_layers(peft_config) as layers,
        ):
            super().__init__(
                model=model, ref_model=ref_model, args=args, data_collator=data_collator, train_dataset=train_dataset,
                eval_dataset=eval_dataset, processing_class=processing_class, compute_metrics=compute_metrics, callbacks=callbacks,
                optimizers=optimizers, quantization_config=quantization_config, peft_config=peft_config,
            )  # fmt: skip
        if not isinstance(model, str) and ref_model is None and self.ref_model is not None:
            copy_partitioned(model, self.ref_model)
        if copied and args.precompute_ref_log_probs:
            self.ref_model = None  # its numbers are in the data set
        self._complete_model()
        check_layers(self.model, layers)
        check_router_loss(self)
        for dataset_name, dataset in data_sets(self.train_dataset, self.eval_dataset):
            check_pair_lengths(self, dataset, dataset_name)
            check_collator(self, dataset, dataset_name)
        check_sharding(self)
        keep_trainable(self.model)  # evaluation runs in eval mode
        if self.aux_loss_enabled and getattr(args, "loss_aggregation", None) == "position":
            raise ConfigError("loss_aggregation='position' has no place for a router loss; set router_aux_loss_coef=0")
        if args.max_tokens_per_batch is not None:
            self._check_token_budget()
        self._layout, self._ref_layout  # noqa: B018 (a model that cannot share says so now)
        self._constant_weights = ConstantWeights(self)
        with same_random_numbers():  # a collator of the user's may draw some
            self._constant_weights.look_at_rows()
            if stored and args.check_reference and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
                check_reference_columns(self)
        for counts in self.data_report.values():
            if "rows" not in counts:  # a stream's first row was looked at, and begins the training again
                counts.update(dict.fromkeys(counts, 0))

    def _check_plain_collator(self, collator: Any, args: TokenDPOConfig, train: Any, evaluation: Any) -> None:
        """Raises a ConfigError where a collator that leaves weights out of the batch would have some to leave out."""
        columns = [f"{side}_{column}" for side in SIDES for column in (*self.token_columns, "ref_logps")] + [
            PAIR_WEIGHT
        ]
        there = [
            name for _, dataset in data_sets(train, evaluation) for name in column_names(dataset) if name in columns
        ]
        if there or args.precompute_ref_log_probs:
            given = there[0] if there else "precompute_ref_log_probs=True"
            raise ConfigError(
                f"data_collator is a {type(collator).__name__}, which leaves columns of ours ({given}) out of the batch, and plain "
                "DPO would be trained; derive it from TokenPreferenceCollator"
            )

    @staticmethod
    def _copies_reference(model, args: TokenDPOConfig) -> bool:
        """Whether a copy of a model is needed: TRL precomputes with the model itself, but where FSDP shards it. Under ZeRO-3, what it
        loads is sharded as it is loaded, and gets the model's weights after that."""
        if isinstance(model, str) or is_partitioned(model):
            return False
        return launched_with_fsdp() or not args.precompute_ref_log_probs

    def token_weights(
        self, chosen: dict[str, torch.Tensor], rejected: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The method's rule: from token-level columns to weights.

        Args:
            chosen, rejected: per column of `token_columns` that the data has, a (B, T) tensor beside the shifted
                labels; and `mask`, (B, T) float, 1 at completion tokens.

        Returns:
            w⁺ and w⁻, (B, T) each; values outside the completions do not matter.
        """
        return chosen.get("weights", chosen["mask"]), rejected.get("weights", rejected["mask"])

    def constant_weights(self) -> tuple[str, str]:
        """What a training is called that has one weight for all tokens and should not, and a sentence on what to do."""
        return self._name, "Give weights that differ between tokens, or train DPO: leave the columns out"

    @cached_property
    def _layout(self) -> PrefixSharing | PaddedRows:
        """How the policy is called; made on first use, which is inside of TRL's constructor where it precomputes."""
        return layout_of(self, self.model)

    @cached_property
    def _ref_layout(self) -> PrefixSharing | PaddedRows:
        if self.ref_model is None or not self._layout.shares:
            return self._layout
        return layout_of(self, self.ref_model)

    def longest_batches(self) -> list[LongestBatch]:
        return longest_pairs(self)

    def required_columns(self, args: TokenDPOConfig) -> tuple[str, ...]:
        """Token-level columns, prefixed, that every data set must have."""
        return ()

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        check_not_empty(dataset, dataset_name)
        check_weighable(dataset, dataset_name, args)
        dataset, self.data_report[dataset_name] = prepare_preference_dataset(
            dataset,
            self._tokenizer,
            args,
            dataset_name,
            self._vocabulary,
            (*self.token_columns, "ref_logps"),
            self.required_columns(args),
            self._rule,
            parts=self._is_vlm,
        )
        if hasattr(self, "data_collator"):  # data given to `evaluate`; the constructor checks earlier data sets
            check_collator(self, dataset, dataset_name)
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        # The Trainer drops what is not named here, without a word: the weights among it.
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns = (*self.token_columns, "ref_logps")
            self._signature_columns += [f"{side}_{column}" for side in SIDES for column in columns]
            self._signature_columns.append(PAIR_WEIGHT)

    def _weights(self, inputs: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
        """(2B, T) weights of a batch, by the method's rule."""
        sides = [{"mask": part} for part in mask.chunk(2)]
        for side, columns in zip(SIDES, sides, strict=True):
            for column in self.token_columns:
                if f"{PREFIX}{side}_{column}" in inputs:
                    columns[column] = shift_to_labels(inputs[f"{PREFIX}{side}_{column}"])
        return torch.cat(self.token_weights(*sides))

    def _compute_loss(self, model, inputs, return_outputs):
        if self._positions is not None:  # rows of a stream are not known before
            tokens = int(inputs["attention_mask"].sum(1).max())
            remedy = f"set max_length to {self._positions} or less"
            check_positions(tokens, self._positions, "the longest row of a batch", remedy)
        return self._loss(partial(self._layout, model), inputs, return_outputs)

    def _loss(self, call: Callable[..., Any], inputs: dict[str, Any], return_outputs: bool):
        """TRL's loss, weighted.

        Args:
            call: takes what TRL gives the model.
            inputs: a batch.
        """
        mode = "train" if self.model.training else "eval"
        ref_logps, ref_sums = self._reference(inputs)
        mask = shift_to_labels(inputs["completion_mask"]).to(ref_logps.dtype)
        weights = self._weights(inputs, mask)
        if self.model.training and self._part is None:
            self._constant_weights.look_at_batch(inputs)
        seam = _TokenWeightedModel(call, ref_logps, weights)
        trl_inputs = {key: value for key, value in inputs.items() if not key.startswith(PREFIX)}
        trl_inputs["ref_chosen_logps"], trl_inputs["ref_rejected_logps"] = ref_sums.chunk(2)
        loss, *outputs = self._loss_through(seam, trl_inputs, self._part, return_outputs)
        logratios = (seam.logps - ref_logps) * mask
        self.of_rows = (weights * logratios).detach().masked_fill(mask == 0, 0).sum(1)
        if self._part is not None:
            self._part.outputs = seam.fields
        self._log_token_metrics(mode, seam.logps, logratios, weights, mask)
        if PAIR_WEIGHTS in inputs:
            loss = self._weigh_pairs(loss, seam, trl_inputs, inputs[PAIR_WEIGHTS])
            of_pairs = self.accelerator.gather(inputs[PAIR_WEIGHTS])
            self._metrics[mode]["weights/pairs"].append(of_pairs.mean().item())
        return (loss, *outputs) if return_outputs else loss

    def _loss_through(
        self, seam: _TokenWeightedModel, inputs: dict[str, Any], part: Part | None, return_outputs: bool = False
    ) -> tuple:
        """TRL's loss of what the seam gives, finished; and its outputs, where they are asked for.

        Args:
            inputs: what TRL reads, the reference's sums among it.
            part: of a batch, whose loss is a mean over all of its pairs.
        """
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            result = super()._compute_loss(seam, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        loss, *outputs = result if return_outputs else (result,)
        mask = shift_to_labels(inputs["completion_mask"]).to(seam.ref_logps.dtype)
        loss = self._finish_loss(loss, (seam.logps - seam.ref_logps) * mask, seam.weights, mask)
        if "sft" in self.loss_types and part is not None:
            loss = loss + self._sft_by_tokens(seam.logps, mask, part)
        return loss, *outputs

    def _weigh_pairs(
        self, loss: torch.Tensor, seam: _TokenWeightedModel, inputs: dict[str, Any], pair_weights: torch.Tensor
    ) -> torch.Tensor:
        """(1/B) Σ_i weight_i f_i: TRL's loss of the pairs of each weight, scaled, and added up.

        No model is called, because the seam has the log-probabilities. A router's loss belongs to the batch and is not scaled.

        Args:
            loss: of the batch without weights, which it is where all of them are 1.
            pair_weights: (B,).
        """
        if (pair_weights == 1).all():
            return loss
        total = seam.logps[:0].sum()  # 0 with a gradient, because every pair of a batch may have weight 0
        with metrics_aside(self):
            for weight, share, part in groups_of(pair_weights, inputs["completion_mask"], self._part):
                rows = torch.tensor(part.pairs, device=seam.logps.device)
                some = seam.rows(torch.cat((rows, rows + len(pair_weights))))
                total = total + weight * share * self._loss_through(some, take(inputs, part), part)[0]
        return total + self.router_aux_loss_coef * seam.aux_loss if self.aux_loss_enabled else total

    def _finish_loss(self, loss, logratios: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor):
        """Changes TRL's loss. Here: takes the weights out of the term `sft`, which is a likelihood and not a log-ratio.

        It is called for all pairs of a batch and, where pairs have weights, for the pairs of each weight. So what it adds
        must be a mean over pairs.

        Args:
            loss: TRL's, of the weighted log-ratios.
            logratios, weights, mask: (2B, T), chosen rows first.
        """
        if "sft" in self.loss_types:
            chosen = mask.chunk(2)[0]
            added = ((weights - 1.0) * logratios).chunk(2)[0].sum() / chosen.sum()
            loss = loss + self.loss_weights[self.loss_types.index("sft")] * added
        return loss

    def _log_token_metrics(self, mode: str, logps, logratios, weights, mask) -> None:
        """Logs, per side, the mean weight of its tokens, the share of negative weights and the rewards without weights, and
        puts unweighted sums where TRL logs log-probabilities. All tensors are (2B, T), chosen rows first."""
        metrics = self._metrics[mode]
        for side, side_logps, side_logratios, side_weights, side_mask in zip(
            SIDES, logps.detach().chunk(2), logratios.detach().chunk(2), weights.chunk(2), mask.chunk(2), strict=True
        ):
            sums = self.accelerator.gather((side_logps * side_mask).sum(1))
            if self.ld_alpha is None:
                metrics[f"logps/{side}"][-1] = sums.mean().item()
            sums_of_weights = (
                (side_weights * side_mask).sum(),
                ((side_weights < 0) * side_mask).sum(),
                side_mask.sum(),
            )
            totals = self.accelerator.gather(torch.stack(sums_of_weights))
            weight, negative, tokens = totals.view(-1, 3).sum(0).tolist()
            metrics[f"weights/{side}"].append(weight / max(tokens, 1.0))
            metrics[f"weights/{side}_negative"].append(negative / max(tokens, 1.0))
            rewards = self.accelerator.gather(self.beta * (side_logratios * side_mask).sum(1))
            metrics[f"rewards/{side}_unweighted"].append(rewards.mean().item())
