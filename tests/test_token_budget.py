"""`max_tokens_per_batch`: the batch's loss, gradient and metrics, whatever passes it is done in."""

from collections import defaultdict

import pytest
from conftest import random_pairs, tiny_llama
from datasets import Dataset
from families import tiny
from peft import LoraConfig
from test_token_dpo import LORA, assert_close, options, separate_reference
from torch.utils.data import SequentialSampler

from align import CDPOConfig, CDPOTrainer, TokenDPOConfig, TokenDPOTrainer
from align.errors import ConfigError
from align.packing import group_pairs, layout_slots, pair_slots
from align.trainers.token_budget import LongestFirst


def one_step(tmp_path, tokenizer, models, budget, lora=False, pairs=None, **kwargs):
    """Loss, gradients, metrics and forward passes of one training step."""
    policy, reference = models()
    trainer = CDPOTrainer(
        policy, ref_model=None if lora else reference,
        args=CDPOConfig(**options(tmp_path, per_device_train_batch_size=8, max_tokens_per_batch=budget) | kwargs),
        train_dataset=Dataset.from_list(pairs or random_pairs(8, columns=("ce_scores",))), processing_class=tokenizer,
        peft_config=LoraConfig(**LORA) if lora else None,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    widths = []
    base = trainer.model.get_base_model() if lora else trainer.model
    base.get_input_embeddings().register_forward_hook(lambda module, args, out: widths.append(args[0].numel()))
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    loss = trainer.training_step(trainer.model, batch).item()
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    metrics = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    assert all(len(values) == 1 for values in trainer._metrics["train"].values())
    return loss, grads, metrics, widths


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}, {"loss_type": ["ipo"]}, {"ld_alpha": 0.5},
        {"loss_aggregation": "position"}, {"prefix_sharing": False}, {"prefix_sharing": False, "loss_aggregation": "position"},
    ],
    ids=str,
)  # fmt: skip
def test_passes_add_up_to_the_batch(tmp_path, model_dir, tokenizer, settings, lora):
    def models():
        return separate_reference(model_dir)

    loss, grads, metrics, widths = one_step(tmp_path, tokenizer, models, 40, lora, **settings)
    expected_loss, expected, expected_metrics, whole = one_step(tmp_path, tokenizer, models, None, lora, **settings)
    assert len(widths) > len(whole)
    assert max(widths) <= 50  # the longest pair of the eight has more than the budget when it is padded
    assert_close(loss, grads, expected_loss, expected, 1e-5)
    assert metrics.keys() == expected_metrics.keys()
    for key, value in expected_metrics.items():
        assert metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def test_models_in_padded_rows_keep_to_the_budget(tmp_path, tokenizer):
    def models():
        return [tiny("mistral") for _ in range(2)]

    results = [one_step(tmp_path, tokenizer, models, budget, prefix_sharing=False) for budget in (60, None)]
    assert_close(*results[0][:2], *results[1][:2], 1e-5)
    assert max(results[0][3]) <= 60 < max(results[1][3])


def test_groups_hold_what_the_budget_allows():
    sizes = [7, 30, 12, 5, 5, 9, 22, 1]
    for one_row in (False, True):
        for multiple in (1, 8):
            groups = group_pairs(sizes, 32, multiple, one_row)
            assert sorted(i for group in groups for i in group) == list(range(8))
            assert groups[0][0] == 1
            for group in groups:
                assert layout_slots([sizes[i] for i in group], multiple, one_row) <= 32
            assert len(groups) <= 5
    assert group_pairs([50, 3], 10) == [[0], [1]]  # never cut, never dropped


def test_a_training_begins_with_the_longest_pairs(tmp_path, tokenizer):
    """The first batch of the first epoch; every pair once an epoch; and the order of TRL's trainer but for that."""
    orders = []
    pairs = random_pairs(24, columns=("ce_scores",))
    for budget in (None, 64):
        seen = []
        trainer = CDPOTrainer(
            tiny_llama(), args=CDPOConfig(**options(tmp_path, num_train_epochs=2, max_tokens_per_batch=budget, preflight=False)),
            train_dataset=Dataset.from_list(pairs), processing_class=tokenizer, peft_config=LoraConfig(**LORA),
        )  # fmt: skip
        collate = trainer.data_collator.torch_call

        def watch(examples, collate=collate, seen=seen):
            seen += [tuple(e["prompt_ids"]) for e in examples]
            return collate(examples)

        trainer.data_collator.torch_call = watch
        trainer.train()
        orders.append(seen)
    plain, ours = orders
    by_size = sorted(
        pairs,
        key=lambda p: (
            -pair_slots(p["prompt_ids"] + p["chosen_ids"], p["prompt_ids"] + p["rejected_ids"], len(p["prompt_ids"]))
        ),
    )
    first = [tuple(p["prompt_ids"]) for p in by_size[:4]]
    assert ours[:4] == first and plain[:4] != first
    assert ours[4:24] == [prompt for prompt in plain[:24] if prompt not in first]
    assert ours[24:] == plain[24:]


def test_processes_share_the_longest():
    sampler = LongestFirst(SequentialSampler(range(8)), [1, 8, 3, 7, 2, 6, 5, 4], lead=4, parts=2)
    assert list(sampler) == [1, 5, 3, 6, 0, 2, 4, 7]
    sampler.set_epoch(1)
    assert list(sampler) == list(range(8)) and len(sampler) == 8


def test_resumed_equals_uninterrupted(tmp_path, model_dir, tokenizer):
    logs = []
    for resume in (False, True):
        folder = tmp_path / str(resume)

        def make(steps, folder=folder):
            policy, reference = separate_reference(model_dir)
            args = CDPOConfig(
                **options(folder, max_steps=steps, save_strategy="steps", save_steps=2, max_tokens_per_batch=30)
            )
            rows = Dataset.from_list(random_pairs(16, columns=("ce_scores",)))
            return CDPOTrainer(policy, ref_model=reference, args=args, train_dataset=rows, processing_class=tokenizer)

        if resume:
            make(2).train()
        trainer = make(6)
        trainer.train(resume_from_checkpoint=resume)
        logs.append({e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e})
    assert logs[0].keys() == logs[1].keys() and len(logs[0]) == 6
    assert logs[1] == pytest.approx(logs[0], rel=1e-6)


def test_accumulated_batches_are_what_they_were(tmp_path, model_dir, tokenizer):
    losses = defaultdict(list)
    for budget in (None, 25):
        policy, reference = separate_reference(model_dir)
        args = CDPOConfig(
            **options(
                tmp_path,
                gradient_accumulation_steps=2,
                max_steps=3,
                max_tokens_per_batch=budget,
                train_sampling_strategy="sequential",
            )
        )
        rows = sorted(
            random_pairs(24, columns=("ce_scores",)),
            key=lambda p: (
                -pair_slots(
                    p["prompt_ids"] + p["chosen_ids"], p["prompt_ids"] + p["rejected_ids"], len(p["prompt_ids"])
                )
            ),
        )
        trainer = CDPOTrainer(
            policy, ref_model=reference, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        trainer.train()
        for entry in trainer.state.log_history:
            if "loss" in entry:
                losses[budget].append(
                    [entry[key] for key in ("loss", "grad_norm", "rewards/margins", "num_tokens", "entropy")]
                )
    assert len(losses[None]) == 3
    for ours, plain in zip(losses[25], losses[None], strict=True):
        assert ours == pytest.approx(plain, rel=1e-5)


def test_what_cannot_be_cut_is_refused(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="aot_unpaired.*max_tokens_per_batch"):
        CDPOConfig(**options(tmp_path, max_tokens_per_batch=64, loss_type=["aot_unpaired"]))
    with pytest.raises(ConfigError, match="max_tokens_per_batch = 0"):
        CDPOConfig(**options(tmp_path, max_tokens_per_batch=0))
    model = tiny("mixtral", output_router_logits=True)
    with pytest.raises(ConfigError, match="router_aux_loss_coef"):
        CDPOTrainer(
            model, ref_model=tiny("mixtral"),
            args=CDPOConfig(**options(tmp_path, max_tokens_per_batch=64)),
            train_dataset=Dataset.from_list(random_pairs(4, columns=("ce_scores",))), processing_class=tokenizer,
        )  # fmt: skip


def test_what_a_budget_cannot_be_used_with(tmp_path, tokenizer):
    for model, settings, words in (
        (tiny_llama(), {"optim": "galore_adamw_layerwise"}, "optim='galore_adamw_layerwise' updates within each"),
        (tiny_llama(), {"optim": "lomo"}, "optim='lomo' updates within each"),
        (
            tiny_llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            {},
            "rope_type 'dynamic'.*longest row",
        ),
    ):
        args = TokenDPOConfig(**options(tmp_path, max_tokens_per_batch=30, **settings))
        with pytest.raises(ConfigError, match=words):
            TokenDPOTrainer(
                model, args=args, train_dataset=Dataset.from_list(random_pairs(4)), processing_class=tokenizer
            )
