"""The chains that the recipes run, from data to an evaluated model.

    problems ─ sample ─ verify ─ pair ─┐
                                       ├─ score ─ train ─ evaluate ─ report
    preference data ─ tokenize ────────┘      │
    problems ─ trace ─ select ────────────────┘

Every stage writes below one folder and is skipped where its output is complete for the same settings and inputs.
"""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .atomic import atomic_path
from .config import DEMONSTRATIONS, METHODS, ChainConfig, Settings, read_config
from .demonstrations import tokenize_demonstrations
from .errors import ConfigError
from .evaluate import evaluate_verdicts, format_interval, preference_accuracy
from .export import export_completions
from .hub import FETCHING, elsewhere, loading_options, source_of
from .locks import locked
from .pair import pair
from .preferences import tokenize_pairs
from .problems import load_problems
from .rac import CorrectionSettings, correction_report
from .record_file import RecordFile
from .records import Record, read_records
from .sample import SampleConfig, sample_completions, sample_settings
from .sources import check_outside
from .stages import is_complete, read_manifest
from .verify import verify

#: The file that a source of token-level columns writes.
SCORED = {
    "reference": "referenced.jsonl",
    "contrastive": "scored.jsonl",
    "guidance": "guided.jsonl",
    "entropy": "entropy.jsonl",
    "rollout": "rollouts.jsonl",
}


def run_recipe(config: str, output: str, overrides: Sequence[str] | None = None) -> None:
    """What a recipe's script does: runs the chain, and prints the table and where things went."""
    from .processes import process_state
    from .report import markdown_table

    summary = Chain(read_config(config, overrides), output).run()
    if not process_state().is_main_process:
        return
    print("\n" + markdown_table(summary["table"]))
    for name in ("lowest score is the first error", "critical token is the first error"):
        if share := summary.get(name):
            print(
                f"\n{name.replace('is the', 'of a rejected solution is its true')}: {share['share']:.1%} of {share['n']}"
            )
    print("".join(f"\nexported: {path}" for path in summary["exports"]))
    if summary["page"]:
        print(f"tokens coloured by score: {summary['page']}")
    print(f"all numbers: {output}/summary.json")


class Chain:
    """The stages of one run, below one folder.

    Args:
        config: see `ChainConfig`; all of it is checked before the first stage.
        out: the run's folder.

    Raises:
        ConfigError: a setting that no stage knows.
    """

    def __init__(self, config: ChainConfig, out: str | Path) -> None:
        self.config, self.out = config, Path(out)
        self.settings = Settings(config, self.out)

    def run(self) -> dict[str, Any]:
        """Runs all stages; returns, and writes to `summary.json`, the table and what was counted on the way.

        Raises:
            RecordFileError: another process works in the run's folder.
        """
        check_outside(self.out, *(getattr(self.config, n) for n in ("train", "test", "pairs", "test_pairs", "teacher")))
        self.settings.check_layers(self.config)
        with locked(self.out):
            return self._run()

    def _run(self) -> dict[str, Any]:
        self._check_problems()
        counts: dict[str, Any] = self.make_pairs()
        for name in self.config.methods:
            counts[f"train {name}"] = self.train(name, counts)
        # Of the base there is nothing to say on pairs: its log-ratio to itself is 0.
        base = ("base",) if self.config.test else ()
        scores = {name: self.evaluate(name) for name in (*base, *self.config.methods)}
        return self.report(scores, counts)

    def _check_problems(self) -> None:
        """Read problems that are needed only after hours of work: a column or an option without a place is an error now."""
        for given in (self.config.teacher.get("problems"), self._test_problems()):
            if given:
                load_problems(**given)

    def _test_problems(self) -> dict[str, Any]:
        return {"split": "test", **self.config.test} if self.config.test else {}

    def load(self, adapter: Path | None = None):
        """Model and tokenizer; a folder without an adapter in it is a fully fine-tuned model of its own."""
        from .models import load_model

        return load_model(**self._loading(adapter)), self.tokenizer()

    def _loading(self, adapter: Path | None) -> dict[str, Any]:
        """Arguments of `align.load_model`."""
        if adapter is not None and not (adapter / "adapter_config.json").exists():
            return elsewhere(self.config.model, adapter)
        return {**self.config.model, "adapter": str(adapter) if adapter else None}

    def tokenizer(self):
        from .models import load_tokenizer

        return load_tokenizer(self.config.model["path"], **source_of(self.config.model))

    def identity(self, **others: str | Path) -> dict[str, Any]:
        """What an output depends on besides its inputs: the model, and the folders of further ones."""
        from .identity import model_identity

        of_model = model_identity(self.config.model["path"], **source_of(self.config.model))
        fetching = {name: value for name, value in source_of(self.config.model).items() if name in FETCHING}
        found = {"model": of_model, **{name: model_identity(path, **fetching) for name, path in others.items()}}
        return found | {"options": loading_options(self.config.model)}

    def _sample(
        self, problems: list[Record], path: Path, config: SampleConfig, adapter: Path | None = None
    ) -> dict[str, int]:
        from .engines import open_engine

        identity = self.identity(**({} if adapter is None else {"adapter": adapter})) | self.settings.engine.settings()
        if is_complete(path, "sample", sample_settings(problems, config, identity)):
            return read_manifest(path)["counts"]  # before a model is loaded for nothing
        tokenizer = self.tokenizer()
        with open_engine(self.settings.engine, self._loading(adapter), tokenizer) as engine:
            counts = sample_completions(engine, tokenizer, problems, path, config, identity)
        del engine
        gc.collect()
        return counts

    def make_pairs(self) -> dict[str, Any]:
        """Pairs, of sampled solutions or of a preference data set."""
        out = self.out
        if self.config.pairs:
            return {"tokenize": self._tokenize(self.config.pairs, out / "pairs.jsonl")}
        if not self.settings.samples:
            return {}
        problems = load_problems(**self.config.train)
        if self.config.inspect.get("first_error") and not all("solution" in problem for problem in problems):
            raise ConfigError("section 'inspect': first_error needs a solution for every problem; set it to false")
        sampled = self._sample(problems, out / "samples.jsonl", self.settings.sampling)
        verified = verify(out / "samples.jsonl", out / "verdicts.jsonl")
        paths = (out / "pairs.jsonl", out / "positive.jsonl", out / "negative.jsonl")
        paired = _on_main(lambda: pair(out / "verdicts.jsonl", *paths, self.settings.pairing))
        return {"sample": sampled, "verify": verified, "pair": paired}

    def _demonstrations(self, learns: str, counts: dict[str, Any]) -> Path:
        """What a method learns from, see `align.config.Method`."""
        if learns != "demonstrations":
            from .teaching import Teaching

            return Teaching(self, counts).demonstrations(learns)
        if self.config.demonstrations == "positive":
            return self.out / "positive.jsonl"
        path = self.out / "demonstrations.jsonl"
        counts["demonstrations"] = tokenize_demonstrations(
            load_problems(**self.config.train), self.tokenizer(), path, settings=self.identity(),
            max_prompt_length=self.settings.sampling.max_prompt_length,
        )  # fmt: skip
        return path

    def _tokenize(self, source: Mapping[str, Any], path: Path) -> dict[str, int]:
        return tokenize_pairs(**source, tokenizer=self.tokenizer(), out_path=path, settings=self.identity())

    def score(self, scores: str, counts: dict[str, Any]) -> Path:
        """Adds the token-level columns of one source to the pairs, reference log-probabilities among them."""
        path = self.out / SCORED[scores]
        if scores != "reference":
            self.score("reference", counts)
        if f"score {scores}" not in counts:
            counts[f"score {scores}"] = getattr(self, f"_score_{scores}")(path, counts)
        return path

    def _scoring(self) -> dict[str, Any]:
        return {k: v for k, v in self.config.score.items() if k != "beta"} | {
            "pad_token_id": self.tokenizer().pad_token_id
        }

    def _referenced(self) -> RecordFile:
        return RecordFile(self.out / SCORED["reference"])

    def _score_reference(self, path: Path, _counts: dict[str, Any]) -> dict[str, Any]:
        from .scoring.pairs import score_settings
        from .scoring.reference import score_reference

        pairs, identity = RecordFile(self.out / "pairs.jsonl"), self.identity()
        if is_complete(path, "score reference", score_settings(pairs, self.config.score.get("max_length"), identity)):
            return read_manifest(path)["counts"]  # before a model is loaded for nothing, as below
        return score_reference(self.load()[0], pairs, path, settings=identity, **self._scoring())

    def _score_contrastive(self, path: Path, _counts: dict[str, Any]) -> dict[str, Any]:
        """Trains the two contrastive models, and scores the pairs under both."""
        from .models import load_adapters, load_model
        from .scoring.contrastive import score_contrastive
        from .scoring.pairs import score_settings
        from .trainers.training import train_sft

        adapters = {name: str(self.out / "contrastive" / name) for name in ("positive", "negative")}
        for name, folder in adapters.items():
            train_sft(self.config.model, RecordFile(self.out / f"{name}.jsonl"), folder, **self.config.contrastive)
        pairs, identity, beta = self._referenced(), self.identity(**adapters), self.config.score.get("beta", 1.0)
        settings = score_settings(pairs, self.config.score.get("max_length"), {"beta": beta, **identity})
        if is_complete(path, "score contrastive", settings):
            return read_manifest(path)["counts"]
        model = load_adapters(load_model(**self.config.model), adapters)
        return score_contrastive(model, pairs, path, settings=identity, beta=beta, **self._scoring())

    def _score_guidance(self, path: Path, counts: dict[str, Any]) -> dict[str, Any]:
        return self._guidance(self._guide(counts), self._referenced(), path)

    def _guide(self, counts: dict[str, Any]) -> str:
        """TGDPO's guide: the one that is given, or one trained by DPO."""
        from .trainers.training import train_preference

        if "path" in self.config.guide:
            return self.config.guide["path"]
        if not self.config.guide:
            counts["train dpo"] = self.train("dpo", counts)
            return str(self.out / "dpo")
        guide = self.out / "guide"
        trained = train_preference("dpo", self.config.model, self._referenced(), guide, **self.config.guide)
        counts["train guide"] = trained or read_manifest(guide)["counts"]
        return str(guide)

    def _guidance(self, guide: str | Path, pairs: Sequence[Record], path: Path) -> dict[str, Any]:
        """Log-ratios of a trained policy and the base, on pairs."""
        from .scoring.guidance import load_guide, score_guidance
        from .scoring.pairs import score_settings

        identity = self.identity(guide=guide)
        if is_complete(path, "score guidance", score_settings(pairs, self.config.score.get("max_length"), identity)):
            return read_manifest(path)["counts"]
        loaded, reference, _ = load_guide(self.config.model, str(guide))
        return score_guidance(loaded, reference, pairs, path, settings=identity, **self._scoring())

    def _score_entropy(self, path: Path, _counts: dict[str, Any]) -> dict[str, Any]:
        from .scoring.entropy import score_entropy
        from .scoring.pairs import score_settings

        pairs, identity, top = self._referenced(), self.identity(), self.config.entropy.get("top", 0.2)
        settings = score_settings(pairs, self.config.score.get("max_length"), {"top": top, **identity})
        if is_complete(path, "score entropy", settings):
            return read_manifest(path)["counts"]
        return score_entropy(self.load()[0], pairs, path, top=top, settings=identity, **self._scoring())

    def _score_rollout(self, path: Path, _counts: dict[str, Any]) -> dict[str, Any]:
        from .scoring.pairs import score_settings
        from .scoring.rollout import rollout_settings, score_rollout

        config, longest = self.settings.rollout, self.config.score.get("max_length")
        pairs, identity = self._referenced(), self.identity()
        if is_complete(path, "score rollout", score_settings(pairs, longest, rollout_settings(config, identity))):
            return read_manifest(path)["counts"]
        model, tokenizer = self.load()
        return score_rollout(model, tokenizer, pairs, path, config, max_length=longest, settings=identity)

    def train(self, name: str, counts: dict[str, Any]) -> dict[str, Any]:
        """Trains one method of the table, after what it needs."""
        from .trainers.training import train_preference, train_sft

        if counts.get(f"train {name}"):
            return counts[f"train {name}"]
        settings, method = self.config.methods[name], METHODS[name]
        if method.scores is None:
            demonstrations = RecordFile(self._demonstrations(method.learns, counts))
            trained = train_sft(self.config.model, demonstrations, self.out / name, method=method.trainer, **settings)
        else:
            pairs = RecordFile(self.score(method.scores, counts))
            trained = train_preference(method.trainer, self.config.model, pairs, self.out / name, **settings)
        return trained or read_manifest(self.out / name)["counts"]

    def evaluate(self, name: str) -> dict[str, Any]:
        """What `base` or a trained method does on the test problems and the held-out pairs."""
        adapter = None if name == "base" else self.out / name
        found: dict[str, Any] = {}
        if self.config.test:
            samples = self.out / "test" / f"{name}-samples.jsonl"
            self._sample(load_problems(**self._test_problems()), samples, self.settings.testing, adapter)
            if self.config.test.get("answers", True):
                verdicts = self.out / "test" / f"{name}-verdicts.jsonl"
                verify(samples, verdicts)
                rows = read_records(verdicts)
                found |= evaluate_verdicts(rows, self.settings.ks)
                if cue := self._cue(name):
                    found["corrections"] = correction_report(rows, cue)
            if (judge := self.settings.export) is not None:
                path = self.out / "test" / f"{name}-{judge}.json{'l' * (judge == 'arena-hard')}"
                model = f"{Path(self.config.model['path']).name}-{name}"
                found["export"] = str(path)
                _on_main(lambda: export_completions(read_records(samples), path, judge, model))
        if self.config.test_pairs and adapter is not None:
            held_out, path = self.out / "test" / "pairs.jsonl", self.out / "test" / f"{name}-pairs.jsonl"
            self._tokenize({"split": "test", **self.config.test_pairs}, held_out)
            self._guidance(adapter, RecordFile(held_out), path)
            accuracy = preference_accuracy(read_records(path))
            found |= {"preference": accuracy["preference"], "pairs": accuracy["n"]}
        return found

    def _cue(self, name: str) -> str:
        """What a method begins a correction with."""
        if name not in METHODS or METHODS[name].trainer != "rac":
            return ""
        return self.config.methods[name].get("args", {}).get("cue", CorrectionSettings.cue).strip()

    def report(self, scores: dict[str, dict], counts: dict[str, Any]) -> dict[str, Any]:
        """Writes `summary.json` and `pairs.html`."""
        table = [self._table_row(name, score) for name, score in scores.items()]
        exports = [score["export"] for score in scores.values() if "export" in score]
        summary = {"table": table, "scores": scores, "counts": counts, "exports": exports, "page": None}
        summary |= _on_main(lambda: self._write_page(table)) or {}
        if _is_main():
            path = self.out / "summary.json"
            with locked(path), atomic_path(path) as temporary:
                temporary.write_text(json.dumps(summary, indent=2, ensure_ascii=False), encoding="utf-8")
        return summary

    def _title(self, name: str) -> str:
        if name not in METHODS:
            return name
        learned = DEMONSTRATIONS[self.config.demonstrations] if METHODS[name].learns == "demonstrations" else ""
        return METHODS[name].title + learned

    def _table_row(self, name: str, score: dict[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = {"method": self._title(name)}
        if self.config.test.get("answers", True) and self.config.test:
            row |= {"accuracy [95 %]": format_interval(score["pass@1"]), "n": score["n"]}
            names = [f"{kind}@{k}" for k in self.settings.ks if k > 1 for kind in ("pass", "maj")]
            row |= {metric: format_interval(score[metric]) for metric in names}
        if self.config.test_pairs:
            there = "preference" in score
            row["preference accuracy [95 %]"] = format_interval(score["preference"]) if there else ""
            row["pairs"] = score["pairs"] if there else ""
        return row

    def _write_page(self, table: list[dict]) -> dict[str, Any]:
        """`pairs.html` with all columns there are, and how often they point at the true first error."""
        from .report import inspect_pairs
        from .tiny import mark_first_errors

        tokenizer, used = self.tokenizer(), {METHODS[name].scores for name in self.config.methods} - {None}
        if not used:
            return {}
        names = [name for name in SCORED if name in used or name == "reference"]
        merged: dict[tuple[str, int], Record] = {}
        for name in names:
            met: Counter[str] = Counter()  # several pairs may have one id, as where it is a prompt's
            for row in read_records(self.out / SCORED[name]):
                key = row["id"], met[row["id"]]
                met[row["id"]] += 1
                # Two sources write `weights`; the page shows what they were made of.
                merged[key] = merged.get(key, {}) | {k: v for k, v in row.items() if "_weights" not in k}
        pairs, path = list(merged.values()), self.out / "pairs.html"
        found = mark_first_errors(pairs, tokenizer) if self.config.inspect.get("first_error") else {}
        shown = ("ce_scores", "guidance_logratios", "rollout_values", "entropies", "ref_logps")
        there = [c for c in shown if any(f"rejected_{c}" in pair for pair in pairs)]
        inspect_pairs(
            pairs, tokenizer, path, title="align: pairs", summary=table,
            columns=there, limit=self.config.inspect.get("limit", 300),
        )  # fmt: skip
        return {"page": str(path), **found}


def _is_main() -> bool:
    from .processes import process_state

    return process_state().is_main_process


def _on_main(work) -> Any:
    """Runs a stage that needs no sharing in the main process, the others wait; its result reaches all."""
    from accelerate.utils import broadcast_object_list

    from .processes import process_state, together

    process, result = process_state(), [None]
    with together(process):
        if process.is_main_process:
            result = [work()]
    if process.num_processes > 1:
        broadcast_object_list(result)
    return result[0]
