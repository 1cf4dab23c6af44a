"""A recipe's configuration: the sections of its YAML file, read and checked before anything runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from inspect import signature
from pathlib import Path
from typing import Any

import yaml

from .checks import fitted
from .engines import EngineConfig
from .errors import ConfigError
from .export import check_format
from .hub import SOURCE, Source
from .pair import PairConfig
from .preferences import tokenize_pairs
from .problems import load_problems
from .rsd import RSDConfig
from .sample import SampleConfig
from .select import RULES, SelectConfig
from .trace import TraceConfig


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        title: what the table calls it.
        trainer: a key of `align.trainers.training.SFT_TRAINERS` or `PREFERENCE_TRAINERS`.
        scores: where its token-level columns come from; `None` where it learns from demonstrations.
        learns: where it learns from demonstrations, from which: `demonstrations`, as the section of that name says; `teacher`, its
            samples; `traces`, the shortest right RSD trace of a problem; or those that a rule of `align select` ranks first.
    """

    title: str
    trainer: str
    scores: str | None
    learns: str | None = None


#: Methods in the order of the table, by their name in a configuration.
METHODS = {
    "sft": Method("SFT", "sft", None, "demonstrations"),
    "bash": Method("BASH", "bash", None, "demonstrations"),
    "bash_autoregressive": Method("BASH, autoregressive", "bash", None, "demonstrations"),
    "rac": Method("RAC", "rac", None, "demonstrations"),
    "teacher_samples": Method("SFT on the teacher's samples", "sft", None, "teacher"),
    "rsd": Method("SFT on RSD traces, the shortest", "sft", None, "traces"),
    "rsd_rsr": Method("SFT on RSD traces, by RSR", "sft", None, "rsr"),
    "rsd_aslec_drop": Method("SFT on RSD traces, by ASLEC-DROP", "sft", None, "aslec-drop"),
    "rsd_aslec_casl": Method("SFT on RSD traces, by ASLEC-CASL", "sft", None, "aslec-casl"),
    "rsd_mean_logp": Method("SFT on RSD traces, by mean log-probability", "sft", None, "mean-logp"),
    "dpo": Method("DPO on the same pairs", "dpo", "reference"),
    "cdpo": Method("cDPO", "cdpo", "contrastive"),
    "tgdpo": Method("TGDPO", "tgdpo", "guidance"),
    "entropy": Method("DPO on tokens of high entropy", "token_dpo", "entropy"),
    "rollout": Method("DPO with weights from rollouts", "token_dpo", "rollout"),
}

#: What methods that learn from demonstrations learn from: right solutions that were sampled, or the problems' own.
DEMONSTRATIONS = {"positive": " on the positive set", "solutions": ""}

#: Settings of sampling that rollouts take over.
DRAWN = ("temperature", "top_p", "top_k", "max_new_tokens", "stop")

#: What a training takes.
TRAINING = {"args", "lora"}


@dataclass
class ChainConfig:
    """A recipe's configuration; each field is a section of the YAML file.

    Args:
        model: arguments of `align.load_model`.
        train, test: arguments of `align.load_problems`, `chat_template_kwargs` among them. With `answers: false` the test
            problems are open-ended prompts, and completions are exported in place of being verified.
        pairs, test_pairs: arguments of `align.tokenize_pairs`: a preference data set in place of `train`, and held-out pairs.
        demonstrations: what SFT, BASH and RAC learn from: `positive`, the right solutions among those sampled, or
            `solutions`, those that the training problems come with; then nothing is sampled for them.
        sample: fields of `SampleConfig` for the training problems.
        engine: `name` (`transformers` or `vllm`) and fields of `EngineConfig`: what draws for training and test problems; a teacher's
            samples, rollouts, traces and contexts are transformers'.
        pair: fields of `PairConfig`.
        contrastive: `args` (`trl.SFTConfig`) and `lora` (`peft.LoraConfig`) of the positive and negative model.
        guide: TGDPO's guide: `path` of a preference-trained policy (a hub name may end in `@REVISION`), or `args` and `lora` to train one by DPO; where it is left
            out, `methods.dpo` is the guide.
        score: `beta`, `max_length`, `max_tokens_per_batch`.
        entropy: `top`, the share of tokens that keep their weight.
        rollout: fields of `RolloutConfig`; temperature, top-p, top-k, length and stops are those of `sample` by default.
        teacher: who gives traces: arguments of `align.load_model` for one that there is; or `args` and `lora` to train one by SFT,
            from `model` (arguments of `align.load_model`, the student by default) on the solutions of `problems` (arguments of
            `align.load_problems`, those of `train` by default).
        trace: fields of `TraceConfig` and `RSDConfig`.
        special_tokens: the teacher's special tokens that the student has under another name.
        never: tokens that only one of the two has; traces are without them.
        select: fields of `SelectConfig` but `rule`; one trace of each problem by default.
        methods: per method of the table, `args` and `lora`; `null` leaves a method out.
        evaluate: fields of `SampleConfig` for the test problems, `ks` for pass@k and maj@k, `export` for a judge's format.
        inspect: `limit` of pairs on the page; `first_error: true` where each problem has one solution text.
    """

    model: dict[str, Any]
    train: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Any] = field(default_factory=dict)
    pairs: dict[str, Any] = field(default_factory=dict)
    test_pairs: dict[str, Any] = field(default_factory=dict)
    demonstrations: str = "positive"
    sample: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    pair: dict[str, Any] = field(default_factory=dict)
    contrastive: dict[str, Any] = field(default_factory=dict)
    guide: dict[str, Any] = field(default_factory=dict)
    score: dict[str, Any] = field(default_factory=dict)
    entropy: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)
    trace: dict[str, Any] = field(default_factory=dict)
    special_tokens: dict[str, str] = field(default_factory=dict)
    never: list[str] = field(default_factory=list)
    select: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    inspect: dict[str, Any] = field(default_factory=dict)


def read_config(path: str | Path, overrides: list[str] | None = None) -> ChainConfig:
    """Reads a recipe's YAML file; `overrides` such as `methods.cdpo.args.learning_rate=1e-5` change single values.

    Raises:
        ConfigError: not YAML, an unknown section, or an override without `=`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    raw = _yaml(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a mapping of sections is expected")
    for override in overrides or ():
        name, separator, value = override.partition("=")
        *sections, last = name.split(".")
        if not separator:
            raise ConfigError(f"--set {override!r}: write it as section.key=value")
        target = raw
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {override!r}: {section!r} is no section of {path}")
        target[last] = _scalar(value, f"--set {override!r}")
    known = {f.name for f in fields(ChainConfig)}
    if unknown := sorted(set(raw) - known):
        raise ConfigError(f"{path}: unknown section {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    if "model" not in raw:
        raise ConfigError(f"{path}: section model is missing")
    if not isinstance(raw.get("methods") or {}, dict):
        raise ConfigError(f"{path}: methods: {raw['methods']!r} must be a mapping of methods to settings")
    if unknown := sorted(set(raw.get("methods") or {}) - set(METHODS)):
        raise ConfigError(f"{path}: unknown method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    raw["methods"] = {name: settings for name, settings in (raw.get("methods") or {}).items() if settings is not None}
    return ChainConfig(**raw)


#: Characters of a configuration as JSON, aliases written out; a few lines of YAML can stand for more than any memory holds.
LONGEST = 1_000_000


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: the first value would be lost."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.composer.ComposerError(None, None, f"key {twice[0]!r} stands twice", node.start_mark)
        return node


def _yaml(text: str, name: str) -> Any:
    """A YAML text's value, made of what JSON has."""
    try:
        # YAML aliases are one object: a change to one section would change the other. So the value is written out.
        parts, length = [], 0
        for part in json.JSONEncoder().iterencode(yaml.load(text, _Loader)):
            parts.append(part)
            length += len(part)
            if length > LONGEST:
                raise ValueError(f"more than {LONGEST} characters, aliases written out")
        return json.loads("".join(parts))
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{name}: cannot be read as YAML of numbers, text, lists and mappings: {reason}") from None


def _scalar(text: str, name: str) -> Any:
    value = _yaml(text, name)
    if isinstance(value, str):
        try:
            return float(value)  # YAML takes 1e-5 for text
        except ValueError:
            pass
    return value


def check_keys(section: str, values: Any, known: set[str], needed: str | None = None) -> None:
    """Raises a ConfigError where a section is no mapping, has a key that nothing knows, or lacks one."""
    if not isinstance(values, dict):
        raise ConfigError(f"section {section!r}: {values!r} must be a mapping of names to values")
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"section {section!r}: unknown {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    if needed is not None and needed not in values:
        raise ConfigError(f"section {section!r}: {needed} is missing")


def section(cls: type, values: Mapping[str, Any], name: str) -> Any:
    """A dataclass of a section's values."""
    check_keys(name, values, {f.name for f in fields(cls) if f.init})
    try:
        return cls(**fitted(cls, values, f"section {name!r}"))
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"section {name!r}: {error}") from error


class Settings:
    """The sections as what the stages take; all of them checked: every key reaches something that knows it. Asked before
    hours of work, not after.

    Args:
        config: as read.
        out: folder of the run, named in messages.

    Raises:
        ConfigError: a setting that no stage knows, or sections that contradict each other.
    """

    def __init__(self, config: ChainConfig, out: Path) -> None:
        from .scoring.rollout import RolloutConfig

        for name in [f.name for f in fields(ChainConfig) if f.name not in ("demonstrations", "never")]:
            values = getattr(config, name)
            check_keys(name, values, set(values) if isinstance(values, dict) else set())
        if not isinstance(config.demonstrations, str):
            raise ConfigError(f"demonstrations: {config.demonstrations!r} must be one of {', '.join(DEMONSTRATIONS)}")
        if wrong := [ours for ours in config.special_tokens.values() if not isinstance(ours, str)]:
            raise ConfigError(f"section 'special_tokens': {wrong[0]!r} is no token; map the teacher's to the student's")
        used = [METHODS[name] for name in config.methods]
        learns = {method.learns for method in used if method.learns} or {"demonstrations"}
        self.samples = any(method.scores for method in used) or (
            config.demonstrations != "solutions" and "demonstrations" in learns
        )
        self._check_sources(config)
        self._check_teaching(config, out, learns - {"demonstrations"})
        self.sampling = section(SampleConfig, config.sample, "sample")
        self.engine = section(EngineConfig, config.engine, "engine")
        if self.engine.name == "server":
            raise ConfigError(
                "section 'engine': a recipe samples what it has just trained, which no server has; use vllm"
            )
        self.pairing = section(PairConfig, config.pair, "pair")
        # Rollouts ask what the policy does from a position on, so they are drawn as the solutions were.
        drawn = {name: config.sample[name] for name in DRAWN if name in config.sample}
        self.rollout = section(RolloutConfig, {**drawn, **config.rollout}, "rollout")
        check_keys("evaluate", config.evaluate, {f.name for f in fields(SampleConfig)} | {"ks", "export"})
        self.ks, self.export = config.evaluate.get("ks", []), config.evaluate.get("export")
        own = {k: v for k, v in config.evaluate.items() if k not in ("ks", "export")}
        self.testing = section(SampleConfig, own, "evaluate")
        self.engine.check_model(config.model, self.sampling, self.testing)
        if not isinstance(self.ks, list) or any(not isinstance(k, int) or k < 1 for k in self.ks):
            raise ConfigError(f"section 'evaluate': ks = {self.ks!r} must be a list of whole numbers")
        if any(k > self.testing.n for k in self.ks):
            raise ConfigError(f"section 'evaluate': ks = {self.ks} need n of at least {max(self.ks)}")
        if self.export is not None:
            check_format(self.export)
            if self.testing.n != 1:
                raise ConfigError(f"section 'evaluate': export takes one completion per prompt; n is {self.testing.n}")
        elif config.test and not config.test.get("answers", True):
            raise ConfigError("section 'test': answers: false leaves nothing to verify; set evaluate.export")
        self._check_trainings(config, out)

    def _check_sources(self, config: ChainConfig) -> None:
        from .models import load_model, loading_arguments

        check_keys("model", config.model, loading_arguments() - {"adapter"}, needed="path")
        named = {key: value for key, value in config.model.items() if key in SOURCE}
        fitted(Source, named, "section 'model'")
        fitted(load_model, {key: value for key, value in config.model.items() if key not in named}, "section 'model'")
        problems = set(signature(load_problems).parameters)
        pairs = set(signature(tokenize_pairs).parameters) - {"tokenizer", "out_path", "settings"}
        for name, known in (("train", problems), ("test", problems), ("pairs", pairs), ("test_pairs", pairs)):
            if getattr(config, name) != {}:
                check_keys(name, getattr(config, name), known, needed="source")
                reader = tokenize_pairs if name in ("pairs", "test_pairs") else load_problems
                fitted(reader, getattr(config, name), f"section {name!r}")
        if bool(config.train) == bool(config.pairs):
            raise ConfigError(
                "give one of the sections 'train' (problems to sample) and 'pairs' (a preference data set)"
            )
        if config.train and not config.train.get("answers", True):
            raise ConfigError("section 'train': answers: false leaves nothing to make pairs of")
        if config.demonstrations not in DEMONSTRATIONS:
            raise ConfigError(f"demonstrations: {config.demonstrations!r} must be one of {', '.join(DEMONSTRATIONS)}")
        if config.train and config.sample == {} and self.samples:
            raise ConfigError("section 'sample' is missing; it says how training problems are sampled")
        if not config.test and not config.test_pairs:
            raise ConfigError("give a section 'test' (problems) or 'test_pairs', to evaluate on")
        check_keys("score", config.score, {"beta", "max_length", "max_tokens_per_batch"})
        if not _is_number(beta := config.score.get("beta", 1.0)) or beta < 0:
            raise ConfigError(f"section 'score': beta = {beta!r} must be a number of at least 0")
        for name in ("max_length", "max_tokens_per_batch"):
            value = config.score.get(name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"section 'score': {name} = {value!r} must be a whole number of at least 1")
        check_keys("entropy", config.entropy, {"top"})
        if not _is_number(top := config.entropy.get("top", 0.2)) or not 0 < top <= 1:
            raise ConfigError(f"section 'entropy': top = {top!r} must be a number in (0, 1]")
        check_keys("inspect", config.inspect, {"limit", "first_error"})
        if config.inspect.get("first_error") and config.pairs:
            raise ConfigError("section 'inspect': first_error needs problems with solutions; 'pairs' has none")

    def _check_teaching(self, config: ChainConfig, out: Path, learns: set[str]) -> None:
        """The sections of a teacher; asked for where a method learns from one."""
        from .models import loading_arguments
        from .trainers.training import check_trainable, check_training

        for name in ("teacher", "trace", "special_tokens", "select"):
            values = getattr(config, name)
            check_keys(name, values, set(values) if isinstance(values, dict) else set())
            if values and not learns:
                raise ConfigError(
                    f"section {name!r}: no method learns from a teacher; add methods.rsd, or leave it out"
                )
        if not isinstance(config.never, list) or any(not isinstance(token, str) for token in config.never):
            raise ConfigError(f"never: {config.never!r} must be a list of tokens")
        rsd = {f.name for f in fields(RSDConfig)}
        check_keys("trace", config.trace, rsd | {f.name for f in fields(TraceConfig)})
        self.rsd = section(RSDConfig, {k: v for k, v in config.trace.items() if k in rsd}, "trace")
        self.tracing = section(TraceConfig, {k: v for k, v in config.trace.items() if k not in rsd}, "trace")
        check_keys("select", config.select, {f.name for f in fields(SelectConfig)} - {"rule"})
        kept: dict[str, Any] = {} if "keep_share" in config.select else {"keep_per_problem": 1}
        kept["max_student_share"] = self.tracing.max_student_share
        self.selecting = {
            rule: section(SelectConfig, {**kept, **config.select, "rule": rule}, "select") for rule in RULES
        }
        if not learns:
            return
        if not config.teacher:
            raise ConfigError("section 'teacher' is missing: name one (path), or say how to train one (args)")
        loaded = loading_arguments()
        if "path" in config.teacher:
            check_keys("teacher", config.teacher, loaded)
            return
        check_keys("teacher", config.teacher, TRAINING | {"model", "problems"}, needed="args")
        base = config.teacher.get("model", config.model)
        check_keys("teacher.model", base, loaded - {"adapter"}, needed="path")
        problems = config.teacher.get("problems", config.train)
        check_keys("teacher.problems", problems, set(signature(load_problems).parameters), needed="source")
        training = {k: v for k, v in config.teacher.items() if k in TRAINING}
        check_training("sft", out, **training, section="teacher")
        check_trainable(base, training.get("lora"))

    def _check_trainings(self, config: ChainConfig, out: Path) -> None:
        from .trainers.training import check_trainable, check_training

        check_keys("contrastive", config.contrastive, TRAINING)
        check_training("sft", out, **config.contrastive, section="contrastive")
        if "cdpo" in config.methods:
            check_trainable(config.model, config.contrastive.get("lora"))
        self._check_guide(config, out)
        for name, settings in config.methods.items():
            check_keys(f"methods.{name}", settings, TRAINING)
            method = METHODS[name]
            check_training(method.trainer, out, **settings, section=f"methods.{name}")
            check_trainable(config.model, settings.get("lora"))
            if config.pairs and method.scores in (None, "contrastive", "rollout"):
                raise ConfigError(
                    f"methods.{name} needs sampled solutions; give problems ('train') in place of 'pairs'"
                )
            if method.scores == "guidance" and not config.guide and "dpo" not in config.methods:
                raise ConfigError(f"methods.{name} needs a guide: a section 'guide' with path or args, or methods.dpo")

    @staticmethod
    def check_layers(config: ChainConfig) -> None:
        """Raises a ConfigError where a `lora` names layers that its model lacks; the models' configurations are read for it."""
        from .trainers.adapters import check_lora_layers

        trained = {f"methods.{name}": settings for name, settings in config.methods.items()}
        trained |= {"guide": config.guide, "teacher": config.teacher}
        trained |= {"contrastive": config.contrastive} if "cdpo" in config.methods else {}
        for name, settings in trained.items():
            if settings.get("lora"):
                check_lora_layers(settings.get("model", config.model), settings["lora"], f"{name}.lora")

    def _check_guide(self, config: ChainConfig, out: Path) -> None:
        from .scoring.guidance import check_guide
        from .trainers.training import check_trainable, check_training

        check_keys("guide", config.guide, TRAINING | {"path"})
        if config.guide and "tgdpo" not in config.methods:
            raise ConfigError("section 'guide': only TGDPO has a guide; add methods.tgdpo, or leave the section out")
        if "path" not in config.guide:
            check_training("dpo", out, **config.guide, section="guide")
            if config.guide:
                check_trainable(config.model, config.guide.get("lora"))
            return
        if len(config.guide) > 1:
            raise ConfigError("section 'guide': path names a trained policy, args and lora train one; give one of them")
        if not isinstance(config.guide["path"], str):
            raise ConfigError(f"section 'guide': path = {config.guide['path']!r} must be a folder or a hub name")
        check_guide(config.model, config.guide["path"])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
