"""Rows of chat messages: one end, a boundary under templates that open `<think>`, tool calls, turns that go on, turns of others.

Expected texts are written by hand, from what each small template does.
"""

import json
import warnings
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import trl
from conftest import byte_level_tokenizer, llama_tokenizer, tiny_llama
from datasets import Dataset
from transformers import GenerationConfig
from trl import DPOConfig, DPOTrainer, SFTTrainer, data_utils
from typer.testing import CliRunner

from align import BASHConfig, BASHTrainer, RACConfig, RACTrainer, TokenDPOConfig, TokenDPOTrainer
from align.cli import app
from align.demonstrations import load_demonstrations, tokenize_demonstrations
from align.errors import ConfigError, RecordError
from align.identity import model_identity
from align.preferences import tokenize_pairs
from align.records import read_records, write_records
from align.sample import SampleConfig, sample_completions
from align.tokens import CompletionRule, encode_completion, encode_pair, encode_prompt, encode_row
from align.trainers.sft import GuardedSFTConfig, GuardedSFTTrainer

QUIET = {
    "bf16": False, "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 4, "preflight": False,
    "dataloader_pin_memory": False, "gradient_checkpointing": False, "disable_tqdm": True,
}  # fmt: skip

SINCE_1_15 = pytest.mark.skipif(
    not hasattr(data_utils, "common_prefix_length"),
    reason="TRL 1.14 cuts a conversation after as many tokens as the prompt has, even where the two differ, and so loses tokens",
)

HEAD = "{{ '<|start|>assistant\n' }}"
OTHERS = "{% if m['role'] != 'assistant' %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% else %}"
#: As DeepSeek-R1's distills: opens `<think>` for the model, and takes reasoning out of every answer.
R1 = (
    "{% for m in messages %}" + OTHERS + HEAD + "{{ m['content'].split('</think>')[-1] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}" + HEAD + "{{ '<think>\n' }}{% endif %}"
)  # fmt: skip
#: As Nemotron 3: an answer without reasoning has an empty block, which the generation prompt does not have.
NEMOTRON = (
    "{% for m in messages %}" + OTHERS + HEAD + "{{ ('' if '<think>' in m['content'] else '<think></think>') }}"
    "{{ m['content'] | trim + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + HEAD + "{{ '<think>\n' }}{% endif %}"
)  # fmt: skip
#: As Qwen3's thinking models: reasoning is parsed, and written again.
QWEN = (
    "{% for m in messages %}" + OTHERS + HEAD + "{{ '<think>\n' + (m.reasoning_content or "
    "m['content'].split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m['content'] or m.reasoning_content"
    " else '') + '\n</think>\n\n' + m['content'].split('</think>')[-1].lstrip('\n') + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + HEAD + "{{ '<think>\n' }}{% endif %}"
)  # fmt: skip
#: As Mistral's: the system message stands before the last message, if that is the user's.
MISTRAL = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (system + '\n\n' if loop.last and system else '') + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
)  # fmt: skip
TOOLS = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] }}{% for call in m.tool_calls %}"
    "{{ '<call>' + (call.function | tojson) + '</call>' }}{% endfor %}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}" + HEAD + "{% endif %}"
)  # fmt: skip
#: Ends turns with a line break alone.
NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"

USER = [{"role": "user", "content": "What is 2+2?"}]
ASKED = "<|start|>user\nWhat is 2+2?<|end|>\n<|start|>assistant\n"
PAIR = {
    "prompt": USER,
    "chosen": [{"role": "assistant", "content": "4"}],
    "rejected": [{"role": "assistant", "content": "5"}],
}
TEXT = {"prompt": "What is 2+2?", "chosen": " 4", "rejected": " 5"}


def chat(template=None, eos="<|end|>"):
    tokenizer = byte_level_tokenizer(chat=True)
    tokenizer.chat_template, tokenizer.eos_token = template or tokenizer.chat_template, eos
    return tokenizer


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def texts(tokenizer, row, **kwargs):
    ids = encode_pair(tokenizer, row, "row 0", **kwargs)
    return tuple(decode(tokenizer, ids[f"{column}_ids"]) for column in ("prompt", "chosen", "rejected"))


def saved(tokenizer, folder, **config):
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(**config).save_pretrained(folder)
    return str(folder)


def call(city):
    return [{"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}]


def trainer(rows, tokenizer, folder, model=None, **settings):
    return TokenDPOTrainer(
        model or tiny_llama(vocab_size=len(tokenizer)), ref_model=tiny_llama(vocab_size=len(tokenizer)),
        args=TokenDPOConfig(str(folder), **QUIET | settings), train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip


# One end --------------------------------------------------------------------------------------------------------------


def test_one_end_whatever_the_template_writes(tmp_path):
    """ChatML's line break is cut; an end that is missing is added and said once; an option keeps TRL's ids."""
    tokenizer = chat()
    assert texts(tokenizer, PAIR) == (ASKED, "4<|end|>", "5<|end|>")
    assert texts(tokenizer, PAIR, rule=CompletionRule.of(tokenizer, trl=True)) == (ASKED, "4<|end|>\n", "5<|end|>\n")
    bare = chat(NO_END)
    source = tmp_path / "pairs.jsonl"
    write_records(source, [PAIR | {"chosen": answer} for answer in ("4", "four", "4.0")])
    for as_trl in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tokenize_pairs(str(source), bare, tmp_path / "out.jsonl", trl_completions=as_trl)
        said = [str(w.message) for w in caught if "end token" in str(w.message)]
        assert len(said) == (0 if as_trl else 1) and all("'<|end|>' is added" in text for text in said)
        rows = read_records(tmp_path / "out.jsonl", "pair")
        expected = [answer + "\n" + ("" if as_trl else "<|end|>") for answer in ("4", "four", "4.0")]
        assert [decode(bare, row["chosen_ids"]) for row in rows] == expected


def test_text_that_was_rendered_before_has_one_bos_and_one_end():
    tokenizer = chat()
    for answer in (" 4", " 4<|end|>", " 4<|end|>\n", " 4<|end|><|end|>", " 4<|end|>\n<|endoftext|>"):
        assert texts(tokenizer, TEXT | {"chosen": answer})[1] == " 4<|end|>", answer
    llama = llama_tokenizer()
    plain, rendered = (encode_pair(llama, TEXT | {"prompt": p}, "row 0") for p in ("Two", "<s>Two"))
    assert rendered["prompt_ids"].count(llama.bos_token_id) == plain["prompt_ids"].count(llama.bos_token_id) == 1
    assert rendered["prompt_ids"][0] == llama.bos_token_id and rendered["chosen_ids"] == plain["chosen_ids"]
    with pytest.raises(RecordError, match="row 0: rejected: text follows its first end token, '<|end|>'.*user"):
        texts(tokenizer, TEXT | {"rejected": " 5<|end|>\n<|start|>user\nSure?<|end|>"})


def test_any_end_token_of_the_checkpoint_ends_an_answer(tmp_path):
    """A template that ends turns with another end token than EOS: what is tokenized ends as what is sampled."""
    tokenizer = chat(eos="<|endoftext|>")
    end, eos = tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    folder = saved(tokenizer, tmp_path / "model", eos_token_id=[end, eos])
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_records(source, [PAIR])
    command = ["tokenize", str(source), str(out), "--model", folder]
    assert CliRunner().invoke(app, command).exit_code == 0
    (row,) = read_records(out, "pair")
    assert decode(tokenizer, row["chosen_ids"]) == "4<|end|>"
    # The same in a trainer, whose model says which end tokens there are; one that names EOS alone gets EOS.
    model = tiny_llama(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = [end, eos]
    assert trainer([PAIR], tokenizer, tmp_path, model).train_dataset[0]["chosen_ids"] == row["chosen_ids"]
    model.generation_config.eos_token_id = eos
    with pytest.warns(UserWarning, match="not with an end token"):
        ids = trainer([PAIR], tokenizer, tmp_path, model).train_dataset[0]["chosen_ids"]
    assert decode(tokenizer, ids) == "4<|end|>\n<|endoftext|>"
    # The option reaches the command, and its manifest: the old output is not taken for the new one.
    assert CliRunner().invoke(app, [*command, "--trl-completions"]).exit_code == 0
    assert decode(tokenizer, read_records(out)[0]["chosen_ids"]) == "4<|end|>\n"


def test_text_and_messages_end_alike_in_every_trainer(tmp_path):
    tokenizer = chat()
    (row,) = trainer([PAIR], tokenizer, tmp_path).train_dataset
    assert decode(tokenizer, row["chosen_ids"]) == "4<|end|>"
    (row,) = trainer([PAIR], tokenizer, tmp_path, trl_completions=True).train_dataset
    assert decode(tokenizer, row["chosen_ids"]) == "4<|end|>\n"
    kinds = {GuardedSFTTrainer: GuardedSFTConfig, BASHTrainer: BASHConfig, RACTrainer: RACConfig}
    demonstrations = [{"prompt": USER, "completion": PAIR["chosen"]}, {"prompt": ASKED, "completion": "4<|end|>\n"}]
    for cls, config in kinds.items():
        for demonstration in demonstrations:
            (row,) = cls(
                tiny_llama(vocab_size=len(tokenizer)), args=config(str(tmp_path), **QUIET),
                train_dataset=Dataset.from_list([demonstration]), processing_class=tokenizer,
            ).train_dataset  # fmt: skip
            assert decode(tokenizer, row["input_ids"]) == ASKED + "4<|end|>"
            assert decode(tokenizer, [token for token in row["labels"] if token != -100]) == "4<|end|>"
    (theirs,), (kept,) = (
        cls(
            tiny_llama(vocab_size=len(tokenizer)), args=config(str(tmp_path), **options),
            train_dataset=Dataset.from_list(demonstrations[:1]), processing_class=tokenizer,
        ).train_dataset
        for cls, config, options in (
            (SFTTrainer, GuardedSFTConfig, QUIET), (GuardedSFTTrainer, GuardedSFTConfig, QUIET | {"trl_completions": True})
        )
    )  # fmt: skip
    assert kept["input_ids"] == theirs["input_ids"] and kept["labels"] == theirs["labels"]


def test_demonstrations_end_alike(tmp_path):
    tokenizer = chat()
    rows = [{"id": "a", "prompt": USER, "answer": "4", "solution": "4"}]
    write_records(tmp_path / "in.jsonl", rows)
    (row,) = load_demonstrations(str(tmp_path / "in.jsonl"), tokenizer)
    assert decode(tokenizer, row["completion_ids"]) == "4<|end|>"
    tokenize_demonstrations(rows, tokenizer, tmp_path / "out.jsonl", trl_completions=True)
    assert decode(tokenizer, read_records(tmp_path / "out.jsonl")[0]["completion_ids"]) == "4<|end|>\n"


def test_the_option_is_refused_where_ids_are_made_already(tmp_path):
    tokenizer, ids = chat(), {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}
    with pytest.raises(ConfigError, match="train data set: trl_completions = True has no effect on ids"):
        trainer([ids], tokenizer, tmp_path, trl_completions=True)
    with pytest.raises(ConfigError, match="train data set: trl_completions = True has no effect"):
        GuardedSFTTrainer(
            tiny_llama(vocab_size=len(tokenizer)), args=GuardedSFTConfig(str(tmp_path), trl_completions=True, **QUIET),
            train_dataset=Dataset.from_list([{"input_ids": [5, 6], "completion_mask": [0, 1]}]), processing_class=tokenizer,
        )  # fmt: skip
    row = {"id": "a", "prompt": "x", "completion": "y", "prompt_ids": [5], "completion_ids": [6]}
    write_records(tmp_path / "in.jsonl", [row])
    with pytest.raises(ConfigError, match="in.jsonl: trl_completions"):
        load_demonstrations(str(tmp_path / "in.jsonl"), tokenizer, trl_completions=True)


def test_a_changed_template_is_another_model(tmp_path):
    tokenizer = chat()
    tokenizer.save_pretrained(tmp_path)
    before = model_identity(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(R1)
    assert model_identity(tmp_path) != before


# Templates that open <think> --------------------------------------------------------------------------------------------

REASONED = "<think>\nTwo and two.\n</think>\n\n4"
OPENED = ASKED + "<think>\n"


@pytest.mark.parametrize(
    "template, answer, expected",
    [
        # As the model writes it, after the generation prompt; and the same with the opening, which the prompt has.
        (R1, "Two and two.\n</think>\n\n4", (OPENED, "Two and two.\n</think>\n\n4<|end|>")),
        (R1, REASONED, (OPENED, "Two and two.\n</think>\n\n4<|end|>")),
        # No reasoning: the whole conversation has no `<think>`, so the prompt has none.
        (R1, "4", (ASKED, "4<|end|>")),
        (NEMOTRON, "Two and two.\n</think>\n\n4", (OPENED, "Two and two.\n</think>\n\n4<|end|>")),
        (NEMOTRON, REASONED, (OPENED, "Two and two.\n</think>\n\n4<|end|>")),
        (NEMOTRON, "4", (ASKED + "<think>", "</think>4<|end|>")),
        (QWEN, "Two and two.\n</think>\n\n4", (OPENED, "Two and two.\n</think>\n\n4<|end|>")),
        (QWEN, REASONED, (OPENED, "Two and two.\n</think>\n\n4<|end|>")),
        (QWEN, "4", (OPENED, "\n</think>\n\n4<|end|>")),
        (QWEN, [{"role": "assistant", "reasoning_content": "Two.", "content": "4"}], (OPENED, "Two.\n</think>\n\n4<|end|>")),
        # No `<think>` in the generation prompt, and reasoning taken out all the same.
        (R1.replace("{{ '<think>\n' }}", ""), REASONED, (ASKED, REASONED + "<|end|>")),
        (R1.replace("{{ '<think>\n' }}", ""), "t, as assistant ends\n</think>\n\n4", (ASKED, "t, as assistant ends\n</think>\n\n4<|end|>")),
        # The system message moves once an answer follows; the model sees it where it was.
        (MISTRAL, "4", ("[INST] Be short.\n\nWhat is 2+2?[/INST]", " 4<|end|>")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("added", [False, True])
def test_prompt_and_answer_are_what_the_model_sees(template, answer, expected, added):
    tokenizer = chat(template)
    if added:
        tokenizer.add_tokens(["<think>", "</think>"])
    prompt = [{"role": "system", "content": "Be short."}, *USER] if template == MISTRAL else USER
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prompt_ids, ids = encode_row(tokenizer, prompt, {"chosen": answer}, "row 0")
    assert (decode(tokenizer, prompt_ids), decode(tokenizer, ids["chosen"])) == expected
    generated = decode(tokenizer, encode_prompt(tokenizer, prompt))
    assert generated.startswith(expected[0]) and (generated == expected[0]) == (
        answer != "4" or template in (QWEN, MISTRAL)
    )


@pytest.mark.parametrize(
    "name, expected",
    [
        ("deepseek_r1_distill", ("<｜Assistant｜><think>\n", "Two.\n</think>\n\n4<｜end▁of▁sentence｜>")),
        ("deepseekv3", ("<｜Assistant｜><think>\n", "Two.\n</think>\n\n4<｜end▁of▁sentence｜>")),
        ("nemotron_3_nano", ("<|im_start|>assistant\n<think>\n", "Two.\n</think>\n\n4<|im_end|>")),
        ("qwen3_5_think", ("<|im_start|>assistant\n<think>\n", "Two.\n</think>\n\n4<|im_end|>")),
        ("qwen3", ("<|im_start|>assistant\n", "<think>\nTwo.\n</think>\n\n4<|im_end|>")),
        ("gptoss", ("<|start|>assistant", "<|channel|>final<|message|>4<|return|>")),
    ],
)  # fmt: skip
def test_templates_of_real_models(name, expected):
    """Those that TRL comes with: reasoning as the model writes it, and with the opening that the prompt has."""
    tokenizer = chat((Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text())
    end = next(end for end in ("<｜end▁of▁sentence｜>", "<|im_end|>", "<|return|>") if expected[1].endswith(end))
    tokenizer.add_special_tokens({"eos_token": end})
    answers = ["4"] if name == "gptoss" else ["Two.\n</think>\n\n4", "<think>\nTwo.\n</think>\n\n4"]
    for answer in answers:
        prompt_ids, ids = encode_row(tokenizer, USER, {"chosen": answer}, "row 0")
        assert decode(tokenizer, prompt_ids).endswith(expected[0]) and decode(tokenizer, ids["chosen"]) == expected[1]
        assert prompt_ids == encode_prompt(tokenizer, USER)


def test_both_sides_have_one_prompt_and_a_shortened_one_is_said_once(tmp_path):
    tokenizer = chat(R1)
    row = {"prompt": USER, "chosen": REASONED, "rejected": "5"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = trainer([row] * 3, tokenizer, tmp_path).train_dataset
    assert len([w for w in caught if "generation prompt ends with '<think>\\n'" in str(w.message)]) == 1
    assert decode(tokenizer, dataset[0]["prompt_ids"]) == ASKED
    assert decode(tokenizer, dataset[0]["chosen_ids"]) == REASONED + "<|end|>"
    assert decode(tokenizer, dataset[0]["rejected_ids"]) == "5<|end|>"
    with pytest.raises(RecordError, match="row 4: solution: .*renders the prompt differently.*encode_row"):
        encode_completion(tokenizer, USER, "5", encode_prompt(tokenizer, USER), "row 4: solution")


@pytest.mark.parametrize(
    "template", [pytest.param(R1, marks=SINCE_1_15), pytest.param(NEMOTRON, marks=SINCE_1_15), QWEN]
)
def test_ids_are_trls_under_the_option(tmp_path, template):
    """TRL cuts prompts where they differ, and takes what the template renders."""
    rows = [
        {
            "prompt": USER,
            "chosen": [{"role": "assistant", "content": REASONED}],
            "rejected": [{"role": "assistant", "content": "5"}],
        }
    ]
    tokenizer = chat(template)
    plain = {key: value for key, value in QUIET.items() if key != "preflight"}
    theirs = DPOTrainer(
        tiny_llama(vocab_size=len(tokenizer)), ref_model=tiny_llama(vocab_size=len(tokenizer)), args=DPOConfig(str(tmp_path), **plain),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    ).train_dataset[0]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = trainer(rows, tokenizer, tmp_path, trl_completions=True).train_dataset[0]
    assert all(ours[key] == theirs[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids"))


def test_an_answer_that_a_template_leaves_out_is_an_error():
    """Nothing of an answer is left out without a word."""
    row = {
        "prompt": USER,
        "rejected": "5",
        "chosen": [{"role": "assistant", "reasoning_content": "Two.", "content": "4"}],
    }
    with pytest.raises(RecordError, match="row 0: chosen: the chat template leaves reasoning_content = 'Two.' out"):
        texts(chat(R1), row)
    row["chosen"] = [{"role": "assistant", "content": "", "tool_calls": call("Oslo")}]
    with pytest.raises(RecordError, match="row 0: chosen: the chat template leaves tool_calls = .*weather.* out"):
        texts(chat(R1), row)
    prompt = [*USER, {"role": "assistant", "tool_calls": call("Oslo")}, {"role": "tool", "content": "Rain."}]
    with pytest.raises(RecordError, match="row 0: prompt: the chat template leaves tool_calls"):
        texts(chat(R1), {"prompt": prompt, "chosen": "4", "rejected": "5"})
    row["chosen"] = "4"
    with pytest.raises(RecordError, match="row 0: chosen: the chat template leaves the answer out"):
        texts(chat("{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"), row)


# Tool calls -----------------------------------------------------------------------------------------------------------

TOOL_ROWS = [
    {"prompt": [{"role": "user", "content": "Weather in Oslo?"}],
     "chosen": [{"role": "assistant", "content": None, "tool_calls": call("Oslo")}],
     "rejected": [{"role": "assistant", "content": None, "tool_calls": call("Rome")}]},
    {"prompt": [{"role": "user", "content": "Weather in Bergen?"}],
     "chosen": [{"role": "assistant", "content": "", "tool_calls": call("Bergen")}],
     "rejected": [{"role": "assistant", "content": "I cannot know."}]},
    {"prompt": [{"role": "user", "content": "Weather in Turin?"}],
     "chosen": [{"role": "assistant", "tool_calls": call("Turin")}],
     "rejected": [{"role": "assistant", "content": "It is sunny."}]},
    {"prompt": [{"role": "user", "content": "Hi"}],
     "chosen": [{"role": "assistant", "content": "Hello"}], "rejected": [{"role": "assistant", "content": "Go"}]},
]  # fmt: skip


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_tool_calls_give_the_same_pairs_everywhere(tmp_path, ending):
    tokenizer, source = chat(TOOLS), tmp_path / f"in.{ending}"
    if ending == "jsonl":
        source.write_text("".join(json.dumps(row) + "\n" for row in TOOL_ROWS))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TOOL_ROWS), source)
    counts = tokenize_pairs(str(source), tokenizer, tmp_path / "out.jsonl")
    assert counts == {"rows": 4, "source_rows": 4, "prompt_too_long": 0, "equal": 0, "empty": 0}
    stored = read_records(tmp_path / "out.jsonl", "pair")
    trained = trainer(TOOL_ROWS, tokenizer, tmp_path / "a").train_dataset
    call_text = '<call>{"name": "weather", "arguments": {"city": "%s"}}</call><|end|>'
    assert [decode(tokenizer, row["chosen_ids"]) for row in stored] == [
        *(call_text % city for city in ("Oslo", "Bergen", "Turin")), "Hello<|end|>",
    ]  # fmt: skip
    for mine, theirs in zip(stored, trained, strict=True):
        assert all(mine[key] == theirs[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids"))


def test_tool_calls_train_with_trls_loss(tmp_path):
    """TRL, with empty content filled in; conversations with results of tools among them."""
    tokenizer = chat(TOOLS)
    turns = [{"role": "tool", "content": "Rain."}, {"role": "assistant", "content": "It rains."}]
    rows = [*TOOL_ROWS, TOOL_ROWS[2] | {"chosen": [*TOOL_ROWS[2]["chosen"], *turns]}]
    ours = trainer(rows, tokenizer, tmp_path / "a", trl_completions=True)
    filled = [
        {
            key: [{**m, "content": m.get("content") or "", "tool_calls": m.get("tool_calls") or []} for m in row[key]]
            for key in row
        }
        for row in rows
    ]
    plain = {key: value for key, value in QUIET.items() if key != "preflight"}
    theirs = DPOTrainer(
        tiny_llama(vocab_size=len(tokenizer)), ref_model=tiny_llama(1, vocab_size=len(tokenizer)), args=DPOConfig(str(tmp_path / "b"), **plain),
        train_dataset=Dataset.from_list(filled), processing_class=tokenizer,
    )  # fmt: skip
    ours.ref_model.load_state_dict(theirs.ref_model.state_dict())
    losses = []
    for one in (ours, theirs):
        batch = one._prepare_inputs(one.data_collator([one.train_dataset[i] for i in range(5)]))
        losses.append(one.compute_loss(one.model, batch).item())
    # The shared layout sums in another order.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and abs(losses[0] - 0.6931) > 1e-3


def test_a_template_that_refuses_messages_without_calls():
    """As Mistral's: a message has text or calls. That it cannot be rendered without its calls shows that they are used."""
    tokenizer = chat("{% for m in messages %}{% if not m['content'] and not m.tool_calls %}{{ raise_exception('empty') }}{% endif %}"
                     "{% endfor %}" + TOOLS)  # fmt: skip
    assert texts(tokenizer, TOOL_ROWS[2])[2] == "It is sunny.<|end|>"


def test_what_is_empty_is_dropped(tmp_path):
    empty = [
        [{"role": "assistant", "content": None}],
        [{"role": "assistant", "content": [{"type": "text", "text": ""}]}],
        [],
    ]
    rows = [PAIR, *(PAIR | {"rejected": answer} for answer in empty)]
    (tmp_path / "in.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "in.json").rename(tmp_path / "in.jsonl")
    assert tokenize_pairs(str(tmp_path / "in.jsonl"), chat(), tmp_path / "out.jsonl")["empty"] == 3


def test_prompts_with_tool_calls_are_sampled_and_learned_from(tmp_path):
    tokenizer = chat(TOOLS)
    asked = [*USER, {"role": "assistant", "tool_calls": call("Oslo")}, {"role": "tool", "content": "Rain."}]
    expected = (
        '<|start|>user\nWhat is 2+2?<|end|>\n<|start|>assistant\n<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call><|end|>\n'
        "<|start|>tool\nRain.<|end|>\n<|start|>assistant\n"
    )
    problem = {"id": "a", "prompt": asked, "answer": "4", "solution": "4"}
    out = tmp_path / "out.jsonl"
    sample_completions(tiny_llama(vocab_size=len(tokenizer)), tokenizer, [problem], out, SampleConfig(max_new_tokens=2))
    assert decode(tokenizer, read_records(out, "sample")[0]["prompt_ids"]) == expected
    tokenize_demonstrations([problem], tokenizer, tmp_path / "learned.jsonl")
    (row,) = read_records(tmp_path / "learned.jsonl", "demonstration")
    assert decode(tokenizer, row["prompt_ids"] + row["completion_ids"]) == expected + "4<|end|>"


# Turns that go on, turns of others --------------------------------------------------------------------------------------

PREFILLED = {
    "prompt": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "A colour is"}],
    "chosen": [{"role": "assistant", "content": " red."}], "rejected": [{"role": "assistant", "content": " seven."}],
}  # fmt: skip
BEGUN = "<|start|>user\nName a colour.<|end|>\n<|start|>assistant\nA colour is"


def test_a_prefilled_turn_goes_on(tmp_path):
    tokenizer = chat()
    assert texts(tokenizer, PREFILLED) == (BEGUN, " red.<|end|>", " seven.<|end|>")
    assert texts(tokenizer, PREFILLED | {"chosen": " red."})[1] == " red.<|end|>"
    seen = tokenizer.apply_chat_template(PREFILLED["prompt"], tokenize=False, continue_final_message=True)
    assert decode(tokenizer, encode_prompt(tokenizer, PREFILLED["prompt"])) == seen == BEGUN
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_records(source, [PREFILLED])
    tokenize_pairs(str(source), tokenizer, out, chat=True)
    (stored,) = read_records(out, "pair")
    (trained,) = trainer([PREFILLED], tokenizer, tmp_path / "a").train_dataset
    for row in (stored, trained):
        assert decode(tokenizer, row["prompt_ids"]) == BEGUN and decode(tokenizer, row["chosen_ids"]) == " red.<|end|>"
    problem = {"id": "a", "prompt": PREFILLED["prompt"], "answer": "red", "solution": " red."}
    sample_completions(tiny_llama(vocab_size=len(tokenizer)), tokenizer, [problem], out, SampleConfig(max_new_tokens=2))
    assert decode(tokenizer, read_records(out, "sample")[0]["prompt_ids"]) == BEGUN
    tokenize_demonstrations([problem], tokenizer, tmp_path / "learned.jsonl")
    (row,) = read_records(tmp_path / "learned.jsonl")
    assert decode(tokenizer, row["prompt_ids"]) == BEGUN and decode(tokenizer, row["completion_ids"]) == " red.<|end|>"
    sft = GuardedSFTTrainer(
        tiny_llama(vocab_size=len(tokenizer)), args=GuardedSFTConfig(str(tmp_path / "b"), **QUIET), processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": PREFILLED["prompt"], "completion": PREFILLED["chosen"]}]),
    )  # fmt: skip
    assert decode(tokenizer, sft.train_dataset[0]["input_ids"]) == BEGUN + " red.<|end|>"


def test_prefilled_reasoning_goes_on():
    """Reasoning that was begun in the prompt and ends in the answer, under a template that takes it out."""
    prompt = [*USER, {"role": "assistant", "content": "<think>\nTwo"}]
    tokenizer = chat(R1)
    ids, found = encode_row(tokenizer, prompt, {"chosen": " and two.\n</think>\n\n4"}, "row 0")
    assert decode(tokenizer, ids) == ASKED + "<think>\nTwo"
    assert decode(tokenizer, found["chosen"]) == " and two.\n</think>\n\n4<|end|>"


def test_prefilled_turns_that_cannot_go_on():
    tokenizer = chat(TOOLS)
    for message in ({"content": ""}, {"content": None}, {"content": "x", "tool_calls": call("Oslo")}):
        row = PAIR | {"prompt": [*USER, {"role": "assistant", **message}]}
        with pytest.raises(RecordError, match="row 0: prompt: its last message, the assistant's, must be text"):
            texts(tokenizer, row)


@pytest.mark.parametrize("role", ["user", "tool", "system"])
def test_turns_of_others_are_not_trained_on(role, tmp_path):
    inside = [
        {"role": "assistant", "content": "Red."},
        {"role": role, "content": "Another?"},
        {"role": "assistant", "content": "Blue."},
    ]
    row = {"id": "r7", "prompt": USER, "chosen": inside, "rejected": PAIR["rejected"]}
    tokenizer, words = (
        chat(),
        f"row 1 .*r7.*: chosen: message 1: role = '{role}' must be 'assistant'.*end the completion before it",
    )
    rows = [PAIR | {"id": "r0"}, row]
    write_records(tmp_path / "in.jsonl", rows)
    with pytest.raises(RecordError, match=f"in.jsonl, {words}"):
        tokenize_pairs(str(tmp_path / "in.jsonl"), tokenizer, tmp_path / "out.jsonl")
    with pytest.raises(RecordError, match=f"train data set, {words}"):
        trainer(rows, tokenizer, tmp_path / "a")
    implicit = {side: [*USER, *row[side]] for side in ("chosen", "rejected")}
    with pytest.raises(RecordError, match="message 1: role"):
        texts(tokenizer, implicit)
    for cls, config in ((GuardedSFTTrainer, GuardedSFTConfig), (BASHTrainer, BASHConfig), (RACTrainer, RACConfig)):
        with pytest.raises(RecordError, match=f"train data set, row 0: completion: message 1: role = '{role}'"):
            cls(
                tiny_llama(vocab_size=len(tokenizer)), args=config(str(tmp_path / "b"), **QUIET), processing_class=tokenizer,
                train_dataset=Dataset.from_list([{"prompt": USER, "completion": inside}]),
            )  # fmt: skip


@pytest.mark.parametrize(
    "empty", ["", [{"role": "assistant", "content": ""}], [{"role": "assistant", "content": None}]]
)
def test_an_empty_answer_is_refused_by_name_as_text_and_as_messages(empty):
    row = {
        "prompt": [{"role": "user", "content": "1+1?"}],
        "chosen": [{"role": "assistant", "content": "2"}],
        "rejected": empty,
    }
    with pytest.raises(RecordError):
        encode_pair(byte_level_tokenizer(chat=True), row, "row 3")
