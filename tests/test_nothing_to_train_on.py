"""Rows with nothing to train on, after tokenization and truncation, are dropped and counted; with none left, training is refused."""

import json

import pytest
import torch
from conftest import byte_level_tokenizer, random_pairs, tiny_llama
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from test_prompts import QUESTION, UNEQUAL, qwen3  # noqa: F401

from align import train_preference, train_sft
from align.errors import MissingColumnError, RecordError
from align.mix_stage import mix_rac
from align.preferences import tokenize_pairs
from align.rac import CorrectionSettings
from align.records import read_records, write_records
from align.tokens import encode_pair
from align.trainers.sft import GuardedSFTConfig, GuardedSFTTrainer
from align.trainers.token_dpo import TokenDPOConfig, TokenDPOTrainer

CPU = {
    "use_cpu": True,
    "report_to": "none",
    "dataloader_pin_memory": False,
    "per_device_train_batch_size": 2,
    "max_steps": 1,
}


def dpo(tmp_path, tokenizer, rows, eval_dataset=None, **options):
    dataset = rows if isinstance(rows, IterableDataset) else Dataset.from_list(rows)
    args = TokenDPOConfig(str(tmp_path / "out"), **CPU | options)
    return TokenDPOTrainer(
        tiny_llama(),
        args=args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )


def pair(chosen, rejected, prompt=(5, 6), **more):
    return {"prompt_ids": list(prompt), "chosen_ids": list(chosen), "rejected_ids": list(rejected), **more}


#: With max_length 6: what keep_start and keep_end make of each.
ROWS = [
    pair([7, 8, 9], [7, 8, 10]),  # whole
    pair([7, 8, 9], [7, 8, 9]),  # equal
    pair([7, 8, 9, 10, 11], [7, 8, 9, 10, 12]),  # equal after keep_start
    pair([1, 7, 8, 9, 10, 11, 12], [2, 7, 8, 9, 10, 11, 12]),  # equal after keep_end
    pair([7, 8], [7, 9], prompt=[3] * 6),  # the prompt fills keep_start
]


def brute_force(row, mode):
    """The oracle: tokens and mask of both sides as TRL's collator cuts them."""
    cut = slice(None, 6) if mode == "keep_start" else slice(-6, None)
    sides = [
        list(zip(row["prompt_ids"] + ids, [0] * len(row["prompt_ids"]) + [1] * len(ids), strict=True))[cut]
        for ids in (row["chosen_ids"], row["rejected_ids"])
    ]
    trained = all(any(mask for _, mask in side) for side in sides)
    return trained and sides[0] != sides[1]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("stream", [False, True])
def test_pairs_with_nothing_to_train_on(tmp_path, tokenizer, mode, stream):
    wanted = [row for row in ROWS if brute_force(row, mode)]
    assert 0 < len(wanted) < len(ROWS)
    rows = IterableDataset.from_generator(lambda: iter(ROWS)) if stream else ROWS
    held_out = Dataset.from_list(ROWS[1:])
    trainer = dpo(tmp_path, tokenizer, rows, held_out, max_length=6, truncation_mode=mode)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    assert [{c: row[c] for c in columns} for row in trainer.train_dataset] == wanted
    assert len(trainer.eval_dataset) == len(wanted) - 1
    counts = {"prompt_fills_max_length": int(mode == "keep_start"), "equal": 1, "equal_after_truncation": 1}
    assert counts.items() <= trainer.data_report["train"].items()
    assert counts.items() <= trainer.data_report["eval"].items()


@pytest.mark.parametrize("stream", [False, True])
def test_where_no_pair_is_left_training_is_refused(tmp_path, tokenizer, stream):
    rows = [{"prompt": "Tom has 7 pens.\nAnswer:", "chosen": " 7-3=4; #### 9", "rejected": " 7-3=4; #### 8"}] * 3

    def build(rows, **options):
        return dpo(
            tmp_path, tokenizer, IterableDataset.from_generator(lambda: iter(rows)) if stream else rows, **options
        )

    ids = encode_pair(tokenizer, rows[0], "row")
    same = next(i for i, (a, b) in enumerate(zip(ids["chosen_ids"], ids["rejected_ids"], strict=True)) if a != b)
    limit = len(ids["prompt_ids"]) + same
    with pytest.raises(RecordError, match=f"none of its 3 rows can be trained on .*: 3.*raise max_length = {limit}"):
        build(rows, max_length=limit)
    build(rows, max_length=limit + 1)
    with pytest.raises(RecordError, match="chosen and rejected are equal: 3"):
        build([row | {"rejected": row["chosen"]} for row in rows])
    held_out = Dataset.from_list([row | {"rejected": row["chosen"]} for row in rows])
    with pytest.raises(RecordError, match="eval data set: none of its 3 rows"):
        build(rows, eval_dataset=held_out)


def test_texts_that_a_template_makes_equal(tmp_path):
    tokenizer = byte_level_tokenizer(chat=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'] | trim")
    rows = [
        {
            "prompt": QUESTION,
            "chosen": [{"role": "assistant", "content": a}],
            "rejected": [{"role": "assistant", "content": b}],
        }
        for a, b in (("4", " 4 "), ("4", "5"))
    ]
    write_records(tmp_path / "in.jsonl", rows)
    counts = tokenize_pairs(str(tmp_path / "in.jsonl"), tokenizer, tmp_path / "out.jsonl")
    assert counts["equal"] == 1 and counts["rows"] == 1
    assert dpo(tmp_path, tokenizer, rows).data_report["train"]["equal"] == 1
    write_records(tmp_path / "in.jsonl", rows[:1])
    with pytest.raises(RecordError, match="none of its 1 rows can be used"):
        tokenize_pairs(str(tmp_path / "in.jsonl"), tokenizer, tmp_path / "none.jsonl")


def test_a_training_counts_what_it_drops(tmp_path, model_dir):
    pairs = [row | {"id": str(i)} for i, row in enumerate([*ROWS, *random_pairs(2)])]
    counts = train_preference(
        "dpo",
        {"path": model_dir},
        pairs,
        tmp_path / "dpo",
        args=CPU | {"max_length": 6, "use_cpu": True},
        lora={"r": 2},
    )
    dropped = {name: counts.get(name, 0) for name in ("prompt_fills_max_length", "equal", "equal_after_truncation")}
    assert dropped["equal"] == 1 and dropped["equal_after_truncation"] >= 1
    assert counts["rows"] == len(pairs) - sum(dropped.values())


def sft(tmp_path, tokenizer, rows, eval_dataset=None, **options):
    dataset = rows if isinstance(rows, IterableDataset) else Dataset.from_list(rows)
    args = GuardedSFTConfig(str(tmp_path / "out"), completion_only_loss=True, **CPU | options)
    return GuardedSFTTrainer(
        tiny_llama(), args, train_dataset=dataset, eval_dataset=eval_dataset, processing_class=tokenizer
    )


def test_demonstrations_with_nothing_to_train_on(tmp_path, tokenizer):
    rows = [{"prompt": "Tom has 7 pens.\n", "completion": "9"}, {"prompt": "How many? " * 20, "completion": "8"}]
    trainer = sft(tmp_path, tokenizer, rows, max_length=20)
    assert len(trainer.train_dataset) == 1
    assert trainer.data_report == {"train": {"rows": 2, "prompt_fills_max_length": 1}}
    for train, held_out in ((rows[1:], None), (rows[:1], rows[1:])):
        with pytest.raises(RecordError, match=f"{'eval' if held_out else 'train'} data set: .*max_length = 20"):
            sft(tmp_path, tokenizer, train, held_out and Dataset.from_list(held_out), max_length=20)
    with pytest.raises(RecordError, match="max_length = 20 leaves no token"):
        sft(tmp_path, tokenizer, IterableDataset.from_generator(lambda: iter(rows[1:])), max_length=20)


def test_the_end_of_a_demonstration_is_trained_on_where_it_is_kept(tmp_path, model_dir):
    rows = [
        {"id": str(i), "prompt": "x", "completion": "y", "prompt_ids": [5] * 9, "completion_ids": [6, 7]}
        for i in range(3)
    ]
    args = CPU | {"max_length": 8, "truncation_mode": "keep_end"}
    assert train_sft({"path": model_dir}, rows, tmp_path / "sft", args=args, lora={"r": 2})["rows"] == 3
    with pytest.raises(RecordError, match="raise it"):
        train_sft(
            {"path": model_dir}, rows, tmp_path / "start", args=args | {"truncation_mode": "keep_start"}, lora={"r": 2}
        )


def test_corrections_with_nothing_to_learn(tmp_path, tokenizer):
    rows = [
        {"id": str(i), "prompt": "x", "completion": "y", "prompt_ids": [5] * n, "completion_ids": [6, 0]}
        for i, n in enumerate((3, 40))
    ]
    config = CorrectionSettings(max_length=30, max_new_tokens=2)
    counts = mix_rac(tiny_llama(), tokenizer, rows, tmp_path / "out.jsonl", config=config)
    assert counts["rows"] == 1 and counts["prompt_fills_max_length"] == 1
    assert all(any(label != -100 for label in row["labels"]) for row in read_records(tmp_path / "out.jsonl"))
    with pytest.raises(RecordError, match="the prompts of all 1 demonstrations fill max_length = 30"):
        mix_rac(tiny_llama(), tokenizer, rows[1:], tmp_path / "none.jsonl", config=config)


def test_trainers_have_the_same_ids_from_rows_with_gaps(tmp_path, qwen3):  # noqa: F811
    wanted = [list(encode_pair(qwen3, row, "row").values()) for row in UNEQUAL]
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    for rows in (
        UNEQUAL,
        IterableDataset.from_generator(lambda: iter(UNEQUAL)),
        Dataset.from_list(UNEQUAL).to_iterable_dataset(),
    ):
        trainer = dpo(tmp_path, qwen3, rows)
        assert [[row[column] for column in columns] for row in trainer.train_dataset] == wanted


@pytest.mark.parametrize("form", ["prompt", "messages"])
def test_sft_has_the_same_ids_from_rows_with_gaps(tmp_path, qwen3, form):  # noqa: F811
    rows = [
        {k: v for k, v in row.items() if k not in ("chosen", "rejected")} | {"completion": row["chosen"]}
        for row in UNEQUAL
    ]
    if form == "messages":
        rows = [{**row, "messages": row.pop("prompt") + row.pop("completion")} for row in rows]
    wanted = []
    for row in rows:
        template = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
        messages = row.get("messages") or row["prompt"] + row["completion"]
        text = qwen3.apply_chat_template(messages, tokenize=False, **template)
        wanted.append(qwen3(text, add_special_tokens=False)["input_ids"])
    union = Dataset.from_list(rows)
    for dataset in (rows, union.to_iterable_dataset()):
        trainer = sft(tmp_path, qwen3, dataset, max_length=None, trl_completions=True)
        assert [list(row["input_ids"]) for row in trainer.train_dataset] == wanted


def test_trainers_ignore_no_column_that_a_model_should_read(tmp_path, tokenizer):
    row = {"prompt": "2+2?", "chosen": " 4", "rejected": " 5", "system": "Be terse."}
    with pytest.raises(RecordError, match="train data set, row 0: system = 'Be terse.' must be in the prompt"):
        dpo(tmp_path, tokenizer, [row])
    dpo(tmp_path, tokenizer, [row | {"system": ""}, row | {"prompt": "Be terse. 2+2?"}])
    with pytest.raises(MissingColumnError, match="column weights has no side"):
        dpo(tmp_path, tokenizer, [pair([7], [8], weights=[1.0])])
    demonstration = {"prompt": "2+2?", "completion": " 4", "system": "Be terse."}
    with pytest.raises(RecordError, match="train data set, row 0: system = 'Be terse.' must be in the prompt"):
        sft(tmp_path, tokenizer, [demonstration])
    with pytest.raises(RecordError, match="row 0: tools need a chat template"):
        sft(tmp_path, tokenizer, [demonstration | {"system": "", "tools": json.dumps([{"name": "x"}])}])
    chat = byte_level_tokenizer(chat=True)
    talk = {"messages": [*QUESTION, {"role": "assistant", "content": "4"}]}
    with pytest.raises(RecordError, match="row 0: the chat template does not read enable_thinking"):
        sft(tmp_path, chat, [talk | {"chat_template_kwargs": {"enable_thinking": False}}])
    for text in ("{}", ""):
        sft(tmp_path, chat, [talk | {"chat_template_kwargs": text}])
    with pytest.raises(RecordError, match="tools need a chat template"):
        dpo(tmp_path, tokenizer, [row | {"system": "", "tools": json.dumps([{"name": "x"}])}])


def test_pairs_that_stay_are_trained_as_they_were(tmp_path, tokenizer):
    pairs = random_pairs(6)
    whole, some = dpo(tmp_path, tokenizer, pairs), dpo(tmp_path, tokenizer, [*pairs, ROWS[1]])
    losses = [t.compute_loss(t.model, next(iter(t.get_eval_dataloader(t.train_dataset)))) for t in (whole, some)]
    torch.testing.assert_close(*losses)


def test_conversations_with_tool_calls_alone_train_in_sft_as_with_empty_content(tmp_path):
    tokenizer = byte_level_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{% endfor %}{{ eos_token }}{% endfor %}"
    )
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]
    ids = []
    for content in ({}, {"content": None}, {"content": ""}):
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": calls, **content}]
        trainer = sft(tmp_path, tokenizer, [{"messages": talk}], max_length=None)
        ids.append(list(trainer.train_dataset[0]["input_ids"]))
    assert ids[0] == ids[1] == ids[2]
    assert "weather" in tokenizer.decode(ids[0])


def test_sft_looks_for_a_column_in_the_prompt_that_trl_reads(tmp_path, tokenizer):
    row = {"prompt": "Q: 1+1", "completion": " 2", "system": "Be terse."}
    talk = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Q: 1+1"}]
    with pytest.raises(RecordError, match="system = 'Be terse.' must be in the prompt"):
        sft(tmp_path, tokenizer, [{**row, "messages": talk}])
