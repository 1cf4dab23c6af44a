"""What a model, an adapter, a data set or a checkpoint of someone else's may not do; every file here tries it."""

import ast
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import byte_level_tokenizer, random_pairs, tiny_llama
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from align import config
from align.errors import ModelLoadError, RecordError, RecordFileError
from align.identity import model_identity
from align.merge import merge_adapter
from align.models import is_adapter, load_adapters, load_model, load_tokenizer
from align.scoring.guidance import load_guide
from align.sources import load_rows
from align.tokens import encode_prompt

ROOT = Path(__file__).parent.parent


class Payload:
    """What runs when it is unpickled: a file appears."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return (os.mkdir, (self.mark,))


@pytest.fixture
def mark(tmp_path):
    """A path that is there once foreign code has run; no test may end with it."""
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists()


@pytest.fixture
def adapter(tmp_path):
    """An adapter's folder to spoil."""
    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "adapter"
    )
    return tmp_path / "adapter"


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def load(folder):
    return load_model(str(folder), dtype="float32")


# Pickles


def test_the_payload_works(tmp_path):
    """Or the tests below could not fail."""
    torch.save(Payload(tmp_path / "ran"), tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_model_in_pickles_is_refused(folder, mark, name):
    (folder / "model.safetensors").unlink()
    torch.save(Payload(mark), folder / name)
    with pytest.raises(ModelLoadError, match=rf"{name}: a pickle.*convert it to safetensors"):
        load(folder)


def pickled_shards(folder, mark) -> Path:
    """The model's weights become an index of safetensors that names a pickle."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(Payload(mark), folder / "shard.bin")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, "shard.bin")}))
    return index


def test_shards_in_pickles_are_refused(folder, mark):
    """Whichever index names them; transformers would follow it, safetensors asked for or not."""
    index = pickled_shards(folder, mark)
    with pytest.raises(ModelLoadError, match="shard.bin: a pickle"):
        load(folder)
    (folder / "more.safetensors").touch()  # a decoy
    with pytest.raises(ModelLoadError, match="shard.bin.*a pickle"):
        load(folder)
    index.rename(folder / "pytorch_model.bin.index.json")
    with pytest.raises(ModelLoadError):
        load(folder)


def test_nothing_is_unpickled_while_a_model_loads(folder, mark, monkeypatch):
    """The second line, for hub names, whose files are not there to be looked at before."""
    from align import safety

    monkeypatch.setattr(safety, "check_folder", lambda _path: None)
    pickled_shards(folder, mark)
    with pytest.raises(ModelLoadError, match="shard.bin: a pickle"):
        load(folder)


@pytest.mark.parametrize("looked_at", [True, False])
def test_an_adapter_in_pickles_is_refused(adapter, folder, tmp_path, mark, monkeypatch, looked_at):
    """Whatever loads it. PEFT would take it, safetensors asked for or not."""
    from align import safety

    (adapter / "adapter_model.safetensors").unlink()
    torch.save(Payload(mark), adapter / "adapter_model.bin")
    if not looked_at:
        monkeypatch.setattr(safety, "check_folder", lambda _path: None)
    loading = [
        lambda: load_adapters(tiny_llama(), {"one": str(adapter)}),
        lambda: load_model(str(folder), dtype="float32", adapter=str(adapter)),
        lambda: load_guide({"path": str(folder), "dtype": "float32"}, str(adapter)),
        lambda: merge_adapter(str(folder), str(adapter), tmp_path / "merged", dtype="float32"),
    ]
    for attempt in loading:
        with pytest.raises(ModelLoadError, match=r"adapter_model\.bin: a pickle"):
            attempt()
    assert not (tmp_path / "merged").exists()


def test_trainers_given_a_name_refuse_pickles(folder, tmp_path, mark):
    """There TRL loads the model."""
    from align import BASHConfig, BASHTrainer, TokenDPOConfig, TokenDPOTrainer

    (folder / "model.safetensors").unlink()
    torch.save(Payload(mark), folder / "pytorch_model.bin")
    options = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "report_to": "none"}
    with pytest.raises(ModelLoadError, match="a pickle"):
        TokenDPOTrainer(str(folder), args=TokenDPOConfig(**options), train_dataset=Dataset.from_list(random_pairs(2)))
    rows = Dataset.from_list([{"prompt": "x", "completion": "y"}])
    with pytest.raises(ModelLoadError, match="a pickle"):
        BASHTrainer(str(folder), args=BASHConfig(**options), train_dataset=rows)


def test_a_reference_cache_does_not_unpickle(tmp_path, mark):
    from align.trainers.reference_cache import ReferenceCache

    (tmp_path / "cache" / "key").mkdir(parents=True)
    for name in ("rows.safetensors", "rows.bin"):
        torch.save(Payload(mark), tmp_path / "cache" / "key" / name)
    assert ReferenceCache(tmp_path / "cache", "key").get(b"anything") is None


def test_models_are_told_apart_without_unpickling(folder, mark):
    torch.save(Payload(mark), folder / "pytorch_model.bin")
    assert model_identity(folder) and not is_adapter(str(folder))


# Training that goes on


ARGS = {
    "max_steps": 2, "per_device_train_batch_size": 2, "bf16": False, "gradient_checkpointing": False, "save_steps": 1,
    "disable_tqdm": True,
}  # fmt: skip


def interrupted(model_dir, out, monkeypatch):
    """A training that was killed; the same once more, as a function; and the checkpoint that it would go on from."""
    from align.trainers import training

    def train():
        return training.train_preference(
            "dpo", {"path": model_dir, "dtype": "float32"}, random_pairs(4), out, args=ARGS,
            lora={"r": 2, "target_modules": ["up_proj"]},
        )  # fmt: skip

    original = training.TokenDPOTrainer.train

    def killed(self, **kwargs):
        original(self, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training.TokenDPOTrainer, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            train()
    working = out.with_name(out.name + ".training")
    shutil.rmtree(working / "checkpoint-2")
    return train, working / "checkpoint-1"


def test_a_checkpoint_s_states_cannot_run_code(model_dir, tmp_path, mark, monkeypatch):
    """The Trainer loads them, as tensors and numbers alone."""
    train, checkpoint = interrupted(model_dir, tmp_path / "out", monkeypatch)
    whole = shutil.copytree(checkpoint, tmp_path / "whole")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert (checkpoint / name).exists()
        torch.save(Payload(mark), checkpoint / name)
        with pytest.raises(Exception, match="[Ww]eights[_ ]only"):
            train()
        assert not mark.exists()
        shutil.copy(whole / name, checkpoint / name)
    assert train()["steps"] == 2


def test_a_checkpoint_that_leads_elsewhere_is_refused(model_dir, tmp_path, monkeypatch):
    train, checkpoint = interrupted(model_dir, tmp_path / "out", monkeypatch)
    state = checkpoint / "trainer_state.json"
    change(state, best_model_checkpoint=str(tmp_path / "elsewhere"))
    with pytest.raises(RecordFileError, match="leads to .*elsewhere, outside"):
        train()
    change(state, best_model_checkpoint=str(checkpoint))
    shutil.move(checkpoint, tmp_path / "moved")
    checkpoint.symlink_to(tmp_path / "moved")
    with pytest.raises(RecordFileError, match="leads to .*checkpoint-1, outside"):
        train()


# Code that comes with a model or a data set


def write_code(folder: Path, mark: Path) -> None:
    (folder / "theirs.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")


def test_a_model_s_own_code_is_not_run(folder, mark):
    write_code(folder, mark)
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "theirs.Model"})
    assert type(load(folder)).__module__.startswith("transformers.")  # a known kind needs no code of its own
    classes = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    change(folder / "config.json", model_type="theirs", auto_map=classes)
    with pytest.raises(ModelLoadError, match="needs code of its own .*auto_map.*--trust-remote-code"):
        load(folder)


def test_trust_runs_a_model_s_own_code(folder, tmp_path, monkeypatch):
    """Or the tests beside this one could not fail."""
    write_code(folder, tmp_path / "ran")
    change(folder / "config.json", model_type="theirs", auto_map={"AutoConfig": "theirs.Config"})
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(Exception, match="Config"):
        load_model(str(folder), dtype="float32", trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_a_tokenizer_s_own_code_is_not_run(folder, mark):
    write_code(folder, mark)
    change(folder / "tokenizer_config.json", tokenizer_class="Theirs", auto_map={"AutoTokenizer": ["theirs.T", None]})
    with pytest.raises(ModelLoadError, match="tokenizer needs code of its own .*auto_map.*--trust-remote-code"):
        load_tokenizer(str(folder))


def test_a_model_s_own_generation_is_not_run(folder, mark):
    (folder / "custom_generate").mkdir()
    code = f"import os\nos.mkdir({str(mark)!r})\ndef generate(*args, **kwargs): pass\n"
    (folder / "custom_generate" / "generate.py").write_text(code)
    load(folder)
    assert not mark.exists()
    load_model(str(folder), dtype="float32", trust_remote_code=True)
    mark.rmdir()  # where it is trusted, it is there


def test_kernels_of_the_hub_are_refused(folder):
    change(folder / "config.json", attn_implementation="someone/kernels")
    with pytest.raises(ModelLoadError, match="someone/kernels' is code on the hub"):
        load(folder)


def test_modules_that_an_adapter_names_are_not_imported(adapter, tmp_path, mark, monkeypatch):
    write_code(tmp_path, mark)
    monkeypatch.syspath_prepend(tmp_path)
    config = adapter / "adapter_config.json"
    change(config, auto_mapping={"base_model_class": "Model", "parent_library": "theirs"}, task_type=None)
    assert load_adapters(tiny_llama(), {"one": str(adapter)}).peft_config
    change(config, megatron_config={"x": 1}, megatron_core="theirs")
    with pytest.raises(ModelLoadError, match="megatron_config makes PEFT import 'theirs'"):
        load_adapters(tiny_llama(), {"one": str(adapter)})


def test_loading_scripts_of_data_sets_are_refused(tmp_path, mark):
    folder = tmp_path / "theirs"
    folder.mkdir()
    write_code(folder, mark)
    for source in (folder, folder / "theirs.py"):
        with pytest.raises(RecordFileError, match="theirs.*cannot be read as rows; name a file"):
            load_rows(str(source))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir('MARK') }}",
        "{{ messages.append(1) }}",
        "{% for m in messages",
        "{{ raise_exception('no roles') }}",
    ],
)
def test_chat_templates_reach_for_text_alone(template, mark):
    tokenizer = byte_level_tokenizer(chat=True)
    tokenizer.chat_template = template.replace("MARK", str(mark))
    with pytest.raises(RecordError, match="row 3: the chat template cannot render"):
        encode_prompt(tokenizer, [{"role": "user", "content": "x"}], "row 3")


def test_nothing_of_ours_unpickles_evaluates_or_unpacks():
    """YAML by a safe loader alone; no pickle of a file, no tar or zip unpacked, no eval."""
    calls, texts = set(), set()
    for file in [
        *(ROOT / "align").rglob("*.py"),
        *(ROOT / "recipes").rglob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
    ]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                calls.add(ast.unparse(node.func))
                texts.add(ast.unparse(node))
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None) or node.names[0].name
                assert module.split(".")[0] not in ("dill", "cloudpickle", "shelve", "tarfile"), file
    # `pickle` makes a copy of an object of ours, in memory, in one place.
    assert {text for text in texts if "pickle.load" in text} == {"pickle.loads(pickle.dumps(dataset))"}
    # Of loaders, there is ours.
    loaders = {text.partition(", ")[2].rstrip(")") for text in texts if text.startswith("yaml.load(")}
    assert loaders == {"_Loader"} and issubclass(config._Loader, yaml.SafeLoader)
    assert not {
        c for c in calls if c.startswith("yaml.") and c not in ("yaml.load", "yaml.safe_load", "yaml.safe_dump")
    } - {"yaml.composer.ComposerError"}
    assert not calls & {"eval", "exec", "torch.load", "os.system"}
    assert not {call for call in calls if call.endswith((".extractall", ".extract"))}
