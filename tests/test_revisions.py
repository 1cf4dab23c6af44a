"""What says where a model comes from (revision, cache, subfolder) holds for its tokenizer, configuration and reference, too."""

import json
import shutil

import pytest
import torch
import yaml
from conftest import random_pairs
from datasets import Dataset
from local_hub import commit, put, put_models
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from align import (
    BASHConfig,
    BASHTrainer,
    CDPOConfig,
    CDPOTrainer,
    RACConfig,
    RACTrainer,
    TGDPOConfig,
    TGDPOTrainer,
    TokenDPOConfig,
    TokenDPOTrainer,
    load_model,
    load_tokenizer,
)
from align.cli import app
from align.config import ChainConfig, Settings
from align.engines import describe_model
from align.errors import ConfigError, ModelLoadError
from align.identity import model_identity
from align.merge import merge_adapter
from align.pipeline import Chain
from align.records import read_records, write_records
from align.scoring.guidance import load_guide
from align.trace import load_policies
from align.trainers.sft import GuardedSFTConfig, GuardedSFTTrainer
from align.trainers.training import train_preference, train_sft

NAME = "user/model"
MESSAGES = [{"role": "user", "content": "2 + 2?"}]
PAIR = {
    "prompt": MESSAGES,
    "chosen": [{"role": "assistant", "content": "4"}],
    "rejected": [{"role": "assistant", "content": "5, or six"}],
}
PREFERENCE = {
    "dpo": (TokenDPOConfig, TokenDPOTrainer),
    "cdpo": (CDPOConfig, CDPOTrainer),
    "tgdpo": (TGDPOConfig, TGDPOTrainer),
}
SFT = {"sft": (GuardedSFTConfig, GuardedSFTTrainer), "bash": (BASHConfig, BASHTrainer), "rac": (RACConfig, RACTrainer)}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A cache with `user/model` in the revisions v1 and v2, without main, so that main is never what was loaded."""
    scratch = tmp_path_factory.mktemp("hub")
    cache = scratch / "cache"
    put_models(cache, NAME, scratch / "folders", ("v1", "v2"))
    return cache


@pytest.fixture
def hub_cache(hub, monkeypatch):
    """The same, where the environment says it is."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    return hub


def oracle(hub, revision="v2"):
    """Weights, configuration and rendered prompt of a revision, read from its folder."""
    folder = hub.parent / "folders" / revision
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return model, tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)


def rendered(tokenizer):
    return tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)


def is_of(model, tokenizer, hub, revision="v2"):
    own, text = oracle(hub, revision)
    assert model.config.rms_norm_eps == own.config.rms_norm_eps
    assert torch.equal(model.get_input_embeddings().weight, own.get_input_embeddings().weight)
    assert rendered(tokenizer) == text


def settings(folder, **kwargs):
    return {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "max_steps": 1,
        "save_strategy": "no",
    } | kwargs


@pytest.mark.parametrize("where", ["cache_dir", "environment"])
@pytest.mark.parametrize("method", PREFERENCE)
def test_preference_trainers(tmp_path, hub, monkeypatch, method, where):
    import huggingface_hub.constants

    init = {"revision": "v2"}
    if where == "environment":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    else:
        init |= {"cache_dir": str(hub), "local_files_only": True}
    config, trainer = PREFERENCE[method]
    columns = {"dpo": (), "cdpo": ("ce_scores",), "tgdpo": ("guidance_logratios",)}[method]
    rows = [PAIR] if not columns else random_pairs(4, columns=columns)
    args = config(**settings(tmp_path, model_init_kwargs=init))
    built = trainer(NAME, args=args, train_dataset=Dataset.from_list(rows))
    is_of(built.model, built.processing_class, hub)
    is_of(built.ref_model, built.processing_class, hub)
    assert built.args.model_init_kwargs == init
    built.save_model(tmp_path / "saved")
    assert rendered(AutoTokenizer.from_pretrained(tmp_path / "saved")) == oracle(hub)[1]
    if not columns:
        ids = built.processing_class(oracle(hub)[1])["input_ids"]
        assert built.train_dataset[0]["prompt_ids"] == ids
        assert built.train().training_loss == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.parametrize("method", SFT)
def test_sft_trainers(tmp_path, hub, method):
    config, trainer = SFT[method]
    init = {"revision": "v2", "cache_dir": str(hub)}
    rows = Dataset.from_list([{"prompt": PAIR["prompt"], "completion": PAIR["chosen"]}] * 2)
    args = config(**settings(tmp_path, model_init_kwargs=init))
    built = trainer(NAME, args, train_dataset=rows, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    is_of(built.model.get_base_model(), built.processing_class, hub)
    assert built.processing_class.decode(built.train_dataset[0]["input_ids"]).startswith(oracle(hub)[1])
    built.save_model(tmp_path / "saved")
    assert rendered(AutoTokenizer.from_pretrained(tmp_path / "saved")) == oracle(hub)[1]
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["revision"] == "v2"


def test_subfolder(tmp_path, hub):
    """A repository whose model lies in a folder of its own."""
    cache = tmp_path / "cache"
    shutil.copytree(hub.parent / "folders" / "v2", tmp_path / "repository" / "inner")
    put(cache, "user/nested", "main", tmp_path / "repository")
    init = {"subfolder": "inner", "cache_dir": str(cache)}
    built = TokenDPOTrainer(
        "user/nested",
        args=TokenDPOConfig(**settings(tmp_path, model_init_kwargs=init)),
        train_dataset=Dataset.from_list([PAIR]),
    )
    is_of(built.model, built.processing_class, hub)
    is_of(load_model("user/nested", dtype="float32", **init), load_tokenizer("user/nested", **init), hub)
    of_folder = load_model(str(tmp_path / "repository"), dtype="float32", subfolder="inner")
    is_of(of_folder, load_tokenizer(str(tmp_path / "repository"), subfolder="inner"), hub)
    assert model_identity("user/nested", **init) == f"user/nested@{commit('main')}/inner"
    assert model_identity(tmp_path / "repository", subfolder="inner") == model_identity(hub.parent / "folders" / "v2")


def test_a_folder_has_no_revision(tmp_path, hub):
    folder = str(hub.parent / "folders" / "v1")
    calls = [
        lambda: load_model(folder, revision="v2"),
        lambda: load_tokenizer(folder, revision="v2"),
        lambda: model_identity(folder, revision="v2"),
        lambda: TokenDPOTrainer(
            folder, args=TokenDPOConfig(**settings(tmp_path, model_init_kwargs={"revision": "v2"})),
            train_dataset=Dataset.from_list([PAIR]),
        ),
        lambda: GuardedSFTTrainer(
            folder, GuardedSFTConfig(**settings(tmp_path, model_init_kwargs={"revision": "v2"})),
            train_dataset=Dataset.from_list([{"text": "x"}]),
        ),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ConfigError, match="is a folder: revision = 'v2' must belong to a hub name"):
            call()
    is_of(load_model(folder, dtype="float32", revision="main"), load_tokenizer(folder, revision="main"), hub, "v1")
    with pytest.raises(TypeError, match="'revison' is not an argument of loading"):
        load_model(NAME, revison="v2")
    with pytest.raises(ModelLoadError, match="no model can be loaded"):
        load_model(NAME, revision="v3", cache_dir=str(hub))


@pytest.fixture
def adapters(tmp_path, hub_cache):
    """An adapter on v2 in the cache, in two revisions."""
    for seed, revision in enumerate(("a1", "a2")):
        torch.manual_seed(seed)
        base = load_model(NAME, dtype="float32", revision="v2")
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        adapted.save_pretrained(tmp_path / revision)
        put(hub_cache, f"user/{tmp_path.name}", revision, tmp_path / revision)
    return f"user/{tmp_path.name}"


IDS = torch.arange(3, 30)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def adapted_oracle(tmp_path, hub, revision="a2"):
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(oracle(hub)[0], tmp_path / revision))


def test_adapters_have_revisions(tmp_path, hub_cache, adapters):
    want = adapted_oracle(tmp_path, hub_cache)
    model = {"path": NAME, "dtype": "float32", "revision": "v2"}
    assert torch.allclose(logits(load_model(**model, adapter=f"{adapters}@a2")), want, atol=1e-5)
    guide, plain, tokenizer = load_guide(model, f"{adapters}@a2")
    assert plain is None and torch.allclose(logits(guide), want, atol=1e-5)
    assert rendered(tokenizer) == oracle(hub_cache)[1]
    guide, plain, _ = load_guide(model, f"{NAME}@v1")
    is_of(guide, load_tokenizer(NAME, revision="v1"), hub_cache, "v1")
    is_of(plain, tokenizer, hub_cache)
    merge_adapter(NAME, f"{adapters}@a2", tmp_path / "merged", dtype="float32", revision="v2")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), want, atol=1e-4)
    assert rendered(AutoTokenizer.from_pretrained(tmp_path / "merged")) == oracle(hub_cache)[1]
    with pytest.raises(ConfigError, match="merged exists already"):
        merge_adapter(NAME, f"{adapters}@a1", tmp_path / "merged", dtype="float32", revision="v2")


def test_two_policies_of_two_revisions(tmp_path, hub_cache):
    options = {"path": NAME, "dtype": "float32"}
    teacher, student, tokenizer = load_policies({**options, "revision": "v1"}, {**options, "revision": "v2"})
    is_of(teacher.model, load_tokenizer(NAME, revision="v1"), hub_cache, "v1")
    is_of(student.model, tokenizer, hub_cache)


def test_identity_is_the_commit(tmp_path, hub, hub_cache):
    assert model_identity(NAME, revision="v2") == f"{NAME}@{commit('v2')}"
    assert model_identity(NAME, revision=commit("v2")) == model_identity(NAME, revision="v2")
    assert model_identity(f"{NAME}@v1") == f"{NAME}@{commit('v1')}" != model_identity(NAME, revision="v2")
    assert model_identity("user/nowhere", revision="v2") == "user/nowhere@v2"
    assert model_identity("user/nowhere") == "user/nowhere"
    # A branch moves: the same name is another model.
    cache = tmp_path / "moving"
    put(cache, "user/moving", "main", hub.parent / "folders" / "v1")
    before = model_identity("user/moving", cache_dir=str(cache))
    put(cache, "user/moving", "next", hub.parent / "folders" / "v2")
    (cache / "models--user--moving" / "refs" / "main").write_text(commit("next"))
    assert model_identity("user/moving", cache_dir=str(cache)) != before


def test_training_stages(tmp_path, hub):
    """Records are trained on with the revision's weights, its tokenizer is saved, and no secret is written down."""
    model = {"path": NAME, "dtype": "float32", "revision": "v2", "cache_dir": str(hub), "token": "hf_secret"}
    lora, args = {"r": 2, "target_modules": ["q_proj"]}, {"max_steps": 1, "bf16": False}
    train_preference("dpo", model, random_pairs(4), tmp_path / "dpo", args=args, lora=lora)
    rows = [{"id": "a", "prompt": "x", "prompt_ids": [5, 6], "completion": "y", "completion_ids": [7, 8]}]
    train_sft(model, rows, tmp_path / "sft", args=args, lora=lora)
    for name in ("dpo", "sft"):
        assert rendered(AutoTokenizer.from_pretrained(tmp_path / name)) == oracle(hub)[1]
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["revision"] == "v2"
        manifest = (tmp_path / f"{name}.manifest.json").read_text()
        assert commit("v2") in manifest and "hf_secret" not in manifest and str(hub) not in manifest
    again = [
        train_preference(
            "dpo", {**model, "revision": revision}, random_pairs(4), tmp_path / "dpo", args=args, lora=lora
        )
        for revision in ("v2", "v1")
    ]
    assert not again[0] and again[1]["steps"] == 1  # the same output is reused, another revision's is not


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)


def test_commands(tmp_path, hub_cache):
    """Every command with a model: the revision's tokenizer and weights, and other settings for another revision."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"id": "a", "prompt": MESSAGES, "answer": "4", "solution": "4"}) + "\n")
    model = ["--model", NAME, "--dtype", "float32"]
    for revision in ("v1", "v2"):
        out = tmp_path / f"{revision}.jsonl"
        assert run("sample", problems, out, *model, "--revision", revision, "--max-new-tokens", 2).exit_code == 0
        tokenizer = load_tokenizer(NAME, revision=revision)
        assert tokenizer.decode(read_records(out)[0]["prompt_ids"]) == oracle(hub_cache, revision)[1]
    preferences = tmp_path / "preferences.jsonl"
    preferences.write_text(json.dumps(PAIR) + "\n")
    assert run("tokenize", preferences, tmp_path / "p.jsonl", "--model", NAME, "--revision", "v2").exit_code == 0
    assert "v2" in load_tokenizer(NAME, revision="v2").decode(read_records(tmp_path / "p.jsonl")[0]["prompt_ids"])


SCORES = {"reference": [], "entropy": [], "guidance": ["--guide", f"{NAME}@v1"]}


@pytest.mark.parametrize("score", SCORES)
def test_scores(tmp_path, hub_cache, score):
    write_records(tmp_path / "pairs.jsonl", random_pairs(2))
    out, found = tmp_path / "out.jsonl", []
    for revision in ("v1", "v2", "v2"):
        args = ["--model", NAME, "--dtype", "float32", "--revision", revision, *SCORES[score]]
        assert run("score", score, tmp_path / "pairs.jsonl", out, *args).exit_code == 0
        found.append(out.read_bytes())
    assert found[0] != found[1] == found[2]
    if score == "reference":
        row = read_records(out)[0]
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        with torch.no_grad():
            logps = oracle(hub_cache)[0](ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        assert row["chosen_ref_logps"] == pytest.approx(logps[len(row["prompt_ids"]) - 1 :].tolist(), abs=1e-4)


def test_every_command_with_a_model_has_a_revision():
    import typer.main

    def commands(command, name):
        for sub in getattr(command, "commands", {}):
            yield from commands(command.commands[sub], f"{name} {sub}")
        if not hasattr(command, "commands"):
            yield name, {option for parameter in command.params for option in parameter.opts}

    for name, options in commands(typer.main.get_command(app), "align"):
        for model, revision in (("--model", "--revision"), ("--tokenizer", "--revision"), ("--teacher", "--teacher-revision"),
                                ("--student", "--student-revision")):  # fmt: skip
            assert model not in options or revision in options, (name, model)


def test_a_recipe(tmp_path, hub):
    """The section `model` has what `load_model` has; its revision is in what the stages depend on, its secrets are not."""
    sections = {
        "model": {"path": NAME, "dtype": "float32", "revision": "v2", "cache_dir": str(hub), "token": "hf_secret"},
        "pairs": {"source": str(tmp_path / "pairs.jsonl")},
        "test_pairs": {"source": str(tmp_path / "pairs.jsonl"), "split": "train"},
        "methods": {"dpo": {"args": {"max_steps": 1, "bf16": False}}},
    }
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(PAIR) + "\n" for _ in range(4)))
    chain = Chain(ChainConfig(**yaml.safe_load(yaml.safe_dump(sections))), tmp_path / "run")
    assert chain.identity() == {"model": f"{NAME}@{commit('v2')}", "options": {"dtype": "float32"}}
    is_of(*chain.load(), hub)
    chain.run()  # the trained model is a folder, which has no revision
    assert "v2" in chain.tokenizer().decode(read_records(tmp_path / "run" / "pairs.jsonl")[0]["prompt_ids"])
    assert rendered(AutoTokenizer.from_pretrained(tmp_path / "run" / "dpo")) == oracle(hub)[1]
    assert not [path for path in (tmp_path / "run").rglob("*.json*") if "hf_secret" in path.read_text()]
    with pytest.raises(ConfigError, match="unknown revison"):
        Settings(ChainConfig(**{**sections, "model": {"path": NAME, "revison": "v2"}}), tmp_path)


def test_the_vocabulary_of_a_server(hub):
    tokenizer = load_tokenizer(NAME, revision="v2", cache_dir=str(hub))
    assert describe_model(NAME, tokenizer, revision="v2", cache_dir=str(hub)) == (400, [0, 2])
