"""The recipes and the command line, run as a user runs them, on a handful of problems; and every configuration read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig

from align.config import METHODS, read_config
from align.errors import ConfigError, ModelLoadError
from align.pipeline import Chain
from align.problems import load_problems
from align.records import read_records, write_records
from align.trainers.training import PREFERENCE_TRAINERS, SFT_TRAINERS, _arguments

ROOT = Path(__file__).parent.parent
ALL = ROOT / "benchmarks/tiny_methods.yaml"
CONFIGS = [*sorted((ROOT / "recipes/configs").rglob("*.yaml")), ALL]
TINY = ROOT / "recipes/configs/cdpo/tiny-arithmetic.yaml"
TGDPO = ROOT / "recipes/configs/tgdpo/tiny-arithmetic.yaml"
MEASURED = (TINY, ALL, *(ROOT / f"recipes/configs/{method}/tiny-arithmetic.yaml" for method in ("bash", "rac")))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
SMALL = [
    "train.limit=12", "test.limit=8", "sample.n=4", "contrastive.args.max_steps=2", "methods.sft.args.max_steps=1",
    "methods.dpo.args.max_steps=2", "methods.cdpo.args.max_steps=2", "evaluate.n=2", "evaluate.ks=[2]",
]  # fmt: skip


def python(*command: str, ok: bool = True) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert not ok or done.returncode == 0, done.stderr[-3000:]
    return done


def align(*command: str, ok: bool = True) -> subprocess.CompletedProcess:
    return python("-c", "from align.cli import main; main()", *map(str, command), ok=ok)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_configuration_is_understood(path, tmp_path):
    """Each field reaches a class that knows it; nothing is downloaded."""
    from trl import SFTConfig

    config = read_config(path)
    Chain(config, tmp_path)
    cpu = {"bf16": False, "use_cpu": True}
    if config.contrastive:
        _arguments(SFTConfig, {**config.contrastive["args"], **cpu}, tmp_path)
        LoraConfig(**config.contrastive["lora"])
    for name, settings in config.methods.items():
        trainer = METHODS[name].trainer
        cls = SFT_TRAINERS[trainer][0] if trainer in SFT_TRAINERS else PREFERENCE_TRAINERS[trainer].config_class
        _arguments(cls, {**settings["args"], **cpu}, tmp_path)
        LoraConfig(**settings.get("lora") or {})
    ours = path.parent.name if path.parent.name in METHODS else "cdpo"
    baseline = {"demonstrations": "sft", "traces": "teacher_samples"}.get(METHODS[ours].learns, "dpo")
    assert set(config.methods) >= {baseline, ours}
    for own in (
        "alpha",
        "epsilon",
        "epsilon_schedule",
        "cue",
        "max_new_tokens",
        "prefix_fraction",
        "keep_correct_share",
    ):
        config.methods[ours]["args"].pop(own, None)
    rates = [config.methods[method]["args"].pop("learning_rate") for method in (baseline, ours)]
    assert config.methods[baseline] == config.methods[ours]  # a fair baseline …
    assert path in MEASURED or rates[0] == rates[1]  # … each with its own best rate where that was measured


def test_mistakes_in_a_configuration_are_named(tmp_path):
    with pytest.raises(ConfigError, match="unknown section tset"):
        read_config(TINY, ["tset.source=x"])
    with pytest.raises(ConfigError, match="section.key=value"):
        read_config(TINY, ["sample.n"])
    with pytest.raises(ConfigError, match="unknown temprature"):
        Chain(read_config(TINY, ["sample.temprature=1"]), tmp_path)
    for override, words in (
        ("methods.cdpo.args.lerning_rate=1", "lerning_rate: no field of CDPOConfig"),
        ("methods.sft.args.max_step=1", "max_step: no field of GuardedSFTConfig"),
        ("methods.cdpo.lora={rank: 4}", "methods.cdpo.lora: rank"),
        ("methods.cdpo.args.learning_rate=abc", "methods.cdpo.args: learning_rate = 'abc' must be a number"),
        ("methods.sft.args.max_steps=1.5", "methods.sft.args: max_steps = 1.5 must be a whole number"),
        ("methods.cdpo.args.output_dir=x", "methods.cdpo.args: output_dir .* leave it out"),
        ("methods.cdpo.args=5", "methods.cdpo.args = 5 must be a mapping"),
        ("methods.cdpo.lora.r=two", "methods.cdpo.lora: r = 'two' must be a whole number"),
        ("contrastive.args.seed=x", "contrastive.args: seed = 'x' must be a whole number"),
        ("sample.n=x", "section 'sample': n = 'x' must be a whole number"),
        ("sample.top_p=x", "section 'sample': top_p = 'x' must be a number"),
        ("pair.negative_coverage=x", "section 'pair': negative_coverage = 'x' must be a number"),
        ("train.limit=x", "section 'train': limit = 'x' must be a whole number or null"),
        ("train.chat=maybe", "section 'train': chat = 'maybe' must be true or false"),
        ("test.source=5", "section 'test': source = 5 must be text"),
        ("model.path=5", "section 'model': path = 5 must be text"),
        ("methods.sft.bar=1", "'methods.sft': unknown bar"),
        ("methods.dpo=5", "'methods.dpo': 5 must be a mapping"),
        ("contrastive.foo=1", "'contrastive': unknown foo"),
        ("inspect.limt=1", "'inspect': unknown limt"),
        ("model.dtpe=float32", "'model': unknown dtpe"),
        ("train.x=1", "'train': unknown x"),
        ("score.beta=-1", "beta = -1 must be a number of at least 0"),
        ("score.beta=x", "beta = 'x' must be a number"),
        ("score.max_length=0", "max_length = 0 must be a whole number"),
        ("entropy.top=20%", "top = '20%' must be a number"),
        ("guide.args={}", "only TGDPO has a guide"),
        ("sample=null", "'sample': None must be a mapping"),
        ("evaluate.ks=3", "ks = 3 must be a list"),
        ("evaluate.export=mt-bench", "'mt-bench' is unknown"),
        ("entropy.top=0", "top = 0 must be a number in"),
        ("rollout.rule=x", "rule = 'x' is unknown"),
        ("pairs.source=x", "give one of the sections 'train'"),
        ("test.answers=false", "nothing to verify; set evaluate.export"),
        ("train.answers=false", "nothing to make pairs of"),
        ("test={}", "give a section 'test'"),
        ("model.quantization=4bit", "4bit cannot be trained; give lora"),
    ):
        with pytest.raises(ConfigError, match=words):
            Chain(read_config(TINY, [override]), tmp_path)
    for override, error, words in (
        ("guide={path: x, args: {}}", ConfigError, "give one of them"),
        ("guide.path=null", ConfigError, "path = None must be a folder or a hub name"),
        ("guide.path=no/such-guide", ModelLoadError, "no/such-guide"),
        (f"guide.path={ROOT / 'data'}", ModelLoadError, "data"),
        ("guide={args: {max_steps: 1}}", ConfigError, "4bit cannot be trained"),
    ):
        config = read_config(TGDPO, [override])
        if "4bit" in words:
            config.model["quantization"] = "4bit"
        with pytest.raises(error, match=words):
            Chain(config, tmp_path)
    assert not list(tmp_path.iterdir())  # nothing has begun
    methods = read_config(TINY, ["methods.cdpo.args.learning_rate=1e-9"]).methods
    assert (
        methods["cdpo"]["args"]["learning_rate"] == 1e-9 != methods["dpo"]["args"]["learning_rate"]
    )  # an alias in the file


@pytest.mark.parametrize(
    "override",
    ["methods.cdpo.lora={target_modules: [q_proj, nowhere]}", "contrastive.lora={modules_to_save: [nowhere]}"],
)
def test_layers_that_no_model_has_are_named_before_the_first_stage(tmp_path, override):
    name = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{name}: [a-z_]+ = 'nowhere' must be a layer of LlamaForCausalLM"):
        Chain(read_config(TINY, [override]), tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def test_a_rate_that_yaml_reads_as_text_is_a_number(tmp_path):
    config = read_config(TINY)
    config.methods["cdpo"]["args"]["learning_rate"] = "1e-9"
    Chain(config, tmp_path)
    from align import CDPOConfig

    assert CDPOConfig(str(tmp_path), use_cpu=True, learning_rate="1e-9").learning_rate == 1e-9


def test_the_chain_behind_rac_is_understood(tmp_path):
    """The command that recipes/rac.py documents, but for the model, which is the run before."""
    import re

    flags = re.findall(r"--set (\S+)", (ROOT / "recipes/rac.py").read_text().split("import sys")[0])
    assert "sample.max_new_tokens=160" in flags and "model.path=runs/rac/rac" in flags
    settings = Chain(read_config(TINY, flags), tmp_path).settings
    rac = read_config(ROOT / "recipes/configs/rac/tiny-arithmetic.yaml")
    assert settings.sampling.max_new_tokens == settings.testing.max_new_tokens == rac.evaluate["max_new_tokens"]


def test_braces_of_a_template_are_plain_text():
    """It is no format string: `{{}}` would reach the model as it is."""
    for path in CONFIGS:
        assert "{{" not in path.read_text(), path


def test_rollouts_are_drawn_as_solutions_are(tmp_path):
    settings = Chain(
        read_config(TINY, ["sample.temperature=0.7", "sample.stop=[x]", "rollout={n: 5}"]), tmp_path
    ).settings
    assert (settings.rollout.temperature, settings.rollout.sampling.stop, settings.rollout.n) == (0.7, ("x",), 5)
    assert settings.rollout.max_new_tokens == settings.sampling.max_new_tokens == 80
    own = Chain(read_config(TINY, ["rollout.temperature=0.9"]), tmp_path).settings.rollout
    assert own.temperature == 0.9


def test_the_page_shows_pairs_of_one_prompt_apart(tmp_path):
    chain = Chain(read_config(TINY), tmp_path)
    chain.config.methods = {"dpo": {}, "cdpo": {}}
    rows = [
        {"id": "same", "prompt": "a", "chosen": "b", "rejected": "c", "prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7 + i], "answer": "1"}
        | {f"{side}_ref_logps": [-float(i)] for side in ("chosen", "rejected")}
        for i in range(3)
    ]  # fmt: skip
    chain.config.inspect = {}
    write_records(tmp_path / "referenced.jsonl", rows)
    write_records(tmp_path / "scored.jsonl", [row | {"rejected_ce_scores": [0.1 * i]} for i, row in enumerate(rows)])
    chain._write_page([])
    page = (tmp_path / "pairs.html").read_text()
    assert "3 of 3 pairs" in page


def test_the_whole_chain_then_nothing_to_do_then_one_stage(tmp_path):
    out = tmp_path / "run"
    command = ["recipes/cdpo.py", "--config", str(TINY), "--output", str(out)]
    flags = [word for value in SMALL for word in ("--set", value)]
    shown = python(*command, *flags).stdout
    for words in ("base", "SFT on the positive set", "DPO on the same pairs", "cDPO", "true first error", "pairs.html"):
        assert words in shown
    summary = json.loads((out / "summary.json").read_text())
    assert summary["scores"]["cdpo"]["n"] == 8 and "maj@2" in summary["scores"]["base"]
    assert summary["counts"]["sample"]["rows"] == 48
    assert summary["lowest score is the first error"]["n"] == len(read_records(out / "scored.jsonl", "pair"))
    assert "2411.19943" in (out / "cdpo" / "README.md").read_text()
    assert not list(out.rglob("*.parts")) and not list(out.glob("*.training*"))
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.jsonl")} | {
        out / m: (out / m).stat().st_mtime_ns for m in ("dpo", "cdpo")
    }
    python(*command, *flags)
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    assert json.loads((out / "summary.json").read_text()) == summary  # what was counted on the way stays counted
    python(*command, *flags, "--set", "methods.cdpo.args.learning_rate=1e-4")
    changed = {str(p.relative_to(out)) for p, stamp in stamps.items() if p.stat().st_mtime_ns != stamp}
    assert {"cdpo", "test/cdpo-samples.jsonl"} <= changed  # the verdicts depend on what was sampled
    assert changed <= {"cdpo", "test/cdpo-samples.jsonl", "test/cdpo-verdicts.jsonl"}


def test_all_methods_on_a_handful_of_problems(tmp_path):
    """Every source of weights in one table; TGDPO's guide is the DPO of the same run, trained once."""
    out = tmp_path / "run"
    values = [
        *SMALL,
        "sample.max_new_tokens=60",
        "rollout.n=2",
        *(f"methods.{m}.args.max_steps=1" for m in ("tgdpo", "entropy", "rollout")),
    ]
    flags = [word for value in values for word in ("--set", value)]
    shown = python("recipes/tgdpo.py", "--config", str(ALL), "--output", str(out), *flags).stdout
    for method in read_config(ALL).methods:
        assert METHODS[method].title in shown
    assert "lowest score of a rejected" in shown and "critical token of a rejected" in shown
    counts = json.loads((out / "summary.json").read_text())["counts"]
    assert counts["train dpo"]["steps"] == 2 and counts["score guidance"]["rows"] == counts["pair"]["pairs"]
    assert not (out / "guide").exists()
    row = read_records(out / "rollouts.jsonl", "pair")[0]
    assert len(row["rejected_weights"]) == len(row["rejected_ref_logps"])
    page = (out / "pairs.html").read_text()
    assert all(f'"{column}"' in page for column in ("ce_scores", "guidance_logratios", "rollout_values", "entropies"))
    done = align("inspect", "run", out)
    assert "align:" not in done.stderr  # nothing is missing
    page = Path(done.stdout.strip()).read_text()
    assert all(f"<h3>{method}<span>" in page and METHODS[method].title in page for method in read_config(ALL).methods)
    assert all(
        f"<figcaption>{name}" in page for name in ("ce_scores", "guidance_logratios", "rollout_values", "weights")
    )


def test_tgdpo_on_a_preference_data_set(tmp_path):
    """Text in, a guide of its own, accuracy on held-out pairs, and completions for a judge out; then a guide that is given."""
    rows = [
        {"instruction": f"What is {i}+1?", "chosen": f" It is {i + 1}.", "rejected": f" It is {i + 2}."}
        for i in range(12)
    ]
    write_records(tmp_path / "prefs.jsonl", rows)
    write_records(
        tmp_path / "prompts.jsonl", [{"instruction": "Say one.", "dataset": "d"}, {"instruction": "Say two."}]
    )
    out, prefs = tmp_path / "run", tmp_path / "prefs.jsonl"
    values = [
        "train={}", f"pairs={{source: {prefs}}}", f"test_pairs={{source: {prefs}, limit: 5}}", "inspect.first_error=false",
        f"test={{source: {tmp_path / 'prompts.jsonl'}, answers: false}}", "evaluate.export=alpaca-eval",
        "evaluate.max_new_tokens=8", "methods.dpo.args.max_steps=2", "methods.dpo.args.warmup_steps=0", "methods.tgdpo.args.max_steps=2",
        "guide={args: {max_steps: 3, bf16: false}}",
    ]  # fmt: skip
    flags = [word for value in values for word in ("--set", value)]
    command = ["recipes/tgdpo.py", "--config", str(TGDPO), "--output", str(out)]
    shown = python(*command, *flags).stdout
    assert "preference accuracy" in shown and "tgdpo-alpaca-eval.json" in shown
    summary = json.loads((out / "summary.json").read_text())
    assert summary["counts"]["tokenize"]["rows"] == 12 and summary["counts"]["train guide"]["steps"] == 3
    assert summary["scores"]["tgdpo"]["pairs"] == 5 and "preference" not in summary["scores"]["base"]
    exported = json.loads((out / "test/tgdpo-alpaca-eval.json").read_text())
    assert [row["instruction"] for row in exported] == ["Say one.", "Say two."]
    assert exported[0]["generator"] == "model-tgdpo" and exported[0]["dataset"] == "d"
    stamp = (out / "dpo").stat().st_mtime_ns
    given = [*flags[:-1], f"guide={{path: {out / 'dpo'}}}"]
    python(*command, *given)
    assert (out / "dpo").stat().st_mtime_ns == stamp
    row = read_records(out / "guided.jsonl", "pair")[0]
    assert any(row["chosen_guidance_logratios"]) and len(row["chosen_guidance_logratios"]) == len(row["chosen_ids"])


def test_scores_and_exports_from_the_command_line(tmp_path):
    model = ["--model", "data/tiny-arithmetic/model"]
    rows = [{"prompt": f"What is {i}+1?", "chosen": f" {i + 1}", "rejected": f" {i + 2}"} for i in range(4)]
    path = {
        name: tmp_path / f"{name}.jsonl" for name in ("prefs", "pairs", "answered", "entropy", "rollout", "samples")
    }
    write_records(path["prefs"], rows)
    assert json.loads(align("tokenize", path["prefs"], path["pairs"], *model).stdout)["rows"] == 4
    pairs = read_records(path["pairs"], "pair")
    entropy = align("score", "entropy", path["pairs"], path["entropy"], *model, "--dtype", "float32", "--top", 0.5)
    assert 0 < json.loads(entropy.stdout)["kept"] < json.loads(entropy.stdout)["tokens"]
    done = align("score", "rollout", path["pairs"], path["rollout"], *model, "--n", 2, ok=False)
    assert done.returncode == 2 and "no answer" in done.stderr
    write_records(path["answered"], [{**pair, "answer": "7"} for pair in pairs])
    options = [*model, "--dtype", "float32", "--n", 2, "--max-new-tokens", 12, "--k", 1, "--stop", "\\n"]
    assert "forward_tokens" in json.loads(align("score", "rollout", path["answered"], path["rollout"], *options).stdout)
    again = align("score", "rollout", path["answered"], path["rollout"], *options)
    assert "Loading weights" not in again.stderr
    align("sample", path["prefs"], path["samples"], *model, "--no-answers", "--max-new-tokens", 5, "--dtype", "float32")
    exported = tmp_path / "arena.jsonl"
    counts = align("evaluate", path["samples"], "--export", "arena-hard", "--out", exported, "--name", "mine")
    assert (
        json.loads(counts.stdout)["rows"] == 4 and json.loads(exported.read_text().splitlines()[0])["model"] == "mine"
    )
    for wrong in (["--export", "arena-hard"], ["--name", "mine"]):
        assert align("evaluate", path["samples"], *wrong, ok=False).returncode == 2


def test_the_command_line_and_the_baseline_recipes(tmp_path):
    model = "data/tiny-arithmetic/model"
    path = {
        name: tmp_path / f"{name}.jsonl"
        for name in ("problems", "samples", "verdicts", "pairs", "positive", "negative", "scored", "ref")
    }
    write_records(path["problems"], load_problems(str(ROOT / "data/tiny-arithmetic/test.jsonl"), limit=10))
    options = ["--model", model, "--dtype", "float32"]
    align("sample", path["problems"], path["samples"], *options, "--n", 6, "--max-new-tokens", 80)
    assert json.loads(align("verify", path["samples"], path["verdicts"]).stdout)["rows"] == 60
    counts = json.loads(
        align(
            "pair", path["verdicts"], path["pairs"], "--positive", path["positive"], "--negative", path["negative"]
        ).stdout
    )
    assert counts["pairs"] == len(read_records(path["pairs"], "pair")) > 0
    assert "| pass@1" in align("evaluate", path["verdicts"], "--k", 3).stdout
    for name in ("positive", "negative"):
        python(
            "recipes/sft.py", "--config", str(TINY), "--data", str(path[name]), "--output", str(tmp_path / "adapters" / name),
            "--set", "methods.sft.args.max_steps=1", "--set", "methods.sft.lora={r: 4, target_modules: [up_proj]}",
        )  # fmt: skip
    adapters = ["--positive", tmp_path / "adapters" / "positive", "--negative", tmp_path / "adapters" / "negative"]
    align("score", "contrastive", path["pairs"], path["scored"], *options, *adapters)
    align("score", "reference", path["scored"], path["ref"], *options)
    again = align("score", "reference", path["scored"], path["ref"], *options)
    assert "Loading weights" not in again.stderr and json.loads(again.stdout)["rows"] == counts["pairs"]
    row = read_records(path["ref"], "pair")[0]
    assert len(row["rejected_ce_scores"]) == len(row["rejected_ref_logps"]) == len(row["rejected_ids"])
    align("inspect", path["ref"], tmp_path / "page.html", "--tokenizer", model, "--column", "ce_scores")
    assert (tmp_path / "page.html").stat().st_size > 5000
    python(
        "recipes/dpo.py", "--config", str(TINY), "--data", str(path["ref"]), "--output", str(tmp_path / "dpo"),
        "--set", "methods.dpo.args.max_steps=1",
    )  # fmt: skip
    assert (tmp_path / "dpo" / "model.safetensors").exists()


def test_bad_input_is_one_line_and_no_traceback(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "x"}\n')
    for command in (
        ["verify", tmp_path / "a.jsonl", tmp_path / "b.jsonl"],
        ["evaluate", tmp_path / "none.jsonl"],
        [
            "sample",
            "data/tiny-arithmetic/test.jsonl",
            tmp_path / "b.jsonl",
            "--model",
            tmp_path / "none",
            "--limit",
            "1",
        ],
        ["sample", tmp_path / "none.csv", tmp_path / "b.jsonl", "--model", "data/tiny-arithmetic/model"],
    ):
        done = align(*command, ok=False)
        assert done.returncode == 2 and done.stderr.startswith("align: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "b.jsonl").exists()
    done = python("recipes/cdpo.py", "--config", str(tmp_path / "none.yaml"), "--output", str(tmp_path / "o"), ok=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "none.yaml" in done.stderr


def test_help_does_not_wait_for_torch():
    shown = python("-c", "import sys, align, align.cli; print('torch' in sys.modules)").stdout
    assert shown.strip() == "False"
