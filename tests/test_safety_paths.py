"""What a value that was read may not become: a path that leaves its folder, or markup of a page."""

import json
import shutil

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_run_report import make_run
from test_safety import change, load

from align.errors import ConfigError, ModelLoadError, ModelMismatchError
from align.models import load_adapters, load_tokenizer
from align.report import inspect_pairs
from align.run_report import inspect_run
from align.safety import plain_name


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "", "..", 7, None])
def test_an_index_that_leaves_its_folder_is_refused(folder, shard):
    """The file is there, so that nothing but the name speaks against it."""
    (folder / "a").mkdir()
    for place in (folder.parent / "secret.safetensors", folder / "a" / "b.safetensors"):
        shutil.copy(folder / "model.safetensors", place)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match="is no file of this folder"):
        load(folder)


def test_an_index_within_its_folder_is_followed(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "shard.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load(folder).lm_head.weight, weights["lm_head.weight"])


@pytest.mark.parametrize("spoil", ["cut", "garbage", "missing", "shape"])
def test_damaged_weights_are_refused_by_name(folder, spoil):
    """A tensor that is not there would be made of random numbers, with a warning among others."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    if spoil in ("cut", "garbage"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if spoil == "cut" else b"x")
    elif spoil == "missing":
        save_file({key: tensor for key, tensor in weights.items() if key != name}, file, {"format": "pt"})
    else:
        save_file(weights | {name: weights[name][:1].clone()}, file, {"format": "pt"})
    with pytest.raises(
        ModelLoadError, match=f"{name} is not among its weights" if spoil == "missing" else "no model can be loaded"
    ):
        load(folder)


@pytest.mark.parametrize(
    "values",
    [{"hidden_size": "x"}, {"vocab_size": -1}, {"rope_parameters": {"rope_type": "x"}}, {"quantization_config": "x"}],
)
def test_a_damaged_configuration_is_refused_by_name(folder, values):
    change(folder / "config.json", **values)
    with pytest.raises(ModelLoadError, match="no model can be loaded from there"):
        load(folder)


@pytest.mark.parametrize(
    "name, text",
    [("tokenizer.json", "{}"), ("tokenizer_config.json", "[]"), ("tokenizer_config.json", '{"eos_token": {"a": 1}}')],
)
def test_a_damaged_tokenizer_is_refused_by_name(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(ModelLoadError, match="no tokenizer can be loaded from there"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("spoil", ["cut", "missing", {"r": "x"}, {"target_modules": "("}])
def test_a_damaged_adapter_is_refused_by_name(tmp_path, spoil):
    adapter = tmp_path / "adapter"
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), config).save_pretrained(adapter)
    whole = shutil.copytree(adapter, adapter.with_name("whole"))
    file = adapter / "adapter_model.safetensors"
    if spoil == "cut":
        file.write_bytes(file.read_bytes()[:60])
    elif spoil == "missing":
        save_file(dict(list(load_file(file).items())[1:]), file, {"format": "pt"})
    else:
        change(adapter / "adapter_config.json", **spoil)
    for first in ({}, {"first": str(whole)}):
        with pytest.raises(
            ModelMismatchError,
            match="adapter .*adapter(: adapter_model.safetensors .* is cut off| does not fit the base)",
        ):
            load_adapters(tiny_llama(), first | {"one": str(adapter)})


def test_templates_named_as_paths_are_refused(folder):
    """Where a tokenizer is saved, beside a trained adapter, say, each template becomes a file of its name."""
    change(folder / "tokenizer_config.json", chat_template=[{"name": "../../out", "template": "x"}])
    with pytest.raises(ModelLoadError, match=r"chat template '\.\./\.\./out'"):
        load_tokenizer(str(folder))


def test_ids_that_look_like_paths_stay_ids(tmp_path, folder):
    """No record's value becomes a file's name: whatever ids are, nothing but the output and its manifest appears."""
    from align.export import export_completions
    from align.records import read_records, write_records
    from align.verify import verify

    name = "../../../escaped"
    row = {
        "id": name, "prompt": "x", "answer": "1", "sample": 0, "prompt_ids": [1], "completion_ids": [2], "completion": "#### 1",
        "finish_reason": "stop",
    }  # fmt: skip
    home = tmp_path / "a" / "b" / "c"
    home.mkdir(parents=True)
    before = {path for path in tmp_path.rglob("*") if home not in path.parents}
    write_records(home / "samples.jsonl", [row])
    verify(home / "samples.jsonl", home / "verdicts.jsonl")
    export_completions([row], home / "out.jsonl", "arena-hard", name)
    inspect_pairs(
        [row | {"chosen": "y", "rejected": "z", "chosen_ids": [3], "rejected_ids": [4], "chosen_weights": [1.0]}],
        load_tokenizer(str(folder)), home / "page.html",
    )  # fmt: skip
    assert read_records(home / "verdicts.jsonl")[0]["id"] == name
    assert {path for path in tmp_path.rglob("*") if home not in path.parents} == before
    assert {path.suffix for path in home.iterdir() if not path.name.startswith(".")} <= {".jsonl", ".json", ".html"}


def test_settings_cannot_move_a_training(tmp_path, model_dir):
    from align.trainers.training import check_training

    with pytest.raises(ConfigError, match="output_dir"):
        check_training("dpo", tmp_path / "out", {"output_dir": str(tmp_path / "elsewhere")})


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/a", "a\\b", "a\0b", None, 3, ["a"]])
def test_plain_names(name):
    assert not plain_name(name) and plain_name("model-00001-of-00002.safetensors")


# Pages


def test_a_page_holds_text_as_text(tmp_path, folder):
    """Every text of a record, of the command line and of a table, each trying to be markup."""
    evil = "</script><img src=x onerror=alert(1)>'\"&"
    pair = {
        "id": evil, "prompt": [{"role": evil, "content": evil}], "chosen": evil, "rejected": evil, "answer": evil,
        "prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4], "chosen_weights": [1.0], "rejected_weights": [0.5],
    }  # fmt: skip
    inspect_pairs([pair], load_tokenizer(str(folder)), tmp_path / "page.html", title=evil, summary=[{evil: evil}])
    page = (tmp_path / "page.html").read_text()
    assert "<img" not in page and page.count("</script>") == page.count("<script")
    assert "innerHTML" not in page and "default-src 'none'" in page


@pytest.mark.parametrize("name", ["scored.jsonl", "summary.json", "cdpo/trainer_state.json"])
def test_a_page_never_replaces_a_file_of_its_run(tmp_path, name):
    make_run(tmp_path / "run")
    before = (tmp_path / "run" / name).read_bytes()
    with pytest.raises(ConfigError, match=f"{name}: a file of the run, which the page would replace"):
        inspect_run(tmp_path / "run", tmp_path / "run" / "cdpo" / ".." / name)
    assert (tmp_path / "run" / name).read_bytes() == before
