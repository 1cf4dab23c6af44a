"""Token scores against loops over the equation, and against two merged models run one sequence at a time."""

import copy
import json

import pytest
import torch
from conftest import random_pairs, tiny_llama
from oracles import completion_logps, contrastive_score
from peft import LoraConfig, PeftModel, get_peft_model

from align import identity
from align.errors import ConfigError, ModelLoadError, ModelMismatchError, RecordError
from align.logps import batches_by_length, token_logps
from align.models import BASE_FILE, base_fingerprint, load_adapters, load_model, same_base, write_base_file
from align.records import read_records
from align.scoring.contrastive import score_contrastive, score_rows
from align.scoring.reference import score_reference


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, model_dir):
    """Two adapters with random weights, saved; their folders by name."""
    folders = {}
    for seed, name in enumerate(("positive", "negative")):
        torch.manual_seed(seed)
        model = get_peft_model(
            load_model(model_dir, dtype="float32"),
            LoraConfig(r=4, target_modules=["up_proj", "down_proj"], init_lora_weights=False),
        )
        folders[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(folders[name])
        write_base_file(folders[name], model)
    return folders


def rows_of(pairs):
    return [(pair["prompt_ids"], pair[f"{side}_ids"]) for pair in pairs for side in ("chosen", "rejected")]


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_token_logps_equal_one_sequence_at_a_time(budget):
    model = tiny_llama()
    rows = rows_of(random_pairs(9))
    exact = tiny_llama().double()
    for row, values in zip(rows, token_logps(model, rows, pad_token_id=0, max_tokens_per_batch=budget), strict=True):
        expected = torch.stack(completion_logps(exact, *map(list, row))).tolist()
        assert values == pytest.approx(expected, abs=2e-5)


def test_batches_keep_the_budget_and_every_row():
    lengths = [3, 9, 1, 4, 4, 20, 7]
    batches = batches_by_length(lengths, 12)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 12 for b in batches)
    assert batches[0] == [5]  # the longest first
    with pytest.raises(ConfigError, match="max_tokens_per_batch = 0"):
        batches_by_length(lengths, 0)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.5])
def test_contrastive_scores_equal_two_merged_models(model_dir, adapters, beta):
    rows = rows_of(random_pairs(5))
    model = load_adapters(load_model(model_dir, dtype="float32"), adapters)
    found = score_rows(model, rows, pad_token_id=0, beta=beta, max_tokens_per_batch=64)
    merged = {
        name: PeftModel.from_pretrained(load_model(model_dir, dtype="float32"), path).merge_and_unload().double()
        for name, path in adapters.items()
    }
    for (prompt, completion), scores in zip(rows, found, strict=True):
        logits = {
            n: m(input_ids=torch.tensor([list(prompt) + list(completion)])).logits[0].tolist()
            for n, m in merged.items()
        }
        for t, token in enumerate(completion):
            place = len(prompt) + t - 1
            expected = contrastive_score(logits["positive"][place], logits["negative"][place], token, beta)
            assert scores[t] == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_stage_writes_scores_beside_ids_and_counts_what_is_too_long(tmp_path, model_dir, adapters):
    pairs = random_pairs(7)
    model = load_adapters(load_model(model_dir, dtype="float32"), adapters)
    lengths = [len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs]
    limit = sorted(lengths)[4]
    counts = score_contrastive(model, pairs, tmp_path / "out.jsonl", pad_token_id=0, max_length=limit)
    scored = read_records(tmp_path / "out.jsonl", "pair")
    assert counts["too_long"] == sum(length > limit for length in lengths) > 0
    assert [row["id"] for row in scored] == [
        p["id"] for p, length in zip(pairs, lengths, strict=True) if length <= limit
    ]
    for row in scored:
        expected = score_rows(model, rows_of([row]), pad_token_id=0)
        assert row["chosen_ce_scores"] == pytest.approx(expected[0], abs=1e-6)
        assert row["rejected_ce_scores"] == pytest.approx(expected[1], abs=1e-6)
    score_reference(load_model(model_dir, dtype="float32"), scored, tmp_path / "ref.parquet", pad_token_id=0)
    referenced = read_records(tmp_path / "ref.parquet", "pair")
    assert referenced[0]["chosen_ce_scores"] == scored[0]["chosen_ce_scores"]
    assert len(referenced[0]["rejected_ref_logps"]) == len(referenced[0]["rejected_ids"])
    with pytest.raises(RecordError, match="none of the 7 pairs fits"):
        score_contrastive(model, pairs, tmp_path / "none.jsonl", pad_token_id=0, max_length=1)


def test_bad_pairs_stop_the_stage_before_it_starts(tmp_path, model_dir, adapters):
    model = load_adapters(load_model(model_dir, dtype="float32"), adapters)
    pairs = random_pairs(3)
    pairs[1]["chosen_ids"][0] = 4000
    with pytest.raises(RecordError, match=r"row 1 \(id 'p1'\): chosen_ids\[0\] = 4000 is not in the vocabulary"):
        score_contrastive(model, pairs, tmp_path / "out.jsonl", pad_token_id=0)
    pairs[1]["chosen_ids"] = []
    with pytest.raises(RecordError, match="row 1 .*chosen_ids is empty"):
        score_contrastive(model, pairs, tmp_path / "out.jsonl", pad_token_id=0)
    assert list(tmp_path.iterdir()) == []


def test_a_base_and_an_adapter_that_do_not_match(tmp_path, model_dir, adapters):
    tiny_llama(hidden_size=64).save_pretrained(tmp_path / "wider")
    tiny_llama(seed=7).save_pretrained(tmp_path / "other")
    for other in ("wider", "other"):
        with pytest.raises(ModelMismatchError, match="whose weights differ"):
            load_adapters(load_model(str(tmp_path / other), dtype="float32"), adapters)
    # Adapters from elsewhere carry no fingerprint; shapes still tell.
    import shutil

    shutil.copytree(adapters["positive"], tmp_path / "foreign")
    (tmp_path / "foreign" / BASE_FILE).unlink()
    with pytest.raises(ModelMismatchError, match="does not fit the base"):
        load_adapters(load_model(str(tmp_path / "wider"), dtype="float32"), {"positive": str(tmp_path / "foreign")})
    config = json.loads((tmp_path / "foreign" / "adapter_config.json").read_text())
    (tmp_path / "foreign" / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["c_attn"]}))
    with pytest.raises(ModelMismatchError, match="does not fit the base"):
        load_adapters(load_model(model_dir, dtype="float32"), {"positive": str(tmp_path / "foreign")})
    with pytest.raises(ModelMismatchError, match="no adapter 'negative'"):
        model = load_adapters(load_model(model_dir, dtype="float32"), {"positive": adapters["positive"]})
        score_rows(model, [([1], [2])], pad_token_id=0)


def test_a_merged_adapter_makes_another_base(tmp_path, model_dir, adapters):
    """Norms and embeddings are the same then; only the matrices tell."""
    merged = load_adapters(load_model(model_dir, dtype="float32"), {"default": adapters["positive"]}).merge_and_unload()
    merged.save_pretrained(tmp_path)
    with pytest.raises(ModelMismatchError, match="whose weights differ"):
        load_adapters(load_model(str(tmp_path), dtype="float32"), {"positive": adapters["positive"]})
    quantized = load_model(model_dir, dtype="float32", quantization="4bit")
    assert same_base(base_fingerprint(quantized), base_fingerprint(load_model(model_dir, dtype="bfloat16")))
    load_adapters(quantized, {"positive": adapters["positive"]})
    load_adapters(load_model(model_dir, dtype="float16"), {"positive": adapters["positive"]})


def test_pickled_weights_are_not_loaded(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_model(str(tmp_path))


def test_an_adapter_is_the_same_in_whatever_order_its_modules_were_written(tmp_path):
    identities = []
    for names in (["q_proj", "v_proj"], ["v_proj", "q_proj"], ["q_proj", "k_proj"]):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "target_modules": names}))
        identities.append(identity.model_identity(tmp_path))
    assert identities[0] == identities[1] != identities[2]


def test_a_change_anywhere_in_the_weights_is_another_model(tmp_path, monkeypatch):
    """Also in a file too large to be read whole, and deep inside of it."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "a")
    for whole in (identity.WHOLE, 0):
        monkeypatch.setattr(identity, "WHOLE", whole)
        first = identity.model_identity(tmp_path / "a")
        for i, name in enumerate(("layers.0.mlp.up_proj", "layers.1.self_attn.v_proj", "layers.1.mlp.down_proj")):
            changed = copy.deepcopy(model)
            with torch.no_grad():
                changed.model.get_submodule(name).weight += 0.01
            changed.save_pretrained(tmp_path / str(i))
            assert identity.model_identity(tmp_path / str(i)) != first, name
        model.save_pretrained(tmp_path / "b")
        assert identity.model_identity(tmp_path / "b") == first
    (tmp_path / "b/model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelLoadError, match="no safetensors file"):
        identity.model_identity(tmp_path / "b")
