"""The page of a run: that it says what the folder says, of runs that are finished, cut off, damaged, hostile, or large."""

import html
import json
import os
import random
import re
import shutil

import pytest
from conftest import byte_level_tokenizer, random_pairs
from test_report import HOSTILE, page_data
from typer.testing import CliRunner

from align.cli import app
from align.errors import ConfigError, RecordFileError
from align.evaluate import evaluate_verdicts
from align.records import write_records
from align.run_folder import read_run
from align.run_report import inspect_run
from align.stages import write_manifest

TOKENIZER = byte_level_tokenizer()
COLUMNS = ("ce_scores", "ref_logps", "weights", "entropies", "guidance_logratios", "rollout_values")
LOG = [
    {"step": 10 * k, "epoch": k / 3, "loss": 0.7 / k, "rewards/chosen": 0.1 * k, "rewards/rejected": -0.2 * k,
     "rewards/accuracies": 1 - 0.3 / k, "rewards/margins": 0.3 * k, "learning_rate": 1e-5 / k, "weights/chosen_negative": 0.0}
    for k in range(1, 7)
]  # fmt: skip
EVALUATED = {"step": 60, "epoch": 2.0, "eval_loss": 0.25, "eval_rewards/chosen": 0.5, "eval_runtime": 3.0}
END = {"step": 60, "epoch": 2.0, "train_loss": 0.286, "train_runtime": 12.5, "total_flos": 1.0}


def state(history, step=60, most=60):
    return json.dumps({"global_step": step, "max_steps": most, "log_history": history})


def verdicts(seed, share):
    draw = random.Random(seed)
    return [
        {"id": f"q{i}", "prompt": "x", "answer": "1", "sample": j, "prompt_ids": [5], "completion_ids": [6], "completion": "c",
         "finish_reason": "stop", "extracted": "1", "rule": "hash", "correct": draw.random() < share}
        for i in range(40) for j in range(2)
    ]  # fmt: skip


def trace(i):
    ids = TOKENIZER("37-7=30")["input_ids"]
    probabilities = [0.01 * ((7 * i + j) % 97) for j in range(len(ids))]
    return {"id": f"t{i}", "prompt": "q", "prompt_ids": [5], "completion_ids": ids, "completion": "37-7=30", "sample": 0,
            "student_probs": probabilities, "teacher_probs": [0.25] * len(ids), "from_teacher": [True] * len(ids)}  # fmt: skip


def make_run(folder):
    """A small run that is finished, as the stages write it; returns its rows."""
    pairs = random_pairs(30, vocab_size=390, columns=COLUMNS)
    folder.mkdir()
    rows = verdicts(0, 0.4)
    write_records(folder / "verdicts.jsonl", rows)
    write_manifest(
        folder / "verdicts.jsonl", "verify", {"samples": "ab12"}, {"rows": len(rows), "correct": 31, "no_answer": 3}
    )
    counts = {
        "completions": 80,
        "problems": 40,
        "problems_without_correct": 7,
        "problems_without_wrong": 3,
        "pairs": 30,
        "positive": 30,
        "negative": 30,
    }
    for name in ("pairs", "positive", "negative"):
        write_records(
            folder / f"{name}.jsonl", [{k: v for k, v in p.items() if not k.endswith(COLUMNS)} for p in pairs]
        )
        write_manifest(
            folder / f"{name}.jsonl", "pair", {"negative_coverage": 0.123, "nested": {"deep": "value-7"}}, counts
        )
    write_records(folder / "scored.jsonl", pairs)
    write_manifest(folder / "scored.jsonl", "score contrastive", {"beta": 1.5}, {"rows": 30, "too_long": 11})
    write_records(folder / "traces.jsonl", [trace(i) for i in range(9)])
    write_manifest(folder / "traces.jsonl", "trace", {}, {"rows": 9})
    (folder / "cdpo").mkdir()
    (folder / "cdpo" / "trainer_state.json").write_text(state([*LOG, EVALUATED, END]))
    (folder / "cdpo" / "README.md").write_text(
        "# x\n### Framework versions\n\n- TRL: 1.16.0\n- Pytorch: 2.13.0+cpu\n\n## C\n"
    )
    TOKENIZER.save_pretrained(folder / "cdpo")
    write_manifest(folder / "cdpo", "cdpo", {"args": {"beta": 0.1}}, {"rows": 30, "steps": 60, "train_runtime": 12.5})
    scores = {}
    for name, share in (("base", 0.3), ("cdpo", 0.8)):
        rows = verdicts(len(name), share)
        write_records(folder / "test" / f"{name}-verdicts.jsonl", rows)
        write_manifest(folder / "test" / f"{name}-verdicts.jsonl", "verify", {}, {"rows": len(rows)})
        scores[name] = evaluate_verdicts(rows, [2])
    summary = {
        "table": [{"method": "the base"}, {"method": "cDPO!"}], "scores": scores, "page": None, "exports": [],
        "counts": {"train cdpo": {"prompt_fills_max_length": 13}}, "lowest score is the first error": {"share": 0.9, "n": 30},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return pairs, scores


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "my-run"
    return folder, *make_run(folder)


@pytest.fixture
def run(made, tmp_path):
    """A copy to break."""
    return shutil.copytree(made[0], tmp_path / "run")


def plain(text):
    """What a reader of the page reads, without markup."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", text, flags=re.DOTALL)))


def drawn_lines(text):
    """Lines of all charts: name of the chart -> name of the line -> points."""
    found = re.findall(r'aria-label="([^"]+) against steps[^"]*" data-lines="([^"]+)"', text)
    return {
        html.unescape(name): {each["name"]: each["points"] for each in json.loads(html.unescape(lines))}
        for name, lines in found
    }


def test_the_page_says_what_the_folder_says(made, tmp_path):
    folder, pairs, scores = made
    path, problems = inspect_run(folder, tmp_path / "page.html", limit=7)
    text, _, sets = page_data(path)
    shown = plain(text)
    assert problems == []
    stages = re.findall(r'<div class="stage"><b>(.*?)</b>\s*<span class="files">(.*?)</span>', text)
    assert stages == [
        ("verify", "verdicts.jsonl"), ("pair", "negative.jsonl, pairs.jsonl, positive.jsonl"), ("score contrastive", "scored.jsonl"),
        ("trace", "traces.jsonl"), ("cdpo", "cdpo"), ("verify", "test/base-verdicts.jsonl"), ("verify", "test/cdpo-verdicts.jsonl"),
    ]  # fmt: skip
    for words in (
        "correct 31", "problems without correct 7", "nested.deep value-7", "negative_coverage 0.123", "TRL 1.16.0", "Pytorch 2.13.0+cpu",
        "lowest score is the first error 90.0 % of 30", "60 of 60 steps", "12.5 s", "7 problems without a right completion pair",
        "11 pairs longer than max_length score contrastive scored.jsonl",
        "13 prompts that fill max_length and leave no room for a completion cdpo cdpo",
    ):  # fmt: skip
        assert words in shown, words
    for name, title in (("base", "the base"), ("cdpo", "cDPO!")):
        cells = [scores[name][metric] for metric in ("pass@1", "pass@2", "maj@2")]
        row = " ".join(f"{100 * c['value']:.1f} [{100 * c['low']:.1f}, {100 * c['high']:.1f}]" for c in cells)
        assert f"{title} {row} 40" in shown
    lines = drawn_lines(text)
    steps = [entry["step"] for entry in LOG]
    for chart, line, key in (
        ("loss", "train", "loss"), ("rewards", "chosen", "rewards/chosen"), ("rewards", "rejected", "rewards/rejected"),
        ("weights_negative", "chosen", "weights/chosen_negative"), ("learning_rate", "train", "learning_rate"),
    ):  # fmt: skip
        assert [point[0] for point in lines[chart][line]] == steps
        assert [point[1] for point in lines[chart][line]] == pytest.approx([entry[key] for entry in LOG], rel=1e-4)
    assert lines["loss"]["eval"][0][:2] == [60, 0.25] and lines["rewards"]["chosen, eval"][0][:2] == [60, 0.5]
    assert not {"epoch", "train_loss", "runtime", "total_flos"} & set(lines)
    heights = [point[3] for point in lines["rewards/margins"]["train"]]
    assert heights == sorted(heights, reverse=True) and len(set(heights)) == 6  # it rises, and y points down
    assert [each["name"] for each in sets] == ["scored.jsonl", "traces.jsonl"]
    assert len(sets[0]["pairs"]) == len(sets[1]["pairs"]) == 7
    ids = {pair["id"]: pair["rejected_ids"] for pair in pairs}
    for row in sets[0]["pairs"]:
        assert [sets[0]["vocabulary"][place][0] for place in row["rejected"]["tokens"]] == ids[row["id"]]


def test_histograms_count_every_token(made, tmp_path):
    text = inspect_run(made[0], tmp_path / "page.html")[0].read_text()
    figures = re.findall(
        r'<figure class="panel chart"><figcaption>(\w+)<span>(.*?)</span>(.*?)</figure>', text, re.DOTALL
    )
    assert [name for name, *_ in figures] == [
        *("ce_scores", "guidance_logratios", "ref_logps", "weights", "entropies", "rollout_values"),
        *("student_probs", "from_teacher", "teacher_probs"),
    ]
    for name, files, figure in figures:
        assert files == (
            "traces.jsonl, 9 rows"
            if name in ("student_probs", "from_teacher", "teacher_probs")
            else "scored.jsonl, 30 rows"
        )
        counted = [int(n) for n in re.findall(r"% of chosen \((\d+)\)", figure)]
        if counted:
            assert sum(counted) == sum(len(pair["chosen_ids"]) for pair in made[1])
            if name == "ce_scores":  # counted again, by hand
                values = [v for pair in made[1] for v in pair["chosen_ce_scores"]]
                assert counted == [sum(k / 24 <= v < (k + 1) / 24 for v in values) for k in range(24)]


def test_a_column_that_is_carried_on_is_shown_once(run, tmp_path):
    shutil.copy(run / "scored.jsonl", run / "again.jsonl")
    text = inspect_run(run, tmp_path / "page.html")[0].read_text()
    assert text.count("<figcaption>ce_scores") == 1 and "scored.jsonl, again.jsonl, 30 rows" in text


def hostile(value):
    """The same, with markup in every text, names included."""
    if isinstance(value, dict):
        return {k + HOSTILE: hostile(v) for k, v in value.items()} | {k: hostile(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(v) for v in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_nothing_in_a_folder_becomes_markup(run, tmp_path):
    for path in [*run.rglob("*.json"), *run.rglob("*.jsonl")]:
        if "tokenizer" in path.name:
            continue
        parts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        rows = [hostile(json.loads(part)) for part in parts]
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    for name in ("scored.jsonl", "cdpo/README.md"):
        text = (run / name).read_text()
        (run / name).write_text(text.replace("1.16.0", "<script>alert(1)</script>"))
    wild = run.with_name("<script>alert(1)<!-- & run")
    run.rename(wild)
    (wild / "<img src=x onerror=alert(1)>.jsonl").write_text("<script>\n")
    (wild / "dpo.training" / "checkpoint-1").mkdir(parents=True)
    (wild / "dpo.training.settings.manifest.json").write_text(
        json.dumps(hostile({"stage": "dpo", "settings": {"a": "b"}}))
    )
    path, problems = inspect_run(wild, tmp_path / "page.html")
    text, block, sets = page_data(path)
    assert sets and not re.search("[<>&\u2028]", block) and any("<img" in problem for problem in problems)
    assert text.count("<script>") == 2 and text.count("<script ") == 1 and text.count("</script>") == 3
    assert "<img" not in text and "<!--" not in text and "alert(1)&lt;!-- &amp; run" in text
    without_text = re.sub(r"img src=x|https://example\.org/x\.js", "", text)
    assert not re.search(
        r"""(src|href)\s*=\s*["']?(?!data:,|#)[\w./:]|@import|url\(|fetch\(|XMLHttpRequest|https?:""", without_text
    )
    assert not re.search("innerHTML|outerHTML|insertAdjacentHTML|document.write", text)
    assert plain(text).count("onerror=alert(1)") > 40  # it is there to be read


def test_a_run_that_goes_on_or_was_cut_off(run, tmp_path):
    (run / "summary.json").unlink()
    (run / "test" / "cdpo-verdicts.jsonl.manifest.json").unlink()
    parts = run / "rollouts.jsonl.parts"
    parts.mkdir()
    (parts / "settings.json").write_text(json.dumps({"stage": "score rollout", "settings": {"n": 16}, "batches": 5}))
    for number_ in range(3):
        (parts / f"{number_:06d}.jsonl").write_text("{}\n")
    working = run / "dpo.training"
    for step, text in ((20, state(LOG[:2], 20, 400)), (100, state(LOG[:3], 30, 400)), (200, '{"log_history": [')):
        (working / f"checkpoint-{step}").mkdir(parents=True)
        (working / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    marker = run / "dpo.training.settings"
    marker.touch()
    write_manifest(marker, "dpo", {"args": {"beta": 0.3}}, {})
    (run / "guide.training").mkdir()
    path, problems = inspect_run(run, tmp_path / "page.html")
    text = path.read_text()
    shown = plain(text)
    for words in (
        "summary.json: not there, so the run has not come to its end",
        "test/cdpo-verdicts.jsonl: has no manifest: written by hand, or its stage was interrupted",
        "dpo.training/checkpoint-200/trainer_state.json: damaged, not JSON",
        "guide: its training has no checkpoint yet",
    ):
        assert any(words in problem for problem in problems) and words in shown, words
    assert len(problems) == 4
    assert "score rollout rollouts.jsonl not finished: running, or interrupted, with 3 of 5 batches done" in shown
    assert "dpo 30 of 400 steps, not finished" in shown and "args.beta 0.3" in shown
    assert "Not finished: 6 of 9" in shown
    curves = re.search(r'<h3>dpo<span>.*?data-lines="([^"]+)"', text, re.DOTALL)[1]
    assert [point[0] for point in json.loads(html.unescape(curves))[0]["points"]] == [10, 20, 30]
    # What is finished of the evaluation is there, counted anew.
    score = evaluate_verdicts(verdicts(len("base"), 0.3))["pass@1"]
    assert f"base {100 * score['value']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]" in shown


@pytest.mark.parametrize("cut", ["half", "empty", "bytes"])
def test_a_damaged_file_is_named(made, tmp_path, cut):
    names = [path.relative_to(made[0]) for path in made[0].rglob("*") if path.is_file()]
    for k, name in enumerate(sorted(names)):
        folder = shutil.copytree(made[0], tmp_path / str(k))
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(
            {"half": content[: len(content) // 2], "empty": b"", "bytes": b"\xff\xfe\x00" * 50}[cut]
        )
        path, problems = inspect_run(folder)
        about_tokens = "tokenizer" in name.name and name.name != "tokenizer_config.json"
        if name.name in ("README.md", "tokenizer_config.json", "chat_template.jinja") and cut != "bytes":
            continue  # half a card, or settings that transformers does without, is no damage that could be seen
        about = str(name.parent) if about_tokens or name.name == "tokenizer_config.json" else str(name)
        assert any(about in problem for problem in problems), (name, problems)
        assert about in plain(path.read_text())
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "name", ["summary.json", "cdpo/trainer_state.json", "scored.jsonl.manifest.json", "scored.jsonl"]
)
def test_any_json_in_any_place_makes_a_page(run, tmp_path, name):
    """Every value of a file is replaced by every kind of value, one after the other."""
    odd = [None, [], {}, "x", True, -1, 1e308, float("nan"), float("-inf"), 10**400, [{}], {"a": [1]}, "\ud800"]
    lines, text = name.endswith(".jsonl"), (run / name).read_text()
    whole = [json.loads(line) for line in text.splitlines()[:3]] if lines else json.loads(text)

    def write(value):
        (run / name).write_text("\n".join(map(json.dumps, value)) + "\n" if lines else json.dumps(value))

    def places(value, depth=0):
        """(container, key) of values, of a list the first and the last."""
        keys = (
            value
            if isinstance(value, dict)
            else sorted({0, len(value) - 1} & set(range(len(value))))
            if isinstance(value, list)
            else ()
        )
        for key in list(keys):
            yield value, key
            if depth < 4:
                yield from places(value[key], depth + 1)

    for other in {"scored.jsonl", "pairs.jsonl", "positive.jsonl", "negative.jsonl", "traces.jsonl"} - {name}:
        (run / other).unlink()  # for speed
    every = [(*place, value) for place in places(whole) for value in odd]
    tried = random.Random(0).sample(every, min(len(every), 80))
    for container, key, value in tried:
        kept = container[key]
        container[key] = value
        write(whole)
        path, _ = inspect_run(run, tmp_path / "page.html", tokenizer=TOKENIZER)
        assert "</html>" in path.read_text(), (key, value)
        container[key] = kept
    assert len(tried) > 60


def test_rows_that_are_missing_are_noticed(run, tmp_path):
    lines = (run / "scored.jsonl").read_text().splitlines(keepends=True)
    (run / "scored.jsonl").write_text("".join(lines[:20]))
    assert inspect_run(run, tmp_path / "page.html")[1] == ["scored.jsonl: has 20 rows, and its manifest says 30"]


def test_a_row_that_does_not_fit_is_named_by_its_place(run, tmp_path):
    rows = [json.loads(line) for line in (run / "scored.jsonl").read_text().splitlines()]
    rows[17]["rejected_ce_scores"].append(0.5)
    write_records(run / "scored.jsonl", rows)
    (problem,) = inspect_run(run, tmp_path / "page.html")[1]
    assert problem.startswith(
        "scored.jsonl: 1 of 30 rows looked at cannot be shown, the first: row 17 (id 'p17'): rejected_ce_scores has"
    )


def test_from_the_command_line(run, tmp_path):
    command = CliRunner()
    done = command.invoke(app, ["inspect", "run", str(run)])
    assert done.exit_code == 0 and done.stdout.strip() == str(run / "run.html") and "align:" not in done.stderr
    (run / "summary.json").write_text("{")
    done = command.invoke(app, ["inspect", "run", str(run), "--out", str(tmp_path / "page.html")])
    assert done.exit_code == 0 and "align: summary.json: damaged, not JSON" in done.stderr
    # `records` may be left out, wherever options stand.
    tokenizer = ["--tokenizer", str(run / "cdpo")]
    for words in ([], ["records"]):
        for order in (
            [str(run / "scored.jsonl"), str(tmp_path / "a.html"), *tokenizer],
            [*tokenizer, str(run / "traces.jsonl"), str(tmp_path / "a.html")],
        ):
            (tmp_path / "a.html").unlink(missing_ok=True)
            done = command.invoke(app, ["inspect", *words, *order])
            assert done.exit_code == 0 and (tmp_path / "a.html").stat().st_size > 5000, done.output


def test_refusals(run, tmp_path):
    with pytest.raises(RecordFileError, match="no such folder"):
        inspect_run(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordFileError, match="neither a manifest"):
        inspect_run(tmp_path / "empty")
    with pytest.raises(ConfigError, match="limit=0"):
        inspect_run(run, limit=0)
    (tmp_path / "taken").mkdir()
    with pytest.raises(RecordFileError, match="taken"):
        inspect_run(run, tmp_path / "taken")
    assert not (run / "run.html").exists() and not list((tmp_path / "empty").iterdir())


def test_without_a_tokenizer_there_are_numbers_but_no_tokens(run, tmp_path):
    for path in (run / "cdpo").glob("tokenizer*"):
        path.unlink()
    path, problems = inspect_run(run, tmp_path / "page.html")
    assert problems == ["examples: no training has left a tokenizer in the folder yet; give --tokenizer to see tokens"]
    text = path.read_text()
    assert 'id="data"' not in text and "<figcaption>ce_scores" in text
    assert 'id="data"' in inspect_run(run, path, tokenizer=TOKENIZER)[0].read_text()


def test_stages_are_in_the_order_of_their_file_times(run):
    for k, name in enumerate(("traces.jsonl", "cdpo", "verdicts.jsonl")):
        os.utime(run / f"{name}.manifest.json", (1000 + k, 1000 + k))
    assert [stage.outputs[0] for stage in read_run(run).stages][:3] == ["traces.jsonl", "cdpo", "verdicts.jsonl"]
