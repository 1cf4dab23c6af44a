"""What a user can get wrong with the trainers: a clear error, or a counted drop, before training starts."""

from pathlib import Path

import pytest
from conftest import random_pairs, tiny_llama
from datasets import Dataset
from peft import LoraConfig
from test_token_dpo import LORA, options
from trl import DPOConfig

from align import CDPOConfig, CDPOTrainer, TokenDPOConfig, TokenDPOTrainer
from align.errors import ConfigError, MissingColumnError, RecordError

ROOT = Path(__file__).parent.parent


def build(tmp_path, tokenizer, pairs, cls=CDPOTrainer, **kwargs):
    args = cls.config_class(**options(tmp_path, **kwargs))
    return cls(
        tiny_llama(), args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer,
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip


def spoil(column, change, row=2):
    pairs = random_pairs(4, columns=("ce_scores", "weights", "ref_logps"))
    pairs[row][column] = change(pairs[row][column])
    return pairs


@pytest.mark.parametrize(
    "column, change, error, words",
    [
        ("rejected_ce_scores", lambda v: v[:-1], RecordError, ["p2", "rejected_ce_scores", "EOS"]),
        ("rejected_ce_scores", lambda v: [0.5, *v], RecordError, ["p2", "rejected_ce_scores", "one too many"]),
        (
            "rejected_ce_scores",
            lambda v: [float("nan"), *v[1:]],
            RecordError,
            ["p2", "rejected_ce_scores[0]", "finite"],
        ),
        ("rejected_ce_scores", lambda v: [1.5, *v[1:]], RecordError, ["p2", "1.5", "[0, 1]"]),
        ("chosen_ref_logps", lambda v: v + [0.0, 0.0], RecordError, ["p2", "chosen_ref_logps"]),
        ("chosen_ref_logps", lambda v: None, RecordError, ["p2", "chosen_ref_logps"]),
        ("rejected_ids", lambda v: [], RecordError, ["p2", "rejected_ids", "empty"]),
        ("prompt_ids", lambda v: [], RecordError, ["p2", "prompt_ids", "empty"]),
        ("chosen_ids", lambda v: [40_000, *v[1:]], RecordError, ["p2", "chosen_ids[0]", "40000", "vocabulary"]),
        ("chosen_ids", lambda v: [-1, *v[1:]], RecordError, ["p2", "chosen_ids[0]", "-1"]),
    ],
)
def test_bad_rows_are_named_before_training(tmp_path, tokenizer, column, change, error, words):
    with pytest.raises(error) as caught:
        build(tmp_path, tokenizer, spoil(column, change))
    assert all(word in str(caught.value) for word in words), caught.value


def test_missing_columns(tmp_path, tokenizer):
    with pytest.raises(MissingColumnError, match="rejected_ce_scores missing"):
        build(tmp_path, tokenizer, random_pairs(4))
    pairs = random_pairs(4, columns=("ce_scores",))
    for pair in pairs:
        del pair["chosen_ce_scores"]
    build(tmp_path, tokenizer, pairs)  # needed only where chosen tokens are weighted
    with pytest.raises(MissingColumnError, match="chosen_ce_scores missing"):
        build(tmp_path, tokenizer, pairs, weight_chosen=True)
    text = [{"prompt": "a", "chosen": "b", "rejected": "c", "rejected_ce_scores": [0.1, 0.2]}]
    with pytest.raises(MissingColumnError, match="without ids"):
        build(tmp_path, tokenizer, text)


def test_prompts_that_fill_max_length_are_counted(tmp_path, tokenizer):
    pairs = random_pairs(8, columns=("ce_scores",))
    limit = sorted(len(p["prompt_ids"]) for p in pairs)[5]
    trainer = build(tmp_path, tokenizer, pairs, max_length=limit)
    dropped = sum(len(p["prompt_ids"]) >= limit for p in pairs)
    assert 0 < dropped < 8
    assert trainer.data_report["train"]["prompt_fills_max_length"] == dropped
    assert len(trainer.train_dataset) == 8 - dropped
    with pytest.raises(RecordError, match="fills max_length = 1 "):
        build(tmp_path, tokenizer, pairs, max_length=1)


def test_stored_reference_shifted_by_one_is_found(tmp_path, tokenizer):
    from align.logps import token_logps

    pairs = random_pairs(6, columns=("ce_scores",))
    model = tiny_llama()
    for pair in pairs:
        pair["prompt_ids"] = pair["prompt_ids"] + [5]
        for side in ("chosen", "rejected"):
            pair[f"{side}_ids"] = (pair[f"{side}_ids"] * 6)[:6]
            pair[f"{side}_ce_scores"] = [0.5] * 6
            pair[f"{side}_ref_logps"] = token_logps(model, [(pair["prompt_ids"], pair[f"{side}_ids"])], pad_token_id=0)[
                0
            ]
    build(tmp_path, tokenizer, pairs)
    for pair in pairs:
        for side in ("chosen", "rejected"):
            values = pair[f"{side}_ref_logps"]
            pair[f"{side}_ref_logps"] = values[1:] + values[:1]
    with pytest.raises(RecordError, match="shifted by one position"):
        build(tmp_path, tokenizer, pairs)


def test_a_shift_is_found_where_tokens_are_nearly_certain(tmp_path):
    """The embedded model gives most tokens a probability near 1, so that a shift changes little on average."""
    from align.logps import token_logps
    from align.models import load_model, load_tokenizer
    from align.problems import load_problems
    from align.tokens import encode_pair

    path = str(ROOT / "data/tiny-arithmetic/model")
    model, tokenizer = load_model(path, dtype="float32"), load_tokenizer(path)
    pairs = []
    for problem in load_problems(str(ROOT / "data/tiny-arithmetic/test.jsonl"), limit=8):
        wrong = problem["solution"] + "0"
        text = {"prompt": problem["prompt"], "chosen": problem["solution"], "rejected": wrong}
        pairs.append({"id": problem["id"], **encode_pair(tokenizer, text, problem["id"])})
    for side in ("chosen", "rejected"):
        rows = [(pair["prompt_ids"], pair[f"{side}_ids"]) for pair in pairs]
        for pair, logps in zip(pairs, token_logps(model, rows, pad_token_id=0), strict=True):
            pair[f"{side}_ref_logps"] = logps
    args = TokenDPOConfig(**options(tmp_path))

    def trainer(rows):
        data = Dataset.from_list(rows)
        return TokenDPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)

    trainer(pairs)
    for by in (1, -1):
        columns = [f"{side}_ref_logps" for side in ("chosen", "rejected")]
        with pytest.raises(RecordError, match="shifted by one position"):
            trainer([pair | {c: pair[c][-by:] + pair[c][:-by] for c in columns} for pair in pairs])
    assert args.precompute_ref_log_probs is False  # the caller's settings are the caller's


def test_a_collator_that_drops_the_weights_is_refused(tmp_path, tokenizer):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    with pytest.raises(ConfigError, match="plain DPO would be trained"):
        TokenDPOTrainer(
            tiny_llama(), args=TokenDPOConfig(**options(tmp_path)), processing_class=tokenizer,
            data_collator=DataCollatorForPreference(pad_token_id=0),
            train_dataset=Dataset.from_list(random_pairs(2, columns=("weights",))),
        )  # fmt: skip


def test_ids_that_only_the_tokenizer_knows_are_named(tmp_path, tokenizer):
    rows = [{"prompt": "How many apples", "chosen": " the answer is 42", "rejected": " duck eggs"}]
    with pytest.raises(RecordError, match="row 0: .*is not in the vocabulary of 200 tokens"):
        TokenDPOTrainer(tiny_llama(vocab_size=200), args=TokenDPOConfig(**options(tmp_path)), processing_class=tokenizer,
                        train_dataset=Dataset.from_list(rows))  # fmt: skip


def test_refused_settings(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="use_weighting"):
        TokenDPOConfig(**options(tmp_path, use_weighting=True))
    with pytest.raises(ConfigError, match="aot"):
        TokenDPOConfig(**options(tmp_path, loss_type=["aot"]))
    with pytest.raises(ConfigError, match="loss_aggregation"):
        CDPOConfig(**options(tmp_path, loss_aggregation="mean"))
    with pytest.raises(ConfigError, match="position"):
        CDPOConfig(**options(tmp_path, loss_aggregation="position", loss_type=["ipo"]))
    with pytest.raises(ConfigError, match="CDPOConfig"):
        CDPOTrainer(tiny_llama(), args=DPOConfig(**options(tmp_path)), train_dataset=Dataset.from_list(random_pairs(2)),
                    processing_class=tokenizer)  # fmt: skip
