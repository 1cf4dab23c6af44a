"""What a row or an option gives is in the prompt, or an error; rows have the same ids whatever file they come from."""

import json

import pytest
from conftest import byte_level_tokenizer, tiny_llama
from datasets import Dataset, Features, Json, List, Value

from align.demonstrations import load_demonstrations
from align.errors import AlignError, ConfigError, RecordError
from align.preferences import tokenize_pairs
from align.problems import load_problems
from align.records import ROWS_PER_GROUP, read_records, write_records
from align.sample import SampleConfig, sample_completions
from align.tokens import encode_pair, encode_prompt

#: In Qwen3's form: tools in front, an empty think block where thinking is off.
QWEN3 = (
    "{% if tools %}<|start|>tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|end|>\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{% if m['content'] %}{{ m['content'] }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}"
    "{% for key in m if key not in ['role', 'content', 'tool_calls'] %}[{{ key }}={{ m[key] }}]{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OFF = {"enable_thinking": False}
QUESTION = [{"role": "user", "content": "2+2?"}]


@pytest.fixture(scope="module")
def qwen3():
    tokenizer = byte_level_tokenizer(chat=True)
    tokenizer.chat_template = QWEN3
    return tokenizer


def put(path, rows) -> str:
    write_records(path, rows)
    return str(path)


def rendered(tokenizer, messages, **template) -> list[int]:
    """The oracle: what the template itself makes of a prompt that is written down as it should be."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_thinking_is_off_wherever_prompts_are_rendered(tmp_path, qwen3):
    row = {"id": "a", "prompt": QUESTION, "answer": "4", "solution": "4"}
    source = put(tmp_path / "in.jsonl", [row | {"chat_template_kwargs": OFF}])
    plain = put(tmp_path / "plain.jsonl", [row])
    wanted = rendered(qwen3, QUESTION, **OFF)
    assert qwen3.decode(wanted).endswith("<think>\n\n</think>\n\n")
    for problems in (load_problems(source), load_problems(plain, chat_template_kwargs=OFF)):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        sample_completions(tiny_llama(), qwen3, problems, out, SampleConfig(max_new_tokens=2))
        (sample,) = read_records(out, "sample")
        assert sample["prompt_ids"] == wanted
    assert load_demonstrations(source, qwen3)[0]["prompt_ids"] == wanted
    assert load_demonstrations(plain, qwen3, chat_template_kwargs=OFF)[0]["prompt_ids"] == wanted
    # A row's own argument wins over the option.
    (problem,) = load_problems(source, chat_template_kwargs={"enable_thinking": True})
    assert problem["chat_template_kwargs"] == OFF
    pair = {"prompt": QUESTION, "chosen": "4", "rejected": "5"}
    for name, column, option in (
        ("column", OFF, None),
        ("option", None, OFF),
        ("both", OFF, {"enable_thinking": True}),
    ):
        path = put(tmp_path / f"{name}-in.jsonl", [pair | ({"chat_template_kwargs": column} if column else {})])
        tokenize_pairs(path, qwen3, tmp_path / f"{name}.jsonl", chat_template_kwargs=option)
        assert read_records(tmp_path / f"{name}.jsonl")[0]["prompt_ids"] == wanted


def test_tools_of_a_problem_are_in_its_prompt(tmp_path, qwen3):
    tools = [{"type": "function", "function": {"name": "add"}}]
    for column in (tools, json.dumps(tools)):
        source = put(tmp_path / "in.jsonl", [{"prompt": "2+2?", "answer": "4", "tools": column}])
        sample_completions(
            tiny_llama(),
            qwen3,
            load_problems(source, chat=True),
            tmp_path / "out.jsonl",
            SampleConfig(max_new_tokens=2),
        )
        assert read_records(tmp_path / "out.jsonl")[0]["prompt_ids"] == rendered(qwen3, QUESTION, tools=tools)
    solved = put(tmp_path / "solved.jsonl", [{"prompt": QUESTION, "answer": "4", "solution": "4", "tools": tools}])
    (row,) = load_demonstrations(solved, qwen3)
    whole = qwen3.apply_chat_template([*QUESTION, *turn("4")], tokenize=False, tools=tools)
    assert qwen3.decode(row["prompt_ids"] + row["completion_ids"]) == whole.rstrip("\n")
    with pytest.raises(ConfigError, match="row 0: tools need a chat template, and the prompt is text; set chat"):
        load_problems(source)


@pytest.mark.parametrize(
    "row, options, wanted",
    [
        ({"prompt": QUESTION}, {"system_prompt": "Think."}, [{"role": "system", "content": "Think."}, *QUESTION]),
        ({"prompt": "2+2?", "system": "Think."}, {"chat": True}, [{"role": "system", "content": "Think."}, *QUESTION]),
        ({"question": "2+2?", "system_prompt": "Think."}, {"chat": True}, [{"role": "system", "content": "Think."}, *QUESTION]),
        ({"prompt": QUESTION, "system": "Think."}, {}, [{"role": "system", "content": "Think."}, *QUESTION]),
        ({"prompt": [{"role": "system", "content": "Think."}, *QUESTION], "system": "Think."}, {},
         [{"role": "system", "content": "Think."}, *QUESTION]),
        ({"instruction": "Translate.", "input": "cat"}, {}, "Translate.\ncat"),
        ({"instruction": "Translate.", "context": "cat", "input": ""}, {}, "Translate.\ncat"),
        ({"instruction": "Translate.", "input": "cat"}, {"prompt_template": "Q: {prompt}"}, "Q: Translate.\ncat"),
        ({"instruction": "Translate.", "input": ""}, {"chat": True}, [{"role": "user", "content": "Translate."}]),
        ({"instruction": "And 2+2?", "history": [["1+1?", "2"]]}, {"chat": True},
         [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "And 2+2?"}]),
        ({"prompt": "### Instruction:\nTranslate.\n\n### Input:\ncat", "instruction": "Translate.", "input": "cat"}, {},
         "### Instruction:\nTranslate.\n\n### Input:\ncat"),
        ({"prompt": "2+2?", "system": None, "history": [], "images": [], "tools": "", "chat_template_kwargs": {}}, {}, "2+2?"),
    ],
)  # fmt: skip
def test_what_is_given_is_in_the_prompt(tmp_path, row, options, wanted):
    (problem,) = load_problems(put(tmp_path / "in.jsonl", [row]), answers=False, **options)
    assert problem["prompt"] == wanted
    if options.get("prompt_template") is None:
        pair = row | {"chosen": "a", "rejected": "b"}
        tokenizer = byte_level_tokenizer(chat=True)
        tokenize_pairs(put(tmp_path / "pairs.jsonl", [pair]), tokenizer, tmp_path / "out.jsonl", **options)
        (found,) = read_records(tmp_path / "out.jsonl")
        assert found["prompt"] == wanted
        assert found["prompt_ids"] == (
            tokenizer(wanted)["input_ids"] if isinstance(wanted, str) else rendered(tokenizer, wanted)
        )


@pytest.mark.parametrize(
    "row, options, words",
    [
        ({"prompt": "2+2?"}, {"system_prompt": "Think."}, "row 0: system_prompt needs chat: true"),
        ({"prompt": [{"role": "system", "content": "Be."}, *QUESTION]}, {"system_prompt": "Think."}, "two system prompts, 'Be.' and"),
        ({"prompt": [{"role": "system", "content": "Be."}, *QUESTION], "system": "Think."}, {}, "two system prompts"),
        ({"prompt": "2+2?", "system": "Be."}, {"system_prompt": "Think.", "chat": True}, "two system prompts"),
        ({"prompt": "2+2?", "system": "Be."}, {}, "system = 'Be.' must be in the prompt; set chat"),
        ({"prompt": "2+2?", "history": [["1+1?", "2"]]}, {}, "history = .* must be in the prompt"),
        ({"prompt": "2+2?", "history": ["1+1?", "2"]}, {"chat": True}, "history = .* must be a list of pairs"),
        ({"prompt": QUESTION, "history": [["1+1?", "2"]]}, {}, "history = .* must be in the prompt"),
        ({"question": "2+2?", "input": "cat"}, {}, "input = 'cat' must be in the prompt"),
        ({"question": "2+2?", "instruction": "Be short."}, {}, "instruction = 'Be short.' must be in the prompt"),
        ({"prompt": QUESTION, "input": "cat"}, {}, "input = 'cat' must be in the prompt"),
        ({"prompt": "2+2?", "image": "a.png"}, {}, "image = 'a.png' must be in the prompt; align reads text alone"),
        ({"prompt": "2+2?", "chat_template_kwargs": OFF}, {}, "chat_template_kwargs need a chat template"),
        ({"prompt": "2+2?"}, {"chat_template_kwargs": OFF}, "chat_template_kwargs need a chat template"),
        ({"prompt": QUESTION}, {"chat_template_kwargs": {"tokenize": True}}, "tokenize is set by align"),
        ({"prompt": QUESTION, "chat_template_kwargs": [1]}, {}, "chat_template_kwargs = .* must be an object"),
        ({"prompt": QUESTION, "tools": "x"}, {}, "tools = 'x' must be a list, or JSON of one"),
    ],
)  # fmt: skip
def test_what_has_no_place_in_the_prompt_is_refused(tmp_path, row, options, words):
    source = put(tmp_path / "in.jsonl", [row])
    with pytest.raises((ConfigError, RecordError), match=words):
        load_problems(source, answers=False, **options)
    pairs = put(tmp_path / "pairs.jsonl", [row | {"chosen": "a", "rejected": "b"}])
    with pytest.raises((ConfigError, RecordError), match=words):
        tokenize_pairs(pairs, byte_level_tokenizer(chat=True), tmp_path / "out.jsonl", **options)


def test_a_template_is_for_text(tmp_path):
    source = put(tmp_path / "in.jsonl", [{"prompt": QUESTION}])
    with pytest.raises(ConfigError, match="row 0: prompt_template needs text, and the prompt is messages"):
        load_problems(source, answers=False, prompt_template="Q: {prompt}")


def test_an_argument_that_the_template_does_not_read_is_refused(tmp_path):
    tokenizer = byte_level_tokenizer(chat=True)
    with pytest.raises(RecordError, match="the chat template does not read enable_thinking"):
        encode_prompt(tokenizer, QUESTION, "row 0", OFF)
    with pytest.raises(RecordError, match="row 0.*does not read tools"):
        encode_pair(tokenizer, {"prompt": QUESTION, "chosen": "a", "rejected": "b", "tools": [{"name": "x"}]}, "row 0")


def test_a_prompt_column_beside_whole_conversations_is_part_of_them(tmp_path):
    tokenizer = byte_level_tokenizer(chat=True)
    sides = {side: [*QUESTION, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    for prompt in ("2+2?", QUESTION):
        tokenize_pairs(put(tmp_path / "in.jsonl", [sides | {"prompt": prompt}]), tokenizer, tmp_path / "out.jsonl")
        assert read_records(tmp_path / "out.jsonl")[0]["prompt_ids"] == rendered(tokenizer, QUESTION)
    source = put(tmp_path / "in.jsonl", [sides | {"prompt": [{"role": "system", "content": "Be."}]}])
    with pytest.raises(RecordError, match="prompt = .* must be among the messages that chosen and rejected begin with"):
        tokenize_pairs(source, tokenizer, tmp_path / "out.jsonl")


def tool(name, properties, **more):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def turn(content, **more):
    return [{"role": "assistant", "content": content, **more}]


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


#: Rows whose objects have different keys.
UNEQUAL = [
    {"prompt": QUESTION, "chosen": turn("a"), "rejected": turn("b"),
     "tools": [tool("weather", {"city": {"type": "string"}}), tool("add", {"x": {"type": "string"}}, strict=True)],
     "chat_template_kwargs": {"enable_thinking": True}},
    {"prompt": QUESTION, "chosen": turn("c", name="Ann"), "rejected": turn("d"), "tools": [tool("now", {"utc": {"enum": ["a", None]}})]},
    {"prompt": QUESTION, "chosen": turn("I call.", tool_calls=[call("weather", city="Oslo")]),
     "rejected": turn("I call.", tool_calls=[call("add", x="1")]), "chat_template_kwargs": {"enable_thinking": False}},
    {"prompt": [{"role": "user", "content": "hi", "name": "Bo"}], "chosen": turn("e"), "rejected": turn("f")},
]  # fmt: skip


def ids_of(path, tokenizer, tmp_path, name):
    tokenize_pairs(str(path), tokenizer, tmp_path / f"ids-{name}.jsonl")
    rows = read_records(tmp_path / f"ids-{name}.jsonl", "pair")
    return [[row[column] for column in ("prompt_ids", "chosen_ids", "rejected_ids")] for row in rows]


def test_the_same_ids_from_jsonl_parquet_and_datasets(tmp_path, qwen3):
    put(tmp_path / "rows.jsonl", UNEQUAL)
    wanted = ids_of(tmp_path / "rows.jsonl", qwen3, tmp_path, "jsonl")
    for row, found in zip(UNEQUAL, wanted, strict=True):
        template = {"tools": row.get("tools"), **row.get("chat_template_kwargs", {})}
        assert found[0] == rendered(qwen3, row["prompt"], **template)
    put(tmp_path / "ours.parquet", UNEQUAL)
    assert ids_of(tmp_path / "ours.parquet", qwen3, tmp_path, "ours") == wanted
    union = Dataset.from_list(UNEQUAL)
    assert union[0]["tools"][0]["function"]["parameters"]["properties"]["x"] is None, "Arrow fills no gap"
    union.to_parquet(tmp_path / "union.parquet")
    assert ids_of(tmp_path / "union.parquet", qwen3, tmp_path, "union") == wanted
    as_json = Features(
        {
            "prompt": List(Json()),
            "chosen": List(Json()),
            "rejected": List(Json()),
            "tools": List(Json()),
            "chat_template_kwargs": Json(),
        }
    )
    Dataset.from_list(UNEQUAL, features=as_json).to_parquet(tmp_path / "json.parquet")
    assert ids_of(tmp_path / "json.parquet", qwen3, tmp_path, "json") == wanted
    assert [list(encode_pair(qwen3, dict(row), "row").values()) for row in union] == wanted


def test_a_key_with_null_is_a_missing_key_in_every_file(tmp_path, qwen3):
    def row(**more):
        return {"prompt": [{"role": "user", "content": "hi", **more}], "chosen": turn("a"), "rejected": turn("b")}

    default = {"tools": [tool("add", {"x": {"type": "string", "default": None}})]}
    without = {"tools": [tool("add", {"x": {"type": "string"}})]}
    put(tmp_path / "nulls.jsonl", [row(name=None) | default])
    put(tmp_path / "without.jsonl", [row() | without])
    wanted = ids_of(tmp_path / "without.jsonl", qwen3, tmp_path, "without")
    assert ids_of(tmp_path / "nulls.jsonl", qwen3, tmp_path, "nulls") == wanted
    # JSON text is taken as it is, and nulls in lists stay.
    put(tmp_path / "text.jsonl", [row() | {"tools": json.dumps(default["tools"])}])
    (found,) = ids_of(tmp_path / "text.jsonl", qwen3, tmp_path, "text")
    assert '"default": null' in qwen3.decode(found[0])
    put(tmp_path / "list.jsonl", [row() | {"tools": [tool("add", {"x": {"enum": ["a", None]}})]}])
    (found,) = ids_of(tmp_path / "list.jsonl", qwen3, tmp_path, "list")
    assert '["a", null]' in qwen3.decode(found[0])


def test_parquet_gives_objects_back_as_they_were(tmp_path):
    rows = [
        {"id": "a", "tools": [{"b": 1, "a": 2}], "prompt": "text", "x": {}, "plain": [{"role": "user", "content": "x"}]},
        {"id": "b", "tools": [{"a": 0.5}, {"b": "ä"}], "prompt": QUESTION, "x": {"y": None}, "plain": [{"role": "user", "content": None}]},
        {"id": "c", "tools": None, "prompt": [], "x": None, "plain": []},
    ]  # fmt: skip
    write_records(tmp_path / "a.parquet", rows)
    assert json.dumps(read_records(tmp_path / "a.parquet")) == json.dumps(rows)
    assert Dataset.from_parquet(str(tmp_path / "a.parquet")).features["plain"] == List(
        {"role": Value("string"), "content": Value("string")}
    )
    # Objects whose keys differ only between groups of rows.
    rows = [
        {"id": str(i), "m": {"a": 1} if i < ROWS_PER_GROUP else {"b": [2, None]}} for i in range(ROWS_PER_GROUP + 2)
    ]
    write_records(tmp_path / "b.parquet", rows)
    assert read_records(tmp_path / "b.parquet") == rows


def test_every_error_of_a_row_names_it(tmp_path):
    source = put(tmp_path / "in.jsonl", [{"id": "q1", "prompt": "2+2?", "system": "Be."}])
    with pytest.raises(AlignError, match=r"in.jsonl, row 0 \(id 'q1'\)"):
        load_problems(source, answers=False)


#: What a command needs besides its input and output.
COMMANDS = {
    "sample": ("--max-new-tokens", "2", "--dtype", "float32"),
    "tokenize": (),
    "mix bash": ("--dtype", "float32"),
    "mix rac": ("--dtype", "float32", "--max-new-tokens", "2"),
    "trace": ("--max-new-tokens", "2", "--n", "1", "--dtype", "float32", "--kept", "kept.jsonl"),
}


@pytest.fixture
def qwen3_dir(tmp_path, qwen3):
    tiny_llama().save_pretrained(tmp_path / "model")
    qwen3.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def run(monkeypatch, *words: str) -> int:
    """Exit code of `align …`."""
    from align import cli

    monkeypatch.setattr("sys.argv", ["align", *map(str, words)])
    try:
        cli.main()
    except SystemExit as exit_:
        return exit_.code or 0
    return 0


@pytest.mark.parametrize("command", COMMANDS)
def test_options_reach_the_prompt_of_every_command(tmp_path, monkeypatch, capsys, qwen3, qwen3_dir, command):
    monkeypatch.chdir(tmp_path)
    row = {"id": "a", "prompt": QUESTION, "answer": "4", "solution": "4", "chosen": "4", "rejected": "5"}
    put(tmp_path / "in.jsonl", [row])
    models = ("--teacher", qwen3_dir, "--student", qwen3_dir) if command == "trace" else ("--model", qwen3_dir)

    def call(out, *options):
        return run(monkeypatch, *command.split(), "in.jsonl", out, *models, *COMMANDS[command], *options)

    options = ("--system-prompt", "Think.", "--chat-template-kwargs", '{"enable_thinking": false}')
    assert call("out.jsonl", *options) == 0, capsys.readouterr().err
    (found,) = read_records(tmp_path / "out.jsonl")
    wanted = rendered(qwen3, [{"role": "system", "content": "Think."}, *QUESTION], **OFF)
    assert found.get("prompt_ids", found.get("source_ids", []))[: len(wanted)] == wanted
    for text, words in (
        ("[1]", "must be JSON of an object"),
        ("{", "must be JSON of an object"),
        ('{"x": 1}', "does not read x"),
    ):
        assert call("other.jsonl", "--chat-template-kwargs", text) == 2
        assert words in capsys.readouterr().err
    assert call("other.jsonl", "--subset", "main") == 2
    assert "subset = 'main' belongs to a hub data set" in capsys.readouterr().err
    if command != "tokenize":
        assert call("other.jsonl", "--prompt-template", "Q: {prompt}") == 2
        assert "prompt_template needs text, and the prompt is messages" in capsys.readouterr().err
    assert not (tmp_path / "other.jsonl").exists()


def test_changed_arguments_of_the_template_are_other_output(tmp_path, monkeypatch, qwen3_dir):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "in.jsonl", [{"id": "a", "prompt": QUESTION, "answer": "4", "chosen": "4", "rejected": "5"}])
    for command in ("sample", "tokenize"):
        lengths = []
        for options in ((), ("--chat-template-kwargs", '{"enable_thinking": false}'), ()):
            words = (command, "in.jsonl", f"{command}.jsonl", "--model", qwen3_dir, *COMMANDS[command], *options)
            assert run(monkeypatch, *words) == 0
            lengths.append(len(read_records(tmp_path / f"{command}.jsonl")[0]["prompt_ids"]))
        assert lengths[0] == lengths[2] < lengths[1]


def test_options_that_phrase_prompts_do_nothing_to_ids(tmp_path, monkeypatch, capsys, qwen3_dir):
    monkeypatch.chdir(tmp_path)
    row = {"id": "a", "prompt": "x", "completion": "y", "prompt_ids": [5], "completion_ids": [6, 2]}
    put(tmp_path / "in.jsonl", [row])
    words = ("mix", "bash", "in.jsonl", "out.jsonl", "--model", qwen3_dir, "--dtype", "float32")
    for options in (
        ("--chat",),
        ("--system-prompt", "x"),
        ("--prompt-template", "{prompt}"),
        ("--chat-template-kwargs", '{"x": 1}'),
    ):
        assert run(monkeypatch, *words, *options) == 2
        assert "changes nothing, since its rows have ids" in capsys.readouterr().err
    assert run(monkeypatch, *words) == 0


def test_an_export_has_no_corrections(tmp_path, monkeypatch, capsys):
    words = (
        "evaluate",
        "in.jsonl",
        "--export",
        "alpaca-eval",
        "--out",
        "o.json",
        "--name",
        "x",
        "--corrections",
        "Wait",
    )
    assert run(monkeypatch, *words) == 2
    assert "--corrections belong to the table of verdicts" in capsys.readouterr().err


def test_a_chain_reads_its_test_problems_before_it_works(tmp_path, model_dir):
    from align.config import ChainConfig
    from align.pipeline import Chain

    train = put(tmp_path / "train.jsonl", [{"prompt": "2+2?", "answer": "4", "solution": "4"}])
    test = put(tmp_path / "test.jsonl", [{"prompt": "2+2?", "answer": "4", "system": "Be terse."}])
    config = ChainConfig(
        model={"path": model_dir}, train={"source": train}, test={"source": test}, demonstrations="solutions",
        methods={"sft": {"args": {"max_steps": 1}}},
    )  # fmt: skip
    with pytest.raises(RecordError, match="test.jsonl, row 0: system = 'Be terse.' must be in the prompt"):
        Chain(config, tmp_path / "run").run()
    assert not list((tmp_path / "run").rglob("*.jsonl"))


ALPACA = {"instruction": "Translate to French.", "input": "The cat sleeps.", "output": "Le chat dort."}
ALPACA_PAIR = {"system": "You are terse.", **ALPACA, "chosen": "Le chat dort.", "rejected": "Il pleut."}


def test_alpaca_rows_by_the_command_line(tmp_path, monkeypatch, capsys, qwen3, qwen3_dir):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "alpaca.jsonl", [ALPACA])
    put(tmp_path / "pairs.jsonl", [ALPACA_PAIR])
    user = {"role": "user", "content": "Translate to French.\nThe cat sleeps."}
    words = ("sample", "alpaca.jsonl", "out.jsonl", "--model", qwen3_dir, *COMMANDS["sample"], "--no-answers", "--chat")
    assert run(monkeypatch, *words) == 0
    (sample,) = read_records(tmp_path / "out.jsonl")
    assert sample["prompt"] == [user] and sample["instruction"] == user["content"]
    assert run(monkeypatch, "tokenize", "pairs.jsonl", "ids.jsonl", "--model", qwen3_dir, "--chat") == 0
    (pair,) = read_records(tmp_path / "ids.jsonl")
    assert pair["prompt_ids"] == rendered(qwen3, [{"role": "system", "content": "You are terse."}, user])
    capsys.readouterr()
    assert run(monkeypatch, "tokenize", "pairs.jsonl", "text.jsonl", "--model", qwen3_dir) == 2
    assert "row 0: system = 'You are terse.' must be in the prompt; set chat" in capsys.readouterr().err


def test_samples_of_a_parquet_file_with_gaps(tmp_path, qwen3):
    rows = [
        {k: v for k, v in row.items() if k not in ("chosen", "rejected")} | {"id": str(i), "answer": "4"}
        for i, row in enumerate(UNEQUAL)
    ]
    put(tmp_path / "rows.jsonl", rows)
    Dataset.from_list(rows).to_parquet(tmp_path / "union.parquet")
    found = []
    for name in ("rows.jsonl", "union.parquet"):
        problems = load_problems(str(tmp_path / name))
        sample_completions(
            tiny_llama(), qwen3, problems, tmp_path / f"{name}-out.jsonl", SampleConfig(max_new_tokens=1)
        )
        found.append([row["prompt_ids"] for row in read_records(tmp_path / f"{name}-out.jsonl")])
    assert found[0] == found[1]
    # Rows of a Dataset, handed over as they are.
    sample_completions(
        tiny_llama(), qwen3, list(Dataset.from_list(rows)), tmp_path / "direct.jsonl", SampleConfig(max_new_tokens=1)
    )
    assert [row["prompt_ids"] for row in read_records(tmp_path / "direct.jsonl")] == found[0]


def test_arguments_of_the_template_in_a_configuration(tmp_path, qwen3, qwen3_dir):
    from align.config import ChainConfig
    from align.pipeline import Chain

    pairs = put(tmp_path / "pairs.jsonl", [{"prompt": QUESTION, "chosen": "4", "rejected": "5"}])
    given = {"source": pairs, "chat_template_kwargs": OFF, "system_prompt": "Think."}
    config = ChainConfig(model={"path": qwen3_dir}, pairs=given, test_pairs=given, methods={"dpo": {"args": {}}})
    Chain(config, tmp_path / "run").make_pairs()
    (pair,) = read_records(tmp_path / "run/pairs.jsonl")
    assert pair["prompt_ids"] == rendered(qwen3, [{"role": "system", "content": "Think."}, *QUESTION], **OFF)
    solved = put(tmp_path / "solved.jsonl", [{"prompt": QUESTION, "answer": "4", "solution": "4"}])
    given = {"source": solved, "chat_template_kwargs": OFF}
    config = ChainConfig(
        model={"path": qwen3_dir}, train=given, test=given, demonstrations="solutions", methods={"sft": {"args": {}}}
    )
    path = Chain(config, tmp_path / "sft")._demonstrations("demonstrations", {})
    assert read_records(path)[0]["prompt_ids"] == rendered(qwen3, QUESTION, **OFF)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Add 13 to the number.", "input": "3", "answer": "16"},
        {"prompt": "Solve: 2+2", "system": "e", "answer": "4"},
        {"prompt": "He said hi. Who?", "history": [["hi", "He"]], "answer": "he"},
    ],
)
def test_a_column_that_only_happens_to_occur_in_the_prompt_is_not_in_it(tmp_path, row):
    column = next(name for name in ("input", "system", "history") if name in row)
    with pytest.raises(RecordError, match=f"row 0: {column} = .* must be in the prompt"):
        load_problems(put(tmp_path / "in.jsonl", [row]))


def test_a_short_input_reaches_the_prompt_through_a_template(tmp_path):
    source = put(tmp_path / "in.jsonl", [{"instruction": "Double it.", "input": "3", "answer": "6"}])
    assert load_problems(source, prompt_template="Q: {prompt} A:")[0]["prompt"] == "Q: Double it.\n3 A:"
