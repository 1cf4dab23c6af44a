"""The page: what is in it, what is not, and that tokens show the decoded text."""

import json
import random
import re

import pytest
from conftest import CORPUS, byte_level_tokenizer, llama_tokenizer, random_pairs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from align.errors import AlignError, ConfigError, MissingColumnError, RecordError, RecordFileError
from align.report import TRACE_COLUMNS, histogram, inspect_pairs, inspect_traces, markdown_table
from align.token_texts import token_texts

TOKENIZER = byte_level_tokenizer()
HOSTILE = "</script><img src=x onerror=alert(1)> & <!-- \u2028 https://example.org/x.js"


def metaspace_tokenizer():
    """SentencePiece style: unigrams, spaces as ▁, unknown characters as `<unk>`."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = {"special_tokens": ["<unk>", "</s>"], "unk_token": "<unk>"}
    tokenizer.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=120, show_progress=False, **special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"byte-level": TOKENIZER, "llama-style": llama_tokenizer(), "metaspace": metaspace_tokenizer()}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def page_data(path):
    text = path.read_text(encoding="utf-8")
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL).group(1)
    return text, block, json.loads(block)


def scored_pair(chosen, rejected, prompt="x", **more):
    """A pair from texts, all scores 0.5."""
    pair = {"id": "p", "prompt": prompt, "chosen": chosen, "rejected": rejected, "prompt_ids": [5]}
    for side in ("chosen", "rejected"):
        pair[f"{side}_ids"] = [*TOKENIZER(pair[side])["input_ids"], TOKENIZER.eos_token_id]
        pair[f"{side}_ce_scores"] = [0.5] * len(pair[f"{side}_ids"])
    return pair | more


@every_tokenizer
@pytest.mark.parametrize(
    "text",
    [
        *("12 + 7 = 19.\n#### 19", "naïve café ☕ and 🦆🦆 stay", "  two  spaces\n\n", "日本語です日本語です"),
        *("👩\u200d👩\u200d👧", "a \ufffd b", ""),
    ],
)
def test_token_texts_join_to_the_decoded_text(tokenizer, text):
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == decoded(tokenizer, ids)
    assert texts[-1] == tokenizer.eos_token
    assert token_texts(tokenizer, []) == []


@every_tokenizer
def test_token_texts_of_any_ids_join_to_the_decoded_text(tokenizer):
    """A model samples bytes that are no text, and special tokens anywhere."""
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(60))]
        texts = token_texts(tokenizer, ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == decoded(tokenizer, ids)


def test_a_character_stands_at_the_last_of_its_tokens():
    ids = TOKENIZER("é: 日😀b")["input_ids"]
    tokens = dict(enumerate(token_texts(TOKENIZER, ids)))
    end = {character: max(i for i, text in tokens.items() if character in text) for character in "日😀b"}
    *parts, last = [tokens[i] for i in range(end["日"] + 1, end["😀"] + 1)]
    assert last == "😀" and parts and not any(parts)
    assert tokens[end["😀"] + 1] == "b"
    # ... and bytes that never become one are shown where they are.
    broken = [*ids[: end["日"]], *TOKENIZER("b")["input_ids"]]
    texts = token_texts(TOKENIZER, broken)
    assert texts[-1] == "b" and texts.count("\ufffd") == 1 and "".join(texts) == decoded(TOKENIZER, broken)


def test_page_loads_nothing_and_takes_no_markup_from_data(tmp_path):
    pairs = random_pairs(4, vocab_size=250, columns=("ce_scores",))
    pairs[0] |= {"prompt": HOSTILE, "id": HOSTILE}
    pairs[1] |= {"prompt": [{"role": "<b>", "content": HOSTILE}, {"role": "user", "content": [{"text": HOSTILE}]}]}
    pairs[2] |= scored_pair(HOSTILE, f"{HOSTILE}\n2")
    path = inspect_pairs(
        pairs, TOKENIZER, tmp_path / "page.html", title=HOSTILE, summary=[{HOSTILE: HOSTILE}], facts={HOSTILE: HOSTILE}
    )
    text, block, data = page_data(path)
    assert not re.search("[<>&\u2028]", block)
    without_text = re.sub(r"img src=x|https://example\.org/x\.js", "", text)
    loads = r"""(src|href)\s*=\s*["']?(?!data:,)[\w./:]|@import|url\(|fetch\(|XMLHttpRequest|WebSocket|https?:"""
    assert not re.search(loads, without_text)
    assert not re.search("innerHTML|outerHTML|insertAdjacentHTML|document.write", text)
    assert "<img" not in text and text.count("<!--") == 0
    assert "default-src 'none'" in text and 'name="viewport"' in text and "<noscript>" in text
    rows = data["pairs"]
    assert rows[0]["prompt"] == rows[0]["id"] == HOSTILE
    assert rows[1]["prompt"] == [["<b>", HOSTILE], ["user", HOSTILE]]
    shown = "".join(data["vocabulary"][token][1] for token in rows[2]["chosen"]["tokens"])
    assert shown == HOSTILE + TOKENIZER.eos_token


def test_a_prompt_with_tool_calls_is_shown(tmp_path):
    pairs = random_pairs(1, vocab_size=250, columns=("ce_scores",))
    calls = [{"function": {"name": "weather"}}]
    pairs[0]["prompt"] = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "assistant", "content": "Wait.", "tool_calls": calls},
    ]
    _, _, data = page_data(inspect_pairs(pairs, TOKENIZER, tmp_path / "page.html"))
    called = '{"tool_calls": [{"function": {"name": "weather"}}]}'
    assert data["pairs"][0]["prompt"] == [["user", "Rain?"], ["assistant", called], ["assistant", f"Wait.\n{called}"]]


def test_page_has_the_ids_texts_and_numbers(tmp_path):
    pairs = random_pairs(6, vocab_size=390, columns=("ce_scores", "ref_logps"))
    pairs[0]["rejected_ce_scores"][-1] = 1.23456789e-7
    _, _, data = page_data(inspect_pairs(pairs, TOKENIZER, tmp_path / "page.html"))
    assert [column["name"] for column in data["columns"]] == ["ce_scores", "ref_logps"]
    assert len({tuple(token) for token in data["vocabulary"]}) == len(data["vocabulary"])
    for row, pair in zip(data["pairs"], pairs, strict=True):
        for side in ("chosen", "rejected"):
            ids, texts, special = zip(*(data["vocabulary"][token] for token in row[side]["tokens"]), strict=True)
            assert list(ids) == pair[f"{side}_ids"]
            assert list(texts) == token_texts(TOKENIZER, pair[f"{side}_ids"])
            assert [bool(flag) for flag in special] == [i in TOKENIZER.all_special_ids for i in ids]
            for column in ("ce_scores", "ref_logps"):
                values = pair[f"{side}_{column}"]
                assert row[side][column]["values"] == pytest.approx(values, rel=5e-5)
                assert row[side][column]["lowest"] == values.index(min(values))
    for side in ("chosen", "rejected"):
        for column in data["columns"]:
            assert sum(column["histogram"][side]) == sum(len(pair[f"{side}_ids"]) for pair in pairs)


def test_columns_in_the_order_asked_for_and_limit(tmp_path):
    pairs = random_pairs(4, columns=("ce_scores", "guidance_logratios", "weights"))
    del pairs[1]["chosen_weights"], pairs[1]["rejected_weights"]
    wanted = ["weights", "ce_scores"]
    path = inspect_pairs(pairs, TOKENIZER, tmp_path / "page.html", columns=wanted, limit=2)
    text, _, data = page_data(path)
    assert [column["name"] for column in data["columns"]] == ["weights", "ce_scores"]
    assert len(data["pairs"]) == 2 and data["total"] == 4 and "2 of 4 pairs" in text
    assert "weights" not in data["pairs"][1]["chosen"]
    assert sum(data["columns"][1]["histogram"]["chosen"]) == sum(len(pair["chosen_ids"]) for pair in pairs)
    _, _, data = page_data(inspect_pairs(pairs, TOKENIZER, path, columns="guidance_logratios", limit=None))
    column = data["columns"][0]
    assert column["scale"] == "diverging" and column["low"] == -column["high"] and len(data["pairs"]) == 4


def test_share_of_lowest_tokens_that_are_the_first_error(tmp_path):
    pairs = random_pairs(9, columns=("ce_scores", "ref_logps"))
    lowest = [pair["rejected_ce_scores"].index(min(pair["rejected_ce_scores"])) for pair in pairs]
    for pair, place in list(zip(pairs, lowest, strict=True))[:6]:
        pair["first_error"] = place
    pairs[6]["first_error"] = (lowest[6] + 1) % len(pairs[6]["rejected_ids"])
    pairs[7]["first_error"] = None
    assert len(pairs[6]["rejected_ids"]) > 1
    _, _, data = page_data(inspect_pairs(pairs, TOKENIZER, tmp_path / "page.html", limit=2))
    assert data["columns"][0]["first_error"] == [6, 7]
    assert data["columns"][1]["first_error"][1] == 7
    assert data["pairs"][0]["first_error"] == lowest[0]


def test_the_lowest_token_is_found_before_digits_are_cut(tmp_path):
    pair = scored_pair("a", "12 + 7 = 19", first_error=1)
    pair["rejected_ce_scores"][:2] = [0.1000002, 0.1000001]
    _, _, data = page_data(inspect_pairs([pair], TOKENIZER, tmp_path / "page.html"))
    assert data["pairs"][0]["rejected"]["ce_scores"]["lowest"] == 1
    assert data["columns"][0]["first_error"] == [1, 1]


def test_refusals_leave_nothing_behind(tmp_path):
    def refused(error, match, pairs, **settings):
        with pytest.raises(error, match=match):
            inspect_pairs(pairs, TOKENIZER, tmp_path / "page.html", **settings)

    refused(MissingColumnError, "token-level column.*align score", random_pairs(2))
    weighted = random_pairs(2, columns=("weights",))
    refused(MissingColumnError, "chosen_x.*there are weights", weighted, columns=["weights", "x"])
    refused(RecordError, "no pairs", [])
    refused(ConfigError, "limit=0", random_pairs(2, columns=("weights",)), limit=0)
    for change, error, match in [
        (lambda pair: pair["rejected_weights"].append(1.0), RecordError, "row 1 .*rejected_weights has"),
        (lambda pair: pair["chosen_weights"].pop(), RecordError, "row 1 .*chosen_weights has"),
        (lambda pair: pair.update(first_error=len(pair["rejected_ids"])), RecordError, "row 1 .*first_error"),
        (lambda pair: pair.update(first_error=-1), RecordError, "row 1 .*first_error -1"),
        (lambda pair: pair.pop("chosen_ids"), MissingColumnError, "row 1 .*chosen_ids"),
        (lambda pair: pair.pop("prompt"), MissingColumnError, "row 1 .*prompt"),
        (lambda pair: pair["chosen_ids"].__setitem__(0, "a"), RecordError, "row 1 .*chosen_ids"),
    ]:
        pairs = random_pairs(2, columns=("weights",))
        change(pairs[1])
        refused(error, match, pairs, limit=1)  # rows that are not shown count in the header, so they are checked too
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    pairs = random_pairs(2, columns=("weights",))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").write_text("")
    with pytest.raises(RecordFileError, match="folder"):
        inspect_pairs(pairs, TOKENIZER, tmp_path / "folder")
    with pytest.raises(RecordFileError, match="kept"):
        inspect_pairs(pairs, TOKENIZER, tmp_path / "folder" / "kept" / "page.html")
    page = tmp_path / "page.html"
    page.write_text("old")
    with pytest.raises(RecordFileError, match="cannot be written as UTF-8"):
        inspect_pairs(pairs, TOKENIZER, page, title="\ud800")
    assert page.read_text() == "old"
    left = sorted(path.name for path in tmp_path.rglob("*") if path.suffix != ".lock")
    assert left == ["folder", "kept", "page.html"]


def test_histogram():
    assert histogram([0.0, 0.24, 0.25, 1.0, 1.0], bins=4, low=0, high=1) == [2, 1, 0, 2]
    assert histogram([-5.0, 0.5, 9.0], bins=2, low=0, high=1) == [1, 2]
    assert histogram([], bins=3) == [0, 0, 0] and histogram([2.0, 2.0], bins=2) == [2, 0]
    assert len(histogram([1.0, 2.0])) == 20


def test_markdown_table():
    table = "| a  | bb |\n|----|----|\n| 1  | x  |\n| 22 |    |"
    assert markdown_table([{"a": 1, "bb": "x"}, {"a": 22, "bb": ""}]) == table
    assert markdown_table([{"a": 1}, {"b": "x|y\nz"}]).splitlines()[-1] == "|   | x\\|y z |"
    assert markdown_table([]) == ""


def traces() -> list[dict]:
    ids = TOKENIZER("37-7=30")["input_ids"]
    n = len(ids)
    made = [
        {"id": f"p{i}", "prompt": "q", "completion_ids": ids, "sample": i, "correct": i == 0,
         "student_probs": [0.5 + 0.01 * j for j in range(n)], "teacher_probs": [0.25] * n,
         "from_teacher": [j % 3 > 0 for j in range(n)]}
        for i in range(3)
    ]  # fmt: skip
    empty = {"completion_ids": [], "student_probs": [], "teacher_probs": [], "from_teacher": []}
    return [*made, {**made[0], "id": "empty", **empty}]


def test_page_of_traces(tmp_path):
    rows = traces()
    text, _, data = page_data(inspect_traces(rows, TOKENIZER, tmp_path / "page.html"))
    assert data["sides"] == ["trace"] and [c["name"] for c in data["columns"]] == list(TRACE_COLUMNS)
    assert [row["id"] for row in data["pairs"]] == ["p0, sample 0, right", "p1, sample 1, wrong", "p2, sample 2, wrong"]
    assert "traces without a token, left out" in text
    for row, trace in zip(data["pairs"], rows, strict=False):
        assert row["trace"]["student_probs"]["values"] == pytest.approx(trace["student_probs"])
        assert row["trace"]["from_teacher"]["values"] == [float(v) for v in trace["from_teacher"]]
    for column in data["columns"]:  # a share is shown on [0, 1], whatever values there are
        assert (column["low"], column["high"]) == (0, 1)
        assert sum(column["histogram"]["trace"]) == 3 * len(rows[0]["completion_ids"])


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        ({"student_probs": [0.5]}, {}, "p0.*student_probs needs one number for each of"),
        ({"teacher_probs": None}, {}, "p0.*column 'teacher_probs' is missing"),
        ({"from_teacher": [7] * 7}, {"columns": "from_teacher"}, "p0.*from_teacher"),
        ({}, {"columns": ["ce_scores"]}, "no column ce_scores; there are student_probs"),
        ({}, {"limit": 0}, "limit=0"),
    ],
)
def test_traces_that_cannot_be_shown(tmp_path, change, settings, words):
    rows = traces()
    rows[0] |= change
    with pytest.raises(AlignError, match=words):
        inspect_traces(rows, TOKENIZER, tmp_path / "page.html", **settings)
    with pytest.raises(AlignError, match="none of 1 traces"):
        inspect_traces(traces()[3:], TOKENIZER, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
