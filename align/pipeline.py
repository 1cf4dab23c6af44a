"""The cDPO chain, from problems to an evaluated model: what `recipes/cdpo.py` runs.

    problems ─ sample ─ verify ─ pair ─ contrastive models ─ score ─ train ─ evaluate ─ report

Every stage writes below one folder and is skipped where its output is complete for the same settings and inputs.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from inspect import signature
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError
from .evaluate import evaluate_verdicts, format_interval
from .pair import PairConfig, pair
from .problems import load_problems
from .records import Record, atomic_path, read_records
from .sample import SampleConfig, sample_completions, sample_settings
from .stages import is_complete, read_manifest
from .verify import verify

#: Rows of the table, in order: name in the configuration -> title.
METHODS = {"sft": "SFT on the positive set", "dpo": "DPO on the same pairs", "cdpo": "cDPO"}


@dataclass
class ChainConfig:
    """A recipe's configuration; each field is a section of the YAML file.

    Args:
        model: arguments of `align.load_model`.
        train, test: arguments of `align.load_problems`.
        sample: fields of `SampleConfig` for the training problems.
        pair: fields of `PairConfig`.
        contrastive: `args` (`trl.SFTConfig`) and `lora` (`peft.LoraConfig`) of the positive and negative model.
        score: `beta`, `max_length`, `max_tokens_per_batch`.
        methods: per method of the table, `args` and `lora`; `null` leaves a method out.
        evaluate: fields of `SampleConfig` for the test problems, and `ks` for pass@k and maj@k.
        inspect: `limit` of pairs on the page; `first_error: true` where each problem has one solution text.
    """

    model: dict[str, Any]
    train: dict[str, Any]
    test: dict[str, Any]
    sample: dict[str, Any]
    pair: dict[str, Any] = field(default_factory=dict)
    contrastive: dict[str, Any] = field(default_factory=dict)
    score: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    inspect: dict[str, Any] = field(default_factory=dict)


def read_config(path: str | Path, overrides: list[str] | None = None) -> ChainConfig:
    """Reads a recipe's YAML file; `overrides` such as `methods.cdpo.args.learning_rate=1e-5` change single values.

    Raises:
        ConfigError: not YAML, an unknown section, or an override without `=`.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a mapping of sections is expected")
    raw = json.loads(json.dumps(raw))  # YAML aliases are one object: a change to one section would change the other
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
        target[last] = _scalar(value)
    known = {f.name for f in fields(ChainConfig)}
    if unknown := sorted(set(raw) - known):
        raise ConfigError(f"{path}: unknown section {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    if missing := [name for name in ("model", "train", "test", "sample") if name not in raw]:
        raise ConfigError(f"{path}: section {', '.join(missing)} is missing")
    if unknown := sorted(set(raw.get("methods", {})) - set(METHODS)):
        raise ConfigError(f"{path}: unknown method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    raw["methods"] = {name: settings for name, settings in raw.get("methods", {}).items() if settings is not None}
    return ChainConfig(**raw)


def _scalar(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)  # YAML takes 1e-5 for text
        except ValueError:
            pass
    return value


def _check_keys(section: str, values: Any, known: set[str], needed: str | None = None) -> None:
    if not isinstance(values, dict):
        raise ConfigError(f"section {section!r}: {values!r} must be a mapping of names to values")
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"section {section!r}: unknown {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    if needed is not None and needed not in values:
        raise ConfigError(f"section {section!r}: {needed} is missing")


def _section(cls: type, values: Mapping[str, Any], name: str) -> Any:
    _check_keys(name, values, {f.name for f in fields(cls)})
    return cls(**values)


class CDPOChain:
    """The stages of one run, below one folder.

    Args:
        config: see `ChainConfig`; all of it is checked before the first stage.
        out: the run's folder.

    Raises:
        ConfigError: a setting that no stage knows.
    """

    def __init__(self, config: ChainConfig, out: str | Path) -> None:
        self.config, self.out = config, Path(out)
        self._check_sections()
        self.sampling = _section(SampleConfig, config.sample, "sample")
        self.pairing = _section(PairConfig, config.pair, "pair")
        self.ks = config.evaluate.get("ks", [])
        self.testing = _section(SampleConfig, {k: v for k, v in config.evaluate.items() if k != "ks"}, "evaluate")
        if not isinstance(self.ks, list) or any(not isinstance(k, int) or k < 1 for k in self.ks):
            raise ConfigError(f"section 'evaluate': ks = {self.ks!r} must be a list of whole numbers")
        if any(k > self.testing.n for k in self.ks):
            raise ConfigError(f"section 'evaluate': ks = {self.ks} need n of at least {max(self.ks)}")

    def _check_sections(self) -> None:
        """Every key of every section reaches something that knows it; asked before hours of work, not after."""
        from .models import load_model
        from .trainers.training import check_training

        config = self.config
        _check_keys("model", config.model, set(signature(load_model).parameters) - {"adapter"}, needed="path")
        for name in ("train", "test"):
            _check_keys(name, getattr(config, name), set(signature(load_problems).parameters), needed="source")
        _check_keys("score", config.score, {"beta", "max_length", "max_tokens_per_batch"})
        if config.score.get("beta", 1.0) < 0:
            raise ConfigError(f"section 'score': beta = {config.score['beta']} must not be negative")
        _check_keys("inspect", config.inspect, {"limit", "first_error"})
        _check_keys("contrastive", config.contrastive, {"args", "lora"})
        check_training("sft", self.out, **config.contrastive)
        for method, settings in config.methods.items():
            _check_keys(f"methods.{method}", settings, {"args", "lora"})
            check_training(method, self.out, **settings)

    def run(self) -> dict[str, Any]:
        """Runs all stages; returns, and writes to `summary.json`, the table and what was counted on the way."""
        counts = self.make_pairs()
        counts["score"] = self.score()
        for method in self.config.methods:
            counts[f"train {method}"] = self.train(method)
        scores = {"base": self.evaluate("base"), **{m: self.evaluate(m) for m in self.config.methods}}
        return self.report(scores, counts)

    def _model(self, adapter: Path | None = None):
        """Model and tokenizer; a folder without an adapter in it is a fully fine-tuned model of its own."""
        from .models import load_model

        settings, tokenizer = dict(self.config.model), self._tokenizer()
        if adapter is not None and not (adapter / "adapter_config.json").exists():
            return load_model(**{**settings, "path": str(adapter)}), tokenizer
        return load_model(**settings, adapter=str(adapter) if adapter else None), tokenizer

    def _tokenizer(self):
        from .models import load_tokenizer

        trusted = self.config.model.get("trust_remote_code", False)
        return load_tokenizer(self.config.model["path"], trust_remote_code=trusted)

    def _sample(
        self, problems: list[Record], path: Path, config: SampleConfig, adapter: Path | None = None
    ) -> dict[str, int]:
        from .models import model_identity

        identity = {"model": model_identity(self.config.model["path"]), "options": _options(self.config.model)}
        if adapter is not None:
            identity["adapter"] = model_identity(adapter)
        if is_complete(path, "sample", sample_settings(problems, config, identity)):
            return read_manifest(path)["counts"]  # before a model is loaded for nothing
        model, tokenizer = self._model(adapter)
        counts = sample_completions(model, tokenizer, problems, path, config, identity)
        del model
        gc.collect()
        return counts

    def make_pairs(self) -> dict[str, Any]:
        """Samples, verifies, pairs."""
        out = self.out
        problems = load_problems(**self.config.train)
        if self.config.inspect.get("first_error") and not all("solution" in problem for problem in problems):
            raise ConfigError("section 'inspect': first_error needs a solution for every problem; set it to false")
        sampled = self._sample(problems, out / "samples.jsonl", self.sampling)
        verified = verify(out / "samples.jsonl", out / "verdicts.jsonl")
        paths = (out / "pairs.jsonl", out / "positive.jsonl", out / "negative.jsonl")
        paired = _on_main(lambda: pair(out / "verdicts.jsonl", *paths, self.pairing))
        return {"sample": sampled, "verify": verified, "pair": paired}

    def score(self) -> dict[str, int]:
        """Trains the two contrastive models, scores the pairs under both, and adds reference log-probabilities."""
        from .models import load_adapters, load_model, model_identity
        from .scoring.contrastive import score_contrastive
        from .scoring.pairs import score_settings
        from .scoring.reference import score_reference
        from .trainers.training import train_sft

        adapters = {}
        for name in ("positive", "negative"):
            adapters[name] = str(self.out / "contrastive" / name)
            train_sft(
                self.config.model, read_records(self.out / f"{name}.jsonl"), adapters[name], **self.config.contrastive
            )
        identity = {"model": model_identity(self.config.model["path"]), "options": _options(self.config.model)}
        options = {k: v for k, v in self.config.score.items() if k != "beta"}
        longest, beta = options.get("max_length"), self.config.score.get("beta", 1.0)
        referenced, scored = self.out / "referenced.jsonl", self.out / "scored.jsonl"
        pairs = read_records(self.out / "pairs.jsonl")
        both = identity | {name: model_identity(path) for name, path in adapters.items()}
        if is_complete(referenced, "score reference", score_settings(pairs, longest, identity)):
            settings = score_settings(read_records(referenced), longest, {"beta": beta, **both})
            if is_complete(scored, "score contrastive", settings):
                return read_manifest(scored)["counts"]  # before a model is loaded for nothing
        model = load_model(**self.config.model)
        options["pad_token_id"] = self._tokenizer().pad_token_id
        score_reference(model, pairs, referenced, settings=identity, **options)
        model = load_adapters(model, adapters)
        return score_contrastive(model, read_records(referenced), scored, settings=both, beta=beta, **options)

    def train(self, method: str) -> dict[str, Any]:
        """Trains one method of the table."""
        from .trainers.training import train_preference, train_sft

        settings = self.config.methods[method]
        if method == "sft":
            return train_sft(self.config.model, read_records(self.out / "positive.jsonl"), self.out / "sft", **settings)
        pairs = read_records(self.out / "scored.jsonl")
        return train_preference(method, self.config.model, pairs, self.out / method, **settings)

    def evaluate(self, method: str) -> dict[str, Any]:
        """Accuracy of `base` or of a trained method on the test problems."""
        samples, verdicts = (self.out / "test" / f"{method}-{kind}.jsonl" for kind in ("samples", "verdicts"))
        problems = load_problems(**{"split": "test", **self.config.test})
        self._sample(problems, samples, self.testing, None if method == "base" else self.out / method)
        verify(samples, verdicts)
        return evaluate_verdicts(read_records(verdicts), self.ks)

    def report(self, scores: dict[str, dict], counts: dict[str, Any]) -> dict[str, Any]:
        """Writes `summary.json` and `pairs.html`."""
        table = [
            {
                "method": METHODS.get(method, method),
                "accuracy [95 %]": format_interval(score["pass@1"]),
                "n": score["n"],
            }
            | {
                f"{kind}@{k}": format_interval(score[f"{kind}@{k}"])
                for k in self.ks
                if k > 1
                for kind in ("pass", "maj")
            }
            for method, score in scores.items()
        ]
        summary = {"table": table, "scores": scores, "counts": counts}
        share = _on_main(lambda: self._write_page(table))
        if share is not None:
            summary["lowest score is the first error"] = share
        if _is_main():
            with atomic_path(self.out / "summary.json") as temporary:
                temporary.write_text(json.dumps(summary, indent=2, ensure_ascii=False), encoding="utf-8")
        return summary

    def _write_page(self, table: list[dict]) -> dict[str, float] | None:
        from .report import inspect_pairs

        tokenizer = self._tokenizer()
        pairs = read_records(self.out / "scored.jsonl")
        share = mark_first_errors(pairs, tokenizer) if self.config.inspect.get("first_error") else None
        inspect_pairs(
            pairs, tokenizer, self.out / "pairs.html", title="cDPO: critical tokens", summary=table,
            columns=["ce_scores", "ref_logps"], limit=self.config.inspect.get("limit", 300),
        )  # fmt: skip
        return share


def mark_first_errors(pairs: list[Record], tokenizer) -> dict[str, float]:
    """Adds `first_error`, the index of the first rejected id that differs from the problem's one solution.

    Returns:
        `n`, and `share` of rejected completions whose lowest contrastive score lies there.
    """
    from .tiny import first_error
    from .tokens import encode_completion

    hits = []
    for row in pairs:
        solution = encode_completion(
            tokenizer, row["prompt"], row["solution"], row["prompt_ids"], f"pair {row['id']!r}: solution"
        )
        row["first_error"] = first_error(row["rejected_ids"], solution)
        scores = row["rejected_ce_scores"]
        hits.append(scores.index(min(scores)) == row["first_error"])
    return {"share": sum(hits) / len(hits), "n": len(hits)}


def _options(model: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of loading that change a model's numbers."""
    return {key: value for key, value in model.items() if key != "path"}


def _is_main() -> bool:
    from .processes import process_state

    return process_state().is_main_process


def _on_main(work) -> Any:
    """Runs a stage that needs no sharing in the main process, the others wait; its result reaches all."""
    from accelerate.utils import broadcast_object_list

    from .processes import process_state

    process = process_state()
    result = [work() if process.is_main_process else None]
    if process.num_processes > 1:
        broadcast_object_list(result)
    return result[0]
