"""The column `weight`: (1/B) Σ_i weight_i f_i, against the losses' equations in float64, and against what a weight means."""

import copy
import json
import math
from functools import partial

import numpy
import pytest
import torch
from conftest import random_pairs, tiny_llama
from datasets import Dataset, IterableDataset
from oracles import completion_logps
from peft import LoraConfig
from test_token_dpo import LORA, assert_close, batch_loss, options, separate_reference
from trl import DPOTrainer

from align import (
    CDPOConfig,
    CDPOTrainer,
    RecordFile,
    TGDPOConfig,
    TGDPOTrainer,
    TokenDPOConfig,
    TokenDPOTrainer,
    read_records,
    score_reference,
    train_preference,
    write_records,
)
from align.errors import ConfigError, RecordError
from align.preferences import tokenize_pairs
from align.records import check_records
from align.trainers.token_dpo import DataCollatorForPreference, TokenPreferenceCollator

BETA, WEIGHTS = 0.3, [0.25, 1.0, 5.0, 0.0, 0.25, 1.0]  # of mean 1.25


def weighted_pairs(columns=("weights",), weights=WEIGHTS, seed=5):
    return [
        row | {"weight": weight}
        for row, weight in zip(random_pairs(len(weights), seed, columns=columns), weights, strict=True)
    ]


def make(tmp_path, tokenizer, rows, models, cls=TokenDPOTrainer, config=TokenDPOConfig, lora=False, **kwargs):
    policy, reference = models
    others = {name: kwargs.pop(name) for name in ("data_collator", "eval_dataset") if name in kwargs}
    return cls(
        policy, ref_model=None if lora else reference,
        args=config(**options(tmp_path, per_device_train_batch_size=6, preflight=False) | kwargs),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows, processing_class=tokenizer,
        peft_config=LoraConfig(**LORA) if lora else None, **others,
    )  # fmt: skip


@pytest.fixture(scope="module")
def exact(model_dir):
    """Per pair and side, log-probabilities of the policy, on a graph, and of the reference; and the policy's parameters."""
    twin, reference = (model.double() for model in separate_reference(model_dir))
    rows = []
    for row in weighted_pairs():
        found = {}
        for side in ("chosen", "rejected"):
            found[side] = torch.stack(completion_logps(twin, row["prompt_ids"], row[f"{side}_ids"]))
            with torch.no_grad():
                found[f"ref_{side}"] = torch.stack(completion_logps(reference, row["prompt_ids"], row[f"{side}_ids"]))
        rows.append(found)
    return rows, dict(twin.named_parameters())


def sigma(x):
    return 1 / (1 + torch.exp(-x))


def log_sigma(x):
    return -torch.log(1 + torch.exp(-x))


def score(divergence, ratio):
    """f'(t) at t = exp(ratio)."""
    t = torch.exp(ratio)
    return {
        "reverse_kl": lambda: torch.log(t), "forward_kl": lambda: 1 - 1 / t, "js_divergence": lambda: torch.log(2 * t / (t + 1)),
        "alpha_divergence": lambda: (t ** (0.5 - 1) - 1) / (0.5 - 1),
    }[divergence]()  # fmt: skip


def loss_of_pair(kind, chosen, rejected, lengths, divergence, smoothing, tau=0.05):
    """One pair's loss from its two log-ratios, as the papers write it."""
    s, s_r = score(divergence, chosen), score(divergence, rejected)
    x, c, r, e = BETA * (s - s_r), BETA * chosen, BETA * rejected, smoothing
    mean = s / lengths[0] - s_r / lengths[1]
    return {
        "sigmoid": lambda: -log_sigma(x),
        "hinge": lambda: (1 - x).clamp(min=0),
        "ipo": lambda: (mean - 1 / (2 * BETA)) ** 2,
        "exo_pair": lambda: sigma(x) * torch.log(sigma(x) / (1 - e)) + sigma(-x) * torch.log(sigma(-x) / e),
        "nca_pair": lambda: -log_sigma(c) - (log_sigma(-c) + log_sigma(-r)) / 2,
        "robust": lambda: (-(1 - e) * log_sigma(x) + e * log_sigma(-x)) / (1 - 2 * e),
        "bco_pair": lambda: -log_sigma(c) - log_sigma(-r),
        "sppo_hard": lambda: (chosen - 1 / (2 * BETA)) ** 2 + (rejected + 1 / (2 * BETA)) ** 2,
        "apo_zero": lambda: 1 - sigma(c) + sigma(r),
        "apo_down": lambda: sigma(c) + 1 - sigma(c - r),
        "discopop": lambda: -log_sigma(x) * (1 - sigma(x / tau)) + torch.exp(-x) * sigma(x / tau),
        "sigmoid_norm": lambda: -log_sigma(BETA * mean),
    }[kind]()


def expected_loss(exact, pairs, kinds, kind_weights, divergence="reverse_kl", smoothing=0.0, ld_alpha=1.0):
    total = torch.zeros((), dtype=torch.float64)
    tokens = sum(len(pair["chosen_ids"]) for pair in pairs)
    for pair, found in zip(pairs, exact, strict=True):
        lengths = [len(pair["chosen_ids"]), len(pair["rejected_ids"])]
        ratios = []
        for side in ("chosen", "rejected"):
            ratio = torch.zeros((), dtype=torch.float64)
            for t, w in enumerate(pair[f"{side}_weights"]):
                share = 1.0 if t < min(lengths) else ld_alpha
                ratio = ratio + share * w * (found[side][t] - found[f"ref_{side}"][t])
            ratios.append(ratio)
        for kind, of_kind in zip(kinds, kind_weights, strict=True):
            if kind == "sft":  # the pair's share of a mean over all chosen tokens
                f = -found["chosen"].sum() * len(pairs) / tokens
            else:
                f = loss_of_pair(kind, *ratios, lengths, divergence, smoothing)
            total = total + of_kind * pair["weight"] * f / len(pairs)
    return total


SETTINGS = [
    *({"loss_type": [kind]} for kind in ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")),
    *({"loss_type": [kind]} for kind in ("discopop", "sigmoid_norm", "sft")),
    *({"loss_type": [kind], "label_smoothing": 0.1} for kind in ("exo_pair", "robust")),
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.5]},
    {"ld_alpha": 0.4}, {"prefix_sharing": False}, {"max_tokens_per_batch": 40},
    {"max_tokens_per_batch": 40, "loss_type": ["hinge", "sft"], "loss_weights": [0.5, 0.7]},
    *({"f_divergence_type": kind} for kind in ("forward_kl", "js_divergence")),
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5, "loss_type": ["hinge"]},
]  # fmt: skip


def step_of(trainer):
    """Loss and gradients of a training step on all rows, in as many passes as it takes."""
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(trainer.model, trainer.data_collator([dict(row) for row in trainer.train_dataset]))
    return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_loss_type_matches_its_equation(tmp_path, model_dir, tokenizer, exact, settings):
    """Token weights and pair weights at once, a pair of weight 0 among them."""
    pairs = weighted_pairs()
    trainer = make(tmp_path, tokenizer, pairs, separate_reference(model_dir), **settings)
    loss, grads = step_of(trainer)
    kinds = settings.get("loss_type", ["sigmoid"])
    expected = expected_loss(
        exact[0], pairs, kinds, settings.get("loss_weights", [1.0] * len(kinds)),
        settings.get("f_divergence_type", "reverse_kl"), settings.get("label_smoothing", 0.0), settings.get("ld_alpha", 1.0),
    )  # fmt: skip
    named = exact[1]
    gradients = torch.autograd.grad(expected, list(named.values()), retain_graph=True)
    assert_close(loss, grads, expected.item(), dict(zip(named, gradients, strict=True)), 1e-5)
    assert trainer._metrics["train"]["weights/pairs"] == [1.25]


@pytest.mark.parametrize("aggregation", ["sequence", "position"])
def test_cdpo_scales_the_loss_of_a_pair(tmp_path, model_dir, tokenizer, exact, aggregation):
    pairs = weighted_pairs(("ce_scores",))
    budget = {"max_tokens_per_batch": 40} if aggregation == "position" else {}
    trainer = make(
        tmp_path, tokenizer, pairs, separate_reference(model_dir), CDPOTrainer, CDPOConfig, loss_aggregation=aggregation, **budget
    )  # fmt: skip
    loss, grads = step_of(trainer)
    width = max(len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs) - 1
    expected = torch.zeros((), dtype=torch.float64)
    for pair, found in zip(pairs, exact[0], strict=True):
        margins = [torch.zeros((), dtype=torch.float64) for _ in range(width)]
        for side, sign in (("chosen", 1), ("rejected", -1)):
            for t, s in enumerate(pair[f"{side}_ce_scores"]):
                w = 1.0 if side == "chosen" else 1 - s
                place = len(pair["prompt_ids"]) - 1 + t
                margins[place] = margins[place] + sign * w * (found[side][t] - found[f"ref_{side}"][t])
        margins = margins if aggregation == "position" else [sum(margins)]
        own = sum(-log_sigma(BETA * margin) for margin in margins) / len(margins)
        expected = expected + pair["weight"] * own / len(pairs)
    gradients = torch.autograd.grad(expected, list(exact[1].values()), retain_graph=True)
    assert_close(loss, grads, expected.item(), dict(zip(exact[1], gradients, strict=True)), 1e-5)


def test_tgdpo_scales_the_loss_of_a_pair(tmp_path, model_dir, tokenizer, exact):
    pairs = weighted_pairs(("guidance_logratios",))
    trainer = make(tmp_path, tokenizer, pairs, separate_reference(model_dir), TGDPOTrainer, TGDPOConfig, alpha=0.7)
    loss, grads = step_of(trainer)
    signed = (("chosen", 1), ("rejected", -1))
    as_weights = [
        pair
        | {f"{s}_weights": [1 + sign * 0.7 * BETA * r for r in pair[f"{s}_guidance_logratios"]] for s, sign in signed}
        for pair in pairs
    ]
    expected = expected_loss(exact[0], as_weights, ["sigmoid"], [1.0])
    gradients = torch.autograd.grad(expected, list(exact[1].values()), retain_graph=True)
    assert_close(loss, grads, expected.item(), dict(zip(exact[1], gradients, strict=True)), 1e-5)


def test_metrics_stay_those_without_weights(tmp_path, model_dir, tokenizer):
    found = []
    for rows in (weighted_pairs(), random_pairs(6, 5, columns=("weights",))):
        trainer = make(tmp_path, tokenizer, rows, separate_reference(model_dir), loss_type=["sigmoid", "sft"])
        step_of(trainer)
        found.append({name: list(values) for name, values in trainer._metrics["train"].items()})
    assert found[0].pop("weights/pairs") == [1.25]
    assert found[0] == found[1] and found[0]["num_tokens"][0] > 100


def trained(tmp_path, tokenizer, model_dir, rows, resume=None, **kwargs):
    """Logged numbers and final weights of a training."""
    settings = {"per_device_train_batch_size": 2, "num_train_epochs": 2, "eval_strategy": "epoch"} | kwargs
    if settings["eval_strategy"] != "no":
        settings["eval_dataset"] = Dataset.from_list(rows[:3])
    trainer = make(tmp_path, tokenizer, rows, separate_reference(model_dir), **settings)
    trainer.train(resume_from_checkpoint=resume)
    timed = ("runtime", "per_second", "total_flos")
    logs = [{k: v for k, v in e.items() if not any(t in k for t in timed)} for e in trainer.state.log_history]
    return logs, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def without(logs, key):
    return [{k: v for k, v in entry.items() if not k.endswith(key)} for entry in logs]


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"max_tokens_per_batch": 40, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"lora": True, "gradient_accumulation_steps": 2, "preflight": True},
    ],
    ids=str,
)  # fmt: skip
def test_weights_of_one_equal_no_column_bit_for_bit(tmp_path, model_dir, tokenizer, settings):
    rows = random_pairs(8, columns=("weights",))
    plain = trained(tmp_path / "plain", tokenizer, model_dir, rows, **settings)
    ones = trained(tmp_path / "ones", tokenizer, model_dir, [row | {"weight": 1} for row in rows], **settings)
    assert without(ones[0], "weights/pairs") == plain[0] and len(plain[0]) > 4
    assert [entry["weights/pairs"] for entry in ones[0] if "weights/pairs" in entry] == [1.0] * sum(
        "loss" in entry for entry in plain[0]
    )
    for name, value in plain[1].items():
        assert torch.equal(value, ones[1][name]), name


def test_all_weights_two_double_the_learning_rate(tmp_path, model_dir, tokenizer):
    """The mean stays one over pairs, so that weights scale and do not renormalise."""
    rows = random_pairs(8, columns=("weights",))
    sgd = {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, "gradient_accumulation_steps": 2}
    twos = trained(tmp_path / "a", tokenizer, model_dir, [row | {"weight": 2} for row in rows], **sgd)
    twice = trained(tmp_path / "b", tokenizer, model_dir, rows, learning_rate=2e-3, **sgd)
    for name, value in twice[1].items():
        assert torch.allclose(value, twos[1][name], rtol=1e-5, atol=1e-7), name
    for ours, plain in zip(twos[0], twice[0], strict=True):
        for key in {"loss", "eval_loss"} & plain.keys():
            assert ours[key] == pytest.approx(2 * plain[key], rel=1e-4), key


@pytest.mark.parametrize("kinds", [["sigmoid"], ["sigmoid", "sft"]], ids=str)
def test_a_weight_of_k_is_a_row_k_times(tmp_path, model_dir, tokenizer, kinds):
    """Of the sum over pairs: TRL's own mean over the repeated rows has another divisor."""
    counts = [1, 3, 0, 2, 1, 2]
    rows = random_pairs(6, seed=5)
    policy, reference = separate_reference(model_dir)
    settings = {"loss_type": kinds, "prefix_sharing": False}
    ours, grads = step_of(
        make(tmp_path, tokenizer, [r | {"weight": k} for r, k in zip(rows, counts, strict=True)],
             (copy.deepcopy(policy), copy.deepcopy(reference)), **settings)
    )  # fmt: skip
    repeated = [row for row, k in zip(rows, counts, strict=True) for _ in range(k)]
    if "sft" in kinds:  # whose divisor is the number of chosen tokens
        tokens = [sum(len(row["chosen_ids"]) for row in these) for these in (repeated, rows)]
        factors = (len(repeated) / len(rows), tokens[0] / tokens[1])
    else:
        factors = (len(repeated) / len(rows),)
    found = []
    for kind, factor in zip(kinds, factors, strict=True):
        trl = DPOTrainer(
            copy.deepcopy(policy), ref_model=copy.deepcopy(reference), train_dataset=Dataset.from_list(repeated),
            args=TokenDPOConfig(**options(tmp_path, loss_type=[kind])), processing_class=tokenizer,
        )  # fmt: skip
        loss, of_kind = batch_loss(trl, repeated)
        found.append((factor * loss, {name: factor * grad for name, grad in of_kind.items()}))
    expected = {name: sum(of_kind[name] for _, of_kind in found) for name in found[0][1]}
    assert_close(ours, grads, sum(loss for loss, _ in found), expected, 1e-5)


def test_a_pair_of_weight_zero_leaves_nothing_behind(tmp_path, model_dir, tokenizer):
    """Its tokens' weights make its own loss infinite; the gradient is that of the others, over the same number of pairs."""
    rows = random_pairs(4, columns=("weights",))
    bad = rows[0] | {"rejected_weights": [1e30] * len(rows[0]["rejected_ids"])}
    settings = {"loss_type": ["sppo_hard"]}
    alone, without_it = (
        step_of(make(tmp_path, tokenizer, some, separate_reference(model_dir), **settings))
        for some in ([bad | {"weight": 0.0}, *(row | {"weight": 1.0} for row in rows[1:])], rows[1:])
    )
    assert math.isinf(step_of(make(tmp_path, tokenizer, [bad], separate_reference(model_dir), **settings))[0])
    expected = {name: grad * 3 / 4 for name, grad in without_it[1].items()}
    assert_close(*alone, without_it[0] * 3 / 4, expected, 1e-5)
    # Where no pair of a batch has a weight, all gradients are there, and 0.
    trainer = make(
        tmp_path, tokenizer, [row | {"weight": float(i == 3)} for i, row in enumerate(rows)], separate_reference(model_dir)
    )  # fmt: skip
    loss, grads = batch_loss(trainer, [dict(row) | {"weight": 0.0} for row in rows])
    assert loss == 0 and len(grads) == len(list(trainer.model.parameters()))
    assert not any(grad.any() for grad in grads.values())


def test_a_router_loss_stays_the_batch_s(tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM, Qwen2MoeConfig

    config = Qwen2MoeConfig(
        vocab_size=400, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        pad_token_id=0, eos_token_id=0, bos_token_id=None, decoder_sparse_step=1,
    )  # fmt: skip

    def step(weights, coefficient):
        torch.manual_seed(0)
        models = [AutoModelForCausalLM.from_config(config) for _ in range(2)]
        rows = [
            row | ({} if weights is None else {"weight": w})
            for row, w in zip(random_pairs(4), weights or [0] * 4, strict=True)
        ]
        trainer = make(tmp_path, tokenizer, rows, models, router_aux_loss_coef=coefficient)
        return step_of(trainer), trainer._metrics["train"]

    weights = [2.0, 2.0, 2.0, 0.5]
    (scaled, _), metrics = step(weights, 0.1)
    (bare, _), _ = step(weights, 0.0)
    (plain, _), plain_metrics = step(None, 0.1)
    assert metrics["aux_loss"] == plain_metrics["aux_loss"] and metrics["aux_loss"][0] > 0.5
    assert scaled - bare == pytest.approx(0.1 * metrics["aux_loss"][0], rel=1e-4)
    assert abs(scaled - plain) > 0.1


def test_stored_and_computed_references_and_resuming_agree(tmp_path, model_dir, tokenizer):
    rows = weighted_pairs(("weights",), [0.5, 2.0, 1.0, 0.0, 3.0, 1.0, 4.0, 0.25])
    common = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    logs, weights = trained(tmp_path / "a", tokenizer, model_dir, rows, **common)
    resumed = trained(tmp_path / "a", tokenizer, model_dir, rows, str(tmp_path / "a" / "checkpoint-2"), **common)
    for name, value in weights.items():
        assert torch.equal(value, resumed[1][name]), name
    before = trained(tmp_path / "b", tokenizer, model_dir, rows, precompute_ref_log_probs=True, **common)
    means = [entry["weights/pairs"] for entry in logs if "weights/pairs" in entry]
    assert len(means) == 4 and len(set(means)) > 1
    for live, stored in zip(logs, before[0], strict=True):
        for key in {"loss", "eval_loss"} & live.keys():
            assert stored[key] == pytest.approx(live[key], rel=1e-4), key
    # In evaluation as well: the mean over the pairs of weight times loss, which one pair at a time shows.
    trainer = make(tmp_path / "c", tokenizer, rows, separate_reference(model_dir), per_device_eval_batch_size=3)
    own = [trainer.evaluate(Dataset.from_list([row | {"weight": 1.0}]))["eval_loss"] for row in rows]
    whole = trainer.evaluate(Dataset.from_list(rows))
    expected = sum(row["weight"] * loss for row, loss in zip(rows, own, strict=True)) / len(rows)
    assert whole["eval_loss"] == pytest.approx(expected, rel=1e-4)


#: A bad value, and what is wrong with it. Rows around it have proper weights.
BAD = [-1.0, float("nan"), float("inf"), 1e39, None, True, "2", [1.0]]


@pytest.mark.parametrize("value", BAD, ids=str)
def test_a_bad_weight_names_its_row(tmp_path, tokenizer, value):
    rows = random_pairs(4)
    text = [{"prompt": "Q: 1\nA:", "chosen": f" {i}", "rejected": " no"} for i in range(4)]
    column = [value] * 4 if isinstance(value, (bool, str, list)) else [1.0, 2.0, value, 0.0]
    place = 0 if isinstance(value, (bool, str, list)) else 2
    for given in (rows, text):
        weighted = [row | {"weight": w} for row, w in zip(given, column, strict=True)]
        with pytest.raises(RecordError, match=rf"train data set, row {place}.*: weight = .* must be a finite number"):
            make(tmp_path, tokenizer, weighted, (tiny_llama(), tiny_llama()))


def test_what_weights_cannot_do_is_refused(tmp_path, tokenizer):
    models = tiny_llama(), tiny_llama()
    with pytest.raises(ConfigError, match="train data set: column weight .* 'aot_unpaired' sorts"):
        make(tmp_path, tokenizer, weighted_pairs(), models, loss_type=["sigmoid", "aot_unpaired"])
    trainer = make(tmp_path, tokenizer, random_pairs(4), models, loss_type=["aot_unpaired"])
    with pytest.raises(ConfigError, match="eval data set: column weight"):
        trainer.evaluate(Dataset.from_list(weighted_pairs()))
    with pytest.raises(RecordError, match="weight = 0 in all of its 4 pairs"):
        make(tmp_path, tokenizer, weighted_pairs(weights=[0.0] * 4), models)
    # The one pair with a weight is dropped.
    rows = weighted_pairs(weights=[0, 0, 3])
    rows[2]["rejected_ids"], rows[2]["rejected_weights"] = rows[2]["chosen_ids"], rows[2]["chosen_weights"]
    with pytest.raises(RecordError, match="weight = 0 in all of its 2 pairs"):
        make(tmp_path, tokenizer, rows, models)


TEXT = [{"prompt": "Q: 1\nA:", "chosen": f" {i}", "rejected": " no", "weight": w} for i, w in enumerate((1, 2.5, 0, 4))]


def of_numpy(row):
    """Numbers as whoever computes them has them."""
    made = {name: numpy.array(value) for name, value in row.items() if isinstance(value, list)}
    return row | made | {"weight": numpy.float32(row["weight"])}


@pytest.mark.parametrize("form", ["ids", "text", "stream", "generator", "generator of NumPy", "ids of NumPy"])
def test_weights_reach_the_batch_from_every_kind_of_data_set(tmp_path, tokenizer, form):
    rows = weighted_pairs(weights=[1, 2.5, 0, 4]) if form in ("ids", "stream", "ids of NumPy") else TEXT
    dataset = Dataset.from_list(rows)
    if form == "stream":
        dataset = dataset.to_iterable_dataset()
    if form == "generator":
        dataset = IterableDataset.from_generator(lambda: iter(rows))
    if form.endswith("NumPy"):
        dataset = IterableDataset.from_generator(lambda: map(of_numpy, rows))
    models = tiny_llama(), tiny_llama()
    trainer = make(tmp_path, tokenizer, dataset, models, max_steps=1, per_device_train_batch_size=4)
    batch = next(iter(trainer.get_train_dataloader()))
    assert sorted(batch["token_pair_weights"].tolist()) == [0, 1, 2.5, 4]
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    # At the reference, each pair's loss is log 2.
    assert logged["weights/pairs"] == 7.5 / 4 and logged["loss"] == pytest.approx(7.5 / 4 * math.log(2), rel=1e-5)


@pytest.mark.parametrize("column", ["weight", "chosen_weights"])
def test_rows_of_a_stream_have_the_columns_of_its_first(tmp_path, tokenizer, column):
    rows = weighted_pairs()
    rest = [{key: value for key, value in row.items() if key != column} for row in rows]
    for given in ([*rows[:2], *rest[2:]], [*rest[:2], *rows[2:]]):
        stream = IterableDataset.from_generator(lambda given=given: iter(given))
        with pytest.raises(RecordError, match=rf"train data set, row 2 \(id 'p2'\): {column} "):
            make(tmp_path, tokenizer, stream, (tiny_llama(), tiny_llama()), max_steps=1).train()


def test_a_collator_that_leaves_columns_out_is_refused(tmp_path, tokenizer):
    class Forgetful(TokenPreferenceCollator):
        def torch_call(self, examples):
            return DataCollatorForPreference.torch_call(self, examples)

    models = tiny_llama(), tiny_llama()
    columns = ("weights", "ref_logps")
    with pytest.raises(ConfigError, match="leaves chosen_weights, rejected_weights, weight out of the batch"):
        make(tmp_path, tokenizer, weighted_pairs(), models, data_collator=Forgetful(0, columns=columns))
    with pytest.raises(ConfigError, match="leaves chosen_weights, rejected_weights out of the batch"):
        make(tmp_path, tokenizer, weighted_pairs(), models, data_collator=TokenPreferenceCollator(0))
    make(tmp_path, tokenizer, weighted_pairs(), models, data_collator=TokenPreferenceCollator(0, columns=columns))
    # Of evaluation data as well, given at once or later.
    bare, other = random_pairs(4), Dataset.from_list(weighted_pairs(()))
    with pytest.raises(ConfigError, match="eval data set: data_collator leaves weight out of the batch"):
        make(tmp_path, tokenizer, bare, models, data_collator=Forgetful(0), eval_dataset=other)
    with pytest.raises(ConfigError, match="eval data set: data_collator leaves weight out of the batch"):
        make(tmp_path, tokenizer, bare, models, data_collator=Forgetful(0)).evaluate(other)


def test_a_collator_is_tried_on_the_columns_of_training_and_leaves_random_numbers_as_they_were(
    tmp_path, tokenizer, model_dir
):
    seen, pairs = [], [{**pair, "note": "not read"} for pair in weighted_pairs()]

    class Drawing(TokenPreferenceCollator):
        def torch_call(self, examples):
            seen.append((set(examples[0]), torch.rand(1).item()))
            return super().torch_call(examples)

    numbers = []
    for collator in (None, Drawing(0, columns=("weights", "ref_logps"))):
        torch.manual_seed(0)
        make(tmp_path, tokenizer, pairs, separate_reference(model_dir), data_collator=collator)
        numbers.append(torch.rand(1).item())
    assert numbers[0] == numbers[1]
    (columns, _), *_ = seen
    assert "weight" in columns and "note" not in columns


def test_looking_at_a_stream_counts_none_of_its_drops(tmp_path, tokenizer):
    rows = weighted_pairs()
    rows[0]["rejected_ids"], rows[0]["rejected_weights"] = rows[0]["chosen_ids"], rows[0]["chosen_weights"]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    trainer = make(
        tmp_path, tokenizer, stream, (tiny_llama(), tiny_llama()), max_steps=1, per_device_train_batch_size=5
    )
    assert trainer.data_report["train"]["equal"] == 0
    trainer.train()
    assert trainer.data_report["train"]["equal"] == 1


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_stages_keep_weights_and_trainings_read_them(tmp_path, model_dir, tokenizer, ending):
    source, tokenized, scored = (tmp_path / f"{name}.{ending}" for name in ("text", "tokenized", "scored"))
    write_records(source, [row | {"rejected": row["chosen"] if i == 1 else " no"} for i, row in enumerate(TEXT)])
    assert tokenize_pairs(str(source), tokenizer, tokenized)["equal"] == 1
    score_reference(tiny_llama(), RecordFile(tokenized, "pair"), scored, pad_token_id=0)
    assert [row["weight"] for row in read_records(scored, "pair")] == [1, 0, 4]
    args = {"max_steps": 1, "per_device_train_batch_size": 3, "logging_steps": 1, "check_reference": False}
    train = partial(
        train_preference, "dpo", {"path": model_dir}, args=args, lora={"r": 2, "target_modules": ["q_proj"]}
    )
    train(RecordFile(scored), tmp_path / "out")
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["log_history"][0]["weights/pairs"] == pytest.approx(5 / 3)
    assert state["log_history"][0]["loss"] == pytest.approx(5 / 3 * math.log(2), rel=1e-2)
    # Other weights are another training; a column that only some rows have is an error, whichever these are.
    assert train([row | {"weight": 1} for row in read_records(scored)], tmp_path / "out") != {}
    for bare in (0, 2):
        rows = read_records(scored)
        del rows[bare]["weight"]
        with pytest.raises(RecordError, match=rf"train data set, row {bare} .*: weight = None must be"):
            train(rows, tmp_path / f"out-{bare}")


@pytest.mark.parametrize("value", [*BAD, 10**400], ids=lambda value: str(value)[:20])
def test_records_name_a_bad_weight(tmp_path, tokenizer, value):
    rows = weighted_pairs(weights=[2, 0, 1.5])
    check_records(rows, "pair")
    rows[1]["weight"] = value
    with pytest.raises(RecordError, match=r"it, row 1 \(id 'p1'\): weight = .* must be a finite number of 0 or more"):
        check_records(rows, "pair", source="it")
    if isinstance(value, float) and not math.isfinite(value):
        return  # JSON lacks it
    del rows[0]["weight"]
    with pytest.raises(RecordError, match="row 1"):
        check_records([rows[0], weighted_pairs()[1]], "pair")
    write_records(tmp_path / "a.jsonl", [TEXT[0], TEXT[1] | {"weight": value}])
    with pytest.raises(RecordError, match="a.jsonl, row 1: weight = "):
        tokenize_pairs(str(tmp_path / "a.jsonl"), tokenizer, tmp_path / "b.jsonl")


def test_a_csv_file_has_no_numbers(tmp_path, tokenizer):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,weight\nQ,a,b,0.5\n")
    with pytest.raises(
        RecordError, match="row 0: weight = '0.5' must be .* as a number, which a CSV file does not have"
    ):
        tokenize_pairs(str(tmp_path / "a.csv"), tokenizer, tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    "settings", [{"lora": True, "gradient_checkpointing": True}, {"pad_to_multiple_of": 16}], ids=str
)
def test_the_batch_s_loss_is_the_sum_of_its_pairs_losses(tmp_path, model_dir, tokenizer, settings):
    """Each in a batch of its own, with the reference from columns or from the model without its adapter."""
    pairs = weighted_pairs(("weights",) if "lora" in settings else ("weights", "ref_logps"))
    policy, reference = separate_reference(model_dir)
    stored = None if "lora" not in settings else reference
    trainer = make(tmp_path, tokenizer, pairs, (policy, stored), check_reference=False, **settings)
    loss, grads = batch_loss(trainer, [dict(row) for row in pairs])
    own = [batch_loss(trainer, [{k: v for k, v in row.items() if k != "weight"}]) for row in pairs]
    scales = [row["weight"] / len(pairs) for row in pairs]
    expected = {
        name: sum(scale * of_pair[name] for scale, (_, of_pair) in zip(scales, own, strict=True)) for name in grads
    }
    assert_close(
        loss, grads, sum(scale * of_pair for scale, (of_pair, _) in zip(scales, own, strict=True)), expected, 1e-5
    )
