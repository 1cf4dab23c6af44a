"""Engines outside of transformers: what they give is checked and cut as ours, against a server in this process that draws by a
plain greedy loop."""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_server import END, EOS, MODEL, TOKENIZER, Fake, greedy

from align import engines, server
from align.cli import main
from align.config import read_config
from align.engines import EngineConfig, describe_model, open_engine, read_completion, visible_devices
from align.errors import ConfigError, EngineError, ModelLoadError
from align.pipeline import Chain
from align.records import read_records
from align.sample import SampleConfig, TransformersEngine, sample_completions
from align.stages import manifest_path

GREEDY = {"temperature": 0, "max_new_tokens": 8}


def problems(n=9):
    return [{"id": f"p{i}", "prompt": "How many apples" + " and" * i + "?", "answer": "1"} for i in range(n)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    MODEL.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def fake(folder, monkeypatch):
    monkeypatch.setattr(server, "WAITS", (0.01, 0.01, 0.01))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    fake = Fake(folder)
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


def stop_text():
    """A text that occurs within greedy completions, over two tokens."""
    ids, _ = greedy(TOKENIZER(problems()[0]["prompt"])["input_ids"], [], [EOS, END], 8)
    return TOKENIZER.decode(ids[2:4])


@pytest.mark.parametrize("stop", [False, True])
def test_a_servers_rows_are_those_of_transformers(tmp_path, fake, folder, stop):
    config = SampleConfig(**GREEDY, stop=(stop_text(),) if stop else (), batch_size=4)
    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"
    sample_completions(MODEL, TOKENIZER, problems(), ours, config)
    fake.delay = 0.02
    with fake.engine(folder, concurrency=3) as engine:
        sample_completions(engine, TOKENIZER, problems(), theirs, config)
    rows = read_records(theirs, "sample")
    assert rows == read_records(ours)
    assert {row["finish_reason"] for row in rows} >= {"stop"} if stop else {"length"}
    assert sorted(asked["prompt"] for asked in fake.requests) == sorted(row["prompt_ids"] for row in rows)
    assert 1 < fake.most <= 3
    settings = json.loads(manifest_path(theirs).read_text())["settings"]
    assert (
        settings["engine"] == "server"
        and json.loads(manifest_path(ours).read_text())["settings"]["engine"] == "transformers"
    )


def test_end_tokens_are_those_of_tokenizer_and_checkpoint(folder):
    assert describe_model(folder, TOKENIZER) == (400, sorted([EOS, END]))
    os.rename(f"{folder}/generation_config.json", f"{folder}/away.json")
    try:
        assert describe_model(folder, TOKENIZER) == (400, [EOS])
    finally:
        os.rename(f"{folder}/away.json", f"{folder}/generation_config.json")
    with pytest.raises(ModelLoadError, match="no configuration"):
        describe_model(f"{folder}/none", TOKENIZER)


@pytest.mark.parametrize("batch_size, sizes", [(4, [1, 1, 1, 1, 4, 4, 4, 4]), (20, [5, 5, 5, 5])])
def test_every_request_says_all_settings_and_has_a_seed_of_its_own(tmp_path, fake, folder, batch_size, sizes):
    """Draws of a problem among several batches, and several problems in a batch."""
    config = SampleConfig(n=5, temperature=0.7, top_p=0.9, top_k=11, max_new_tokens=4, batch_size=batch_size, seed=3)
    with fake.engine(folder) as engine:
        sample_completions(engine, TOKENIZER, problems(4), tmp_path / "a.jsonl", config)
        asked = fake.requests.copy()
        sample_completions(engine, TOKENIZER, problems(4), tmp_path / "b.jsonl", config)
    assert sorted(one["n"] for one in asked) == sizes
    for one in asked:
        expected = {
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 11,
            "max_tokens": 4,
            "stop_token_ids": sorted([EOS, END]),
        }
        neutral = {"min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
        assert {**one, **expected, **neutral, "return_token_ids": True, "model": folder} == one
    seeds = [one["seed"] + draw for one in asked for draw in range(one["n"])]  # a server adds a draw's number
    assert len(set(seeds)) == 20
    again = fake.requests[len(asked) :]
    assert {(str(a["prompt"]), a["n"], a["seed"]) for a in asked} == {
        (str(a["prompt"]), a["n"], a["seed"]) for a in again
    }
    # Batches of other prompts behind a prompt change nothing of it.
    fake.requests.clear()
    with fake.engine(folder) as engine:
        sample_completions(engine, TOKENIZER, problems(1), tmp_path / "c.jsonl", config)
    few = {(a["n"], a["seed"]) for a in fake.requests}
    assert few == {(a["n"], a["seed"]) for a in asked if a["prompt"] == fake.requests[0]["prompt"]}


def read(ids, reason, **options):
    return read_completion(TOKENIZER, 400, [EOS, END], [5, 6], ids, reason, SampleConfig(max_new_tokens=4, **options))


def test_what_an_engine_gives_means_what_ours_means():
    bc = [t for c in "bc" for t in TOKENIZER(c)["input_ids"]]
    assert read([9, EOS], "stop") == ([9, EOS], "stop")
    assert read([9, END], "stop") == ([9, END], "stop")
    assert read([9, 10, 11, 12], "length") == ([9, 10, 11, 12], "length")
    assert read([9, *bc], "stop", stop="bc") == ([9, EOS], "stop")  # the text is cut, EOS put there
    assert read([9, *bc, 12], "length", stop="bc") == ([9, EOS], "stop")
    begun = TOKENIZER.decode([6, 9])
    assert read([9, 10, 11, 12], "length", stop=begun) == ([EOS], "stop")  # begun in the prompt: no engine sees it


@pytest.mark.parametrize(
    "ids, reason, words",
    [
        ([9, 400], "length", ["400", "vocabulary"]),
        ([9, -1], "length", ["-1", "vocabulary"]),
        ([9, "10"], "length", ["'10'"]),
        ([False, 9], "length", ["False"]),
        ([9] * 5, "length", ["5 tokens", "max_new_tokens = 4"]),
        ([9, 10], "length", ["2 of 4", "max_model_len"]),
        ([9, 10], "stop", ["[10]", "end tokens"]),
        ([], "stop", ["end tokens"]),
        ([9, 10], "abort", ["abort"]),
        ([9, 10], None, ["None"]),
    ],
)
def test_what_is_no_completion_of_ours_is_refused(ids, reason, words):
    with pytest.raises(EngineError) as caught:
        read(ids, reason)
    assert all(word in str(caught.value) for word in words), caught.value


def first(change):
    def spoil(_asked, body):
        body["choices"][0] |= change
        return body

    return spoil


@pytest.mark.parametrize(
    "spoil, words",
    [
        (first({"token_ids": None}), ["no token ids", "return_token_ids"]),
        (first({"token_ids": "9 10"}), ["no token ids"]),
        (first({"token_ids": [9, 4000]}), ["4000", "vocabulary"]),
        (first({"prompt_token_ids": [1, 2]}), ["[1, 2]", "prompt"]),
        (first({"index": 3}), ["choices"]),
        (lambda asked, body: {"choices": []}, ["0 choices where 1"]),
        (lambda asked, body: {"choices": [1]}, ["no choices"]),
        (lambda asked, body: [body], ["no choices"]),
        (lambda asked, body: b"<html>", ["JSON"]),
    ],
)
def test_a_servers_wrong_answers_are_refused(tmp_path, fake, folder, spoil, words):
    fake.spoil = spoil
    with fake.engine(folder) as engine, pytest.raises(EngineError) as caught:
        sample_completions(engine, TOKENIZER, problems(3), tmp_path / "a.jsonl", SampleConfig(**GREEDY))
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "a.jsonl").exists()


def test_transient_failures_are_tried_again_others_are_not(tmp_path, fake, folder):
    config = SampleConfig(**GREEDY)
    fake.fail = lambda count: {1: 503, 2: "hang up", 3: 429}.get(count)
    with fake.engine(folder, concurrency=1) as engine:
        sample_completions(engine, TOKENIZER, problems(2), tmp_path / "a.jsonl", config)
        assert len(fake.requests) == 5
        for status, tries, words in (
            (503, 4, ["503", "does not recover"]),
            (400, 1, ["400", "no more of 1", "cannot do"]),
            (401, 1, ["ALIGN_SERVER_KEY"]),
            (404, 1, ["--server-url"]),
            ("hang up", 4, ["cannot be reached"]),
        ):
            fake.requests.clear()
            fake.fail = lambda count, status=status: status
            with pytest.raises(EngineError) as caught:
                sample_completions(engine, TOKENIZER, problems(1), tmp_path / "b.jsonl", config)
            assert all(word in str(caught.value) for word in words), caught.value
            assert len(fake.requests) == tries


def test_one_failure_ends_a_batch_without_waiting_for_others(fake, folder, monkeypatch):
    monkeypatch.setattr(server, "WAITS", (30,))
    fake.fail = lambda count: 400 if count == 4 else 503
    start = time.monotonic()
    with fake.engine(folder) as engine, pytest.raises(EngineError):
        engine.generate([[5, 6]] * 4, SampleConfig(**GREEDY), 0)
    assert time.monotonic() - start < 10


def test_a_slow_server_is_named(fake, folder):
    fake.delay = 0.5
    with fake.engine(folder, timeout=0.1) as engine, pytest.raises(EngineError, match="within 0.1 seconds.*--timeout"):
        engine.generate([[5, 6]], SampleConfig(**GREEDY), 0)
    assert len(fake.requests) == 1


def test_a_run_goes_on_where_a_server_died_at_another_address_too(tmp_path, fake, folder):
    config, out = SampleConfig(**GREEDY, batch_size=2), tmp_path / "a.jsonl"
    fake.fail = lambda count: 400 if count > 5 else None
    with fake.engine(folder, concurrency=1) as engine, pytest.raises(EngineError):
        sample_completions(engine, TOKENIZER, problems(), out, config)
    other = Fake(folder)
    with other.engine(folder) as engine:
        sample_completions(engine, TOKENIZER, problems(), out, config)
    other.server.shutdown()
    other.server.server_close()
    assert len(other.requests) == 5  # two whole batches of two were there
    sample_completions(MODEL, TOKENIZER, problems(), tmp_path / "b.jsonl", config)
    assert read_records(out) == read_records(tmp_path / "b.jsonl")


def test_the_key_goes_to_the_server_and_nowhere_else(tmp_path, fake, folder, monkeypatch):
    monkeypatch.setenv("ALIGN_SERVER_KEY", "very-secret")
    fake.fail = lambda count: 400 if count > 1 else None
    out, config = tmp_path / "a.jsonl", SampleConfig(**GREEDY, batch_size=1)
    with fake.engine(folder) as engine, pytest.raises(EngineError) as caught:
        sample_completions(engine, TOKENIZER, problems(2), out, config)
    assert "very-secret" not in str(caught.value)
    assert not any("very-secret" in file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    fake.fail = lambda count: None
    with fake.engine(folder) as engine:
        sample_completions(engine, TOKENIZER, problems(2), out, config)
    assert {headers["Authorization"] for headers in fake.headers} == {"Bearer very-secret"}
    assert "very-secret" not in manifest_path(out).read_text()
    for url in ("http://me:very-secret@host/v1", "http://host/v1?key=very-secret"):
        with pytest.raises(ConfigError, match="environment variable") as caught:
            open_engine(EngineConfig("server", server_url=url), {"path": folder}, TOKENIZER)
        assert "very-secret" not in str(caught.value)


def test_what_a_server_serves_is_asked_first(tmp_path, fake, folder):
    with pytest.raises(EngineError, match="does not serve 'other' but.*--served-model-name"):
        fake.engine(folder, served_model_name="other")
    fake.models = {"data": [{"id": "other", "max_model_len": 12}]}
    with fake.engine(folder, served_model_name="other") as engine, pytest.raises(ConfigError, match="12 tokens"):
        sample_completions(engine, TOKENIZER, problems(), tmp_path / "a.jsonl", SampleConfig(max_new_tokens=8))
    assert fake.requests == []
    fake.models = {"models": []}
    with pytest.raises(EngineError, match="OpenAI-compatible"):
        fake.engine(folder)
    fake.server.shutdown()
    fake.server.server_close()
    with pytest.raises(EngineError, match="cannot be reached.*start the server"):
        fake.engine(folder)
    fake.url = "http://127.0.0.1:1/else"
    with pytest.raises(EngineError, match="cannot be reached"):
        fake.engine(folder)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"name": "sglang"}, "unknown"),
        ({"name": "vllm", "server_url": "http://host"}, "belongs to engine 'server'"),
        ({"name": "transformers", "tensor_parallel_size": 2}, "belongs to engine 'vllm'"),
        ({"name": "vllm", "tensor_parallel_size": 0}, "tensor_parallel_size = 0"),
        ({"name": "vllm", "gpu_memory_utilization": 1.5}, "1.5"),
        ({"name": "server"}, "server_url"),
        ({"name": "server", "server_url": "http://host", "timeout": 0}, "timeout"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ConfigError, match=words):
        EngineConfig(**options)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", "http://host:port/v1"])
def test_an_address_that_is_none(folder, url):
    with pytest.raises(ConfigError, match="is no address"):
        open_engine(EngineConfig("server", server_url=url), {"path": folder}, TOKENIZER)


def test_what_an_engine_cannot_take_of_a_model_is_refused_before_loading():
    vllm, served = EngineConfig("vllm"), EngineConfig("server", server_url="http://host")
    for config, model, words in (
        (vllm, {"quantization": "4bit"}, "AWQ"),
        (vllm, {"quantization": "8bit"}, "AWQ"),
        (vllm, {"attn_implementation": "sdpa"}, "attn_implementation"),
        (served, {"dtype": "float32"}, "dtype of its own"),
        (served, {"quantization": "4bit"}, "quantization of its own"),
        (served, {"adapter": "positive"}, "--lora-modules"),
    ):
        with pytest.raises(ConfigError, match=words):
            open_engine(config, {"path": "nowhere", **model}, TOKENIZER)


def test_a_recipes_engine_is_checked_before_it_runs(tmp_path):
    config = Path(__file__).parents[1] / "recipes/configs/cdpo/tiny-arithmetic.yaml"
    for changes, words in (
        (["engine.name=server", "engine.server_url=http://host"], "a recipe samples what it has just trained"),
        (["engine.name=sglang"], "unknown"),
        (["engine.tensor_parallel_size=2"], "belongs to engine 'vllm'"),
        (["engine.names=vllm"], "unknown names"),
        (["engine.name=vllm", "model.quantization=4bit"], "AWQ"),
    ):
        with pytest.raises(ConfigError, match=words):
            Chain(read_config(config, changes), tmp_path)
    assert Chain(read_config(config, ["engine.name=vllm"]), tmp_path).settings.engine == EngineConfig("vllm")


def test_without_vllm_the_command_that_installs_it_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"pip install 'align\[vllm\]'"):
        open_engine(EngineConfig("vllm"), {"path": folder}, TOKENIZER)


def test_each_process_of_a_launch_has_gpus_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [visible_devices(rank, 2) for rank in range(2)] == [["0", "1"], ["2", "3"]]
    with pytest.raises(ConfigError, match="launch 1 processes"):
        visible_devices(1, 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert visible_devices(3, 1) == ["7"]
    launch = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "3",
        "MASTER_ADDR": "host",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with engines._alone(1):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "7" and not set(launch) & set(os.environ)
        assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert dict(os.environ) == before
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert visible_devices(3, 1) == []


def test_transformers_is_an_engine_as_the_others(tmp_path, folder):
    config = SampleConfig(n=2, max_new_tokens=5, seed=4)
    model = {"path": folder, "dtype": "float32"}
    with open_engine(EngineConfig(), model, TOKENIZER) as engine:
        assert isinstance(engine, TransformersEngine)
        sample_completions(engine, TOKENIZER, problems(3), tmp_path / "a.jsonl", config)
    sample_completions(MODEL, TOKENIZER, problems(3), tmp_path / "b.jsonl", config)
    assert read_records(tmp_path / "a.jsonl") == read_records(tmp_path / "b.jsonl")


def test_the_command(tmp_path, fake, folder, monkeypatch, capsys):
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems(3)))
    line = ["align", "sample", str(tmp_path / "problems.jsonl"), str(tmp_path / "out.jsonl"), "--model", folder]
    line += ["--temperature", "0", "--max-new-tokens", "8", "--engine", "server"]

    def run(*more):
        monkeypatch.setattr(sys, "argv", [*line, *more])
        with pytest.raises(SystemExit) as left:
            main()
        return SimpleNamespace(code=left.value.code or 0, out=capsys.readouterr())

    assert run().code == 2
    assert run("--server-url", fake.url, "--dtype", "float32").code == 2
    found = run("--server-url", fake.url)
    assert found.code == 0 and json.loads(found.out.out)["rows"] == 3
    asked = len(fake.requests)
    assert run("--server-url", "http://127.0.0.1:1/v1").code == 0  # complete: nobody is asked
    assert len(fake.requests) == asked == 3
