"""BASH and RAC on TRL's `SFTTrainer`: what is trained on holds the model's own tokens, drawn every few updates.

One seam, `get_batch_samples`, where the Trainer collects the batches of an update: the batches of the next `refresh_steps`
updates are read ahead, their contexts are drawn at once with the policy of that moment, and handed out. Loss, metrics,
collator and everything after are TRL's.
"""

from __future__ import annotations

import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset

from ..contexts import MixedRow, OwnTokens, draw_contexts, mixed_row
from ..errors import ConfigError, RecordError, RecordFileError
from ..mix import IGNORED, Example, epsilon_at
from ..models import keep_trainable
from ..positions import check_positions
from ..progress import progress
from ..rac import CorrectionSettings, draw_corrections, longest_correction, split_source
from ..records import Record, read_records, row_name, write_records
from .longest import LongestBatch, collate, collate_first, longest_rows, row_id
from .preflight import same_random_numbers
from .row_checks import made_when_read
from .sft import GuardedSFTConfig, GuardedSFTTrainer
from .trl_check import check_trl, sft_difference
from .whole_weights import whole_weights

#: In a checkpoint's folder: contexts that are drawn and not yet trained on.
CONTEXTS_FILE = "contexts.jsonl"


@dataclass
class SelfGeneratedConfig(GuardedSFTConfig):
    """What BASH and RAC have in common.

    Args:
        refresh_steps: updates whose contexts are drawn at once. A window ends with its epoch.
        generation_tokens: budget of a batch that is drawn, padding included.
        contexts_limit: windows whose contexts are kept in `output_dir/contexts`, to be looked at; `None` keeps all, 0 none. A
            checkpoint holds those that it needs to go on.
        preflight: whether the longest batch, with contexts as long as they can get, has a forward and backward pass before the
            first step; see [`~align.trainers.preflight.Preflight`]. Drawing keeps to `generation_tokens` and is not tried.
    """

    refresh_steps: int = field(default=16, metadata={"help": "Updates whose contexts are drawn at once."})
    generation_tokens: int = field(default=16384, metadata={"help": "Token budget of a batch that is drawn."})
    contexts_limit: int | None = field(default=2, metadata={"help": "Windows kept in output_dir/contexts."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("refresh_steps", 1), ("generation_tokens", 1), ("contexts_limit", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name} = {value} must be at least {low}")
        for name in ("packing", "padding_free", "eval_packing"):
            if getattr(self, name):
                raise ConfigError(
                    f"{name} is not supported by {type(self).__name__}: contexts are drawn per row; set it to False"
                )


@dataclass
class BASHConfig(SelfGeneratedConfig):
    """Settings of batch-scheduled sampling; defaults are ours, the paper's mixing rate was not at hand.

    Args:
        epsilon: chance that a context token is the model's own.
        epsilon_schedule: see `align.mix.epsilon_at`.
        generation, passes, temperature: see `align.contexts.OwnTokens`.
    """

    epsilon: float = field(default=0.25, metadata={"help": "Chance of an own token in the context."})
    epsilon_schedule: str = field(default="constant", metadata={"help": "constant, linear or inverse_sigmoid."})
    generation: str = field(default="parallel", metadata={"help": "parallel or autoregressive."})
    passes: int = field(default=1, metadata={"help": "Passes of parallel draws."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the draws."})

    def __post_init__(self) -> None:
        super().__post_init__()
        epsilon_at(0, 1, self.epsilon, self.epsilon_schedule)
        self.own_tokens()

    def own_tokens(self) -> OwnTokens:
        """The settings of the draws."""
        return OwnTokens(self.generation, self.passes, self.temperature, self.generation_tokens)


@dataclass
class RACConfig(SelfGeneratedConfig):
    """Settings of reference-answer-based correction: see `align.rac.CorrectionSettings`."""

    cue: str = field(default=CorrectionSettings.cue, metadata={"help": "Text between own tokens and reference."})
    prefix_fraction: list[float] = field(  # parsers of command lines read a list, and no tuple
        default_factory=lambda: list(CorrectionSettings.prefix_fraction),
        metadata={"help": "Least and largest share of a generation that is kept."},
    )
    keep_correct_share: float = field(
        default=CorrectionSettings.keep_correct_share,
        metadata={"help": "Share of right generations that are left uncorrected."},
    )
    max_new_tokens: int = field(default=512, metadata={"help": "Longest generation."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the generations."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prefix_fraction = tuple(self.prefix_fraction)
        self.corrections()

    def corrections(self) -> CorrectionSettings:
        """The settings of the examples."""
        return CorrectionSettings(
            self.cue, self.prefix_fraction, self.keep_correct_share, self.max_new_tokens, self.temperature,
            self.max_length, self.generation_tokens,
        )  # fmt: skip


@dataclass
class Place:
    """One example of a window.

    Args:
        step: the update it belongs to.
        position: its place in that update's global batch: the same in any number of processes.
        source: the ground truth.
    """

    step: int
    position: int
    source: Example


class SelfGeneratedTrainer(GuardedSFTTrainer):
    """Reads ahead, has contexts drawn, stores them; subclasses say how in `draw`."""

    config_class = SelfGeneratedConfig

    @wraps(GuardedSFTTrainer.__init__)
    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        keep_trainable(self.model)  # contexts are drawn in eval mode
        if self._is_vision_dataset:
            raise ConfigError(f"{type(self).__name__} does not support images; use text data")
        if self.is_deepspeed_enabled:
            raise ConfigError(
                f"{type(self).__name__} draws with the whole model in every process; DeepSpeed, which shards it, is not "
                "supported: launch with recipes/accelerate/ddp.yaml or fsdp2.yaml"
            )
        self._iterator: Iterator | None = None
        self._held: list[dict[str, Any]] = []  # read ahead of the window
        self._ready: list[dict[str, Any]] = []  # micro-batches of the window that are still to be trained on
        self._records: list[Record] = []  # their contexts, those of all processes
        self._stored: list[Record] = []  # of the checkpoint
        self._done: Callable[[int], Any] = lambda count: None  # moves the bar of a window that is drawn
        with same_random_numbers():
            self.check_collator(collate_first(self, self.train_dataset)[1])

    def check_collator(self, batch: Mapping[str, Any]) -> None:
        """Raises a ConfigError where the collator, which made `batch`, cannot be used. Called once, before training."""
        self._check_batch(batch)

    def _check_batch(self, batch: Mapping[str, Any]) -> None:
        """Raises a ConfigError where contexts cannot be put into a batch of the collator's."""
        shapes = {
            name: tuple(getattr(batch.get(name), "shape", ())) for name in ("input_ids", "labels", "attention_mask")
        }
        if len(set(shapes.values())) > 1 or len(shapes["input_ids"]) != 2:
            raise ConfigError(
                f"data_collator = {type(self.data_collator).__name__} must give input_ids, labels and attention_mask of one shape "
                f"(rows, tokens), into which {type(self).__name__} puts own tokens, not {shapes}; correct it, or leave it out"
            )

    @staticmethod
    def check_seam(args: SelfGeneratedConfig) -> None:
        check_trl(args, partial(sft_difference, BASHTrainer, epsilon=0.0))

    @abstractmethod
    def draw(self, places: Sequence[Place]) -> list[Record]:
        """Trained-on examples of a window's places, all processes' together: records with `input_ids` and `labels`, and what
        else is worth a look, the same in every process."""

    def longest_example(self, source: Example, name: str) -> Example:
        """The longest example that can be made of a row's ground truth: here, contexts are as long as it is."""
        return source

    def check_source(self, source: Example, name: str) -> None:
        """Raises a RecordError where what is drawn for a row's ground truth has more tokens than the model has positions."""
        remedy = f"set max_length to {self._positions} or less"
        check_positions(len(source.input_ids), self._positions, f"{name}: its length", remedy)

    def with_examples(self, batch: Mapping[str, Any], examples: Sequence[Example]) -> dict[str, Any]:
        """A batch with examples in place of its ground truth. Here they are as long as it, and the rest stays."""
        ids, masks = batch["input_ids"].clone(), batch["attention_mask"].bool()
        for row, mask, example in zip(ids, masks, examples, strict=True):
            row[mask] = torch.tensor(example.input_ids, dtype=ids.dtype, device=ids.device)
        return {**batch, "input_ids": ids}

    def longest_batches(self) -> list[LongestBatch]:
        longest = longest_rows(self)
        rows, inputs = collate(self, longest)
        names = [row_id(row, place) for row, place in zip(rows, longest, strict=True)]
        sources = [place.source for place in self._places(self.state.global_step, 0, inputs)]
        examples = [self.longest_example(source, name) for source, name in zip(sources, names, strict=True)]
        inputs = self.with_examples(inputs, examples)
        found = [{"id": name, "tokens": [len(e.input_ids)]} for name, e in zip(names, examples, strict=True)]
        return [LongestBatch(inputs, found)]

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: Any) -> tuple[list, Any]:
        if epoch_iterator is not self._iterator:
            self._iterator, self._held, self._ready = epoch_iterator, [], []
        if not self._ready:
            self._read_window()
        batches, self._ready = self._ready[:num_batches], self._ready[num_batches:]
        return super().get_batch_samples(iter(batches), num_batches, device)

    def _read_window(self) -> None:
        """Reads the batches of the next updates and puts contexts into them."""
        first = self.state.global_step
        stored, self._stored = [row for row in self._stored if row["step"] >= first], []
        steps = 1 + max(row["step"] for row in stored) - first if stored else self.args.refresh_steps
        wanted = min(steps, self.state.max_steps - first) * self.args.gradient_accumulation_steps
        # One more than is needed: where that is an epoch's last, the loader is at its end, and says so to whoever gathers
        # metrics, only when it has been asked for another.
        batches = self._held + list(islice(self._iterator, wanted + 1 - len(self._held)))
        if self.accelerator.gradient_state.end_of_dataloader:
            batches += islice(self._iterator, 1)  # the one more was the last: there is none, and now the loader knows
        batches, self._held = batches[:wanted], batches[wanted:]
        places = [self._places(first, number, batch) for number, batch in enumerate(batches)]
        mine = [place for of_batch in places for place in of_batch]
        everyones = sorted(gather_object(mine), key=lambda place: (place.step, place.position))
        if not everyones:
            return  # a stream that ends before it was expected to
        self._records = self._found(stored, everyones) or self._drawn(everyones)
        by_place = {(row["step"], row["position"]): row for row in self._records}
        for batch, of_batch in zip(batches, places, strict=True):
            rows = [by_place[place.step, place.position] for place in of_batch]
            examples = [Example(row["input_ids"], row["labels"]) for row in rows]
            self._ready.append(self.with_examples(batch, examples))

    def _places(self, first: int, number: int, batch: dict[str, Any]) -> list[Place]:
        """Where the rows of this process's micro-batch `number` of the window stand, and their ground truth."""
        step, micro = divmod(number, self.args.gradient_accumulation_steps)
        process = self.accelerator.process_index + micro * self.accelerator.num_processes
        self._check_batch(batch)
        places = []
        for row, mask in enumerate(batch["attention_mask"].bool()):
            source = Example(*(batch[name][row][mask].tolist() for name in ("input_ids", "labels")))
            if any(label not in (IGNORED, token) for token, label in zip(source.input_ids, source.labels, strict=True)):
                raise RecordError(
                    f"update {first + step}: an example has labels that are not its ids, as rows of `align mix` do; "
                    f"{type(self).__name__} draws its own contexts from ground truth: give it that, or train with SFTTrainer"
                )
            self.check_source(source, f"update {first + step}, row {row}")
            places.append(Place(first + step, process * self.args.per_device_train_batch_size + row, source))
        return places

    def _found(self, stored: list[Record], places: list[Place]) -> list[Record]:
        """The checkpoint's contexts, where they are of these places' examples."""
        by_place = {(row["step"], row["position"]): row for row in stored}
        rows = [by_place.get((place.step, place.position)) for place in places]
        if stored and all(row and row["source_ids"] == p.source.input_ids for row, p in zip(rows, places, strict=True)):
            return stored
        if stored:
            self.accelerator.print(
                "align: the checkpoint's contexts are of other examples than those that come next; contexts are drawn anew"
            )
        return []

    def _drawn(self, places: list[Place]) -> list[Record]:
        start = time.perf_counter()
        # The bar is under the training's own, and gone with the window.
        hidden = self.args.disable_tqdm
        with progress(len(places), "contexts", hidden=hidden, leave=False) as bar, whole_weights(self.model):
            self._done = bar.update
            rows = self.draw(places)
        records = [
            {"step": place.step, "position": place.position, "source_ids": place.source.input_ids, **row}
            for place, row in zip(places, rows, strict=True)
        ]
        self._metrics["train"]["refresh_seconds"].append(time.perf_counter() - start)
        if self.accelerator.is_main_process and self.args.contexts_limit != 0:
            folder = Path(self.args.output_dir) / "contexts"
            for path in folder.glob("step-*.jsonl"):  # of an earlier run in this folder
                if path.stem >= f"step-{places[0].step:08d}":
                    path.unlink()
            write_records(folder / f"step-{places[0].step:08d}.jsonl", records)
            if self.args.contexts_limit is not None:
                for path in sorted(folder.glob("step-*.jsonl"))[: -self.args.contexts_limit]:
                    path.unlink()
        return records

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Before the rest: a checkpoint counts as whole by what is written last.
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.accelerator.is_main_process:
            left = [row for row in self._records if row["step"] >= self.state.global_step]
            write_records(folder / CONTEXTS_FILE, left)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        found: list[list[Record] | None] = [None]
        if self.accelerator.is_main_process:  # who wrote it; another machine may not see the file
            try:
                found = [read_records(Path(checkpoint) / CONTEXTS_FILE)]
            except RecordFileError:
                self.accelerator.print(f"align: {checkpoint} has no {CONTEXTS_FILE}; contexts are drawn anew")
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        self._stored = found[0] or []

    def _share(self, number: int) -> bool:
        """Whether a numbered batch is drawn in this process."""
        return number % self.accelerator.num_processes == self.accelerator.process_index


class BASHTrainer(SelfGeneratedTrainer):
    """SFT on contexts that interleave ground truth and the model's own tokens; the target is the ground truth (Cen et al.,
    TMLR 2025, arXiv 2410.14655). ε = 0 is TRL's `SFTTrainer`."""

    config_class = BASHConfig
    _name = "BASH"

    def draw(self, places: Sequence[Place]) -> list[Record]:
        args = self.args
        rows: list[MixedRow] = []
        for place in places:
            epsilon = epsilon_at(place.step, self.state.max_steps, args.epsilon, args.epsilon_schedule)
            source = place.source
            rows.append(mixed_row(source.input_ids, source.labels, epsilon, args.seed, place.step, place.position))
        drawn = draw_contexts(
            self.accelerator.unwrap_model(self.model), rows, args.own_tokens(), self._tokenizer.pad_token_id or 0,
            take=self._share, autocast=self.compute_loss_context_manager, done=self._done,
        )  # fmt: skip
        for index, context in gather_object(list(drawn.items())):
            rows[index].context = context
        if all(IGNORED not in place.source.labels for place in places):
            warnings.warn(
                "every token is learned, prompts and the user's turns too, so own tokens stand there as well; give prompt and "
                "completion, or assistant_only_loss=True, to have them in answers alone",
                stacklevel=2,
            )
        self._count(places, rows)
        return [{"input_ids": row.context, "labels": p.source.labels} for p, row in zip(places, rows, strict=True)]

    def _count(self, places: Sequence[Place], rows: Sequence[MixedRow]) -> None:
        labelled = sum(label != IGNORED for place in places for label in place.source.labels[1:])
        own = sum(map(sum, (row.own for row in rows)))
        differ = sum(a != b for row in rows for a, b in zip(row.ids, row.context, strict=True))
        self._metrics["train"]["bash/own_tokens"].append(own / max(1, labelled))
        self._metrics["train"]["bash/own_tokens_that_differ"].append(differ / max(1, own))


class RACTrainer(SelfGeneratedTrainer):
    """SFT on corrections: prompt, the beginning of the model's own answer, a cue, the reference; loss on cue and reference
    alone (Cen et al., TMLR 2025, arXiv 2410.14655). An empty cue and `prefix_fraction=(0, 0)` is TRL's `SFTTrainer`."""

    config_class = RACConfig
    _name = "RAC"

    @wraps(GuardedSFTTrainer.__init__)
    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        known = isinstance(self.train_dataset, Dataset) and not made_when_read(self.train_dataset)
        if self._positions is not None and known and "labels" in self.train_dataset.column_names:
            for place, row in enumerate(self.train_dataset):
                self.check_source(Example(row["input_ids"], row["labels"]), f"train data set, {row_name(row, place)}")

    def check_source(self, source: Example, name: str) -> None:
        limit, new = self._positions, self.args.max_new_tokens
        if limit is None:
            return
        if self.args.corrections().generates:
            drawn = len(split_source(source, name)[0]) + new
            check_positions(drawn, limit, f"{name}: prompt and max_new_tokens", "lower max_new_tokens")
        longest = len(self.longest_example(source, name).input_ids)
        remedy = f"set max_length to {limit} or less, or lower max_new_tokens"
        check_positions(longest, limit, f"{name}: the longest correction", remedy)

    def check_collator(self, batch: Mapping[str, Any]) -> None:
        super().check_collator(batch)
        ids = batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()
        rows = [Example(ids[: n + 1], [IGNORED, *ids[1 : n + 1]]) for n in range(min(2, len(ids)))]
        try:
            made = self.with_examples(batch, rows)
            self._check_batch(made)
            masks = made["attention_mask"].bool()
            found = [
                Example(*(made[n][i][mask].tolist() for n in ("input_ids", "labels"))) for i, mask in enumerate(masks)
            ]
        except Exception as error:  # noqa: BLE001 - a function of the user's
            raise ConfigError(self._unfit(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")) from error
        if found != rows:
            raise ConfigError(self._unfit(f"of {rows} it makes {found}"))

    def _unfit(self, reason: str) -> str:
        return (
            f"data_collator = {type(self.data_collator).__name__} must make a batch of rows that have input_ids and labels, since "
            f"{type(self).__name__} makes rows of its own: {reason}; correct it, or leave it out"
        )

    def with_examples(self, batch: Mapping[str, Any], examples: Sequence[Example]) -> dict[str, Any]:
        return self.data_collator([{"input_ids": e.input_ids, "labels": e.labels} for e in examples])

    def longest_example(self, source: Example, name: str) -> Example:
        return longest_correction(self._tokenizer, source, name, self.args.corrections())

    def draw(self, places: Sequence[Place]) -> list[Record]:
        drawn = draw_corrections(
            self.accelerator.unwrap_model(self.model), self._tokenizer, [place.source for place in places],
            [(place.step, place.position) for place in places], self.args.corrections(), self.args.seed,
            take=self._share, gather=gather_object, autocast=self.compute_loss_context_manager, done=self._done,
        )  # fmt: skip
        for name, values in drawn.metrics.items():
            self._metrics["train"][f"rac/{name}"].append(values)
        return drawn.rows
