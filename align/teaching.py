"""Demonstrations from a teacher, as a recipe's chain makes them: its own samples, traces of reverse speculative decoding, and the
traces that a rule chooses."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .demonstrations import tokenize_demonstrations
from .errors import ConfigError
from .hub import elsewhere, loading_options, source_of
from .problems import load_problems
from .record_file import RecordFile
from .records import read_records
from .sample import SampleConfig, sample_completions, sample_settings
from .select import select_settings, select_traces
from .stages import file_hash, is_complete, read_manifest, records_hash, write_chosen
from .trace import choose, load_policies, trace_problems, trace_settings
from .verify import verify
from .vocabulary import never_ids, shared_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .pipeline import Chain


class Teaching:
    """What a chain's methods learn from a teacher.

    Args:
        chain: whose folder and settings are used.
        counts: what is counted on the way is added to them.
    """

    def __init__(self, chain: Chain, counts: dict[str, Any]) -> None:
        self.chain, self.counts, self.out = chain, counts, chain.out
        self.config, self.settings = chain.config, chain.settings

    def demonstrations(self, learns: str) -> Path:
        """`teacher`: the teacher's samples; `traces`: RSD traces; otherwise those that a rule of `align select` keeps."""
        if learns == "teacher":
            return self.samples()
        return self.traces() if learns == "traces" else self.selected(learns)

    def teacher(self) -> dict[str, Any]:
        """Arguments of `align.load_model`: of the teacher that is given, or of one that is trained now."""
        from .identity import model_identity
        from .trainers.training import train_sft

        given = self.config.teacher
        if "path" in given:
            return given
        base, folder, path = given.get("model", self.config.model), self.out / "teacher", self.out / "teacher.jsonl"
        tokenizer, problems = self._tokenizer(base), load_problems(**given.get("problems", self.config.train))
        tokenize_demonstrations(
            problems, tokenizer, path, settings={"teacher": model_identity(base["path"], **source_of(base))}
        )
        training = {name: given[name] for name in ("args", "lora") if name in given}
        trained = train_sft(base, RecordFile(path), folder, **training)
        self.counts["train teacher"] = trained or read_manifest(folder)["counts"]
        return {**base, "adapter": str(folder)} if training.get("lora") is not None else elsewhere(base, folder)

    def _identity(self, teacher: Mapping[str, Any]) -> dict[str, Any]:
        from .identity import model_identity

        adapter = {"teacher_adapter": teacher["adapter"]} if teacher.get("adapter") else {}
        options = {name: value for name, value in loading_options(teacher).items() if name != "adapter"}
        names = {
            "teacher": model_identity(teacher["path"], **source_of(teacher)),
            "special_tokens": dict(self.config.special_tokens),
            "never": list(self.config.never),
            "teacher_options": options,
        }
        return self.chain.identity(**adapter) | names

    def _policies(self, teacher: Mapping[str, Any]):
        return load_policies(teacher, self.config.model, self.config.special_tokens, self.config.never)

    def samples(self) -> Path:
        """As many samples of the teacher as there are traces, drawn and chosen alike."""
        from .models import load_model

        path, kept = self.out / "teacher-samples.jsonl", self.out / "teacher-kept.jsonl"
        teacher, rsd, tracing = self.teacher(), self.settings.rsd, self.settings.tracing
        config = SampleConfig(
            n=tracing.n, temperature=rsd.teacher_temperature, top_p=rsd.top_p, top_k=rsd.top_k, seed=rsd.seed,
            max_new_tokens=rsd.max_new_tokens, max_prompt_length=tracing.max_prompt_length, batch_size=tracing.batch_size,
        )  # fmt: skip
        problems, identity = load_problems(**self.config.train), self._identity(teacher)
        if is_complete(path, "sample", sample_settings(problems, config, identity)):
            self.counts["teacher samples"] = read_manifest(path)["counts"]
        else:
            tokenizer = self.chain.tokenizer()
            if shared_ids(self._tokenizer(teacher), tokenizer, self.config.special_tokens, self.config.never):
                raise ConfigError(
                    "methods.teacher_samples: the teacher's samples cannot be learned from as they are, since it has special "
                    "tokens under other ids (special_tokens); leave the method out"
                )
            model = load_model(**teacher)
            # The ids are the same; prompts are put as the student will meet them, and as traces have them.
            self.counts["teacher samples"] = sample_completions(model, tokenizer, problems, path, config, identity)
            del model
            gc.collect()
        verdicts = self.out / "teacher-verdicts.jsonl"
        verify(path, verdicts)
        depends = {**sample_settings(problems, config, identity), "prefix_tokens": tracing.prefix_tokens}
        if not is_complete(kept, "teacher kept", depends):
            rows = read_records(verdicts)
            never = set(never_ids(self._tokenizer(teacher), self.config.never))
            known = [row for row in rows if never.isdisjoint(row["completion_ids"])]
            chosen, counts = choose(known, tracing)
            write_chosen(kept, chosen, "teacher kept", depends, counts | {"unknown_to_student": len(rows) - len(known)})
        self.counts["teacher samples"] |= read_manifest(kept)["counts"]
        return kept

    def _tokenizer(self, model: Mapping[str, Any]) -> PreTrainedTokenizerBase:
        from .models import load_tokenizer

        return load_tokenizer(model["path"], **source_of(model))

    def traces(self) -> Path:
        """RSD traces, the shortest good one of each problem."""
        path, kept = self.out / "traces.jsonl", self.out / "traces-kept.jsonl"
        if "trace" in self.counts:
            return kept
        teacher, rsd, tracing = self.teacher(), self.settings.rsd, self.settings.tracing
        problems, identity = load_problems(**self.config.train), self._identity(teacher)
        depends, drawn = trace_settings(problems, rsd, tracing, identity)
        if is_complete(path, "trace", drawn) and is_complete(kept, "trace kept", depends):
            self.counts["trace"] = read_manifest(path)["counts"] | read_manifest(kept)["counts"]
            return kept
        policies = self._policies(teacher)
        self.counts["trace"] = trace_problems(*policies, problems, path, kept, rsd, tracing, identity)
        del policies
        gc.collect()
        return kept

    def selected(self, rule: str) -> Path:
        """Of the good traces, those that a rule ranks first; and beginnings for the problems that have no good one, as there
        are where the shortest is taken, so that rules differ in nothing but what they choose."""
        fallback = [row for row in read_records(self.traces()) if row["prefix_only"]]
        path = self._select(rule)
        out = self.out / f"demonstrations-{rule}.jsonl"
        depends = {"selected": file_hash(path), "fallback": records_hash(fallback)}
        if not is_complete(out, "selected and beginnings", depends):
            rows = [*read_records(path), *fallback]
            write_chosen(
                out, rows, "selected and beginnings", depends, {"rows": len(rows), "prefix_only": len(fallback)}
            )
        return out

    def _select(self, rule: str) -> Path:
        """What a rule keeps of the good traces."""
        path, config = self.out / f"selected-{rule}.jsonl", self.settings.selecting[rule]
        rows, identity = read_records(self.out / "traces.jsonl"), self.chain.identity()
        if is_complete(path, "select", select_settings(rows, config, identity)):
            self.counts[f"select {rule}"] = read_manifest(path)["counts"]
            return path
        model, tokenizer = self.chain.load()
        self.counts[f"select {rule}"] = select_traces(
            model, tokenizer, rows, path, config, scores_path=self.out / "traces-scores.jsonl", settings=identity
        )
        return path
