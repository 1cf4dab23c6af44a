"""The reference's log-probabilities, token by token: of a batch, or of whole data sets beforehand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from trl import DPOTrainer
from trl.models import prepare_deepspeed

from ..progress import progress
from ..tokens import shift_to_labels, truncate
from .loading import disable_functional_dropout, name_bias
from .preference_data import SIDES, check_precomputable, has_reference, pad_columns
from .reference_cache import ReferenceCache, default_folder, row_key, weights_key
from .reference_model import complete_reference_adapter
from .row_checks import check_pair_lengths

if TYPE_CHECKING:
    from tqdm import tqdm

logger = get_logger(__name__)

#: What the batch calls a token-level column of the data set.
PREFIX = "token_"


class TokenReference(DPOTrainer):
    """The half of `TokenDPOTrainer` that knows the reference per token: from columns, from the cache, or by running it."""

    #: Whether the model was passed with an adapter, whose copy is the reference.
    _adapted_before: bool = False

    def _precompute_ref_logps(self, dataset, name, batch_size):
        # TRL's stores one sum per side; ours stores the tokens' numbers, so that weights can be applied to them.
        if has_reference(dataset):
            return dataset
        check_precomputable(dataset, name)
        check_pair_lengths(self, dataset, name)
        self._complete_model()
        keys = self._reference_keys(dataset)
        self._layout, self._ref_layout  # noqa: B018 (tried with the adapter on)
        cache = self._reference_cache() if self.accelerator.is_main_process else None
        # One process looks up for all: folders differ from machine to machine, and others may be writing.
        known = [[[None if cache is None else cache.get(key) for key in row] for row in keys]]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(known)
        known = known[0]
        missing = [i for i, row in enumerate(known) if None in row]
        logger.info(
            f"{name} data set: reference of {len(missing)} rows to compute, of {len(keys) - len(missing)} known"
        )
        if missing:
            counted = {"total": len(keys), "done": len(keys) - len(missing)}
            with progress(name=f"reference of {name} data set", hidden=self.args.disable_tqdm, **counted) as bar:
                computed = self._compute_ref_logps(dataset.select(missing), batch_size, bar)
            for j, i in enumerate(missing):
                known[i] = [computed[side][j] for side in SIDES]
        if cache is not None:
            cache.add((keys[i][n], known[i][n]) for i in missing for n in range(len(SIDES)))
        rows = {side: [row[n] for row in known] for n, side in enumerate(SIDES)}
        return pad_columns(dataset, rows, "ref_logps", self.args.truncation_mode)

    def _complete_model(self) -> None:
        """Does what TRL leaves out, before the first pass: within TRL's constructor, where that precomputes."""
        name_bias(self.model)
        if self.args.disable_dropout:
            for model in (self.model, self.ref_model):
                if model is not None:
                    disable_functional_dropout(model)
        if self._adapted_before:
            complete_reference_adapter(self.model)

    def _reference_keys(self, dataset) -> list[tuple[bytes, bytes]]:
        """Per row, the cache's keys of its chosen and rejected side, truncated as the collator does."""
        keys = []
        for row in dataset.select_columns(["prompt_ids", *(f"{side}_ids" for side in SIDES)]):
            sides = []
            for side in SIDES:
                ids = truncate(
                    [*row["prompt_ids"], *row[f"{side}_ids"]], self.args.max_length, self.args.truncation_mode
                )
                mask = [0] * len(row["prompt_ids"]) + [1] * len(row[f"{side}_ids"])
                sides.append(row_key(ids, sum(truncate(mask, self.args.max_length, self.args.truncation_mode))))
            keys.append(tuple(sides))
        return keys

    def _reference_cache(self) -> ReferenceCache | None:
        """Of this reference's weights; `None` where each process has only a part of them."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or not self.args.cache_reference:
            return None
        reference = self.model if self.ref_model is None else self.ref_model
        off = [name for name in getattr(reference, "peft_config", {}) if name != "ref"]
        key = weights_key(
            self.accelerator.unwrap_model(reference, keep_torch_compile=False), off, self.accelerator.mixed_precision
        )
        return ReferenceCache(default_folder(), key)

    def _compute_ref_logps(self, dataset, batch_size: int, bar: tqdm) -> dict[str, list[list[float]]]:
        """Per side and row of the data set, the reference log-probabilities of the completion tokens that are kept."""
        loader = self.accelerator.prepare(
            torch.utils.data.DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator, shuffle=False)
        )
        rows: dict[str, list[list[float]]] = {"chosen": [], "rejected": []}
        if self.ref_model is None and self.is_deepspeed_enabled and self._precompute_engine is None:
            # Before `train`, nothing gathers its weights.
            self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)
        for batch in loader:
            before, (logps, _) = len(rows[SIDES[0]]), self._reference(batch, self._precompute_engine)
            # A row's completion lies wherever the truncation left it, so the mask travels with the numbers.
            stacked = torch.stack((logps, shift_to_labels(batch["completion_mask"]).to(logps.dtype)), dim=-1)
            for side, part in zip(SIDES, stacked.chunk(2), strict=True):
                part = self.accelerator.pad_across_processes(part, dim=1)
                for row in self.accelerator.gather_for_metrics(part).cpu():
                    rows[side].append(row[row[:, 1] > 0, 0].tolist())
            bar.update(len(rows[SIDES[0]]) - before)
        return rows

    def _reference(self, inputs: dict[str, Any], reference: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Reference log-probabilities of a batch: per token (2B, T), and TRL's sums (2B,).

        Args:
            reference: what to call in place of the reference model, or of the policy, if there is none.
        """
        stored = [inputs[f"{PREFIX}{side}_ref_logps"] for side in SIDES if f"{PREFIX}{side}_ref_logps" in inputs]
        inputs = {key: value for key, value in inputs.items() if not key.startswith(PREFIX)}
        captured = SimpleNamespace(log_probs=None)
        # A compiled model has no truth value, so `or` would raise.
        reference = next(one for one in (reference, self.ref_model, self.model) if one is not None)

        def score(**kwargs):
            captured.log_probs = (
                shift_to_labels(torch.cat(stored)) if stored else self._ref_layout(reference, **kwargs).log_probs
            )
            return captured

        # TRL's own method, for its way of finding the reference and of summing (`ld_alpha`).
        sums = torch.cat(self.compute_ref_log_probs(score, inputs))
        return captured.log_probs[:, -shift_to_labels(inputs["input_ids"]).size(1) :].detach(), sums

    def _with_reference(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with the reference's numbers among its token-level columns."""
        if f"{PREFIX}chosen_ref_logps" in inputs:
            return inputs
        logps, _ = self._reference(inputs)
        columns = torch.nn.functional.pad(logps, (1, 0)).chunk(2)  # nothing predicts the first token
        return inputs | {f"{PREFIX}{side}_ref_logps": part for side, part in zip(SIDES, columns, strict=True)}
