"""Reference log-probabilities from disk: taken up where ids and weights are the same, and never where they are not."""

from pathlib import Path

import pytest
import torch
from conftest import random_pairs, tiny_llama
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_token_dpo import options

from align import CDPOConfig, CDPOTrainer, TokenDPOTrainer
from align.trainers import reference_cache


@pytest.fixture
def computed(monkeypatch):
    """Rows that went through the reference, a number per trainer."""
    counts = []
    original = TokenDPOTrainer._compute_ref_logps

    def counting(self, dataset, *others):
        counts.append(len(dataset))
        return original(self, dataset, *others)

    monkeypatch.setattr(TokenDPOTrainer, "_compute_ref_logps", counting)
    return counts


def build(folder, tokenizer, pairs, model=None, lora=True, **settings):
    args = CDPOConfig(**options(folder, precompute_ref_log_probs=True, **{"max_length": 16, **settings}))
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False) if lora else None
    return CDPOTrainer(
        model or tiny_llama(),
        args=args,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=lora,
    )


def stored(trainer):
    return [trainer.train_dataset[f"{side}_ref_logps"] for side in ("chosen", "rejected")]


PAIRS = random_pairs(6, columns=("ce_scores",))


@pytest.mark.parametrize("lora", [True, False])
def test_hits_where_only_the_training_differs(tmp_path, tokenizer, computed, lora):
    first = build(tmp_path / "a", tokenizer, PAIRS, lora=lora)
    again = build(tmp_path / "b", tokenizer, PAIRS, lora=lora, learning_rate=1e-5, per_device_train_batch_size=2, seed=9,
                  beta=0.7, loss_type=["ipo"], ld_alpha=0.5)  # fmt: skip
    assert computed == [6]
    assert [list(map(list, side)) for side in stored(first)] == [list(map(list, side)) for side in stored(again)]


def other_weights():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 0.5
    return model


def under_an_adapter(seed):
    model = tiny_llama()
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))


@pytest.mark.parametrize(
    "change, misses",
    [
        ({"model": other_weights}, 6),
        ({"max_length": 12}, None),
        ({"truncation_mode": "keep_end", "max_length": 12}, None),
        ({"pairs": lambda: [PAIRS[0] | {"chosen_ids": [9] * len(PAIRS[0]["chosen_ids"])}, *PAIRS[1:]]}, 1),
        ({"cache_reference": False}, 6),
        ({"model": lambda: tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 10.0})}, 6),
        ({"model": lambda: tiny_llama(num_attention_heads=8, num_key_value_heads=4)}, 6),
        ({"model": lambda: tiny_llama().to(torch.bfloat16)}, 6),
    ],
)
def test_misses_where_the_numbers_differ(tmp_path, tokenizer, computed, change, misses):
    build(tmp_path / "a", tokenizer, PAIRS)
    change = dict(change)
    pairs = change.pop("pairs", lambda: PAIRS)()
    model = change.pop("model", tiny_llama)()
    other_heads = model.config.num_attention_heads == 8
    if other_heads:  # no tensor tells
        model.load_state_dict(tiny_llama().state_dict())
    found = build(tmp_path / "b", tokenizer, pairs, model, **change)
    if misses is None:  # exactly the rows that are cut elsewhere than before
        longest = [
            len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in found.train_dataset
        ]
        misses = sum(length > 12 for length in longest)
        assert 0 < misses < 6
    assert computed[1:] == [misses]
    # And what it now has is what is computed with an empty cache.
    fresh = build(tmp_path / "c", tokenizer, pairs, change.get("model") or model, **change | {"cache_reference": False})
    for one, other in zip(stored(found), stored(fresh), strict=True):
        for row, wanted in zip(one, other, strict=True):
            assert row == pytest.approx(wanted, abs=1e-5 if model.dtype == torch.float32 else 0.2)


def test_rows_cut_at_the_other_side_miss(tmp_path, tokenizer, computed):
    """As long as before, but other ids."""
    build(tmp_path / "a", tokenizer, PAIRS, max_length=12)
    found = build(tmp_path / "b", tokenizer, PAIRS, max_length=12, truncation_mode="keep_end")
    cut = sum(len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) > 12 for p in PAIRS)
    assert computed == [6, cut] and 0 < cut < 6
    fresh = build(tmp_path / "c", tokenizer, PAIRS, max_length=12, truncation_mode="keep_end", cache_reference=False)
    for one, other in zip(stored(found), stored(fresh), strict=True):
        for row, wanted in zip(one, other, strict=True):
            assert row == pytest.approx(wanted, abs=1e-5)


def test_another_precision_misses(tmp_path, tokenizer, computed):
    build(tmp_path / "a", tokenizer, PAIRS)
    build(tmp_path / "b", tokenizer, PAIRS, bf16=True)
    assert computed == [6, 6]


def test_an_adapter_of_another_scale_misses(tmp_path, tokenizer, computed):
    """The same matrices A and B; the reference's numbers differ all the same."""
    found = []
    for alpha in (4, 64):
        torch.manual_seed(1)
        config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["up_proj"], init_lora_weights=False)
        trainer = build(tmp_path / str(alpha), tokenizer, PAIRS, get_peft_model(tiny_llama(), config), lora=False)
        found.append(stored(trainer)[0][0])
    assert computed == [6, 6]
    assert max(abs(a - b) for a, b in zip(*found, strict=True)) > 0.01


def test_a_cache_that_cannot_be_written_costs_no_numbers(tmp_path, tokenizer, computed, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    trainer = build(tmp_path / "a", tokenizer, PAIRS)
    assert computed == [6] and len(stored(trainer)[0]) == 6
    assert "cannot be written" in caplog.text


def test_files_appear_whole_or_not_at_all(tmp_path, tokenizer, monkeypatch):
    """Killed while writing: no file by its final name."""

    def half(tensors, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(reference_cache, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "a", tokenizer, PAIRS)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_another_adapter_of_the_reference_misses(tmp_path, tokenizer, computed):
    """Training goes on with an adapter: the reference is a copy of it, as it is in the beginning."""
    for seed in (1, 2, 1):
        build(tmp_path / str(len(computed)), tokenizer, PAIRS, under_an_adapter(seed), lora=False)
    assert computed == [6, 6]  # the third is the first


def test_a_broken_file_is_computed_again(tmp_path, tokenizer, computed):
    first = build(tmp_path / "a", tokenizer, PAIRS)
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    again = build(tmp_path / "b", tokenizer, PAIRS)
    assert computed == [6, 6]
    assert list(stored(again)[0]) == list(stored(first)[0])
    build(tmp_path / "c", tokenizer, PAIRS)
    assert computed == [6, 6]  # written anew, whole
