"""What an engine could do other than it was asked, without a word: refused, before anything is drawn where that can be known."""

import json
import sys
from dataclasses import make_dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from fake_server import END, EOS, MODEL, TOKENIZER, Fake
from peft import LoraConfig, get_peft_model

from align import load_model, load_tokenizer, server
from align.config import read_config
from align.engines import EngineConfig, open_engine
from align.errors import ConfigError, EngineError, ModelLoadError
from align.pipeline import Chain
from align.sample import SampleConfig, sample_completions
from align.vllm_adapter import LORA_RANKS, MEANINGFUL, adapter_rank

EMBEDDED = str(Path(__file__).parent.parent / "data" / "tiny-arithmetic" / "model")
GREEDY = SampleConfig(temperature=0, max_new_tokens=8)
PROBLEMS = [{"id": f"p{i}", "prompt": "How many apples" + " and" * i + "?", "answer": "1"} for i in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    MODEL.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def fake(folder, monkeypatch):
    monkeypatch.setattr(server, "WAITS", (0.01,))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    fake = Fake(folder)
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


class FakeLLM:
    """vLLM's offline engine as far as it starts: it keeps its arguments, and takes an adapter, or fails to."""

    made, broken = None, None

    def __init__(self, **arguments):
        FakeLLM.made, self.arguments, self.loras, self.closed = self, arguments, [], False
        self.llm_engine = self
        self.model_config = SimpleNamespace(max_model_len=64)
        self.engine_core = SimpleNamespace(shutdown=lambda: setattr(self, "closed", True))

    def add_lora(self, request):
        if FakeLLM.broken is not None:
            raise FakeLLM.broken
        self.loras.append(request)


@pytest.fixture
def vllm(monkeypatch):
    """Modules with vLLM's names; its reader of adapters knows two fields."""
    monkeypatch.setattr(FakeLLM, "made", None)
    monkeypatch.setattr(FakeLLM, "broken", None)
    modules = {
        "vllm": {"LLM": FakeLLM, "SamplingParams": SimpleNamespace},
        "vllm.lora": {},
        "vllm.lora.peft_helper": {"PEFTHelper": make_dataclass("PEFTHelper", ["r", "use_rslora"])},
        "vllm.lora.request": {"LoRARequest": lambda *given: given},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True)},
    }
    for name, values in modules.items():
        module = ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)


def an_adapter(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **changes}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return str(folder)


def test_an_adapter_that_vllm_would_read_otherwise_than_peft_is_refused(tmp_path):
    plain = an_adapter(
        tmp_path / "a", init_lora_weights="gaussian", rank_pattern={}, use_dora=False, modules_to_save=None
    )
    assert adapter_rank(plain, ()) == 8
    assert adapter_rank(an_adapter(tmp_path / "a", r=9, rank_pattern={"q_proj": 33}), ["rank_pattern"]) == 64
    values = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2}, "modules_to_save": ["lm_head"]}
    for field in MEANINGFUL:
        adapter = an_adapter(tmp_path / "a", **{field: values.get(field, True)})
        with pytest.raises(ConfigError, match=f"{field} = .*passes over.*align merge"):
            adapter_rank(adapter, [other for other in MEANINGFUL if other != field])
        assert adapter_rank(adapter, MEANINGFUL) in LORA_RANKS
    for init in ("pissa", "PiSSA_niter_16", "olora", "corda", "loftq"):
        with pytest.raises(ConfigError, match=f"{init}.*align merge"):
            adapter_rank(an_adapter(tmp_path / "a", init_lora_weights=init), MEANINGFUL)
    with pytest.raises(ConfigError, match="rank 600.*align merge"):
        adapter_rank(an_adapter(tmp_path / "a", r=600), MEANINGFUL)
    with pytest.raises(ModelLoadError, match="no rank"):
        adapter_rank(an_adapter(tmp_path / "a", r=None), MEANINGFUL)
    with pytest.raises(ModelLoadError, match="no rank"):
        adapter_rank(str(tmp_path / "none"), MEANINGFUL)


@pytest.mark.parametrize("target, refused", [("embed_tokens", True), ("lm_head", True), ("q_proj", False)])
def test_vllm_has_one_layer_for_tied_matrices(tmp_path, vllm, target, refused):
    """The embedded model ties its embeddings and its head."""
    base = load_model(EMBEDDED, dtype="float32")
    adapter = str(tmp_path / "a")
    get_peft_model(base, LoraConfig(r=2, target_modules=[target])).save_pretrained(adapter)
    model = {"path": EMBEDDED, "dtype": "float32", "adapter": adapter}
    tokenizer = load_tokenizer(EMBEDDED)
    if not refused:
        open_engine(EngineConfig("vllm"), model, tokenizer).close()
        return
    with pytest.raises(ConfigError, match=f"changes .*{target}, which the base ties .* align merge"):
        open_engine(EngineConfig("vllm"), model, tokenizer)


def test_vllm_is_given_what_it_needs_and_nothing_to_unpickle(tmp_path, vllm, folder):
    model, adapter = {"path": folder, "dtype": "float32"}, an_adapter(tmp_path / "a", r=12, use_rslora=True)
    with open_engine(EngineConfig("vllm", max_model_len=64), {**model, "adapter": adapter}, TOKENIZER) as engine:
        expected = {"model": folder, "dtype": "float32", "load_format": "safetensors", "max_lora_rank": 16}
        expected |= {"max_model_len": 64, "generation_config": "vllm", "trust_remote_code": False}
        assert {**FakeLLM.made.arguments, **expected} == FakeLLM.made.arguments
        assert FakeLLM.made.loras == [("adapter", 1, adapter)]
        assert engine.sampling(GREEDY, 3) | {"ignore_eos": True, "stop_token_ids": sorted([EOS, END]), "seed": 3} == (
            engine.sampling(GREEDY, 3)
        )
        with pytest.raises(ConfigError, match="takes 64 tokens"):
            sample_completions(engine, TOKENIZER, PROBLEMS, tmp_path / "a.jsonl", SampleConfig(max_new_tokens=60))
    assert FakeLLM.made.closed
    source = {"revision": "main", "code_revision": "c1", "token": "t"}
    with open_engine(EngineConfig("vllm"), {**model, **source}, TOKENIZER):
        expected = {"revision": "main", "tokenizer_revision": "main", "code_revision": "c1", "hf_token": "t"}
        assert {**FakeLLM.made.arguments, **expected} == FakeLLM.made.arguments
    FakeLLM.made = None
    with pytest.raises(ConfigError, match="engine 'vllm' has no subfolder"):
        open_engine(EngineConfig("vllm"), {**model, "subfolder": "x"}, TOKENIZER)
    with pytest.raises(ConfigError, match="alpha_pattern"):
        changed = an_adapter(tmp_path / "b", alpha_pattern={"q_proj": 2})
        open_engine(EngineConfig("vllm"), {**model, "adapter": changed}, TOKENIZER)
    pickled = tmp_path / "c"
    an_adapter(pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(ModelLoadError, match="adapter_model.bin: a pickle"):
        open_engine(EngineConfig("vllm"), {**model, "adapter": str(pickled)}, TOKENIZER)
    weights = tmp_path / "weights"
    weights.mkdir()
    MODEL.config.save_pretrained(weights)
    torch.save({}, weights / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="pytorch_model.bin: a pickle"):
        open_engine(EngineConfig("vllm"), {**model, "path": str(weights)}, TOKENIZER)
    assert FakeLLM.made is None


def test_an_adapter_that_vllms_process_refuses_is_an_error_of_ours(tmp_path, vllm, folder):
    """What that process raises arrives here without its class."""
    FakeLLM.broken = Exception("Call to add_lora method failed: no DoRA")
    adapter = an_adapter(tmp_path / "a")
    with pytest.raises(EngineError, match="does not start with .* and adapter .*no DoRA"):
        open_engine(EngineConfig("vllm"), {"path": folder, "adapter": adapter}, TOKENIZER)
    assert FakeLLM.made.closed


def test_a_temperature_that_vllm_would_raise_is_refused(tmp_path):
    served, cold = EngineConfig("server", server_url="http://host"), SampleConfig(temperature=0.005)
    for config in (EngineConfig("vllm"), served):
        with pytest.raises(ConfigError, match="draws at 0.01 where temperature = 0.005"):
            config.check_model({}, GREEDY, cold)
        config.check_model({}, GREEDY, SampleConfig(temperature=0.01))
    EngineConfig().check_model({}, cold)
    recipe = "recipes/configs/cdpo/tiny-arithmetic.yaml"
    for section in ("sample", "evaluate"):
        changes = ["engine.name=vllm", f"{section}.temperature=0.005"]
        with pytest.raises(ConfigError, match="draws at 0.01"):
            Chain(read_config(recipe, changes), tmp_path)


def test_an_empty_stop_text_is_refused():
    with pytest.raises(ConfigError, match="empty stop text"):
        SampleConfig(stop=("a", ""))


@pytest.mark.parametrize("timeout", [float("inf"), float("nan"), 1e12, 0])
def test_a_timeout_that_no_clock_has_is_refused(timeout):
    with pytest.raises(ConfigError, match="timeout"):
        EngineConfig("server", server_url="http://host", timeout=timeout)


def draw(engine, n=1):
    return engine.generate([[5, 6, 9]], SampleConfig(n=n, max_new_tokens=8), 0)


def answering(change, drop=()):
    """Answers that have other fields and, in their choices, lack some."""

    def spoil(_asked, body):
        for choice in body["choices"]:
            for name in drop:
                del choice[name]
        return body | change

    return spoil


def test_a_prompt_that_a_server_shortens_is_seen_where_it_does_not_repeat_it(fake, folder):
    no_ids = ["prompt_token_ids"]
    with fake.engine(folder) as engine:
        expected = draw(engine)
        for usage in ({"prompt_tokens": 3}, {"prompt_tokens": None}, {}, None):
            fake.spoil = answering({"usage": usage}, no_ids)
            assert draw(engine) == expected
        fake.spoil = answering({"usage": {"prompt_tokens": 6}}, no_ids)
        assert len(draw(engine, n=2)[0]) == 2  # counted for each draw
        for tokens in (2, 4, 6):
            fake.spoil = answering({"usage": {"prompt_tokens": tokens}}, no_ids)
            with pytest.raises(EngineError, match=f"read {tokens} tokens of a prompt of 3"):
                draw(engine)
        # Ids of the whole answer count where a choice has the field without them.
        fake.spoil = lambda asked, body: (
            body
            | {
                "prompt_token_ids": [5, 6],
                "choices": [choice | {"prompt_token_ids": None} for choice in body["choices"]],
            }
        )
        with pytest.raises(EngineError, match=r"as other ids: \[5, 6, 9\] as \[5, 6\]"):
            draw(engine)


def test_a_server_that_answers_by_another_of_its_models_is_refused(fake, folder):
    base = {"id": "base", "root": folder, "max_model_len": 40}
    alias, tuned = {**base, "id": "alias"}, {"id": "tuned", "root": "elsewhere", "parent": "base"}
    fake.models = {"data": [base, alias, tuned]}
    for asked, answered, right in (
        ("tuned", "tuned", True),
        ("tuned", "base", False),
        ("base", "tuned", False),
        ("alias", "base", True),  # vLLM answers by a model's first name
        ("tuned", "tuned-2026-11", True),  # a name that is nobody's here
        ("tuned", ["tuned"], True),
        ("tuned", None, True),
    ):
        fake.spoil = answering({"model": answered})
        with fake.engine(folder, served_model_name=asked) as engine:
            if right:
                assert draw(engine)
                continue
            with pytest.raises(EngineError, match=f"answers by '{answered}' where '{asked}' is asked"):
                draw(engine)
    # Of models without a root each is another one.
    fake.models = {"data": [{"id": "a"}, {"id": "b"}]}
    fake.spoil = answering({"model": "b"})
    with fake.engine(folder, served_model_name="a") as engine, pytest.raises(EngineError, match="answers by 'b'"):
        draw(engine)


def test_an_adapters_context_is_its_bases(tmp_path, fake, folder):
    fake.models = {
        "data": [{"id": "base", "max_model_len": 12}, {"id": "tuned", "parent": "base", "max_model_len": None}]
    }
    with fake.engine(folder, served_model_name="tuned") as engine, pytest.raises(ConfigError, match="12 tokens"):
        sample_completions(engine, TOKENIZER, PROBLEMS, tmp_path / "a.jsonl", GREEDY)
    assert fake.requests == []


def test_a_key_that_cannot_be_sent_is_not_said(fake, folder, monkeypatch):
    for key in ("very secret", "very-secrét", "very\nsecret"):
        monkeypatch.setenv("ALIGN_SERVER_KEY", key)
        with pytest.raises(ConfigError, match="ALIGN_SERVER_KEY") as caught:
            fake.engine(folder)
        assert "secr" not in str(caught.value)
    monkeypatch.setenv("ALIGN_SERVER_KEY", "very-secret\r\n")
    with fake.engine(folder) as engine:
        draw(engine)
        assert fake.headers[-1]["Authorization"] == "Bearer very-secret"
        fake.fail = lambda count: 401
        fake.refusal = "no key very-secret here"
        with pytest.raises(EngineError, match="no key … here") as caught:
            draw(engine)
    assert "secret" not in str(caught.value)
