"""The page: what is in it, what is not, and that tokens show the decoded text."""

import json
import re

import pytest
from conftest import byte_level_tokenizer, llama_tokenizer, random_pairs

from align.errors import MissingColumnError, RecordError
from align.report import histogram, inspect_pairs, markdown_table, token_texts

TOKENIZER = byte_level_tokenizer()


def page_data(path):
    text = path.read_text(encoding="utf-8")
    return text, json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S).group(1))


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer(), llama_tokenizer()], ids=["byte-level", "llama-style"])
@pytest.mark.parametrize("text", ["12 + 7 = 19.\n#### 19", "naïve café ☕ and 🦆🦆 stay", " two  spaces\n\n", "日本"])
def test_token_texts_join_to_the_decoded_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts).strip(" ") == tokenizer.decode(ids).strip(" ")


def test_page_is_self_contained_and_complete(tmp_path):
    pairs = random_pairs(4, vocab_size=250, columns=("ce_scores", "ref_logps"))
    pairs[0]["first_error"] = 0
    pairs[1]["prompt"] = "</script><img src=x onerror=alert(1)> & <!-- \u2028"
    path = inspect_pairs(
        pairs, TOKENIZER, tmp_path / "page.html", title="<b>title</b>", summary=[{"method": "<i>x</i>", "n": 3}], facts={"a": "b<"}
    )
    text, data = page_data(path)
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!data:,)[^"'>\s]*[/:]|@import|url\(|fetch\(|XMLHttpRequest""", text)
    assert "<img" not in text and "<b>title" not in text and "<i>x" not in text
    assert 'name="viewport"' in text
    assert data["pairs"][1]["prompt"] == pairs[1]["prompt"]
    assert [column["name"] for column in data["columns"]] == ["ce_scores", "ref_logps"]
    for row, pair in zip(data["pairs"], pairs, strict=True):
        for side in ("chosen", "rejected"):
            assert row[side]["ids"] == pair[f"{side}_ids"]
            assert row[side]["ce_scores"] == pytest.approx(pair[f"{side}_ce_scores"], abs=1e-5)
            assert len(row[side]["texts"]) == len(pair[f"{side}_ids"])
    assert data["pairs"][0]["first_error"] == 0
    total = sum(len(p["rejected_ids"]) for p in pairs)
    assert sum(data["columns"][0]["histogram"]["rejected"]) == total
    assert page_data(inspect_pairs(pairs, TOKENIZER, tmp_path / "two.html", limit=2))[1]["total"] == 4


def test_refusals_leave_nothing_behind(tmp_path):
    with pytest.raises(MissingColumnError, match="chosen_ce_scores"):
        inspect_pairs(random_pairs(2), TOKENIZER, tmp_path / "page.html")
    pairs = random_pairs(2, columns=("weights",))
    pairs[1]["rejected_weights"] = pairs[1]["rejected_weights"] + [1.0]
    with pytest.raises(RecordError, match="row 1 .*rejected_weights"):
        inspect_pairs(pairs, TOKENIZER, tmp_path / "page.html")
    with pytest.raises(RecordError, match="no pairs"):
        inspect_pairs([], TOKENIZER, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_histogram_and_table():
    assert histogram([0.0, 0.24, 0.25, 1.0, 1.0], bins=4, low=0, high=1) == [2, 1, 0, 2]
    assert histogram([], bins=3) == [0, 0, 0] and histogram([2.0, 2.0], bins=2) == [2, 0]
    assert markdown_table([{"a": 1, "bb": "x"}, {"a": 22, "bb": ""}]) == "| a  | bb |\n|----|----|\n| 1  | x  |\n| 22 |    |"
