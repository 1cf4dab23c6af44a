"""Models with a table of positions: what does not fit is refused by row, length and limit, wherever it would be fed."""

import json

import pytest
import torch
import transformers
from conftest import byte_level_tokenizer, random_pairs, tiny_llama
from datasets import Dataset, IterableDataset
from typer.testing import CliRunner

from align import BASHConfig, BASHTrainer, TokenDPOConfig, TokenDPOTrainer
from align.cli import app
from align.errors import AlignError, ConfigError, RecordError
from align.models import load_model
from align.positions import position_limit
from align.records import read_records, write_records
from align.sample import SampleConfig, sample_completions
from align.trainers.sft import GuardedSFTConfig, GuardedSFTTrainer
from align.trainers.training import train_preference, train_sft

WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
GPT2 = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}


def model_of(name: str, **settings):
    settings = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, **settings}
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**settings)).eval()


FAMILIES = {
    "GPT2": GPT2,
    "GPTBigCode": GPT2,
    "GPTNeo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 2, "hidden_size": 32,
               "max_position_embeddings": 64, "window_size": 8},
    "OPT": {**WIDE, "ffn_dim": 32, "word_embed_proj_dim": 32},
    "BioGpt": {**WIDE, "intermediate_size": 32},
    "Bert": {**WIDE, "intermediate_size": 32, "is_decoder": True},
    "Roberta": {**WIDE, "intermediate_size": 32, "is_decoder": True},
    "GPTJ": {**GPT2, "rotary_dim": 8},
    "Llama": {**WIDE, "intermediate_size": 32},
    "GPTNeoX": {**WIDE, "intermediate_size": 32},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_the_limit_is_the_length_at_which_a_forward_pass_fails(name):
    model = model_of(name, **FAMILIES[name])

    def takes(length: int) -> bool:
        try:
            model(input_ids=torch.full((1, length), 5))
        except (IndexError, RuntimeError):
            return False
        return True

    with torch.no_grad():
        failing = next((length for length in range(60, 70) if not takes(length)), None)
    assert position_limit(model) == (None if failing is None else failing - 1)
    assert (failing is None) == (name in ("Llama", "GPTNeoX", "Bloom"))


def test_a_vocabulary_as_large_as_the_table_is_no_table():
    assert position_limit(model_of("Llama", **{**FAMILIES["Llama"], "vocab_size": 64})) is None
    assert position_limit(model_of("GPT2", **{**GPT2, "vocab_size": 64})) == 64


@pytest.fixture(scope="module", params=["GPT2", "OPT"])
def short(request, tmp_path_factory) -> str:
    """A model with 64 learned positions, and its tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    model_of(request.param, **FAMILIES[request.param]).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return str(folder)


def rows(long: int) -> list[dict]:
    """Pairs and demonstrations of 10 tokens, of which number 2 has `long`."""
    made = []
    for index in range(4):
        length = long if index == 2 else 10
        ids = [[7 + (index + place) % 300 for place in range(n)] for n in (length - 4, 5)]
        made.append({
            "id": f"p{index}", "prompt": "x", "answer": "7", "chosen": "y", "rejected": "z", "completion": "y", "prompt_ids": [5] * 4,
            "chosen_ids": ids[0], "rejected_ids": ids[1], "completion_ids": ids[0], "correct": True, "finish_reason": "stop",
        })  # fmt: skip
    return made


def invoke(*words) -> str:
    done = CliRunner().invoke(app, [*map(str, words), "--dtype", "float32"])
    if isinstance(done.exception, AlignError):
        raise done.exception
    assert done.exit_code == 0, done.exception
    return done.stdout


@pytest.mark.parametrize(
    "command", ["score reference", "score entropy", "score guidance --guide MODEL", "select --rule rsr --keep-per-problem 1",
                "mix bash", "score rollout --weight-chosen --n 2 --max-new-tokens 80"],
)  # fmt: skip
def test_commands_name_the_row_its_length_and_the_limit(tmp_path, short, command):
    write_records(tmp_path / "in.jsonl", rows(70))
    name, *options = command.replace("MODEL", short).split(" --")
    words = [word for option in options for word in f"--{option}".split()]
    with pytest.raises(RecordError, match=r"row \d \(id 'p\d'\).*= (70|84) tokens must be at most 64"):
        invoke(*name.split(), tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--model", short, *words)
    assert not (tmp_path / "out.jsonl").exists()
    write_records(tmp_path / "in.jsonl", rows(64))  # as long as the table
    words = [word if word != "80" else "60" for word in words]
    invoke(*name.split(), tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--model", short, *words)


def test_max_length_leaves_out_what_does_not_fit(tmp_path, short):
    write_records(tmp_path / "in.jsonl", rows(70))
    words = ("--model", short, "--max-length", "64")
    counts = json.loads(invoke("score", "reference", tmp_path / "in.jsonl", tmp_path / "out.jsonl", *words))
    assert counts["too_long"] == 1 and len(read_records(tmp_path / "out.jsonl")) == 3


def test_draws_name_the_prompt_its_length_and_the_limit(tmp_path, short):
    problems = [{"id": "a", "prompt": "What is 1 + 1?", "answer": "2"}, {"id": "b", "prompt": "x" * 70, "answer": "2"}]
    tokenizer, model = byte_level_tokenizer(), load_model(short, dtype="float32")
    long = len(tokenizer(problems[0]["prompt"])["input_ids"])
    with pytest.raises(ConfigError, match=rf"takes 64 tokens.*problem 'a'\) has {long} and max_new_tokens is 100"):
        sample_completions(model, tokenizer, problems[:1], tmp_path / "o.jsonl", SampleConfig(max_new_tokens=100))
    with pytest.raises(ConfigError, match=r"takes 64 tokens.*problem 'b'\) has \d+"):
        sample_completions(model, tokenizer, problems, tmp_path / "o.jsonl", SampleConfig(max_new_tokens=4))
    fits = SampleConfig(max_new_tokens=64 - long)
    assert sample_completions(model, tokenizer, problems[:1], tmp_path / "o.jsonl", fits)["rows"] == 1
    write_records(tmp_path / "p.jsonl", rows(10))
    with pytest.raises(
        RecordError, match="prompt and max_new_tokens = 104 tokens must be at most 64.*lower max_new_tokens"
    ):
        invoke("mix", "rac", tmp_path / "p.jsonl", tmp_path / "out.jsonl", "--model", short, "--max-new-tokens", "100")


def test_traces_end_where_the_positions_do(tmp_path, short):
    write_records(
        tmp_path / "p.jsonl",
        [{"id": "a", "prompt": "x", "answer": "2"}, {"id": "b", "prompt": "x" * 70, "answer": "2"}],
    )
    words = (
        "--teacher",
        short,
        "--student",
        short,
        "--kept",
        tmp_path / "kept.jsonl",
        "--n",
        "2",
        "--max-new-tokens",
        "100",
    )
    counts = json.loads(invoke("trace", tmp_path / "p.jsonl", tmp_path / "out.jsonl", *words))
    assert counts["prompt_too_long"] == 2 and counts["context"] + counts["stop"] == 2


ARGS = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "disable_tqdm": True}


@pytest.mark.parametrize("method", ["sft", "bash", "rac"])
def test_trainings_on_demonstrations(tmp_path, short, method):
    args = ARGS if method != "rac" else ARGS | {"max_new_tokens": 8, "cue": "42"}
    with pytest.raises(RecordError, match=r"row 2 \(id 'p2'\).*= 70 tokens must be at most 64.*max_length"):
        train_sft({"path": short}, rows(70), tmp_path / "out", args=args, method=method)
    assert (
        train_sft({"path": short}, rows(70), tmp_path / "out", args=args | {"max_length": 64}, method=method)["steps"]
        == 1
    )
    # A limit that is larger than the table is no fault as long as no row is.
    assert (
        train_sft({"path": short}, rows(50), tmp_path / "b", args=args | {"max_length": 100}, method=method)["steps"]
        == 1
    )


def test_what_rac_draws_is_counted(tmp_path, short):
    with pytest.raises(RecordError, match="prompt and max_new_tokens = 104 tokens must be at most 64"):
        train_sft({"path": short}, rows(10), tmp_path / "out", args=ARGS | {"max_new_tokens": 100}, method="rac")
    with pytest.raises(RecordError, match=r"the longest correction = \d+ tokens must be at most 64"):
        train_sft({"path": short}, rows(30), tmp_path / "out", args=ARGS | {"max_new_tokens": 50}, method="rac")


@pytest.mark.parametrize("precompute", [False, True])
def test_trainings_on_pairs(tmp_path, short, precompute):
    args = ARGS | {"precompute_ref_log_probs": precompute}
    with pytest.raises(RecordError, match=r"row 2 \(id 'p2'\): its length = 70 tokens must be at most 64"):
        train_preference("dpo", {"path": short}, rows(70), tmp_path / "out", args=args)
    assert (
        train_preference("dpo", {"path": short}, rows(70), tmp_path / "b", args=args | {"max_length": 64})["steps"] == 1
    )


def settings(tmp_path, config_class, **more):
    return config_class(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", dataloader_pin_memory=False, **{**ARGS, **more}
    )


@pytest.mark.parametrize("trainer, config", [(GuardedSFTTrainer, GuardedSFTConfig), (BASHTrainer, BASHConfig)])
def test_a_stream_is_refused_at_the_batch(tmp_path, trainer, config):
    stream = IterableDataset.from_generator(lambda: iter([{"input_ids": [5] * n, "labels": [5] * n} for n in (10, 70)]))
    made = trainer(
        model_of("GPT2", **GPT2),
        settings(tmp_path, config),
        train_dataset=stream,
        processing_class=byte_level_tokenizer(),
    )
    with pytest.raises(RecordError, match="(longest row of a batch|its length) = 70 tokens must be at most 64"):
        made.train()


def test_evaluation_rows_are_looked_at_too(tmp_path):
    train, held_out = (Dataset.from_list([{"input_ids": [5] * n, "labels": [5] * n}] * 2) for n in (10, 70))
    with pytest.raises(RecordError, match="eval data set, row 0: its length = 70"):
        GuardedSFTTrainer(
            model_of("GPT2", **GPT2), settings(tmp_path, GuardedSFTConfig), train_dataset=train, eval_dataset=held_out,
            processing_class=byte_level_tokenizer(),
        )  # fmt: skip


def test_rotary_models_go_beyond_their_configuration(tmp_path, model_dir):
    """What works is not refused: 512 is what the configuration says."""
    tiny_llama(max_position_embeddings=64).save_pretrained(tmp_path / "model")
    byte_level_tokenizer().save_pretrained(tmp_path / "model")
    write_records(tmp_path / "in.jsonl", rows(70))
    invoke("score", "reference", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--model", tmp_path / "model")
    assert train_sft({"path": str(tmp_path / "model")}, rows(70), tmp_path / "out", args=ARGS)["steps"] == 1
    pairs = Dataset.from_list(random_pairs(2))
    model = load_model(str(tmp_path / "model"), dtype="float32")
    TokenDPOTrainer(
        model, args=settings(tmp_path, TokenDPOConfig), train_dataset=pairs, processing_class=byte_level_tokenizer()
    )


def test_a_stream_of_pairs_is_refused_at_the_batch(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(rows(70)))
    trainer = TokenDPOTrainer(
        load_model(_saved(tmp_path), dtype="float32"), args=settings(tmp_path / "out", TokenDPOConfig, max_steps=2),
        train_dataset=stream, processing_class=byte_level_tokenizer(),
    )  # fmt: skip
    with pytest.raises(RecordError, match="the longest row of a batch = 70 tokens must be at most 64"):
        trainer.train()


def _saved(tmp_path) -> str:
    model_of("GPT2", **GPT2).save_pretrained(tmp_path / "gpt2")
    byte_level_tokenizer().save_pretrained(tmp_path / "gpt2")
    return str(tmp_path / "gpt2")


def test_virtual_tokens_take_positions():
    from peft import LoraConfig, PromptTuningConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    def model():
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=64, n_embd=8, n_layer=1, n_head=1))

    prompts = get_peft_model(model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8))
    assert position_limit(prompts) == 56
    assert position_limit(get_peft_model(model(), LoraConfig(task_type="CAUSAL_LM"))) == 64
