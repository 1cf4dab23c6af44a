"""What README tells users to type, typed."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The folder in which the chain by hand was typed, and what it printed."""
    folder = tmp_path_factory.mktemp("chain")
    (commands,) = [block for block in blocks("sh") if "align sample" in block]
    for name in ("data", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    scripts = folder / "bin"
    scripts.mkdir()
    (scripts / "align").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m align "$@"\n')
    (scripts / "align").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    commands = commands.replace("\npython ", f'\n"{sys.executable}" ')
    done = subprocess.run(
        ["sh", "-ec", commands], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_the_chain_by_hand(chain):
    folder, printed = chain
    assert "| pass@4" in printed
    assert '"chosen_guidance_logratios"' in (folder / "guided.jsonl").read_text()
    assert '"rejected_rollout_values"' in (folder / "rollouts.jsonl").read_text()
    assert '"input_ids"' in (folder / "mixed.jsonl").read_text()
    assert '"generated_ids"' in (folder / "corrections.jsonl").read_text()
    assert '"rejected_entropies"' in (folder / "entropy.jsonl").read_text()
    assert '"rank_surprisal_ratio"' in (folder / "selected.jsonl").read_text()
    assert "160 of 160 traces" in (folder / "traces.html").read_text()
    assert (folder / "pairs.html").exists() and (folder / "referenced.jsonl").exists()


def test_the_python_examples(chain, monkeypatch):
    """On the files that the chain by hand leaves."""
    from align.records import read_records

    example, own, bash, trace = (
        block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "data/tiny-arithmetic/model") for block in blocks("python")
    )
    monkeypatch.chdir(chain[0])
    cpu = "bf16=False, use_cpu=True, max_steps=1, save_strategy='no', report_to='none', logging_steps=1, per_device_train_batch_size=500"
    assert "bf16=True" in example
    exec(example.replace("bf16=True", cpu), {})

    # The method of one's own: short, and its weights are those of its formula.
    assert len([line for line in own.splitlines() if line.strip()]) < 25 and "gamma=1.0" in own
    names = {"__name__": "example"}
    exec(own.replace("bf16=True", cpu), names)
    pairs = read_records("referenced.jsonl")
    assert len(pairs) < 500  # one batch
    values = [math.exp(value) for pair in pairs for value in pair["rejected_ref_logps"]]
    assert names["trainer"].state.log_history[0]["weights/rejected"] == pytest.approx(
        sum(values) / len(values), abs=1e-4
    )

    problems = read_records("data/tiny-arithmetic/train.jsonl")[:40]
    rows = [{"prompt": row["prompt"], "completion": row["solution"]} for row in problems]
    loading = 'load_dataset("trl-lib/tldr", split="train")'
    assert loading in bash
    two_steps = cpu.replace("max_steps=1", "max_steps=2")
    bash = bash.replace(loading, "Dataset.from_list(rows)").replace("bf16=True", two_steps)
    names = {"rows": rows}
    exec("from datasets import Dataset\n" + bash, names)
    # Of two steps, a linear schedule has no own tokens in the first and ε in the second.
    first, second = (entry["bash/own_tokens"] for entry in names["trainer"].state.log_history[:2])
    assert first == 0 and 0.2 < second < 0.3

    names = {}
    exec(trace, names)
    drawn = names["trace"]
    assert drawn.completion_ids and drawn.finish_reason in ("stop", "length")
    accepted = [p for p, source in zip(drawn.student_probs, drawn.sources, strict=True) if source == "teacher"]
    assert accepted and min(accepted) >= 0.01


def test_named_files_exist():
    for path in re.findall(r"\b(?:recipes|benchmarks|data|tests)/[\w./-]+\.(?:py|yaml|md|json)\b", README):
        assert (ROOT / path).exists(), path


def test_every_table_quotes_a_result_that_is_there():
    """No placeholder is left, every link leads somewhere, and the figures of the first table are those of the JSON."""
    assert "@@" not in README
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    result = json.loads((ROOT / "benchmarks/results/tiny_methods.json").read_text())
    for method, values in result["accuracy"].items():
        assert f"{sum(values) / len(values):.1f} ±" in README, method
    for name, difference in result["differences"].items():
        if name != "entropy - dpo":  # "0.0", without its sign
            assert f"{abs(difference['mean']):.1f} ± {difference['half']:.1f}" in README, name
    lowest, critical = (result[f"{name} is the first error"] for name in ("lowest score", "critical token"))
    assert f"{100 * lowest['share']:.1f} % of {lowest['n']:,}" in README
    assert f"rollouts in {100 * critical['share']:.1f} %" in README
    for name in ("scoring_tiny", "scoring_smollm2"):
        result = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
        assert f"{result['seconds, one at a time over two models']:.1f} s" in README
        assert f"{result['seconds, batched over one base']:.1f} s" in README


def test_critical_tokens_are_quoted_as_measured():
    result = json.loads((ROOT / "benchmarks/results/critical_tokens.json").read_text())
    tokens, drawn = result["forward tokens per pair"], result["really drawn, n = 8"]
    for name in ("rollouts, every position", "rollouts, every position, independent", "rollouts, bisection"):
        assert f"| {tokens[name]:,.0f} |" in README, name
    assert (
        f"{tokens['contrastive, scoring']:.0f}, and {tokens['contrastive, its share of training']:,.0f} for" in README
    )
    for name in ("the lowest contrastive score", "the first contrastive score under 0.5", "what bisection finds"):
        assert f"{100 * result[f'critical token is: {name}']:.1f} %" in README, name
    assert f"took {drawn['independent tokens']:,} tokens and {drawn['independent seconds']:.1f} s" in README
    assert f"{drawn['shared tokens']:,.0f} and {drawn['shared seconds']:.2f} s" in README


def test_convergence_is_quoted_as_measured():
    result = json.loads((ROOT / "benchmarks/results/convergence.json").read_text())
    curves: dict[tuple, list[dict]] = {}
    for run in result["runs"]:
        curves.setdefault((run["learning rate"], run["method"]), []).append(run["accuracy"])
    for (_, method), found in curves.items():
        mean = {step: sum(curve[step] for curve in found) / len(found) for step in found[0]}
        best = max(mean, key=mean.get)
        assert f"| {method} | {mean[best]:.1f} | {best} | {mean['360']:.1f} |" in README, method
    near = result["weights within 0.1 of 1"]
    assert f"{100 * near['TGDPO, α 0.5']:.1f} % of whose weights" in README
    assert f"({100 - 100 * near['TGDPO, α 2']:.1f} % of them by more" in README


def test_the_tgdpo_step_is_quoted_as_measured():
    rows = json.loads((ROOT / "benchmarks/results/tgdpo_step.json").read_text())
    for name, row in zip(("full fine-tuning", "LoRA"), rows, strict=True):
        times = [row["seconds per step, all models every step"], row["seconds per step, cached"], row["ratio"]]
        cells = [
            *(f"{t:.2f}" for t in times),
            f"{row['weights MB, every step']:.0f} → {row['weights MB, cached']:.0f}",
            f"{row['largest relative difference of a loss']:.0e}",
        ]
        assert f"| {name} | {' | '.join(cells)} |" in README, name


def test_the_speed_of_a_step_is_quoted_as_measured():
    results = json.loads((ROOT / "benchmarks/results/dpo_step_cpu.json").read_text())["results"]
    more = json.loads((ROOT / "benchmarks/results/dpo_step_cpu_more.json").read_text())["results"]
    families = json.loads((ROOT / "benchmarks/results/dpo_step_families.json").read_text())["results"]
    assert len(results) == 6 and len(more) == 6 and len(families) == 2
    for row in results + families:
        seconds, memory = row["seconds"], row["peak memory, GB"]
        cells = [
            f"{seconds['trl']:.1f}",
            f"{seconds['ours']:.1f}",
            f"{row['TRL / ours']:.1f}",
            f"{row['ours / floor']:.2f}",
        ]
        cells.append(f"{memory['trl']:.1f} → {memory['ours']:.1f}")
        assert f"| {row['model']} | {row['shape']} | {' | '.join(cells)} |" in README, (row["model"], row["shape"])
    for row in more:
        assert f"{row['TRL / ours']:.1f}" in README, (row["model"], row["shape"])
    largest = max(row["relative difference of gradients"] for row in results)
    assert f"gradients agree to {largest:.0e}" in README
    growth = json.loads((ROOT / "benchmarks/results/dpo_growth.json").read_text())["rows"]
    for row in growth:
        assert f"| {row['prompt']:,} | {row['trl']:.2f} | {row['ours']:.2f} | {row['ratio']:.1f} |" in README, row[
            "prompt"
        ]


def test_what_drawing_adds_is_quoted_as_measured():
    rows = json.loads((ROOT / "benchmarks/results/own_tokens_step.json").read_text())["results"]
    for row in rows:
        cells = [f"{row['seconds per step']:.2f}", format(row["over SFT's"], ".2f")]
        if row["tokens drawn"]:
            cells += [f"{row['refresh, seconds']:.1f}", f"{row['tokens drawn per second of refresh']:,.0f}"]
        assert f"| {row['trainer']} | {' | '.join(cells)} |" in README, row["trainer"]
    (parallel,) = (row["over SFT's"] for row in rows if row["trainer"] == "BASH, parallel")
    assert parallel <= 1.4


def test_own_tokens_are_quoted_as_measured():
    result = json.loads((ROOT / "benchmarks/results/own_tokens.json").read_text())
    assert len(result["accuracy"]) == 7 and result["seeds"] == 5
    for method, values in result["accuracy"].items():
        assert len(values) == 5 and f"| {sum(values) / 5:.1f} ± " in README, method
    for name, difference in result["differences"].items():
        if name not in ("rac-dpo - sft", "rac-cdpo - sft"):
            assert difference["mean"] < 0
            assert f"{-difference['mean']:.1f} ± {difference['half']:.1f}" in README, name
    for method in ("base", "sft", "bash", "bash_autoregressive"):
        cells = result["right steps and all steps by position"][method]["after an error"].values()
        right, steps = sum(cell[0] for cell in cells), sum(cell[1] for cell in cells)
        assert f"{100 * right / steps:.1f} % of {steps:,}" in README, method
    before = result["corrections"]["unanswered_before"] * result["corrections"]["corrected"]
    assert f"{100 * before:.1f} % of its completions the cue stands before any answer" in README.replace("\n", " ")


def test_the_speed_of_traces_is_quoted_as_measured():
    results = json.loads((ROOT / "benchmarks/results/rsd_speed_cpu.json").read_text())["results"]
    cells: dict[tuple, dict[int, dict]] = {}
    for row in results:
        cells.setdefault((row["teacher layers"], row["batch"]), {})[row["lookahead"]] = row
    assert len(cells) == 10
    for (layers, batch), rows in cells.items():
        best, plain = max(rows.values(), key=lambda row: row["over lookahead 0"]), rows[0]
        shown = [
            layers, batch, f"{plain['teacher / student']:.1f}", f"{100 * plain['drafts accepted']:.0f} %", f"{plain['tokens per second']:.1f}",
            f"{best['tokens per second']:.1f} (γ = {best['lookahead']})", f"{best['over lookahead 0']:.2f}",
            f"{max(row['bound'] for row in rows.values()):.2f}",
        ]  # fmt: skip
        assert f"| {' | '.join(map(str, shown))} |" in README, (layers, batch)
    times = {}
    for layers in {layers for layers, _ in cells}:
        one, eight = (
            {ahead: row["tokens per second"] for ahead, row in cells[layers, batch].items()} for batch in (1, 8)
        )
        times[layers] = eight[0] / one[0], eight[4] / one[4], max(eight.values()) / max(one.values())
    plain, four, best = times[30]
    assert (
        f"{plain:.1f} times one (30 layers, γ = 0), {four:.1f} at γ = 4, and {best:.1f} with the best γ of each"
        in README
    )
    bests = sorted(best for *_, best in times.values())
    assert f"all teachers, {bests[0]:.1f} to {bests[-1]:.1f} with the best of each" in README


def test_the_speed_of_traces_on_a_gpu_is_quoted_as_measured():
    result = json.loads((ROOT / "benchmarks/results/rsd_speed_cuda.json").read_text())
    assert result["hardware"] == "NVIDIA H200" and result["new tokens"] == 128 and result["rounds"] == 2
    spread = {True: [], False: []}
    for row in result["results"]:
        spread[row["cuda graphs"]].append(max(row["all"]) / min(row["all"]))
    assert 2.9 < max(spread[False]) < 3.1 and max(spread[True]) < 1.135
    extra = max(
        row["first batch, seconds"] - 128 * row["batch"] / row["tokens per second"]
        for row in result["results"]
        if row["cuda graphs"] and row["lookahead"]
    )
    assert f"γ + 1 tokens took up to {extra:.2f} s of a first batch" in README
    for batch in (1, 8, 32):
        mine = [row for row in result["results"] if row["batch"] == batch]
        rows = {row["lookahead"]: row for row in mine if row["cuda graphs"]}
        (without,) = (row for row in mine if not row["cuda graphs"] and row["lookahead"] == 0)
        best, plain = max(rows.values(), key=lambda row: row["over lookahead 0"]), rows[0]
        teacher = [row["teacher pass, ms"] for row in (without, plain)]
        student = [row["teacher pass, ms"] / row["teacher / student"] for row in (without, plain)]
        shown = [
            batch, " → ".join(f"{ms:.1f}" for ms in teacher), " → ".join(f"{ms:.1f}" for ms in student), f"{100 * plain['drafts accepted']:.0f} %",
            f"{without['tokens per second']:,.0f}", f"{plain['tokens per second']:,.0f}",
            f"{best['tokens per second']:,.0f} (γ = {best['lookahead']})", f"{best['over lookahead 0']:.2f}", f"{best['bound']:.2f}",
        ]  # fmt: skip
        assert f"| {' | '.join(map(str, shown))} |" in README, batch


def test_what_students_learn_from_traces_is_quoted_as_measured():
    result = json.loads((ROOT / "benchmarks/results/traces.json").read_text())
    assert result["seeds"] == 5 and len(result["accuracy"]) == 8
    for method, values in result["accuracy"].items():
        threshold = "" if method in ("base", "teacher_samples") else "1e-05" if method.endswith(", low") else "0.01"
        assert len(values) == 5
        assert re.search(rf"^\| [^|]+ \| {threshold} \| {sum(values) / 5:.1f} ± ", README, re.MULTILINE), method
    under = result["share of tokens under 0.01"]
    theirs = under["the teacher's samples"]
    assert under["RSD traces"] == 0 and f"tokens {100 * theirs:.1f} % have less" in README.replace("\n", " ")
    differ = {name: counts.get("problems with traces that differ") for name, counts in result["counts"].items()}
    assert differ["0.01"] == 0 and f"{100 * differ['1e-05']:.1f} % of the problems differed" in README
    rsr = result["differences"]["rsd_rsr, low - rsd, low"]
    assert f"RSR loses {-rsr['mean']:.1f} ± {rsr['half']:.1f}" in README
    assert abs(rsr["mean"]) < rsr["half"]
    gains = [
        result["differences"][f"{rule}, low - rsd, low"]["mean"]
        for rule in ("rsd_aslec_drop", "rsd_aslec_casl", "rsd_mean_logp")
    ]
    assert f"gain {min(gains):.0f} to {max(gains):.0f} points over the shortest trace" in README.replace("\n", " ")


def test_a_million_rows_pages_and_imports_are_quoted_as_measured():
    text = README.replace("\n", " ")
    million = json.loads((ROOT / "benchmarks/results/million.json").read_text())
    runs = million["runs"]
    assert million["rows"] == 1_000_000 and all(run["peak_mib"] < 2048 for run in runs.values())
    seconds = {name: round(sum(run["cpu_seconds"].values())) for name, run in runs.items()}
    peak, own = ({name: run[key] for name, run in runs.items()} for key in ("peak_mib", "own_mib"))
    assert f"scoring the reference {peak['score']} MiB ({seconds['score']} s of the core)" in text
    assert (
        f"first step, preflight included, {peak['cdpo']} MiB, TGDPO {peak['tgdpo']} MiB ({seconds['cdpo']} and {seconds['tgdpo']} s)"
        in text
    )
    assert all("preflight" in runs[name]["cpu_seconds"] for name in ("cdpo", "tgdpo"))
    assert f"of which {own['cdpo']} and {own['tgdpo']} are the process's own" in text
    for row in json.loads((ROOT / "benchmarks/results/pages.json").read_text())["rows"]:
        name = row["page"].replace("a run", "the quickstart's run")
        assert f"| {name} | {row['MB']:.2f} | {row['load, s']:.2f} | {row['tokens visible, s']:.2f} |" in README, name
    imports = {
        row["command"]: row["seconds"]
        for row in json.loads((ROOT / "benchmarks/results/imports.json").read_text())["medians"]
    }
    help_of = [value for name, value in imports.items() if name.count(" ") > 1]
    assert (
        f"`import align` takes {imports['import align']:.2f} s, `align --help` {imports['align --help']:.2f} s" in text
    )
    assert f"the help of a command {min(help_of):.2f}–{max(help_of):.2f} s" in text and max(help_of) < 0.5
