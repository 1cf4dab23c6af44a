"""n completions per problem: seeded, batched by length, shared among processes, resumable. What draws is an `Engine`;
transformers' is here, others are in `engines.py`."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from .checks import check_seed, check_temperature, check_whole
from .errors import ConfigError, RecordError
from .models import base_model, cache_name, prompt_learning, vocab_size, without_router_loss
from .positions import position_limit
from .records import Record, check_records
from .stages import records_hash, run_in_parts
from .tokens import add_eos, decode_completion, encode_problem, end_ids_of, first_end

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

#: Of one prompt: per draw the completion's ids, EOS included where it ended, and the finish reason (`stop`, `length`).
Draws = list[tuple[list[int], str]]


@dataclass(frozen=True)
class SampleConfig:
    """How to sample.

    Args:
        n: completions per problem.
        temperature: 0 is greedy decoding.
        top_p: nucleus share; 1 is the whole distribution. cDPO samples at 0.95.
        top_k: 0 is the whole vocabulary.
        max_new_tokens: longest completion, EOS included.
        max_prompt_length: longer prompts are left out and counted.
        stop: texts that end a completion; what follows the token before them is cut and EOS is put there. One that
            begins in the prompt and ends beyond it counts.
        seed: with the number of the batch, decides every draw.
        batch_size: most completions generated together.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 512
    max_prompt_length: int | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        for field, low in (("n", 1), ("max_new_tokens", 1), ("batch_size", 1), ("top_k", 0)):
            check_whole(f"sample: {field}", getattr(self, field), low)
        if self.max_prompt_length is not None:
            check_whole("sample: max_prompt_length", self.max_prompt_length, 1)
        check_temperature("sample: temperature", self.temperature)
        check_seed("sample: seed", self.seed)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sample: top_p = {self.top_p} must lie in (0, 1]")
        if self.temperature == 0 and self.n > 1:
            raise ConfigError(f"sample: temperature 0 gives n = {self.n} equal completions; set n = 1 or a temperature")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)  # YAML and the command line give lists
        if other := [text for text in stop if not isinstance(text, str)]:
            raise ConfigError(f"sample: stop = {other[0]!r} must be text")
        if "" in stop:
            raise ConfigError("sample: an empty stop text ends every completion at once; leave it out")
        object.__setattr__(self, "stop", stop)


class Engine(ABC):
    """What draws completions.

    Attributes:
        vocab_size: ids from 0 to one below it can be fed.
        max_length: most tokens of a prompt and its completion together; `None` without a bound.
        settings: what, of the engine, the samples depend on; stands in the manifest.
        more: what gives room for more tokens.
    """

    vocab_size: int
    max_length: int | None = None
    settings: Mapping[str, Any]
    more: str = "give the engine a longer max_model_len"

    @abstractmethod
    def generate(self, prompts: Sequence[Sequence[int]], config: SampleConfig, seed: int) -> list[Draws]:
        """`config.n` draws of every prompt (ids); they depend on these arguments alone."""

    def close(self) -> None:  # noqa: B027 (most hold nothing)
        """Gives back what the engine holds: devices, connections."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class TransformersEngine(Engine):
    """A model of this process.

    Args:
        model: causal LM; where it has an adapter, that is on.
    """

    settings = {"engine": "transformers"}
    more = "take a model with more positions"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer, self.vocab_size = model, tokenizer, vocab_size(model)
        self.max_length = position_limit(model)

    def generate(self, prompts: Sequence[Sequence[int]], config: SampleConfig, seed: int) -> list[Draws]:
        return generate(self.model, self.tokenizer, prompts, config, seed)


def sample_completions(
    model: PreTrainedModel | Engine,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Record],
    out_path: str | os.PathLike,
    config: SampleConfig | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, int]:
    """The stage `align sample`: writes one sample record per problem and draw.

    Args:
        model: causal LM, or an engine. Where a model has an adapter, that is on.
        problems: problem records.
        out_path: samples, JSONL or Parquet.
        config: how to sample.
        settings: what else the samples depend on (hash of the model), for resuming.

    Returns:
        Counts: `rows`, `stop`, `length` (cut at `max_new_tokens`), `prompt_too_long`, `tokens`.

    Raises:
        RecordError, MissingColumnError: a problem does not fit the schema, or no prompt is short enough.
        ConfigError: the engine's context is too short for the longest prompt and its completion.
    """
    config = config or SampleConfig()
    engine = model if isinstance(model, Engine) else TransformersEngine(model, tokenizer)
    problems = list(problems)
    check_records(problems, "problem", source="problems")
    prompts = [encode_problem(tokenizer, p, f"problem {p['id']!r}") for p in problems]
    if (highest := max(map(max, prompts), default=0)) >= engine.vocab_size:
        raise RecordError(f"the tokenizer gives id {highest}, the model knows {engine.vocab_size}; they do not match")
    longest = config.max_prompt_length
    kept = [i for i, ids in enumerate(prompts) if longest is None or len(ids) <= longest]
    if not kept:
        raise RecordError(f"none of the {len(problems)} prompts fits max_prompt_length = {longest}; raise it")
    kept.sort(key=lambda i: len(prompts[i]))  # prompts of equal length share a batch: little padding
    most, long = engine.max_length, len(prompts[kept[-1]])
    if most is not None and long + config.max_new_tokens > most:
        raise ConfigError(
            f"the engine takes {most} tokens, the longest prompt (problem {problems[kept[-1]]['id']!r}) has {long} and "
            f"max_new_tokens is {config.max_new_tokens}; lower max_new_tokens or max_prompt_length, or {engine.more}"
        )
    # A batch is problems and draws of each: several whole problems, or a part of one problem's draws.
    size, draws = max(1, config.batch_size // config.n), min(config.n, config.batch_size)
    batches = [
        (kept[i : i + size], range(first, min(first + draws, config.n)))
        for i in range(0, len(kept), size)
        for first in range(0, config.n, draws)
    ]

    def compute(number: int, batch: tuple[list[int], range]) -> list[Record]:
        indices, numbers = batch
        seed = derived_seed(config.seed, number)
        texts = [prompts[i] for i in indices]
        completions = engine.generate(texts, replace(config, n=len(numbers)), seed)
        return [
            {
                **problems[i],
                "sample": draw,
                "prompt_ids": prompts[i],
                "completion_ids": ids,
                "completion": decode_completion(tokenizer, ids),
                "finish_reason": reason,
                "_row": i,
            }
            for i, drawn in zip(indices, completions, strict=True)
            for draw, (ids, reason) in zip(numbers, drawn, strict=True)
        ]

    return run_in_parts(
        out_path,
        batches,
        compute,
        stage="sample",
        settings=sample_settings(problems, config, {**engine.settings, **(settings or {})}),
        order=lambda row: (row.pop("_row"), row["sample"]),
        size=lambda batch: len(batch[0]) * len(batch[1]),
        count=lambda rows: {
            "stop": sum(row["finish_reason"] == "stop" for row in rows),
            "length": sum(row["finish_reason"] == "length" for row in rows),
            "prompt_too_long": len(problems) - len(kept),
            "tokens": sum(len(row["completion_ids"]) for row in rows),
        },
    )


def sample_settings(
    problems: Sequence[Record], config: SampleConfig, settings: dict[str, Any] | None
) -> dict[str, Any]:
    """What the output of `sample_completions` depends on; with it `stages.is_complete` tells whether there is work left."""
    engine = TransformersEngine.settings  # of any other engine, `settings` says so
    return {**engine, **asdict(config), **(settings or {}), "problems": records_hash(problems)}


def derived_seed(seed: int, number: int) -> int:
    """Seed of part `number` of what `seed` decides; within what torch takes, however often it is derived."""
    return (seed * 1_000_003 + number) % 2**63


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: SampleConfig,
    seed: int,
) -> list[Draws]:
    """Completions of one batch of prompts.

    Args:
        prompts: ids of each prompt.
        seed: decides the draws of this batch; the global random state is left as it was.

    Returns:
        For every prompt `config.n` pairs of completion ids (EOS included where it ended) and finish reason
        (`stop`, `length`).
    """
    inputs = pad_left(prompts, padding_id(tokenizer), model.get_input_embeddings().weight.device)
    output = run_generate(model, tokenizer, config, seed, **inputs)[:, inputs["input_ids"].shape[1] :].tolist()
    owners = [prompt for prompt in prompts for _ in range(config.n)]
    end_ids = end_token_ids(model, tokenizer.eos_token_id)
    ended = [
        cut_at_end(end_ids, tokenizer, ids, config, context=prompt) for ids, prompt in zip(output, owners, strict=True)
    ]
    return [ended[i : i + config.n] for i in range(0, len(ended), config.n)]


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What pads rows: EOS stands in for a missing padding token."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (B, L) of rows padded on the left, since generation goes on at the right end."""
    import torch

    width = max(map(len, rows))
    input_ids = [[pad_token_id] * (width - len(ids)) + list(ids) for ids in rows]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in rows]
    return {"input_ids": torch.tensor(input_ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def run_generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: SampleConfig, seed: int, **inputs: Any
) -> torch.Tensor:
    """transformers' `generate` with these settings and no others.

    Args:
        seed: decides the draws; the global random state is left as it was.
        inputs: what the model is given, `input_ids` (B, L) among it.

    Returns:
        (B · n, L') ids, the given ones included.
    """
    import torch
    from transformers import GenerationConfig

    sampling = config.temperature > 0
    options = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        num_return_sequences=config.n,
        do_sample=sampling,
        **({"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k} if sampling else {}),
        pad_token_id=padding_id(tokenizer),
        eos_token_id=end_token_ids(model, tokenizer.eos_token_id),
        stop_strings=list(config.stop) or None,
    )
    device = inputs["input_ids"].device
    more = {"tokenizer": tokenizer} if config.stop else {}
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with torch.inference_mode(), forked:
        torch.manual_seed(seed)
        return generate_ids(model, options, **inputs, **more)


def generate_ids(model: PreTrainedModel, options: GenerationConfig, **inputs: Any) -> torch.Tensor:
    """transformers' `generate` with `options` alone.

    Args:
        inputs: what it is given, `input_ids` (B, L) and `attention_mask` among it.

    Returns:
        (B · n, L') ids, the given ones included.
    """
    # Not in step with other processes, which draw batches of their own.
    with without_generation_config(model), without_router_loss(model):
        if prompt_learning(model) is None:
            return model.generate(**inputs, generation_config=options, synced_gpus=False)
        return _generate_behind_virtual_tokens(model, options, **inputs)


def _generate_behind_virtual_tokens(
    model: PeftModel, options: GenerationConfig, input_ids: torch.Tensor, attention_mask: torch.Tensor, **others: Any
) -> torch.Tensor:
    """`generate` of the bare model, whose cache has the virtual tokens of a prompt-learning adapter.

    PEFT's own `generate` leaves virtual tokens out of the positions, and drops those of a prefix.
    """
    import torch
    from transformers import GenerationMixin

    copies = options.num_return_sequences or 1  # `generate` repeats rows, but not a cache
    input_ids, attention_mask = (each.repeat_interleave(copies, 0) for each in (input_ids, attention_mask))
    options = copy.copy(options)
    options.num_return_sequences = 1
    base, rows = base_model(model), len(input_ids)
    virtual = prompt_learning(model).num_virtual_tokens
    prompt = model.get_prompt(batch_size=rows, max_cache_len=-1)
    if isinstance(prompt, torch.Tensor):
        embeddings = prompt.to(model.get_input_embeddings().weight.dtype)
        prompt = base(inputs_embeds=embeddings, use_cache=True)[cache_name(type(base).forward)]

    def before(given: Sequence[Any]) -> list[Any]:
        """Criteria and processors that see a row without its virtual tokens, because they count tokens."""
        return [lambda ids, scores, each=each, **more: each(ids[:, virtual:], scores, **more) for each in given]

    others |= {
        name: type(others[name])(before(others[name]))
        for name in ("logits_processor", "stopping_criteria")
        if name in others
    }
    # The ids of what a cache holds are not read.
    ids = torch.cat((input_ids[:, :1].expand(-1, virtual), input_ids), 1)
    mask = torch.cat((attention_mask.new_ones(rows, virtual), attention_mask), 1)
    others[cache_name(GenerationMixin.prepare_inputs_for_generation)] = prompt
    drawn = base.generate(input_ids=ids, attention_mask=mask, generation_config=options, synced_gpus=False, **others)
    return drawn[:, virtual:]


@contextmanager
def without_generation_config(model: PreTrainedModel):
    """A checkpoint's own temperature, top-k or penalties would fill what a call of `generate` leaves open."""
    from transformers import GenerationConfig

    # PEFT's `generate` hands the wrapper's on to the base.
    models = [model, *([model.get_base_model()] if hasattr(model, "peft_config") else [])]
    kept = [each.generation_config for each in models]
    for each in models:
        each.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for each, config in zip(models, kept, strict=True):
            each.generation_config = config


def end_token_ids(model: PreTrainedModel, eos: int) -> list[int]:
    """EOS of the tokenizer and those the checkpoint itself ends with (chat models often have several)."""
    return end_ids_of(eos, model.generation_config)


def cut_at_end(
    end_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    config: SampleConfig,
    given: int = 0,
    context: Sequence[int] = (),
) -> tuple[list[int], str]:
    """Cuts a completion behind its first end token, or before the token in which a stop text begins; see `find_end`.

    Returns:
        The ids, and the finish reason (`stop`, `length`).
    """
    found = find_end(end_ids, tokenizer, ids, config, given, context)
    return (ids, "length") if found is None else (found[0], "stop")


def find_end(
    end_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    config: SampleConfig,
    given: int = 0,
    context: Sequence[int] = (),
) -> tuple[list[int], int] | None:
    """Where a completion ends.

    Args:
        end_ids: see `end_token_ids`.
        ids: of the completion; what stands behind its end does not matter.
        given: how many of them were there before anything was drawn. An end token or stop text counts where it ends
            beyond them; a stop text may begin among them, and is cut from there on.
        context: what precedes `ids`. A stop text may begin here, too, and leaves EOS alone.

    Returns:
        The ids that stay, EOS included, and after how many of `ids` the end is there; `None` where there is none.
    """
    read = first_end(ids, end_ids, given)
    if config.stop:
        # A stop text has a token per byte at most; what lies further back than that takes no part.
        back = len(context) + given - max(len(stop.encode()) for stop in config.stop)
        whole, back = [*context, *ids], max(back, 0)

        def text_of(length: int) -> str:
            return tokenizer.decode(whole[back : len(context) + length], clean_up_tokenization_spaces=False)

        last = len(ids) if read is None else read
        text = text_of(last)
        # Not the length of what was given: it may end within a character, and decode to something else.
        known = len(os.path.commonprefix([text, text_of(given)]))
        spans = [(text.find(stop, max(0, known - len(stop) + 1)), len(stop)) for stop in config.stop]
        if spans := [(start, start + length) for start, length in spans if start >= 0]:
            end = min(end for _, end in spans)
            read = bisect_left(range(last), True, lo=given + 1, key=lambda n: text_of(n).startswith(text[:end]))
            # One token may complete several stop texts; those that later ones would complete are not there yet.
            begin = min(start for start, end in spans if end <= len(text_of(read)))
            kept = read
            while kept and len(text_of(kept)) > begin:
                kept -= 1
            return add_eos(ids[:kept], tokenizer.eos_token_id), read
    return None if read is None else (ids[:read], read)
