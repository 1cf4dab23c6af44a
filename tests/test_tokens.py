"""The boundary of prompt and completion: stored ids decode to what the model sees, for three kinds of tokenizer."""

import os

import pytest
import torch
from conftest import byte_level_tokenizer, llama_tokenizer

from align.errors import MissingColumnError, RecordError
from align.tokens import (
    CompletionRule,
    encode_completion,
    encode_pair,
    encode_prompt,
    label_values,
    pad_rows,
    shift_to_labels,
    truncate,
)

TOKENIZERS = {
    "gpt2-style": byte_level_tokenizer(),
    "llama-style": llama_tokenizer(),
    "chat": byte_level_tokenizer(chat=True),
}

TEXTS = [
    ("Question: Tom has 12 apples.\nAnswer:", " 12 + 7 = 19."),
    ("Question: Tom has 12 apples.\nAnswer: ", "12 + 7 = 19."),  # a trailing space, which tokens like to merge with
    ("How many app", "les are there?"),  # in the middle of a word
    ("the answer is 4", "2"),
    ("naïve café ☕ and", " 🦆 stay"),
    ("a\n", "\nb"),
]


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("prompt, completion", TEXTS)
def test_ids_decode_to_the_text_the_model_sees(kind, prompt, completion):
    tokenizer = TOKENIZERS[kind]
    prompt_ids = encode_prompt(tokenizer, prompt)
    ids = encode_completion(tokenizer, prompt, completion, prompt_ids)
    assert prompt_ids == tokenizer(prompt)["input_ids"]  # the prompt stays what it is at generation
    bos = tokenizer.bos_token is not None
    # Such tokenizers show a space after BOS that the text does not have, so BOS is decoded apart.
    assert decode(tokenizer, (prompt_ids + ids)[bos:]) == prompt + completion + tokenizer.eos_token
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    if bos:
        assert prompt_ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in ids


def test_some_of_these_texts_do_merge_at_the_boundary():
    """Without this, the test above might not see what it is about."""
    tokenizer = TOKENIZERS["gpt2-style"]
    merged = [
        p
        for p, c in TEXTS
        if tokenizer(p + c)["input_ids"][: len(tokenizer(p)["input_ids"])] != tokenizer(p)["input_ids"]
    ]
    assert len(merged) >= 2


def test_eos_is_not_doubled():
    tokenizer = TOKENIZERS["gpt2-style"]
    prompt_ids = encode_prompt(tokenizer, "the answer is")
    plain = encode_completion(tokenizer, "the answer is", " 42", prompt_ids)
    assert encode_completion(tokenizer, "the answer is", " 42<|endoftext|>", prompt_ids) == plain


def test_chat_template():
    tokenizer = TOKENIZERS["chat"]
    prompt = [{"role": "user", "content": "How many apples?"}]
    prompt_ids = encode_prompt(tokenizer, prompt)
    ids = encode_completion(tokenizer, prompt, [{"role": "assistant", "content": "19 apples"}], prompt_ids)
    assert decode(tokenizer, prompt_ids) == "<|start|>user\nHow many apples?<|end|>\n<|start|>assistant\n"
    assert decode(tokenizer, ids) == "19 apples<|end|>"
    assert encode_completion(tokenizer, prompt, "19 apples", prompt_ids) == ids


def test_same_ids_as_trl_where_nothing_merges():
    from conftest import tiny_llama
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": [{"role": "user", "content": f"{i}?"}], "chosen": [{"role": "assistant", "content": f"{i}"}],
         "rejected": [{"role": "assistant", "content": "no idea"}]}
        for i in range(3)
    ]  # fmt: skip
    tokenizer = TOKENIZERS["chat"]
    args = DPOConfig("unused", bf16=False, report_to="none", use_cpu=True)
    from peft import LoraConfig

    trainer = DPOTrainer(
        tiny_llama(),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(),
    )
    for theirs, row in zip(trainer.train_dataset, rows, strict=True):
        ours = encode_pair(tokenizer, row, "row", CompletionRule.of(tokenizer, trl=True))
        assert ours == {key: theirs[key] for key in ours}
        # Ours are TRL's up to the end token, which TRL has a line break behind.
        ended = encode_pair(tokenizer, row, "row")
        assert [*ended["chosen_ids"], *tokenizer("\n")["input_ids"]] == theirs["chosen_ids"]


def test_templates_that_change_the_prompt_are_refused():
    tokenizer = byte_level_tokenizer(chat=True)
    tokenizer.chat_template = "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}"
    prompt = [{"role": "user", "content": "hi"}]
    with pytest.raises(RecordError, match="row 4.*renders the prompt differently"):
        encode_completion(tokenizer, prompt, "yes", encode_prompt(tokenizer, prompt), "row 4")


@pytest.mark.parametrize("prompt, completion, words", [("", "x", "no tokens"), ("x", "", "empty")])
def test_empty_texts_are_refused(prompt, completion, words):
    tokenizer = TOKENIZERS["gpt2-style"]
    with pytest.raises(RecordError, match=words):
        encode_pair(tokenizer, {"prompt": prompt, "chosen": completion, "rejected": "y"}, "row 0")
    with pytest.raises(RecordError, match="chat template"):
        encode_prompt(tokenizer, [{"role": "user", "content": "hi"}])
    with pytest.raises(MissingColumnError, match="row 3.*'rejected'"):
        encode_pair(tokenizer, {"prompt": "x", "chosen": "y"}, "row 3")


def test_label_position_of_a_completion_token():
    """Token j of a completion behind P prompt tokens stands at label position P − 1 + j, whatever is cut off."""
    prompt, values = [7, 7, 7], [0.1, 0.2, 0.3]
    rows = pad_rows([label_values(values, len(prompt)), [0.0]], 0.0, 8)
    assert shift_to_labels(rows)[0].tolist() == pytest.approx([0, 0, 0.1, 0.2, 0.3, 0, 0])
    assert truncate(label_values(values, 3), 4) == [0, 0, 0, 0.1]
    assert truncate(label_values(values, 3), 4, "keep_end") == [0, 0.1, 0.2, 0.3]
    assert rows.dtype == torch.float32


@pytest.mark.slow
def test_real_chat_model():
    """With SmolLM2-135M-Instruct (or another ChatML model) in the folder ALIGN_SMOLLM2."""
    from align.models import load_tokenizer

    folder = os.environ.get("ALIGN_SMOLLM2")
    if not folder:
        pytest.skip("set ALIGN_SMOLLM2 to a folder with SmolLM2-135M-Instruct")
    tokenizer = load_tokenizer(folder)
    prompt = [{"role": "user", "content": "How many is 16 - 3 - 4?"}]
    row = {"prompt": prompt, "chosen": "16 - 3 - 4 = <<16-3-4=9>>9 🦆", "rejected": "  10\n"}
    ids = encode_pair(tokenizer, row, "row")
    for side in ("chosen", "rejected"):
        seen = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": row[side]}], tokenize=False)
        assert decode(tokenizer, ids["prompt_ids"] + ids[f"{side}_ids"]) == seen.rstrip("\n")
        assert tokenizer.eos_token_id in ids[f"{side}_ids"]
    generation = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert decode(tokenizer, ids["prompt_ids"]) == generation
    for text_prompt, completion in TEXTS:
        prompt_ids = encode_prompt(tokenizer, text_prompt)
        whole = prompt_ids + encode_completion(tokenizer, text_prompt, completion, prompt_ids)
        assert decode(tokenizer, whole) == text_prompt + completion + tokenizer.eos_token


def test_tools_and_template_arguments_reach_the_template():
    tokenizer = byte_level_tokenizer(chat=True)
    tokenizer.chat_template = "{% if tools %}{{ tools[0]['name'] }}: {% endif %}{{ mood }}" + tokenizer.chat_template
    row = {
        "prompt": [{"role": "user", "content": "hello"}], "chosen": "yes", "rejected": "no",
        "tools": '[{"name": "clock"}]', "chat_template_kwargs": {"mood": "calm"},
    }  # fmt: skip
    ids = encode_pair(tokenizer, row, "row 0")
    assert tokenizer.decode(ids["prompt_ids"]).startswith("clock: calm")
    assert tokenizer.decode(ids["chosen_ids"]).startswith("yes")
