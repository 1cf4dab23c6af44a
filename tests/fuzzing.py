"""What the fuzz tests feed: records, JSON and bytes, valid ones and ones that went wrong in a known way; and the clock.

Everything is a hypothesis strategy, so that the same inputs are drawn at random by `test_fuzz.py` and steered by coverage by
`fuzz_coverage.py`.
"""

from __future__ import annotations

import datetime
import decimal
import faulthandler
import gzip
import io
import json
import signal
import string
from contextlib import contextmanager

import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st

from align.prompts import READ_COLUMNS
from align.records import REQUIRED, TOKEN_COLUMNS

#: Seconds of this process's time that one input may take. math-verify gives a comparison up after 5 s, three times at most.
LIMIT = 20.0


class Hang(BaseException):
    """An input took longer than `LIMIT`; no `except Exception` of ours or of a library can swallow it."""


@contextmanager
def time_limit(seconds: float = LIMIT):
    """Raises `Hang` after so much processor time; what does not return from C is ended with a traceback at ten times that.

    The timer is the virtual one: SIGALRM is math-verify's.
    """

    def stop(_signal, _frame):
        raise Hang(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    faulthandler.dump_traceback_later(10 * seconds, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGVTALRM, before)


# Values ---------------------------------------------------------------------------------------------------------------

ODD_TEXTS = [
    "", " ", "\n", "\0", "\ud800", "a\udfffb", "\u2028", "\u2029x", "\x85", "\ufeff", "\r\n", "é", "🦆", "e\u0301", "٣",
    "<script>", "</script><!--", "{prompt}", "{{ 1 }}", "{% raise %}", "<|endoftext|>", "<|end|>", "#### ", "\\boxed{", "\\boxed{1}",
    "nan", "null", "1e400", "9" * 400, "x" * 3000, "../../a", "a#1", "=1+1", "|", "%s", "\\ud800", "$", "1/0", "-", "A:", "#### 7",
]  # fmt: skip
texts = st.one_of(
    st.sampled_from(ODD_TEXTS),
    st.text(string.printable, max_size=12),
    st.text(st.characters(codec=None), max_size=6),
)
ODD_NUMBERS = [
    0, -1, 1, True, False, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, -0.0, 1e308, -1e308, 5e-324, 1.5,
    float("nan"), float("inf"), float("-inf"), 1.7976931348623157e308, 255, 4096,
]  # fmt: skip
numbers = st.one_of(st.sampled_from(ODD_NUMBERS), st.integers(-3, 300), st.floats(width=32))
scalars = st.one_of(st.none(), numbers, texts)
messages = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"role": st.one_of(st.sampled_from(["user", "assistant", "system", "tool"]), scalars)},
            optional={"content": st.one_of(texts, scalars, st.lists(st.fixed_dictionaries({"type": texts, "text": texts}), max_size=2))},
        ),
        scalars,
    ),
    max_size=3,
)  # fmt: skip
json_values = st.one_of(
    scalars,
    messages,
    st.recursive(
        scalars,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=3)),
        max_leaves=6,
    ),
)


# Records --------------------------------------------------------------------------------------------------------------

words = st.text("abz019 .+-=/,\n", min_size=1, max_size=12)
answers = st.one_of(st.integers(0, 99).map(str), st.sampled_from(["1/2", r"\frac{1}{2}", "x+1", "1,000", "(3, 4)"]))
token_ids = st.lists(st.integers(0, 100), min_size=1, max_size=5)
prompts = st.one_of(
    words, st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": words}), min_size=1, max_size=2)
)


@st.composite
def valid_rows(draw, kind: str) -> list[dict]:
    """A few records of a kind of `REQUIRED`, or of `preference`, `trace`, `solved` (problems with solutions), as stages write them."""
    rows = []
    drawn = {
        "sample": [1, 1, 2, 4],
        "verdict": [4, 1, 2, 4],
        "trace": [4, 1, 2, 4],
    }  # a pair needs several, an export one
    draws = draw(st.sampled_from(drawn.get(kind, [1])))
    weighted = kind in ("pair", "preference") and draw(st.booleans())
    for number in range(draw(st.integers(draws, 4 if draws == 1 else 8))):
        row = {"id": f"p{number // draws}", "prompt": draw(prompts)}
        if kind in ("problem", "solved", "demonstration"):
            row["answer"] = draw(answers)
        if kind == "solved":
            row["solution"] = draw(words)
        if kind in ("sample", "verdict", "trace"):
            row |= {"prompt": "q", "answer": "7", "sample": number, "prompt_ids": [5, 6]}
        if kind in ("sample", "verdict", "trace", "demonstration"):
            row["completion"] = draw(
                st.one_of(words, answers.map("#### {}".format), answers.map(r"\boxed{{{}}}".format))
            )
            row["completion_ids"] = draw(token_ids)
        if kind == "demonstration":
            row["prompt_ids"] = draw(token_ids)
        if kind in ("sample", "verdict", "trace"):
            row["finish_reason"] = draw(st.sampled_from(["stop", "stop", "length"]))
        if kind in ("verdict", "trace"):
            row |= {"extracted": draw(st.one_of(st.none(), answers)), "rule": "hash", "correct": draw(st.booleans())}
        if kind == "trace":
            shares = st.lists(st.floats(0, 1), min_size=len(row["completion_ids"]), max_size=len(row["completion_ids"]))
            row |= {"student_probs": draw(shares), "teacher_probs": draw(shares)}
            row |= {"from_teacher": [p > 0.5 for p in row["student_probs"]], "student_share": draw(st.floats(0, 1))}
        if kind in ("pair", "preference"):
            row |= {"chosen": draw(words), "rejected": draw(words)}
            row |= {"weight": draw(st.one_of(st.integers(0, 3), st.floats(0, 1e30)))} if weighted else {}
        if kind == "pair":
            row |= {"prompt_ids": draw(token_ids), "chosen_ids": draw(token_ids), "rejected_ids": draw(token_ids)}
            row |= {"answer": draw(answers)}
            for column in draw(st.lists(st.sampled_from(TOKEN_COLUMNS), max_size=2, unique=True)):
                shares = st.floats(0, 1) if column in ("ce_scores", "rollout_values") or draw(st.booleans()) else None
                values = st.floats(allow_nan=False, allow_infinity=False) if shares is None else shares
                for side in ("chosen", "rejected"):
                    size = len(row[f"{side}_ids"])
                    row[f"{side}_{column}"] = draw(st.lists(values, min_size=size, max_size=size))
        rows.append(row)
    return rows


KINDS = (*REQUIRED, "preference", "trace", "solved")

COLUMNS = sorted(
    {column for columns in REQUIRED.values() for column in columns}
    | {f"{side}_{column}" for side in ("chosen", "rejected") for column in TOKEN_COLUMNS}
    | set(READ_COLUMNS)
    | {"solution", "tools", "chat_template_kwargs", "first_error", "student_share", "from_teacher", "student_probs"}
    | {
        "weight",
        "teacher_probs",
        "rule",
        "dataset",
        "question",
        "problem",
        "uid",
        "_row",
        "_reason",
        "_dropped",
        "",
    }
)


@st.composite
def spoilt_rows(draw, kind: str, changes: int = 3) -> list:
    """Valid records after up to `changes` things went wrong with them (none, often)."""
    rows: list = draw(valid_rows(kind))
    for _ in range(draw(st.integers(0, changes))):
        place = draw(st.integers(0, len(rows) - 1))
        row = rows[place]
        if not isinstance(row, dict):
            continue
        column = draw(st.sampled_from(sorted(row) or [""]))
        change = draw(
            st.sampled_from(("drop", "set", "add", "item", "extend", "swap", "twice", "row", "text", "empty"))
        )
        if change == "drop":
            row.pop(column, None)
        elif change == "set":
            row[column] = draw(json_values)
        elif change == "add":
            row[draw(st.sampled_from(COLUMNS))] = draw(json_values)
        elif change in ("item", "extend") and isinstance(row.get(column), list):
            kept = row[column][1:] if change == "item" else row[column]
            row[column] = [*kept, draw(json_values)]
        elif change == "swap":
            other = draw(st.sampled_from(sorted(row) or [""]))
            row[column], row[other] = row.get(other), row.get(column)
        elif change == "twice":
            rows.append(dict(row))
        elif change == "row":
            rows[place] = draw(json_values)
        elif change == "text":
            row[column] = draw(texts)
        elif change == "empty":
            row[column] = draw(st.sampled_from([[], "", {}, [[]], None, [None], [True]]))
    return rows


# Files ----------------------------------------------------------------------------------------------------------------


def _jsonl(rows: list, ascii_: bool) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=ascii_) + "\n" for row in rows).encode("utf-8", "surrogatepass")


FILE_CHANGES = {
    "none": lambda data, _: data,
    "byte order mark": lambda data, _: b"\xef\xbb\xbf" + data,
    "carriage returns": lambda data, _: data.replace(b"\n", b"\r\n"),
    "old Mac": lambda data, _: data.replace(b"\n", b"\r"),
    "blank lines": lambda data, _: data.replace(b"\n", b"\n\n \t\n"),
    "line separators": lambda data, _: data.replace(b"\n", "\u2028\n".encode()),
    "separators in text": lambda data, _: data.replace(b'": "', '": "\u2028\u0085\x0c\x1c'.encode()),
    "zero byte": lambda data, at: data[:at] + b"\0" + data[at:],
    "not UTF-8": lambda data, at: data[:at] + b"\xff" + data[at:],
    "cut": lambda data, at: data[:at],
    "twice": lambda data, at: data[:at] + data,
    "key twice": lambda data, _: data.replace(b'{"', b'{"id": "other", "', 1),
    "huge float": lambda data, _: data.replace(b"}", b', "extra": 1e400}', 1),
    "huge integer": lambda data, _: data.replace(b"}", b', "extra": ' + b"9" * 5000 + b"}", 1),
    "NaN": lambda data, _: data.replace(b"}", b', "extra": [NaN, -Infinity]}', 1),
    "surrogate": lambda data, _: data.replace(b"}", b', "extra": "\\ud800"}', 1),
    "deep": lambda data, at: data.replace(b"}", b', "extra": ' + b"[" * (1 + at) + b"]" * (1 + at) + b"}", 1),
    "very deep": lambda data, _: data.replace(b"}", b', "extra": ' + b'{"a":' * 9000 + b"0" + b"}" * 9001, 1),
    "long line": lambda data, _: data.replace(b'": "', b'": "' + b"x" * 100_000, 1),
    "zipped": lambda data, _: gzip.compress(data, mtime=0),
    "UTF-16": lambda data, _: data.decode("utf-8", "replace").encode("utf-16"),
    "one list": lambda data, _: b"[" + data.replace(b"\n", b",") + b"null]",
    "no end of line": lambda data, _: data.rstrip(b"\n"),
}


@st.composite
def jsonl_bytes(draw, kind: str, changes: int = 3) -> bytes:
    """A JSONL file of a kind, with up to `changes` mistakes in its rows and often one in its bytes."""
    if draw(st.integers(0, 15)) == 0:
        return draw(
            st.one_of(st.binary(max_size=200), json_values.map(lambda value: _jsonl([value], True)), st.just(b""))
        )
    data = _jsonl(draw(spoilt_rows(kind, changes)), draw(st.booleans()))
    change = draw(st.one_of(st.just("none"), st.sampled_from(sorted(FILE_CHANGES)))) if changes else "none"
    return FILE_CHANGES[change](data, draw(st.integers(0, min(len(data), 1200))))


ODD_ARRAYS = (
    lambda n: pyarrow.nulls(n),
    lambda n: pyarrow.array(["a"] * n).dictionary_encode(),
    lambda n: pyarrow.array([{"x": [{"y": 1}]}] * n),
    lambda n: pyarrow.array([[[1, 2]]] * n),
    lambda n: pyarrow.array([b"\xff\xfe"] * n),
    lambda n: pyarrow.Array.from_buffers(
        pyarrow.string(), n, pyarrow.array([b"\xff\xfe"] * n, pyarrow.binary()).buffers()
    ),
    lambda n: pyarrow.array([1 + 10**18] * n, pyarrow.timestamp("ns")),
    lambda n: pyarrow.array([2**62] * n, pyarrow.timestamp("s")),
    lambda n: pyarrow.array([0] * n, pyarrow.timestamp("us", tz="Nowhere/Else")),
    lambda n: pyarrow.array([2**30] * n, pyarrow.date32()),
    lambda n: pyarrow.array([datetime.date(2020, 1, 1)] * n),
    lambda n: pyarrow.array([decimal.Decimal("1.5")] * n),
    lambda n: pyarrow.array([[("k", 1)]] * n, pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    lambda n: pyarrow.array([float("nan")] * n),
    lambda n: pyarrow.array([1.0] * n, pyarrow.float16()),
    lambda n: pyarrow.array([True] * n),
    lambda n: pyarrow.array([2**64 - 1] * n, pyarrow.uint64()),
    lambda n: pyarrow.array([[1, 2]] * n, pyarrow.list_(pyarrow.int8(), 2)),
    lambda n: pyarrow.array([None] * n, pyarrow.string()),
)


def _array(values: list) -> pyarrow.Array:
    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError, ValueError, TypeError):
        return pyarrow.array([json.dumps(value) for value in values])


@st.composite
def parquet_bytes(draw, kind: str) -> bytes:
    """A Parquet file of a kind: columns of the wrong type, columns twice, damaged bytes among them."""
    rows = [row for row in draw(spoilt_rows(kind, 1)) if isinstance(row, dict)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    arrays = [_array([row.get(name) for row in rows]) for name in names]
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        array = draw(st.sampled_from(ODD_ARRAYS))(len(rows))
        if names and draw(st.booleans()):
            arrays[draw(st.integers(0, len(names) - 1))] = array
        else:
            names.append(draw(st.sampled_from(COLUMNS)))
            arrays.append(array)
    stream = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.table(arrays, names=names), stream)
    except (pyarrow.ArrowException, ValueError):
        return b"PAR1PAR1"
    data = bytearray(stream.getvalue())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 4]))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@st.composite
def record_files(draw, kinds: tuple[str, ...] = KINDS) -> tuple[str, bytes]:
    """Name and bytes of a record file; the ending is mostly the one that belongs to them."""
    kind = draw(st.sampled_from(kinds))
    if draw(st.integers(0, 4)) == 0:
        return "in.parquet", draw(parquet_bytes(kind))
    name = (
        "in.jsonl"
        if draw(st.integers(0, 30))
        else draw(st.sampled_from(["in.parquet", "in.json", "in.JSONL", "in.csv", "in.ndjson", "in.jsonl.gz"]))
    )
    content = draw(jsonl_bytes(kind, draw(st.sampled_from([0, 1, 3]))))
    return name, gzip.compress(content) if name.endswith(".gz") else content


@st.composite
def csv_files(draw) -> tuple[str, bytes]:
    """Name and bytes of a CSV file: cells of any text, lines that are too short or too long among them."""
    columns = draw(
        st.lists(st.sampled_from(["id", "prompt", "answer", "solution", "chosen", "rejected"]), min_size=1, max_size=4)
    )
    lines = [columns] + draw(st.lists(st.lists(texts, min_size=1, max_size=4), max_size=4))
    quote = draw(st.booleans())
    cells = [[f'"{cell.replace(chr(34), chr(34) * 2)}"' if quote else cell for cell in line] for line in lines]
    content = "\n".join(map(",".join, cells)).encode(errors="surrogatepass")
    return ("in.csv.gz", gzip.compress(content)) if draw(st.booleans()) else ("in.csv", content)


# Expressions and configurations ---------------------------------------------------------------------------------------

LATEX = [
    "\\frac{", "\\sqrt{", "}", "{", "(", ")", "^", "_", "!", "\\sum_{i=1}^{", "\\int_0^1", "\\binom{", "\\cdot", "\\times", "\\pi",
    "\\infty", "\\text{", "\\left(", "\\right)", "\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\", "\\lim_{x\\to 0}", "\\log", "\\gcd(",
    "x", "y", "e", "i", "=", "\\neq", "<", "\\leq", "\\in", "\\cup", "[", "]", "\\{", "\\}", ",", "+", "-", "*", "/", "**", "%", "|", ".",
    "0", "1", "2", "7", "99", "999", "10", "1e9", "0.5", "123456789", "$", "\\$", "\\boxed{", "####", " ", "\n", "the answer is", "A:",
    "\\prod_{n=1}^{", "mod", "\\bmod", "^{", "^\\circ", "\\%", "²", "½", "−", "\ud800", "\0", "and", "or", "\\mathbb{R}", "\\sin", "\\overline{",
]  # fmt: skip
expressions = st.one_of(
    st.lists(st.sampled_from(LATEX), min_size=1, max_size=14).map("".join),
    st.lists(st.sampled_from(["1", "2", "9", "99", "(", ")", "^", "!", "/", "+"]), min_size=1, max_size=12).map(
        "".join
    ),
    texts,
    answers,
)
solutions = st.one_of(
    st.lists(st.one_of(expressions, words), min_size=1, max_size=6).map(" ".join),
    st.tuples(st.sampled_from([*LATEX, "A: ", "answer is ", "\\boxed{{"]), st.sampled_from([40, 3000])).map(lambda t: t[0] * t[1]),
)  # fmt: skip
YAML_BYTES = [
    b"\xff\xfe", b"a: [", b"a: &a [*a]", b"{[1]: 2}", b"? {a: b}\n: c", b"2001-99-99", b"a: 2001-01-01", b"!!python/object:os.system x",
    b"a: !!binary aGk=", b"a: !!set {x}", b"model: {path: x}\nmodel: {path: y}", b"<<: 5", b"a: !!int x", b"a: " + b"[" * 3000,
    b"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\n"
    b"e: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\ng: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\nh: [*g,*g,*g,*g,*g,*g,*g,*g,*g]",
    b"\0", b"a: \x85", b"---\n---\n", b"a: .inf\nb: .nan", b"a: " + b"9" * 5000, b"a: 1:99:99", b"%YAML 9.9\n---\na: 1", b"a: !!float x",
]  # fmt: skip
