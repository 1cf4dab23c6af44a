"""Find the final answer of a solution, and compare it with the reference answer. Pure functions over text.

**Finding.** Thinking (`<think>…</think>`), Markdown marks, HTML tags, calculators' notes (`<<3+4=7>>`), struck words and what
follows an end-of-turn token are left out. Four rules are tried in this order. A rule without an answer gives way to the next
one. Of several matches of a rule the last one with an answer counts.

| rule | matches | `extracted` |
|---|---|---|
| `hash` | `#### 18 dollars` | `18` |
| `boxed` | `so \\boxed{\\frac{1}{2}}` | `\\frac{1}{2}` |
| `boxed` | `$x=\\boxed{3}$ or $x=\\boxed{5}$`; `$-\\boxed{10}$` | `3, 5`; `-10` |
| `answer_is` | `The answer is 5. Wait, the answer is 6.`; `The answer is 5. No, it's 6.` | `6` |
| `answer_is` | `## Final answer`, and `$$x+1$$` on the next line | `x+1` |
| `answer_is` | `A: 26`, `"answer": 26`, `<answer>26</answer>`, `答案是26。`, `La réponse est 26` | `26` |
| `answer_is` | `The answer is (C).`, `Option C is correct`, `(C)` alone | `C` |
| `last_number` | `She has **73 apples** after 4 days` | `73` |
| `last_number` | `So $x = \\frac{3}{4}$.`; `The roots are 5 and 7.`; `y = 2x + 3` | `\\frac{3}{4}`; `5 and 7`; `y = 2x + 3` |

A marker without an answer does not count: `#### Step 2` and `#### 1. Multiply` are headings, `The answer is below` is prose,
`If the answer is 5, …` is a supposition. A quantity is taken whole: `2 1/2`, `5 million`, `5 hours and 30 minutes`, `3:30`,
`5 or 7`, `5√2`, `(5, 7)`. Nouns after it are left out, and units are kept. `less than 5` and `half of 10` are no answers.

**Comparing.** Both texts are normalized (Unicode, LaTeX spacing and synonyms, Markdown). Then the first rule that applies decides:

| rule | equal | not equal |
|---|---|---|
| same text; spaces, and case of words, do not count | `\\dfrac12`, `\\frac{1}{2}` | |
| exact numbers: signs, groups, decimals, fractions, mixed, repeating, `e`, `10^n`, words | `2 1/2`, `2.5`; `0.\\overline{3}`, `1/3` | `0.333`, `1/3` |
| units: two known ones must agree; one alone, and nouns, do not count | `3 m`, `300 cm`; `3 m`, `3` | `3 m`, `3 cm` |
| per cent and dozens beside a bare number: with or without the factor | `5%`, `5`, `0.05` (each with the first) | `5%`, `0.5` |
| digits with a base; times and ratios by parts | `204_5`, `204_{5}`; `3:30 PM`, `3:30 p.m.` | `204_6`, `204_5` |
| lists and sets in any order, `±` as two; tuples, intervals and matrices by place | `3 and 5`, `5, 3` | `(1,2)`, `(2,1)`, `[1,2]` |
| one side defines a variable, or is an inequality | `x = 5`, `5`; `2<x<3`, `(2,3)` | `x+y=5`, `5` |
| words | `east`, `\\text{East}` | `east`, `seat` |
| anything else: math-verify, and both sides have the same value at sample points | `2\\sqrt{5}`, `\\sqrt{20}` | `1/2^{99}`, `1/2^{98}` |

Math-verify takes a decimal for an irrational number where six decimals agree: `1.4142136` equals `\\sqrt2`. Towers of powers,
integrals, sums, limits and answers of more than 300 characters are compared as text, because evaluating them may not end.
"""

from __future__ import annotations

import re
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

#: Longest answer that is compared as mathematics; longer ones are compared as text.
LONGEST_EXPRESSION = 300
#: How much of the end of a solution is searched: an answer stands at the end, and no input may cost unbounded time.
SEARCHED_TAIL = 20_000
#: Longest number that is compared by value, in digits, and largest power of ten.
LONGEST_NUMBER, LARGEST_EXPONENT = 1000, 1000
#: Longest time that math-verify has for one comparison, in seconds.
ENGINE_SECONDS = 5
#: Most markers that are tried, and how much of what follows one is read.
MOST_MARKERS, LONGEST_LINE = 50, 2000
#: Most elements of a list that are compared in any order.
LONGEST_LIST = 32


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


_seconds_left: ContextVar[float] = ContextVar("seconds_left", default=ENGINE_SECONDS)


# --- Characters and marks ----------------------------------------------------------------------------------------------

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_FRACTIONS = {
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5",
    "⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8",
}  # fmt: skip
#: Characters that mean the same in ASCII: full-width forms, signs, spaces.
_PLAIN = {
    **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)},
    **dict.fromkeys(map(ord, "−–‒﹣⁃"), "-"),
    **dict.fromkeys(map(ord, "\u00a0\u2007\u2009\u202f\u3000\u2002\u2003"), " "),
    **dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u2062\u2063"), None),
    **dict.fromkeys(map(ord, "“”„"), '"'), **dict.fromkeys(map(ord, "‘’"), "'"), ord("⁄"): "/", ord("、"): ",",
    **{ord(char): text for char, text in _FRACTIONS.items()},
}  # fmt: skip
_COMMANDS = {
    "×": r"\times ", "✕": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "∕": "/", "π": r"\pi ",
    "θ": r"\theta ", "φ": r"\phi ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "∞": r"\infty ",
    "≤": r"\leq ", "⩽": r"\leq ", "≥": r"\geq ", "⩾": r"\geq ", "≠": r"\neq ", "≈": r"\approx ", "∈": r"\in ",
    "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "±": r"\pm ", "°": r"^{\circ}", "ℝ": r"\mathbb{R}",
}  # fmt: skip


def _plain(text: str) -> str:
    """`text` with ASCII digits, signs, spaces and punctuation, and scripts as `^{…}` and `_{…}`."""
    if text.isascii():
        return text
    text = re.sub(rf"(?<=\d)\s*(?=[{''.join(_FRACTIONS)}])", " ", text).translate(_PLAIN)
    text = re.sub(r"(?:零下|负|負)(?=\d)", "-", text)
    if "分之" in text:
        text = re.sub(r"(?<!\d)(\d{1,15})\s*分之\s*(\d{1,15})", r"\2/\1", text)
    text = re.sub(r"[^\D0-9]", lambda m: str(unicodedata.decimal(m.group())), text)
    for opening, digits in (("^", _SUPERSCRIPTS), ("_", _SUBSCRIPTS)):
        text = re.sub(
            f"[{''.join(digits)}]+", lambda m, o=opening, d=digits: f"{o}{{{''.join(map(d.get, m.group()))}}}", text
        )
    return text


_EMPHASIS = [
    re.compile(rf"(?<![\w\\{mark[-1]}]){mark}(?=[^\s{mark[-1]}])(.{{0,300}}?[^\s{mark[-1]}\\]){mark}(?![\w{mark[-1]}])")
    for mark in (r"\*\*\*", r"\*\*", r"\*", "__", "_")
] + [re.compile(r"(?<!`)(`{1,2})(?!`)([^`\n]{1,300})\1(?!`)")]
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)\w*[ \t]*$", re.MULTILINE)
_MARKED = re.compile(r"\*\*|(?<![\w)\]}])[*_](?=\S)|`")


def _without_marks(text: str) -> str:
    """`text` without Markdown's bold, italics and code; a `*` or `_` of a formula stays."""
    if not _MARKED.search(text):
        return text
    for pattern in _EMPHASIS:
        text = pattern.sub(lambda m: m.group(m.lastindex), text)
    return _FENCE.sub("", text)


_THINKING = re.compile(r"(?:</|\[/)(?:think|thinking|thought|reasoning|scratchpad)[>\]]|◁/think▷", re.IGNORECASE)
_UNFINISHED_THINKING = re.compile(r"(?:<|\[)think(?:ing)?[>\]]|◁think▷", re.IGNORECASE)
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>]{1,40}\|>|</?s>|<eos>|<pad>|<(?:start|end)_of_turn>")
_END_OF_TURN = re.compile(
    r"(?<=\S)\s*(?:<\|(?:im_end|eot_id|endoftext|end|end_of_text|eom_id)\|>|</s>|<end_of_turn>|<eos>)"
)


def _spoken(text: str) -> str:
    """What a solution says after its thinking, without special tokens. Thinking that does not end says nothing."""
    if "</" in text or "[/" in text or "think" in text or "<|" in text or "<e" in text:
        text = text.rpartition("<|channel|>final<|message|>")[2]
        text = text[max((match.end() for match in _THINKING.finditer(text)), default=0) :]
        if opened := _UNFINISHED_THINKING.search(text):
            text = text[: opened.start()]
        text = _SPECIAL_TOKEN.sub(" ", _END_OF_TURN.split(text.lstrip(), maxsplit=1)[0])
    return text


# --- Numbers and units --------------------------------------------------------------------------------------------------

_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|max|min|gcd|lcm|det"
_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d{1,3}(?:[ ]\d{3})+(?![\d/])|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d+)?|\.\d+)"
_FRACTION = r"\\[dtc]?frac\s*(?:\{\s*[-+]?[\d.,]+\s*\}|\d)\s*(?:\{\s*[-+]?[\d.,]+\s*\}|\d)"
_POWER_OF_TEN = (
    r"(?:[eE][-+]?\d+(?!\w)|\s*(?:\\times|\\cdot|[x×·*])\s*10\s*(?:\^|\*\*)\s*(?:\{\s*[-+]?\d+\s*\}|[-+]?\d+))"
)
_CURRENCY = r"(?:(?:US|AU|CA|HK|NT)?\\?[$]|[€£¥₹₩₽₺₫฿₱₦]|(?:USD|EUR|GBP|Rs\.?)\s?)"
_NUMBER = (
    rf"[-+]?(?:{_CURRENCY}[ ]?[-+]?)?(?:\d*\.\d*\(\d+\)|\d+(?::\d+)+(?!\d)|\d+[ ]:[ ]\d+|\d*\.\d*\\overline\s*\{{\d+\}}|{_INTEGER}\s*{_FRACTION}|{_FRACTION}"
    rf"|{_INTEGER}[ ]\d+/\d+(?!\d)|{_DECIMAL}(?:\s*/\s*\d+)?){_POWER_OF_TEN}?(?:\s*\\?%)?"
)
_NUMBER_AT_START = re.compile(rf"(?:=\s*)?({_NUMBER})")
# A number begins at no letter, digit, point or exponent sign; signs and symbols of calculations may precede it.
_NUMBER_ANYWHERE = re.compile(rf"(?<![A-Za-z0-9_.^\\])(?<!\^\{{)(?<!_\{{){_NUMBER}|(?<=[=>*+/(]){_NUMBER}")
_GROUPS = re.compile(r"(?<=\d)(?:\\[,!;:]|\{,\}|,\\!|\\ |(?<=\d)'(?=\d{3}'|\d{3}\b))+\s?(?=\d{3}(?!\d))")

#: Words that multiply the number before them.
_SCALES = {
    word: scale
    for scale, words in (
        (10**2, "hundred 百"), (10**3, "thousand thousands тысяча тысячи тысяч mil 千 천"), (10**4, "万 萬 만"), (10**5, "lakh"),
        (10**6, "million millions millionen millones milhões миллион миллиона миллионов"), (10**7, "crore"), (10**8, "亿 億 억"),
        (10**9, "billion billions"), (10**12, "trillion trillions"),
    )
    for word in words.split()
}  # fmt: skip
_NUMBER_WORDS = {
    word: str(number)
    for numbers, words in (
        (range(21), "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
                    " eighteen nineteen twenty"),
        (range(30, 101, 10), "thirty forty fifty sixty seventy eighty ninety hundred"),
    )
    for number, word in zip(numbers, words.split(), strict=True)
}  # fmt: skip
#: Units by dimension, in the dimension's first unit. Others are nouns, which verdicts do not depend on.
_DIMENSIONS: dict[str, dict[str, Fraction]] = {
    "length": {
        "m meter meters metre metres 米 メートル 미터": Fraction(1), "mm millimeter millimeters millimetre millimetres": Fraction(1, 1000),
        "cm centimeter centimeters centimetre centimetres 厘米 公分": Fraction(1, 100), "km kilometer kilometers kilometre kilometres 公里 千米": Fraction(1000),
        "in inch inches": Fraction(254, 10000), "ft foot feet": Fraction(3048, 10000), "yd yard yards": Fraction(9144, 10000),
        "mi mile miles": Fraction(1609344, 1000),
    },
    "mass": {
        "g gram grams 克": Fraction(1), "mg milligram milligrams": Fraction(1, 1000), "kg kilogram kilograms kilo kilos 千克 公斤": Fraction(1000),
        "oz ounce ounces": Fraction(28349523125, 10**9), "lb lbs pound pounds": Fraction(45359237, 10**5),
    },
    "time": {
        "s sec secs second seconds 秒 초": Fraction(1), "min mins minute minutes 分钟 分鐘 分 분": Fraction(60),
        "h hr hrs hour hours 小时 小時 時間 시간 时": Fraction(3600), "day days 天 日 일": Fraction(86400), "week weeks": Fraction(7 * 86400), "ms millisecond milliseconds": Fraction(1, 1000),
    },
    "half of the day": {"am a.m": Fraction(1), "pm p.m": Fraction(-1)},
    "calendar": {"month months": Fraction(1), "year years yr yrs": Fraction(12)},
    "volume": {
        "l liter liters litre litres": Fraction(1), "ml milliliter milliliters millilitre millilitres": Fraction(1, 1000),
        "gallon gallons gal": Fraction(3785411784, 10**9), "quart quarts qt": Fraction(946352946, 10**9),
        "pint pints pt": Fraction(473176473, 10**9),
    },
    "dollar": {"dollar dollars usd": Fraction(1), "cent cents ¢": Fraction(1, 100)},
    "euro": {"euro euros eur €": Fraction(1)}, "yuan": {"元": Fraction(1), "角": Fraction(1, 10)}, "dozen": {"dozen": Fraction(12)},
    "angle": {"degree degrees deg": Fraction(1), "radian radians rad": Fraction(0)},
    "speed": {"mph": Fraction(1609344, 3600000), "km/h kmh kph": Fraction(1, 1) * 1000 / 3600},
}  # fmt: skip
_UNITS = {
    name: (dimension, factor)
    for dimension, units in _DIMENSIONS.items()
    for names, factor in units.items()
    for name in names.split()
}
_CURRENCIES = {"$": ("*dollar^1", Fraction(1)), "US$": ("*dollar^1", Fraction(1)), "€": ("*euro^1", Fraction(1))}
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_LETTER = r"A-Za-zÀ-ÿ\u0400-\u04ff"
_UNIT_WORD = re.compile(
    rf"\s*(?:per\s+|/\s*|\\cdot\s*)?(?:[{_LETTER}¢][{_LETTER}'.-]*|千[克米瓦]|[百千万萬亿億천만억]|[{_CJK}]+|[€£¥₹₩₽₺₫฿₱₦$])(?:\^\{{?-?\d\}}?|[23](?!\w))?"
)
#: Words that end a quantity, or that make another one of it.
#: Words of mathematics, which no noun is.
_MATH_WORDS = re.compile(rf"(?:{_FUNCTIONS}|pi|root|infinity|infty)(?![a-z])")
_ENDS_QUANTITY = _words(
    "a an as at after instead rather altogether because before but by each for from given he her his how i if in into is it its left of on"
    " our per remaining she since so than that the their then there therefore they this thus total until we what when where"
    " which while who will with was were are has have had would not"
)
_CHANGES_QUANTITY = _words(
    "and or to plus minus times divided multiplied over by mod base remainder root sqrt squared cubed half halves thirds fifths sixths sevenths eighths ninths tenths hundredths"
    " thousandths choose factorial more less fewer than tens hundreds below más fois mal"
)


@dataclass(frozen=True)
class _Quantity:
    """A number with its unit: `dimension` is "" without one; `factor` converts it to the dimension's first unit."""

    value: Fraction
    dimension: str = ""
    factor: Fraction = Fraction(1)
    #: Factor of the last of several units.
    last: Fraction | None = None
    percent: bool = False

    def equals(self, other: _Quantity) -> bool:
        if self.dimension and other.dimension:
            return self.dimension == other.dimension and self.value * self.factor == other.value * other.factor
        if self.percent and other.percent:
            return self.value == other.value
        return not self._values().isdisjoint(other._values())

    def _values(self) -> set[Fraction]:
        """What it stands for beside a bare number: 5 % for 5 and 0.05, 3 dozen for 3 and 36, 1 h 30 min for 1.5 and 90."""
        values = {self.value, self.value / 100} if self.percent else {self.value}
        values |= {self.value * self.factor} if self.dimension == "*dozen^1" else set()
        return values | ({self.value * self.factor / self.last} if self.last else set())


_EXACT = re.compile(
    rf"""(?P<sign3>[-+]?)10\^\{{(?P<ten>[-+]?\d+)\}}|(?P<sign>[-+]?)\s*(?:(?P<currency>{_CURRENCY})\s*(?P<sign2>[-+]?)\s*)?(?:
        (?P<begin>\d*)\.(?P<fixed>\d*)\\overline\{{(?P<repeat>\d+)\}}
      | (?P<whole>{_INTEGER})(?:\s*\\frac\{{(?P<top>\d+)\}}\{{(?P<bottom>\d+)\}}|[ ](?P<top2>\d+)/(?P<bottom2>\d+)|[ ]and[ ](?P<top3>\d+)/(?P<bottom3>\d+)|[ ]and[ ]a[ ](?P<half>half)\b)
      | \\frac\{{\s*(?P<numerator>[-+]?{_DECIMAL})\s*\}}\{{\s*(?P<denominator>[-+]?{_DECIMAL})\s*\}}
      | (?P<decimal>{_DECIMAL}|\d+\.)(?:\s*/\s*(?P<over>{_DECIMAL}))?
    )(?P<power>{_POWER_OF_TEN})?(?P<percent>\s*%)?""",
    re.VERBOSE,
)


def _value(text: str) -> Fraction:
    return Fraction(re.sub(r"[, ]", "", text).rstrip("."))


def _exact(match: re.Match[str]) -> Fraction | None:
    """The value of a match of `_EXACT`; `None` where it has none, or is too large to be computed."""
    found = match.groupdict()
    if len(match.group()) > LONGEST_NUMBER:
        return None
    try:
        exponent = int(re.search(r"[-+]?\d+\s*\}?$", found["power"]).group().rstrip("} ")) if found["power"] else 0
        if found["ten"]:
            exponent, value = int(found["ten"]), Fraction(1)
        elif found["repeat"]:
            shift, nines = 10 ** len(found["fixed"]), 10 ** len(found["repeat"]) - 1
            value = Fraction(int(found["begin"] + found["fixed"] or "0")) / shift
            value += Fraction(int(found["repeat"]), nines * shift)
        elif found["whole"]:
            top, bottom = (
                ("1", "2")
                if found["half"]
                else tuple(found[f"{part}"] or found[f"{part}2"] or found[f"{part}3"] for part in ("top", "bottom"))
            )
            value = _value(found["whole"]) + Fraction(int(top), int(bottom))
        elif found["numerator"]:
            value = _value(found["numerator"]) / _value(found["denominator"])
        else:
            value = _value(found["decimal"]) / (_value(found["over"]) if found["over"] else 1)
        if abs(exponent) > LARGEST_EXPONENT:
            return None
    except (ValueError, ZeroDivisionError):
        return None
    negative = (found["sign"], found["sign2"], found["sign3"]).count("-") % 2
    return (-value if negative else value) * Fraction(10) ** exponent


def _number_with_unit(text: str) -> tuple[_Quantity, str] | None:
    """The quantity that a normalized text begins with, and what follows it."""
    match = _EXACT.match(text)
    if match is None or (value := _exact(match)) is None:
        return None
    rest = text[match.end() :]
    unit = re.sub(r"\\text\{([^{}]*)\}", r" \1", rest)
    glued = unit[:1].isalpha()
    dimension, factor = _CURRENCIES.get((match["currency"] or "").strip("\\ "), ("", Fraction(1)))
    if degrees := re.match(r"\s*\^\{\\circ\}", unit):
        unit, dimension = unit[degrees.end() :], "*angle^1"
    words, position = [], 0
    while len(words) < 6 and (word := _UNIT_WORD.match(unit, position)):
        name = word.group().strip()
        plain = name.rstrip(".").lower()
        noun = plain == "times" and not unit[word.end() :].strip()
        if _is_variable(name, glued and not words) or (plain in _CHANGES_QUANTITY and not noun):
            break
        position = word.end()
        if not words and plain in _SCALES:
            value *= _SCALES[plain]
        else:
            words.append(name)
    found, _ = _longest_unit(words)
    if found is not None and not dimension:
        dimension, factor = found
    return _Quantity(value, dimension, factor, percent=bool(match["percent"])), unit[position:].strip()


def _is_variable(name: str, glued: bool) -> bool:
    """Whether a word behind a number is mathematics: 5x, 5 x, 5 pi, 5 xy; 5 m is a length, 5m may be a product."""
    letters = re.match(r"[A-Za-z]+", name)
    if letters is None or name[letters.end() :][:1] in ("'", "-"):
        return False
    known = letters.group() in _UNITS or (len(letters.group()) > 1 and letters.group().lower() in _UNITS)
    if len(letters.group()) == 1:
        return glued or not known
    return not known and (
        _MATH_WORDS.match(letters.group()) is not None
        or (len(letters.group()) == 2 and letters.group() not in _SHORT_WORDS)
    )


_SHORT_WORDS = _words(
    "sq st nd rd th an as at by go he if in is it me my no of on or so to up us we am pm tv id pt EUR USD"
)


def _unit(words: list[str]) -> tuple[str, Fraction] | None:
    """Dimension and factor of a unit's words; `None` where one of them is a noun, or there are none."""
    dimension, factor, power = "", Fraction(1), 1
    for word in words:
        plain = word.rstrip(".")
        for prefix, exponent in (("平方", 2), ("立方", 3)):
            if plain.startswith(prefix):
                plain, power = plain.removeprefix(prefix), exponent
        if plain.lower() in ("square", "sq", "cubic"):
            power = 3 if plain.lower() == "cubic" else 2
            continue
        match = re.fullmatch(r"(per\s+|/\s*)?(.*?)(?:\^?\{?(-?\d)\}?)?", plain)
        name = match.group(2)
        known = _UNITS.get(name.lower() if len(name) > 1 or name in "LS" else name)
        if known is None:
            return None
        power = int(match.group(3) or power) * (-1 if match.group(1) else 1)
        dimension, factor, power = f"{dimension}*{known[0]}^{power}", factor * (known[1] or 1) ** power, 1
        if known[1] == 0:  # an angle in radians is not one in degrees
            dimension += "radians"
    return (dimension, factor) if dimension else None


def _longest_unit(words: list[str]) -> tuple[tuple[str, Fraction] | None, int]:
    """The unit that the words begin with, and how many of them it is."""
    found = ((unit, length) for length in range(len(words), 0, -1) if (unit := _unit(words[:length])))
    return next(found, (None, 0))


def _quantity(text: str) -> _Quantity | None:
    """A normalized text as a quantity: a number with or without a unit, or several of one dimension ("5 feet 6 inches")."""
    text = text.strip()
    if not text or not (text[0].isdigit() or text[0] in "-+.($€£¥₹₩₽₺₫฿₱₦\\URHNAECG"):
        return None
    text = re.sub(r"(?<=\S)\s*(?:\\text\{\s*)?\([^()\d]*\)\s*\}?$", "", text)
    if inner := re.fullmatch(r"\(([^()]*)\)", text):
        text = inner.group(1).strip()
    found = _number_with_unit(text)
    if found is None:
        return None
    total, rest = found
    while rest:
        following = _number_with_unit(re.sub(r"^(?:,\s*)?(?:and\s+|\\text\{\s*and\s*\}\s*)?", "", rest))
        if following is None or not total.dimension or following[0].dimension != total.dimension:
            return None
        part, rest = following
        value = total.value * total.factor + part.value * part.factor
        total = _Quantity(value / total.factor, total.dimension, total.factor, last=part.factor)
    return total


# --- Finding ------------------------------------------------------------------------------------------------------------

_SENTENCE_END = re.compile(r"[.?](?=\s|$)|!(?=\s+\S|\s*$)|[;。？！]|\n|[.](?=[\"')\]]*(?:\s|$))")
_ASIDE = re.compile(
    r",?\s+\(?(?:since|because|so|which|where|when|as|giving|given|for\s+all|if|after|once|who)\b|\s+\((?=[a-z]{2,})|,\s+(?=[a-z]{2,}\b(?<!and)(?<!or))"
)
_FILLER = re.compile(
    r"(?:(?:=>|->|[→⇒•]|-(?=\s)|(?:donc|alors|entonces|pues|quindi|also)\b|(?:a|an|the)\s+(?=[a-z]+\W*$)|as\s+follows|approximately|approx\.?|about|around|roughly|nearly|almost|exactly|precisely|therefore|thus|hence|then|simply|just"
    r"|indeed|clearly|still|actually|also|now|so|equal\s+to|equals|given\s+by|(?:a|the)\s+total\s+(?:of\s+|is\s+)?|(?:the\s+)?(?:number|value|option|choice|letter)"
    r"(?=\s+[\d(\\$A-J])|\\approx|\\therefore|[:=≈~,])\s*)+",
    re.IGNORECASE,
)
_NOT_BUT = re.compile(r"\b(?:is\s+)?not\s[^\n.;]{1,60}?[,;]?\s+but\s+(?:rather\s+|is\s+)?", re.IGNORECASE)
_QUALIFIED = re.compile(
    r"\b(?:not|n't|never|less|fewer|more|greater|least|most|under|over|between|half|twice|double|triple|than|except|without|sum|product|difference|quotient|squared?|multiple|divisible|divisor|factor|power)\b",
    re.IGNORECASE,
)
_NO_ANSWER_WORDS = _words(
    "correct right wrong incorrect clear obvious below above follows following here unknown as not simple simply found given obtained calculated"
    " computed determined the a an that this it we let first step conclusion final answer so thus therefore what how which in"
)
_MATH_SPAN = re.compile(
    r"\$\$(.{1,1000}?)\$\$|\\\[(.{1,1000}?)\\\]|\\\((.{1,1000}?)\\\)|\$(?![\s$])((?:\\\$|[^$\n]){1,1000}?)(?<!\\)(?<!\s)\$(?!\d)",
    re.DOTALL,
)
# After a number: what makes it a part of a larger expression.
_GOES_ON = re.compile(
    r"\s*(?:\)?_\{?\d|['′\"″]\s*\d|\+/-|~\s*\d|\.\.\.?\s*\d|[-–]\d|\(or\b|\(?(?:base|mod)\s|[\^_√±≤≥<>∞≡\u0370-\u03ff]|\\(?!%|text|mathrm|mbox|textrm|textbf|operatorname|[,;:! )\]]|quad|\$|circ)|!(?![\s.]*$)(?!\s+[A-Z])|\{|[*/×÷·=](?!\*)"
    r"|[-+](?=\s*(?:[\d\\($.]|[A-Za-z](?![a-z])))|\((?!\s*[A-Za-z])|\.\d|:\d)|[A-Za-z](?![A-Za-z])(?<![ghmsLl])|[A-Za-z]\w*[*^(\\+-]|\d"
)
_LISTS_ON = re.compile(
    r"\s*[或和又至到や]\s*\d|\s*;\s*\d|\s*(?:→|->|=>|≈)\s*\d|\s*(?:,\s*)?(?:\$\s*)?(?:or|and|to|&|through|out\s+of|ou|et|y|e|o|oder|und|или|и)\s+(?:\$?-?\.?\d|\\[a-z]|\$|a\s+half\b|[a-z]\s*=)|\s*,\s*(?:and\s+|or\s+)?(?:[-$]|\\(?!boxed|fbox)[a-z(]|\d|[a-z]\s*=)",
    re.IGNORECASE,
)


def extract_answer(text: str) -> tuple[str | None, str | None]:
    """Find the final answer by the rules of this module.

    Returns:
        The answer and the name of the rule; both `None` where nothing is found. Never raises, whatever the text.
    """
    text = _cleaned(_plain(_spoken(text)[-SEARCHED_TAIL:]))
    turns = _NEXT_QUESTION.split(text)
    for rule, find in _RULES:
        # A base model may go on with the next question; what it marks in its first answer counts.
        marked = next((answer for turn in turns[:-1] if rule != "last_number" and (answer := find(turn))), None)
        if answer := marked or find(text):
            return answer, rule
    return None, None


_NEXT_QUESTION = re.compile(r"\n[ \t]*(?:Question|Q|Problem|User|Human|### Instruction)\s*:")
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
_HTML = re.compile(r"</?(?:b|i|em|strong|u|p|span|div|br|h\d|sup|sub|center)\b[^<>\n]{0,80}>", re.IGNORECASE)
_STRUCK = re.compile(r"~~[^~\n]{1,200}~~")
_NEGATIVE = re.compile(
    r"\b(?:negative|(?<=is )minus|(?<=be )minus|(?<=: )minus|(?<== )minus|(?<=es )menos|(?<=est )moins)\s+(?=[$]?\d)",
    re.IGNORECASE,
)


def _cleaned(text: str) -> str:
    """`text` without calculators' notes, HTML tags and struck words; digits in groups have commas."""
    if "\\" in text or "{,}" in text or "'" in text:
        text = _GROUPS.sub(",", text)
    if "<" in text:
        text = _HTML.sub(" ", _CALCULATOR.sub("", text))
    text = _STRUCK.sub("", text) if "~~" in text else text
    text = _SPACED_SIGN.sub(r"\1-", text) if " - " in text else text
    return _NEGATIVE.sub("-", text) if any(word in text for word in ("egative", "minus", "menos", "moins")) else text


_SPACED_SIGN = re.compile(r"((?:=|:|\bis) )- (?=\d)")


_HASH = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)")
_FACTORIAL = re.compile(r"\d+!")
_ENUMERATED = re.compile(
    r"\d+\s*(?:[.):]\s+\S|\s[A-Z])|(?:step|part|case|section|explanation|note|check|verification)\b", re.IGNORECASE
)
_LABEL = re.compile(
    r"(?:(?:the|my|our|so)\s+)*(?:final\s+|correct\s+)?(?:answer|result|solution|conclusion)\b", re.IGNORECASE
)


def _find_hash(text: str) -> str | None:
    if "####" not in text:
        return None
    for match in reversed(list(_HASH.finditer(text))):
        line = _without_marks(match.group(1)[:LONGEST_LINE]).strip()
        below = text[match.end() :].strip()
        heading = text.rfind("\n", 0, match.start()) + 1 == match.start() and below != ""
        if not line or _LABEL.match(line) or (heading and (_ENUMERATED.match(line) or _is_prose(line))):
            continue
        if heading and re.search(r"\d", below) and not _NUMBER_AT_START.fullmatch(line):
            continue  # a title with a number, and the working below
        line = _LABELLED.sub("", line)
        if answer := line if _FACTORIAL.fullmatch(line) else _leading_answer(line, prose=False):
            return answer
    return None


_LABELLED = re.compile(r"^(?:[A-Za-z]+ ?){1,4}:\s*(?=[-$(]?\d)")


def _is_prose(line: str) -> bool:
    """Whether a line has words and does not begin with a number or formula: below a heading's `####`, a title."""
    return re.match(r"[-+(]?\s*(?:[\d.$€£¥₹\\]|[A-Za-z]\s*[=<>]|[A-Za-z]\W?$)", line) is None


def boxed_answer(text: str) -> str | None:
    """The last box that is closed and holds something, braces balanced; boxes that a connective joins are one list.

    One pass finds it, however many boxes are left open.
    """
    if "boxed" not in text and "fbox" not in text:
        return None
    boxes = {match.end(): match.start() for match in re.finditer(r"\\(?:boxed|fbox)\s*{", text)}
    opened: list[int] = []
    closed: list[tuple[int, int, str]] = []  # where each box begins and ends, and what is in it; no box within another
    for brace in re.finditer(r"(?<!\\)[{}]", text) if boxes else ():
        if brace.group() == "{":
            opened.append(brace.end())
        elif opened and (start := opened.pop()) in boxes and (not closed or start > closed[-1][0]):
            inside = text[start : brace.start()].strip()
            if _holds_answer(inside):
                closed.append((boxes[start], brace.end(), inside))
    if not closed:
        bare = re.findall(r"\\(?:boxed|fbox)\s+([-+]?[\w.]+)", text)
        return bare[-1].rstrip(".") if bare else None
    answers, (first, end, inside), joint = [], closed[-1], ", "
    for begun, before, answer in reversed(closed[:-1]):
        between = _BETWEEN_BOXES.fullmatch(text[before:first])
        if not between or (between.group(1) and not _known(between.group(1))):
            break
        answers.insert(0, " ".join(filter(None, (answer, between.group(1)))))
        joint = ":" if ":" in between.group() else ", "
        first = begun
    if not answers:
        return _around_box(text, first, end) or _of_box(inside)
    unit = re.match(r"[\s$]*(?:\\text\s*\{)?\s*([A-Za-z]{1,12})", text[end:]) if " " in answers[-1] else None
    return joint.join([*answers, f"{inside} {unit.group(1)}" if unit else inside])


def _around_box(text: str, start: int, end: int) -> str | None:
    """The expression that a box is a part of: `-\\boxed{10}`, `\\boxed{2}\\pi`; `None` where it is a whole side of its formula."""
    before, after = text[max(0, start - 200) : start], text[end : end + 200]
    left = re.split(r"\$|\\[(\[]|=|\n|\\approx|:|\\text\s*\{[^{}]*\}", before)[-1]
    right = re.split(r"\$|\\[)\]]|[=,;]|\n|\\text|\\q?quad|\.(?:\s|$)|\\[,; ]|\s[A-Za-z]{2}", after)[0]
    if not (_GREW.search(left) or _GROWS.match(right)):
        return None
    whole = left + text[start:end] + right
    braces = r"{\1}" if "\\" in left + right or "_" in right or "^" in right else r"\1"
    return _trim(re.sub(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}", braces, whole)) or None


_GREW = re.compile(r"(?:[-+/*^_×]|(?<![A-Za-z])\d|\\(?:times|cdot|pm)\s*|\\(?:frac|sqrt)\s*\{?|\}\s*\{)\s*$")
_GROWS = re.compile(
    r"\s*(?:[\^_+*/-](?=\s*[\w\\{(])|!(?=\s*$)|\\(?:pi|sqrt|times|cdot|frac|cup|pm|cdots)|[A-Za-z](?![A-Za-z]))"
)


def _of_box(inside: str) -> str:
    """What a box holds; where it begins with words before a number, the number."""
    if re.match(r"\\(?:text|textbf|mathrm|mbox)\s*\{\s*[A-Za-z]", inside) and re.search(r"\d", inside):
        words = re.sub(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}", r"\1 ", inside)
        return _find_answer_is(words) or _leading_answer(words, prose=True) or inside
    return inside


_BETWEEN_BOXES = re.compile(
    r"[ \t$]*(?:\\[)\]])?[ \t$]*(?:\\text\s*\{)?\s*((?!and\b|or\b)[A-Za-z]{1,12})?\s*"
    r"(?:[,;:&+]|[,;]?\s*(?:and|or)(?:\s+also)?|\([a-z]\)|\}|(?<=[a-z])\s)[}\s$]*(?:\\[(\[])?\s*(?:[A-Za-z]\s*=\s*)?[ \t$]*"
)


def _holds_answer(inside: str) -> bool:
    bare = re.sub(r"\\(?:text|textbf|mathrm|mbox)\b|[\s{}$?._…-]|\\[ldc]?dots|\\,|\\ ", "", inside)
    return bool(bare) and bare.lower() not in ("answer", "finalanswer", "youranswer")


_VERB = r"(?:is|are|equals|=|:|was|(?:should|must|will|would)\s+be|comes\s+(?:out\s+)?to)"
_ANSWER_LINE = re.compile(
    r"^[ \t>#*\"'{(-]*(?:(?:the|my|our)\s+)?(?:(?:final|correct)\s+)?(?:answers?|A)[ \t*\"']*(?:\([^()\n]{0,40}\)[ \t*]*)?(?:[:=]|$)",
    re.IGNORECASE | re.MULTILINE,
)
_HEADING = re.compile(
    r"^[ \t]*#{1,6}[ \t]*(?:\d+[.)][ \t]*)?(?:\*\*)?(?:the[ \t]+)?(?:final[ \t]+)?(?:answer|result|solution|conclusion)(?:\*\*)?[ \t]*:?[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
_ANSWER_IS = re.compile(
    rf"\b(?:answer|(?:correct|right|best)\s+(?:option|choice))\b[^\n.:>]{{0,40}}?(?:\b(?=[a-z])|(?<![a-z])){_VERB}(?![a-z])[\"']?[ \t]*:?",
    re.IGNORECASE,
)
_CORRECTION = re.compile(
    r"\b(?:no|wait|actually|sorry|hmm|however|really|correction|i\s+mean|or\s+rather)\b[,:]?\s*(?:(?:no|wait|actually|sorry)[,:]?\s*)*"
    r"(?:(?:it|that)(?:'s|\s+is|\s+should\s+be)\s+)?(?=[$\\*(-]{0,3}\d)",
    re.IGNORECASE,
)
#: An answer that is only supposed: "if the answer is 5", "one might think the answer is 5".
_SUPPOSED = re.compile(r"\b(?:if|whether|suppose|think|say|assume|that)\s+(?:that\s+)?the\s+$", re.IGNORECASE)
_CHOSEN = re.compile(
    r"(?:故|答案|应|因此)?选(?:项)?(?:择)?\s*(?:是|为)?\s*(?=\W{0,3}[A-J]\b)"
    r"|\b(?:final\s+choice|correct\s+option|option|i\s+choose|ans)\s*:?\s*(?=\(?[A-J]\)?(?:\W*$|\s+is\s))",
    re.IGNORECASE | re.MULTILINE,
)
_ANSWER_TAG = re.compile(r"<answer>(?=(.{1,2000}?)</answer>)", re.IGNORECASE | re.DOTALL)
_OTHER_LANGUAGES = re.compile(
    r"(?:答案|答え|答|정답|답)\s*(?:应该是|應該是|是|为|為|は|은|는|:)\s*:?"
    r"|\b(?:respuesta|réponse|Antwort|resposta|risposta|ответ|antwoord)\b[^\n.:]{0,30}?(?:\b(?:es|est|ist|lautet|é|è|is)\b|:|=|—)\s*:?",
    re.IGNORECASE,
)


def _find_answer_is(text: str) -> str | None:
    foreign = not text.isascii() or any(sign in text for sign in _FOREIGN_SIGNS)
    said, chosen = any(sign in text for sign in _SAID_SIGNS), any(sign in text for sign in _CHOSEN_SIGNS)
    if not (foreign or said or chosen or any(sign in text for sign in _LABEL_SIGNS)):
        return _lone_option(text)
    text = _without_marks(text)
    labels = [match.end() for match in _ANSWER_LINE.finditer(text)]
    labels += [match.end() for match in _HEADING.finditer(text)] if "#" in text else []
    sentences = _marked_sentences(text) if said or chosen else []
    sentences += [match.end() for match in _CHOSEN.finditer(text)] if chosen else []
    sentences += [match.end() for match in _OTHER_LANGUAGES.finditer(text)] if foreign else []
    tags = {match.end(): match.end(1) for match in _ANSWER_TAG.finditer(text)} if said and "<" in text else {}
    for start in sorted({*labels, *sentences, *tags}, reverse=True)[:MOST_MARKERS]:
        if start in tags:
            answer = _leading_answer(text[start : tags[start]].strip(), prose=True)
        else:
            answer = _after_marker(text, start, start in labels)
        if answer:
            return answer
    return _lone_option(text)


def _marked_sentences(text: str) -> list[int]:
    """Where the answers of sentences begin: of "the answer is", where it is not only supposed, and of corrections after it."""
    marked = [
        m.end() for m in _ANSWER_IS.finditer(text) if not _SUPPOSED.search(text[max(0, m.start() - 40) : m.start()])
    ]
    return marked + ([match.end() for match in _CORRECTION.finditer(text, marked[0])] if marked else [])


#: Texts without these signs have no marker: most of them are told apart without a search.
_SAID_SIGNS, _CHOSEN_SIGNS, _LABEL_SIGNS = (
    ("nswer", "NSWER"),
    ("ption", "hoice", "choose", "ns:", "选"),
    ("A:", "A =", "#"),
)
_FOREIGN_SIGNS = ("respuesta", "Antwort", "resposta", "risposta", "antwoord")


def _lone_option(text: str) -> str | None:
    """The letter that a whole text is: "(B)"; or that its last line calls correct: "Option B is correct"."""
    line = text.strip()[-80:].rpartition("\n")[2]
    if len(line) > 60 or not (found := _LONE_OPTION.fullmatch(line)):
        return None
    return found.group(2) or (found.group(1) if len(text.strip()) == len(line) else None)


_LONE_OPTION = re.compile(
    r"\**\(?([A-J])\)?[.]?\**|(?:thus|so|therefore|hence)?,?\s*(?:option|choice|answer)\s+\(?([A-J])\)?\s+is\s+(?:the\s+)?(?:correct|right|best)[^\n]{0,20}",
    re.IGNORECASE,
)


def _after_marker(text: str, start: int, label: bool) -> str | None:
    """The answer that follows a marker, on its line or, where that is empty, below it."""
    text = text[start : start + LONGEST_LINE]
    if quoted := re.match(r'[ \t:]*"([^"\n]+)"[ \t]*[,}\n]', text):
        return _leading_answer(quoted.group(1).replace("\\\\", "\\"), prose=True)
    line, _, below = text.partition("\n")
    if not line.strip(_AROUND) or line.strip(_AROUND) in ("$$", "\\[", "\\("):
        text = text.lstrip(_AROUND + "\n")
        line, _, below = text.partition("\n")
        if not _MATH_SPAN.match(text) and _is_prose(line) and re.search(r"\d", below):
            return None  # working follows, not an answer
    if (span := _MATH_SPAN.match(text.lstrip(_AROUND))) and "\n" in span.group():
        line, below = span.group(), ""
    later = label and re.search(r"\d", below) is not None
    return _leading_answer(line.strip(_AROUND), prose=not later)


_AROUND = " \t*:\"'"


def _leading_answer(rest: str, prose: bool) -> str | None:
    """The answer that a text begins with; `None` where it does not begin with one.

    Args:
        rest: what follows a marker.
        prose: whether the one number of a sentence in words counts ("that she has 5 apples").
    """
    rest = rest[:LONGEST_LINE].lstrip("> ")
    rest = _trim(rest.split("\n")[0] if "$$" not in rest and "\\[" not in rest else rest)
    rest = _NOT_BUT.sub("", rest, count=1)
    if filler := _FILLER.match(rest):
        rest = rest[filler.end() :].strip()
    if not rest or re.match(r"(?:not|n't|never|cannot)\b", rest, re.IGNORECASE):
        return None
    if rest.startswith(("\\boxed", "\\fbox")) and (boxed := boxed_answer(rest)):
        return boxed
    if span := _MATH_SPAN.match(rest):
        return _answer_of_math(span, rest)
    if spelled := re.match(r"[a-z-]+\s\((\d+)\)", rest):
        return spelled.group(1)
    if correct := re.match(r"\(?([A-J])\)?\s+is\b", rest):
        return correct.group(1)
    if option := _OPTION.match(rest):
        return option.group(1) if not rest[option.end() :].strip(" .,") else _sentence(rest, asides=True)
    if assigned := _ASSIGNED.match(rest):
        return _leading_number(rest[assigned.end() :]) or _sentence(rest)
    if number := _leading_number(rest):
        return number
    sentence = _sentence(rest)
    if re.search(r"[\\^=+*/√_(){}<>\[\]]", sentence) or not _TWO_WORDS.search(sentence):
        first = sentence.split(" ", 1)[0].strip(",.:;").lower()
        return _result(sentence) if sentence and first not in _NO_ANSWER_WORDS and _holds_answer(sentence) else None
    return _answer_in_words(sentence, prose)


_OPTION = re.compile(
    r"(?:[Oo]ption|[Cc]hoice)?\s*\(?([A-J]|[a-j](?=\)|\W*$))\)?(?=[.\s,]*$|\)\s|\.\s|:\s|,\s|\s+[-–(])"
)
_ASSIGNED = re.compile(r"\$?(?:[A-Za-z](?:_\{?\w\}?)?(?:\([a-z]\))?|[A-Za-z ]{2,20})\s*=\s*(?=\S)")
_TWO_WORDS = re.compile(rf"[A-Za-z]{{2,}} [A-Za-z]{{2,}}|[{_CJK}]{{2,}}")


def _answer_in_words(sentence: str, prose: bool) -> str | None:
    numbers = list(_NUMBER_ANYWHERE.finditer(sentence))
    if not numbers:
        words = sentence.split()
        return sentence if len(words) <= 3 and words[0].strip(",.:;").lower() not in _NO_ANSWER_WORDS else None
    if not prose or len(numbers) > 1 or _QUALIFIED.search(sentence[: numbers[0].start()]):
        return None
    return _leading_number(sentence[numbers[0].start() :])


def _leading_number(rest: str) -> str | None:
    """The whole quantity that a text begins with, nouns left out; the expression or list, where it is one."""
    match = _NUMBER_AT_START.match(rest)
    if match is None:
        return None
    after = rest[match.end() :]
    if re.match(r"\$(?=\s|[.,;]|$)", after) and match.group(1).startswith("$"):
        after = after[1:]
    after = re.sub(r"^(?:st|nd|rd|th)\b", "", after)
    if _WITH_ANOTHER.match(after):
        return _sentence(rest, asides=True)
    text = _TEXT_COMMAND.sub(lambda m: f" {m.group(1) or ''} ", after)
    if (
        _GOES_ON.match(after)
        or _LISTS_ON.match(after)
        or (after.lstrip(" $").startswith("\\") and _GOES_ON.match(text.lstrip()))
        or ("%" in match.group(1) and re.match(r"\s+of\s+\D{0,9}\d", after))
    ):
        return _result(_sentence(rest))
    words, position = [], 0
    while len(words) < 6 and (word := _UNIT_WORD.match(text, position)):
        name = word.group().strip()
        plain = name.rstrip(".,").lower()
        if plain in _ENDS_QUANTITY:
            break
        if plain in _CHANGES_QUANTITY:
            changes = plain not in _CHANGES_WITH or _CHANGES_WITH[plain].match(text, word.end())
            return _result(_sentence(rest)) if changes else _in_short(match, words)
        if _is_variable(name, glued=text[:1].isalpha() and not words and name not in _UNITS):
            return _result(_sentence(rest))
        words.append(name)
        position = word.end()
        following = text[position:]
        if _same_dimension(
            name, re.match(rf"\s*,?\s*(?:and\s+)?{_NUMBER}\s*([A-Za-z{_CJK}]+)", following)
        ) or _AFTER_NOUN.match(following):
            return _result(_sentence(rest))  # 5 feet 6 inches; 12 eggs * 4 = 48; 3 boys, 5 girls
        if name.endswith("."):
            break
    return _in_short(match, words)


_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|mbox|textrm)\s*\{([^{}]*)\}|\\[,;: ]|\\q?quad\b|[$~]")
_AFTER_NOUN = re.compile(
    rf"\s*(?:[*+×÷=/]\s*[\d$(]|-\s\$?\d|,\s*(?:and\s+)?{_NUMBER}\s+[a-z]{{3,}}\W*$)|\s+at\s+\$?\d[^=\n]*=|\s+of\s+\d|\s+\d+\s*[{_LETTER}]{{2,}}\W*$"
)
_WITH_ANOTHER = re.compile(
    r"\s*,?\s*\(?\s*(?:in\s+)?(?:base|mod|(?:with\s+)?(?:a\s+)?remainder|or|plus\s+or|thru|through)\s+(?:of\s+|minus\s+)?[\d$\\-]|°\s*\d"
)
_ANOTHER = re.compile(r"\s*(?:the\s+|a\s+)?(?:\S+\s+|power\s+of\s+)?(?:\d|\\[a-z]|half\b)")
_COMPARED = re.compile(r"\s+(?:\w+\s+)?than\s+(?:\d|[a-z]\b)")
_FACTOR = re.compile(r"\s*(?:the\s+)?(?:[-$(]?\d|\\[a-z]|[a-z]\b|pi\b)")
#: What must follow some words that change a quantity, so that they do: "5 and 7", "5 times 3", "5 more than x", not "5 times".
_CHANGES_WITH = {
    **dict.fromkeys(("and", "or", "to"), _ANOTHER), **dict.fromkeys(("more", "less", "fewer"), _COMPARED),
    **dict.fromkeys(("times", "over", "by", "plus", "minus", "root", "base"), _FACTOR),
}  # fmt: skip


def _result(sentence: str) -> str:
    """What a calculation gives: of "12 eggs * 4 = 48 eggs", the last side; anything else stands as it is."""
    calculation, equals, value = re.sub("≈|→|->|=>", "=", sentence).rpartition("=")
    variable = re.search(r"(?<![A-Za-z])(?![aA]\b)[A-Za-z](?![A-Za-z])", calculation)
    if equals and re.search(r"\d", calculation) and not variable and not re.search(r",|\b(?:or|and)\b", sentence):
        return _leading_number(value.strip()) or sentence
    return sentence


def _in_short(number: re.Match[str], words: list[str]) -> str:
    """A number with its scale and unit; nouns are left out."""
    words = [word.rstrip(".,") for word in words]
    scale = int(bool(words) and words[0].lower() in _SCALES)
    _, length = _longest_unit(words[scale:])
    return " ".join([_trim(number.group(1)).rstrip(","), *words[: scale + length]])


def _same_dimension(unit: str, following: re.Match[str] | None) -> bool:
    """Whether a unit, and the last group of what follows it, measure the same."""
    if following is None or _known(unit) is None:
        return False
    other = following.groups()[-1]
    return _known(unit) == _known(other) or (_known(unit) == "time" and other in ("m", "s"))


def _known(unit: str) -> str | None:
    """The dimension of a unit; Chinese, Japanese and Korean units may have particles behind them."""
    unit = unit.rstrip(".,").lower()
    lengths = range(len(unit), 0, -1) if re.match(f"[{_CJK}]", unit) else (len(unit),)
    return next((_UNITS[unit[:length]][0] for length in lengths if unit[:length] in _UNITS), None)


def _answer_of_math(span: re.Match[str], rest: str) -> str | None:
    """The answer that begins with a math span: the span, with what belongs to it behind it."""
    parts, end = [_inside(span)], span.end()
    if boxed := boxed_answer(parts[0]):
        return boxed
    while (
        len(parts) < LONGEST_LIST
        and (joined := _JOINS.match(rest, end))
        and (following := _MATH_SPAN.match(rest, joined.end()))
    ):
        parts.append(_inside(following))
        end = following.end()
    if len(parts) > 1:
        return ", ".join(parts)
    after = rest[end:].strip()
    if re.match(r"\$|\\\(", after):  # two formulas side by side are one expression
        return _trim(_MATH_SPAN.sub(_inside, _sentence(rest)))
    if _NUMBER_AT_START.fullmatch(parts[0]):
        return _leading_number(f"{parts[0]} {after}" if after else parts[0])
    return _trim(parts[0]) or None


_JOINS = re.compile(r"\s*(?:[,;]\s*)?(?:and|or|,|;|&|(?<=[,;]\s))\s*")


def _inside(span: re.Match[str]) -> str:
    return next(group for group in span.groups() if group is not None).strip()


def _sentence(rest: str, asides: bool = False) -> str:
    """The first sentence of a text, without what explains it, unless `asides`."""
    end = _SENTENCE_END.search(rest)
    sentence = rest[: end.start()] if end else rest
    aside = None if asides else _ASIDE.search(sentence)
    return _trim(sentence[: aside.start()] if aside else sentence)


_UNFINISHED = re.compile(r"(?:[-+*/×÷=(]|<<[^>]*)\s*$")
_OF_ONE = rf"(?:{_NUMBER}(?:\s?(?:\\?pi|π|[A-Za-z])(?![A-Za-z]))?|(?<![A-Za-z])[A-Za-z](?:\s?\^\s?\{{?\d+\}}?)?|[)\]}}]|\\?pi|[\u0370-\u03ff])"
#: An operand and what joins it to the number behind it.
_JOINED_BEFORE = re.compile(
    rf"(?<![A-Za-z0-9_.\\])(?:[A-Za-z]\s*=\s*)?{_OF_ONE}\s*(?:[-+*/×÷^±≡]|(?<!=)[<>≤≥≠](?![<>])|\\(?:times|cdot|pm|leq?|geq?|neq?|div)\s"
    r"|['′]|,|;|,?\s*\b(?:or|and|to|by|times|plus|minus|over|x|(?:divided|multiplied)\s+by|out\s+of|in|mod|base|ou|et|y|und|oder)\s"
    r"|\s\(?(?:in\s+)?(?:mod|base)\s)\s*(?:[A-Za-z]\s*=\s*)?$"
)
_OF_ANOTHER = re.compile(r"(?:\d\s*/\s*\d+|%)\s+of\s+(?:the\s+)?$")
#: What makes an expression of the number behind it, without an operand.
_APPLIED_BEFORE = re.compile(
    rf"(?:(?<![\w.])(?:{_DECIMAL}\s?)?√|[A-Za-z]\s*!=\s*|\+/-\s*|\([A-Z]\s*=\s*|[±≤≥≠<](?!<)\s*|\\(?:pm|leq?|geq?|neq?)\s*|(?<![A-Za-z])\\?(?:{_FUNCTIONS})\s*(?:_\S{{1,5}}\s*)?\(?\s*|(?<![A-Za-z])[A-Za-z]\(|\\frac\s*\{{[^{{}}]*\}}\s*\{{?\s*"
    r"|[\u0370-\u03ff]\s*[*/]?\s*|[A-Za-z]_\{?|\(\s*(?:mod|base)\s*)$"
)
_QUALIFIED_BEFORE = re.compile(
    r"\b(?:not|isn't|never|cannot\s+be|can't\s+be|(?:less|fewer|more|greater)\s+than|at\s+(?:least|most)|half\s+(?:of|as)|twice|double|triple"
    r"|multiple\s+of|divisible\s+by)\s+\$?$",
    re.IGNORECASE,
)
#: Bold words of a line; headings and labels in bold are not.
_BOLD = re.compile(r"\*\*(?=\S)([^*\n]{0,80}?\d[^*\n]{0,80}?)(?<=[^\s:])\*\*")
_TIME = r"(?:years?|months?|weeks?|days?|hours?|minutes?|seconds?|steps?|rounds?|times|people|friends|trips?)"
_DETERMINED = r"(?:(?:all|the|his|her|its|their|these|those|of|each)\s+)"
#: A circumstance at a sentence's end: "after 4 weeks", "for all of his 6 friends", "when x = 4".
_CIRCUMSTANCE = re.compile(
    rf"\s+(?:(?:after|over|in|within|during|for)\s+(?:{_DETERMINED}+\d+\s+[a-z]+|\d+\s+{_TIME})|to\s+\w+\s+all\s+{_DETERMINED}*\d+\s+[a-z]+"
    r"|(?:when|where|if|at)\s+[a-z]\s*=[^.\n]*)[.!*\s]*$",
    re.IGNORECASE,
)


def _find_number(text: str) -> str | None:
    if _UNFINISHED.search(_without_marks(text[-200:])):
        return None
    lines = text.rstrip().split("\n")
    line = next((line for line in reversed(lines) if re.search(r"\d", line)), "")[-LONGEST_LINE:]
    bold = _BOLD.findall(line)
    if len(bold) == 1 and not re.match(r"(?:step|part)\b", bold[0], re.IGNORECASE):
        line = bold[0]
    elif formula := _last_formula(_without_marks(text)):
        return formula
    line = _without_marks(line)
    if "$" in line or "\\" in line:
        line = _MATH_SPAN.sub(_inside, line)
    circumstance = _CIRCUMSTANCE.search(line)
    if circumstance and _NUMBER_ANYWHERE.search(line, 0, circumstance.start()):
        line = line[: circumstance.start()]
    last = _last(_NUMBER_ANYWHERE, line)
    return None if last is None else _around(line, last)


def _around(line: str, number: re.Match[str]) -> str | None:
    """The whole quantity, list or expression that a line's last number belongs to."""
    start = number.start()
    before = line[:start]
    if _QUALIFIED_BEFORE.search(before):
        return None
    if compound := _compound_before(before, line[number.end() :]):
        return _sentence(line[compound.start() :])
    while applied := _APPLIED_BEFORE.search(line[:start]) or _JOINED_BEFORE.search(line[:start]):
        start = applied.start()
    if of := _OF_ANOTHER.search(line[:start]):
        start = of.start()
    closing = {"(": ")", "[": "])", "{": "}"}.get(line[start - 1 : start], "")
    if start < number.start() and closing and re.match(rf"\s*[{re.escape(closing)}]", line[number.end() :]):
        start -= 1
    if start < number.start() and re.search(r"\bbetween\s+$", line[:start]):
        return None
    if start == number.start():
        return _leading_number(line[start:]) or _sentence(line[start:])
    rest = line[number.end() :]
    end = re.search(r"\s+[A-Za-z]{2,}|[.,;!?](?=\s|$)|$", rest).start()
    return _trim(line[start : number.end()] + rest[:end]) or None


def _compound_before(before: str, after: str) -> re.Match[str] | None:
    """The part of a compound quantity ("5 hours and ") before its last number."""
    match = re.search(rf"(?<![A-Za-z0-9_.]){_DECIMAL}\s*([A-Za-z]+|[{_CJK}]+)\s*,?\s*(?:and\s+)?$", before)
    return match if match and _same_dimension(match.group(1), re.match(rf"\s*([A-Za-z]+|[{_CJK}]+)", after)) else None


def _last_formula(text: str) -> str | None:
    """The right side of the last formula, where no number follows it and it is more than a number; joined ones are a list."""
    if "\\" not in text and "^" not in text and "$" not in text:
        return None
    spans = list(_MATH_SPAN.finditer(text[-LONGEST_LINE:])) or list(_ENVIRONMENT.finditer(text[-LONGEST_LINE:]))
    if not spans or re.search(r"\d", (after := spans[-1].string[spans[-1].end() :])):
        return None
    joined = [spans[-1]]
    for span in reversed(spans[:-1]):
        if not _JOINS.fullmatch(text[-LONGEST_LINE:], span.end(), joined[0].start()):
            break
        joined.insert(0, span)
    if len(joined) > 1:
        return ", ".join(map(_inside, joined))
    inside = _inside(joined[0])
    if _NUMBER_AT_START.fullmatch(inside):
        return None
    if "matrix" not in inside:  # the last line of aligned equations
        inside = re.sub(r"\\(?:begin|end)\{\w+\*?\}|&", "", re.split(r"\\\\|\n", inside.rstrip("\\ \n"))[-1])
    side = re.split(r"\\Rightarrow|\\implies", inside)[-1].strip()
    defined, _, value = re.sub(r"\\approx", "=", side).rpartition("=")
    side = value.strip() if not defined or _DEFINED.fullmatch(defined.rpartition("=")[2]) else side
    if _NUMBER_AT_START.fullmatch(side):
        return _leading_number(f"{side} {after.strip()}".strip())
    return _trim(side) if re.search(r"\d", side) or not re.search(r"\w", after) else None


#: Formulas without delimiters.
_ENVIRONMENT = re.compile(r"\\begin\{(?:align|equation|gather|eqnarray)\*?\}(.{1,1000}?)\\end\{\w+\*?\}", re.DOTALL)


_RULES: tuple[tuple[str, Callable[[str], str | None]], ...] = (
    ("hash", _find_hash),
    ("boxed", boxed_answer),
    ("answer_is", _find_answer_is),
    ("last_number", _find_number),
)


def _trim(answer: str) -> str:
    """An answer without what surrounds it: spaces, emphasis, quotes, LaTeX's delimiters in pairs, a closing full stop."""
    while True:
        before = answer
        answer = re.sub(r"</\w{1,20}>$", "", answer.strip()).strip("*").strip().strip('"').removesuffix("\\")
        answer = re.sub(r"(?<=[\w)}\]%$`'\"°!])[.;,:]+$", "", answer)
        for opening, closing in (
            ("$$", "$$"),
            ("$", "$"),
            ("\\(", "\\)"),
            ("\\[", "\\]"),
            ("`", "`"),
            ("_", "_"),
            ("'", "'"),
        ):
            if answer.startswith(opening) and answer.endswith(closing) and len(answer) > len(opening + closing):
                inner = answer[len(opening) : -len(closing)]
                answer = inner if opening not in inner else answer
        if answer == before:
            return answer


# --- Comparing ----------------------------------------------------------------------------------------------------------

_SPACING = re.compile(r"(?<!\\)\\(?:[,;:> ]|quad\b|qquad\b|hspace\{[^{}]*\}|enspace\b|thinspace\b)|~")
_SIZES = re.compile(
    r"\\(?:left|right|bigl?|bigr?|Bigl?|Bigr?|biggl?|biggr?|middle|displaystyle|textstyle|limits)(?![A-Za-z])\s*\.?(?=\W|$)|\\!"
)
_TEXT = re.compile(
    r"\\(?:text|textrm|textbf|textit|textnormal|mathrm|mathbf|mathit|mathsf|mbox|hbox|operatorname|rm|bf)\*?\s*\{([^{}]*)\}"
)
_SYNONYMS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:d|t|c)frac(?![A-Za-z])", r"\\frac"), (r"\\(?:leqslant|le)(?![A-Za-z])", r"\\leq "), (r"\\(?:geqslant|ge)(?![A-Za-z])", r"\\geq "),
        (r"\\ne(?![A-Za-z])", r"\\neq "), (r"\\lt(?![A-Za-z])", "<"), (r"\\gt(?![A-Za-z])", ">"), (r"\\(?:varnothing|O)(?![A-Za-z])", r"\\emptyset "),
        (r"\\\{\s*\\\}", r"\\emptyset "), (r"\\(?:lbrace)(?![A-Za-z])", r"\\{"), (r"\\(?:rbrace)(?![A-Za-z])", r"\\}"),
        (r"\\(?:degree|degrees)(?![A-Za-z])", r"^{\\circ}"), (r"\^\s*\\circ(?![A-Za-z])", r"^{\\circ}"), (r"\\%", "%"), (r"\\\$", "$"), (r"\\(?:colon)(?![A-Za-z])", ":"),
        (r"\\(?:div)(?![A-Za-z])", "/"), (r"\\(?:cdotp|ast)(?![A-Za-z])", r"\\cdot "), (r"\\(?:bar)\s*\{(\d+)\}", r"\\overline{\1}"),
        (r"\\(?:lvert|rvert|vert)(?![A-Za-z])", "|"), (r"\\(?:dots|ldots|cdots)(?![A-Za-z])", r"\\ldots "), (r"\\(?:tiny|small|large|Large|LARGE|huge|Huge)(?![A-Za-z])", ""), (r"\\(?:text)?color\s*\{\w+\}", ""), (r"\\[lr]angle(?![A-Za-z])", lambda m: "(" if m.group()[1] == "l" else ")"),
    )
]  # fmt: skip


@lru_cache(maxsize=4096)
def _normalize(text: str) -> str:
    """One way of writing for what is written in many: see the module."""
    text = _trim(_without_marks(_plain(text)))
    if text.replace(".", "", 1).isdigit():
        return text
    for char, command in _COMMANDS.items() if not text.isascii() else ():
        text = text.replace(char, command)
    text = re.sub(
        r"√\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z]))", lambda m: rf"\sqrt{{{m.group(1) or m.group(2)}}}", text
    )
    text = _GROUPS.sub(",", text)
    if "\\" in text:
        text = _SPACING.sub(" ", _SIZES.sub("", text))
        for pattern, replacement in _SYNONYMS:
            text = pattern.sub(replacement, text)
        text = re.sub(r"\\(?:boxed|fbox)\s*\{(.*)\}", r"\1", text)
        text = _TEXT.sub(_text, text)
        text = re.sub(r"^\\text\{\s*\(([A-J])\)\s*\}\s*(?=\S)", r"(\1) ", text)
        if whole := re.fullmatch(r"\\text\{([^{}]*)\}", text):
            text = whole.group(1)
        text = re.sub(r"\\(frac|binom)\s*(\d|\s[A-Za-z])\s*([\dA-Za-z])", r"\\\1{\2}{\3}", text)
        text = re.sub(r"\\(frac|binom)\s*(\{[^{}]*\})\s*(\w)", r"\\\1\2{\3}", text)
        text = re.sub(r"\\(frac|binom)\s*(\d|\s[A-Za-z])\s*(\{[^{}]*\})", r"\\\1{\2}\3", text)
        text = re.sub(r"\\frac\s*\{\s*([^{}]*?)\s*\}\s*\{\s*([^{}]*?)\s*\}", r"\\frac{\1}{\2}", text)
        text = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", text)
        text = re.sub(r"-\s*\\frac\{-([^{}]*)\}", r"\\frac{\1}", text)
    text = _WORD_COMMANDS.sub(_command, text)
    text = re.sub(r"(?<=[\w)}\]])\s*\*\*\s*(?=[\w({\\-])", "^", text)
    text = re.sub(r"([\^_])\s*\{\s*(.*?)\s*\}", r"\1{\2}", text)
    text = re.sub(r"([\^_])\s*(-?\d(?!\d)|-?\d+|[A-Za-z])(?!\})", r"\1{\2}", text)
    text = re.sub(r"(?<=\d)\s*(?:percent|per cent|percentage|pct)\b", "%", text)
    text = _trim(re.sub(r"\s+", " ", text))
    while text.startswith("{") and text.endswith("}") and "{" not in text[1:-1] and "}" not in text[1:-1]:
        text = text[1:-1].strip()
    text = re.sub(r"(?<=\.)(\d*)\((\d+)\)", r"\1\\overline{\2}", text)
    text = re.sub(r"^(?:negative|minus)\s+(?=\S)", "-", _spelled(text))
    return re.sub(r"^(?:\\approx|\\therefore|=|:|~|about |approximately )\s*", "", text)


def _spelled(text: str) -> str:
    """A number in words, up to 999, in digits: "twenty-five", "three hundred"."""
    words = re.split(r"[\s-]+", text.casefold().strip())
    if not 0 < len(words) <= 5 or not all(word in _NUMBER_WORDS or word == "and" for word in words):
        return text
    total = 0
    for word in words:
        number = int(_NUMBER_WORDS.get(word, 0))
        total = max(total, 1) * 100 if word == "hundred" else total + number
    return str(total)


_WORD_COMMANDS = re.compile(
    rf"(?<![\\A-Za-z])(?:sqrt\s*\(([^()]*)\)|(infinity|infty|inf|oo|pi)(?![A-Za-z])|({_FUNCTIONS})(?=\s*[(\d{{]|\s+[a-z](?![a-z])))"
)


def _command(match: re.Match[str]) -> str:
    """A function or constant that is written without its backslash."""
    root, constant, function = match.groups()
    if constant:
        return "\\pi " if constant == "pi" else "\\infty "
    return rf"\{function} " if function else rf"\sqrt{{{root}}}"


def _text(match: re.Match[str]) -> str:
    """`\\text{…}` of one letter is that letter; of a connective, the word; of more, itself under one name."""
    inside = match.group(1).strip()
    if len(inside) == 1 or re.fullmatch(rf"(?:{_FUNCTIONS})", inside):
        return inside if len(inside) == 1 else rf"\{inside} "
    if inside.lower() in ("and", "or", "and/or", ", and", ", or"):
        return f" {inside} "
    return rf"\text{{{inside}}}"


def _key(text: str) -> str:
    """A normalized text without the spaces that mean nothing; words in lower case."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    if re.search(r"[A-Za-z]{2,} ?[A-Za-z]{2,}|[A-Za-z]{3,}", text) and "\\" not in text:
        return re.sub(r"^(?:a|an|the) ", "", text.casefold())
    return re.sub(r"(?<!\d) +| +(?!\d)", "", re.sub(r"(\\[A-Za-z]+) +(?=[A-Za-z])", "\\1\x00", text)).replace(
        "\x00", " "
    )


_PLAIN_NUMBER = re.compile(r"-?\d{1,30}(?:\.\d{1,30})?", re.ASCII)


def canonical_answer(extracted: str | None) -> str | None:
    """A key that is equal for plainly equal answers: `1,000`, `$1000`, `1000.0` and `x = 1000` all give `1000`.

    Returns:
        `None` for `None` and for nothing but spaces.
    """
    if extracted is None or not extracted.strip():
        return None
    if len(extracted) > LONGEST_NUMBER:
        return re.sub(r"\s+", " ", _trim(extracted)) or None
    text = _normalize(extracted)
    quantity = _quantity(re.sub(r"^[A-Za-z](?:\([a-z]\))?\s*=\s*", "", text))
    if quantity is not None and quantity.last is None:
        return str(quantity.value)
    return re.sub(r"\s+", " ", _key(text)) or _trim(extracted) or None


def answers_equal(extracted: str, reference: str) -> bool:
    """Whether two answers are the same, by the rules of this module.

    Args:
        extracted: the solution's answer.
        reference: the right answer; of a GSM8K solution, what follows `####`.
    """
    if "####" in reference:
        reference = reference.rsplit("####", 1)[1].strip()
    if _PLAIN_NUMBER.fullmatch(extracted) and _PLAIN_NUMBER.fullmatch(reference):
        return extracted == reference or Fraction(extracted) == Fraction(reference)
    if max(len(extracted), len(reference)) > LONGEST_NUMBER:
        return canonical_answer(extracted) == canonical_answer(reference)
    left, right = _normalize(extracted), _normalize(reference)
    if left == right:
        return bool(left)
    _seconds_left.set(ENGINE_SECONDS)
    if option := re.fullmatch(r"\(?([A-J])(?:\)|[.:,]|\s+[-(])\s*(?![A-J]\b)(\S.*?)\)?", left):
        return any(_same(_normalize(part), right) for part in option.groups())
    return bool(left and right) and _same(left, right)


_BASED = re.compile(r"(\w+?)_\{(\d+)\}(?:\s*\\text\{[^{}]*\})?")
_EQUATION = re.compile(r"(?<![<>!])=(?!=)|\\in(?![A-Za-z])")
_WORDS = re.compile(rf"(?<![\\A-Za-z])(?!(?:{_FUNCTIONS}|and|or|pi)(?![A-Za-z]))[A-Za-z]{{3,}}")
_CONNECTIVE = re.compile(r"\s*(?:,|;)?\s*\b(?:and|or)\b\s*|\s*;\s*")


def _same(left: str, right: str, depth: int = 0) -> bool:
    """Whether two normalized texts are the same answer; the first rule that decides does."""
    if _key(left) == _key(right):
        return True
    one, other = _quantity(left), _quantity(right)
    if one is not None and other is not None:
        return one.equals(other)
    if depth > 4 or max(len(left), len(right)) > LONGEST_EXPRESSION:
        return False
    for rule in (_same_base, _same_measure, _same_side, _same_elements, _same_words):
        if (decided := rule(left, right, depth)) is not None:
            return decided
    if (
        None in (_split(left), _split(right))
        or _unlike(left, right)
        or _explodes(left)
        or _explodes(right)
        or (seconds := _seconds_left.get()) <= 0
    ):
        return False
    start = time.monotonic()
    equal = _math_verify(left, right)
    _seconds_left.set(seconds - (time.monotonic() - start))
    return equal


_MEASURE = re.compile(
    rf"(.*?[\d}})\w])(?:\s+|\s*\\text\{{\s*)((?:square |sq |cubic )?(?:[A-Za-z]{{1,20}}|[{_CJK}]+))\s*\}}?(\^\{{\d\}})?"
)


def _same_measure(left: str, right: str, depth: int) -> bool | None:
    """Expressions with a unit or noun behind them: a unit counts where both have one."""
    (one, unit), (other, other_unit) = map(_measured, (left, right))
    if (one, other) == (left, right):
        return None
    return (unit is None or other_unit is None or unit == other_unit) and _same(one, other, depth + 1)


def _measured(text: str) -> tuple[str, tuple[str, Fraction] | None]:
    """An expression and the unit behind it; nouns are left out, words alone stay as they are."""
    match = _MEASURE.fullmatch(text)
    if (
        not match
        or not re.search(r"\d|\\", match.group(1))
        or _WORDS.search(re.sub(r"\\text\{[^{}]*\}", "", match.group(1)))
    ):
        return text, None
    words = match.group(2).split()
    unit = _unit([*words[:-1], words[-1] + (match.group(3) or "")])
    noun = len(words[-1]) > 2 and not _MATH_WORDS.match(words[-1]) and words[-1].lower() not in _CHANGES_QUANTITY
    return (match.group(1).strip(), unit) if unit or noun else (text, None)


def _same_base(left: str, right: str, depth: int) -> bool | None:
    """Numbers with a base, `204_{5}`: equal where digits and base are. A ratio or time, `3:30`, is equal by parts."""
    based = [_BASED.fullmatch(text.replace(" ", "")) for text in (left, right)]
    if any(match and match.group(1)[0].isdigit() for match in based):
        return all(based) and based[0].groups() == based[1].groups()
    left, right = (re.sub(r"\\text\{([^{}]*)\}", r"\1", text) for text in (left, right))
    if ":" in left + right and "\\" not in left + right:
        clocks = [re.sub(r"\s*([ap])\.?\s?m\.?$", r"\1m", text, flags=re.IGNORECASE).lower() for text in (left, right)]
        halves = {text[-2:] for text in clocks if text[-2:] in ("am", "pm")}
        parts = [re.sub(r"[ap]m$", "", text).split(":") for text in clocks]
        return (
            len(halves) < 2
            and len(parts[0]) == len(parts[1])
            and all(_same(a.strip(), b.strip(), depth + 1) for a, b in zip(*parts, strict=True))
        )
    return None


def _same_side(left: str, right: str, depth: int) -> bool | None:
    """Where one of two is `x = 5` or `x \\in S`, its last side counts; an equation in several terms has no value of its own.
    An inequality becomes its interval."""
    sides = [text if _elements(text) else _last_side(text) for text in (left, right)]
    if (sides[0] == left) != (sides[1] == right) and not _EQUATION.search(left if sides[0] == left else right):
        return _same(*sides, depth + 1)
    if sides[0] != left and re.sub(r"\s", "", left[: -len(sides[0])]) == re.sub(r"\s", "", right[: -len(sides[1])]):
        return _same(*sides, depth + 1)
    if len({bool(_EQUATION.search(text)) for text in (left, right)}) > 1 and not any(map(_elements, (left, right))):
        return False
    intervals = [_interval(text) for text in (left, right)]
    if any(intervals) and (all(intervals) or any(re.match(r"[(\[]", text) for text in (left, right))):
        return _same(*[interval or text for interval, text in zip(intervals, (left, right), strict=True)], depth + 1)
    return None


#: What an equation defines: a variable, a function's value, a quantity by name; or nothing but numbers, a calculation.
_DEFINED = re.compile(
    r"\s*(?:\\?[A-Za-z](?:_\{?\w+\}?)?'*|\\[a-z]+|[A-Z]{2,}|(?![a-z]{2}\b)[A-Za-z][A-Za-z ]{2,}|(?:[A-Za-z]|\\[a-z]+)'*\s*\([^()]*\)|\\text\{[^{}]*\}|\\angle [A-Z]+|(?:[^A-Za-z=\\]|\\(?:times|cdot|div|frac|sqrt)(?![A-Za-z])| x )+"
    r"|\|?\\?(?:over\w+\{)?[A-Z]{2}\}?\|?)\s*"
)


def _last_side(text: str) -> str:
    """The last side of an equation that defines something, or the set of a membership; any other text as it is."""
    sides = _EQUATION.split(text)
    if len(sides) < 2 or not sides[-1].strip():
        return text
    if re.fullmatch(r"\s*[A-Za-z]\s*", sides[-1]) and re.fullmatch(r"[^A-Za-z]+", sides[0]):
        return sides[0].strip()
    return sides[-1].strip() if _DEFINED.fullmatch(sides[0]) else text


_LESS, _GREATER = r"(<|\\leq\s*)", r"(>|\\geq\s*)"
_BOUND, _VARIABLE = r"([^<>=,]+?)", r"([A-Za-z])"


def _interval(text: str) -> str | None:
    """An inequality in one variable as an interval, several with "or" as their union."""
    text = re.sub(r"\\text\{\s*or\s*\}", " or ", text).strip()
    if " or " in text:
        intervals = [_interval(part) for part in text.split(" or ")]
        return r" \cup ".join(intervals) if all(intervals) else None
    if match := re.fullmatch(rf"{_BOUND}\s*{_LESS}\s*{_VARIABLE}\s*{_LESS}\s*{_BOUND}", text):
        low, opening, _, closing, high = match.groups()
    elif match := re.fullmatch(rf"{_BOUND}\s*{_GREATER}\s*{_VARIABLE}\s*{_GREATER}\s*{_BOUND}", text):
        high, closing, _, opening, low = match.groups()
    elif match := re.fullmatch(rf"{_VARIABLE}\s*{_LESS}\s*{_BOUND}|{_BOUND}\s*{_GREATER}\s*{_VARIABLE}", text):
        high = match.group(3) or match.group(4)
        low, opening, closing = r"-\infty", "<", match.group(2) or match.group(5)
    elif match := re.fullmatch(rf"{_VARIABLE}\s*{_GREATER}\s*{_BOUND}|{_BOUND}\s*{_LESS}\s*{_VARIABLE}", text):
        low = match.group(3) or match.group(4)
        high, opening, closing = r"\infty", match.group(2) or match.group(5), "<"
    else:
        return None
    return f"{'(' if opening in '<>' else '['}{low.strip()},{high.strip()}{')' if closing in '<>' else ']'}"


def _split(text: str, separators: str = ",") -> list[str] | None:
    """The parts of a text between separators outside of brackets; `None` where brackets do not match."""
    parts, depth, start = [], 0, 0
    for index, char in enumerate(text):
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
            if depth < 0:
                return None
        elif char in separators and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    return None if depth else [*parts, text[start:].strip()]


_MATRIX = re.compile(r"\\begin\{([bpBvV]?(?:small)?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}")


def _elements(text: str) -> tuple[str, list[str]] | None:
    """What kind of collection a text is, and its elements: `list`, `set`, a pair of brackets, `union`, a matrix's shape."""
    if matrix := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in re.split(r"\\\\", matrix.group(2).strip().removesuffix("\\\\"))]
        kind = "determinant" if matrix.group(1)[0] in "vV" else "matrix"
        return f"{kind} {[len(row) for row in rows]}", [cell.strip() for row in rows for cell in row]
    pieces = re.split(r"\s*\\cup(?![A-Za-z])\s*", text)
    if len(pieces) > 1:
        return "union", pieces
    kind, body = "list", text
    for opening, closing, name in (
        ("\\{", "\\}", "set"),
        ("(", ")", "()"),
        ("(", "]", "(]"),
        ("[", ")", "[)"),
        ("[", "]", "[]"),
    ):
        if text.startswith(opening) and text.endswith(closing):
            inner = text[len(opening) : -len(closing)]
            parts = _split(inner)
            if parts is not None and (len(parts) > 1 or name == "set"):
                kind, body = name, inner
                break
    parts = _split(_CONNECTIVE.sub(",", body))
    if parts is None or "" in parts and kind != "set":
        return None
    parts = [each for part in parts for each in _both_signs(part)]
    return (kind, parts) if len(parts) > 1 or kind != "list" else None


def _both_signs(text: str) -> list[str]:
    """`a\\pm b` as its two values."""
    if text.count("\\pm") != 1:
        return [text]
    return [re.sub(r"^\s*\+\s*", "", re.sub(r"\\pm\s*", sign, text)).strip() for sign in "+-"]


def _same_elements(left: str, right: str, depth: int) -> bool | None:
    """Lists and sets in any order; tuples, intervals and matrices by place. The commas of a number are no list's."""
    one, other = (None if _quantity(text) else _elements(text) for text in (left, right))
    if one is None and other is None:
        return None
    if one is None or other is None:
        lone = one or other
        if lone[0] == "list" and len(lone[1]) > 1 or lone[0] in ("set", "union") or lone[0].startswith("matrix"):
            alike = " or " in left + right or lone[0] != "list"
            return alike and all(_same(element, right if other is None else left, depth + 1) for element in lone[1])
        return False if lone[0] in ("(]", "[)", "[]") else None
    kinds, parts = {one[0], other[0]}, (one[1], other[1])
    if len(parts[0]) != len(parts[1]) or len(parts[0]) > LONGEST_LIST:
        return False
    if kinds <= {"list", "set"} or kinds == {"union"}:
        return _same_in_any_order(*parts, depth)
    if len(kinds) == 1 or kinds == {"list", "()"}:
        return all(_same(a, b, depth + 1) for a, b in zip(*parts, strict=True))
    return False


def _same_in_any_order(one: list[str], other: list[str], depth: int) -> bool:
    left = list(other)
    for element in one:
        match = next((each for each in left if _key(element) == _key(each)), None)
        match = match or next((each for each in left if _same(element, each, depth + 1)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_words(left: str, right: str, depth: int) -> bool | None:
    """Words are compared as text alone: mathematics would take them for products of letters, in any order."""
    texts = [re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text) for text in (left, right)]
    choices = [re.fullmatch(r"(?:option |choice )?\(?([A-Za-z])[).]?", text.strip(), re.IGNORECASE) for text in texts]
    if all(choices):
        return choices[0].group(1) == choices[1].group(1)
    if all(re.fullmatch("[A-Z]{2,}", text) for text in texts):
        return False  # names of points, which have an order
    if any(_WORDS.search(re.sub(r"\\(?:begin|end)\{\w+\}", "", text)) for text in texts):
        one, other = (re.sub(r"[\s.,;:'\"!?()]+", " ", text).strip().casefold() for text in texts)
        return one == other
    return None


def _explodes(expression: str) -> bool:
    """Whether evaluating the expression could take forever: towers of powers, huge exponents, factorials of factorials."""
    powers = re.findall(r"(\d*)\s*\^\s*[{(]?\s*-?(\d*)", expression)
    towers = re.search(r"\^\s*[{(]?\s*[\w.]+\s*[})]?\s*\^|[)}]\s*\^\{?\d{2}", expression) is not None
    return (
        towers
        or any(len(power) > 4 or len(power) > 2 and (not base or len(base) > 3) for base, power in powers)
        or expression.count("!") > 1
        or bool(re.search(r"\d{3,}\s*!|\\(?:int|sum|prod|lim)(?![a-z])", expression))
        or expression.count("/") > 8
    )


def _unlike(left: str, right: str) -> bool:
    """Whether two expressions have what math-verify takes for the same: derivatives and functions, capital and small Greek
    letters; or a slash before a product, which writers and parsers read in two ways."""
    greek = [sorted(set(re.findall(r"\\([A-Z][a-z]+)", text))) for text in (left, right)]
    ambiguous = any(re.search(r"/\s*\d+\s*(?:[A-Za-z]|\\[a-z])", text) for text in (left, right))
    return left.count("'") != right.count("'") or greek[0] != greek[1] or ambiguous


def _math_verify(extracted: str, reference: str) -> bool:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    # Its own normalization takes letters for units and adds backslashes; ours has been done.
    config = LatexExtractionConfig(normalization_config=NormalizationConfig(boxed="none"))

    # The library's time limits are signals, which only the main thread can receive.
    limit = ENGINE_SECONDS if threading.current_thread() is threading.main_thread() else None
    try:
        gold, found = (
            parse(f"${text}$", [config], fallback_mode="no_fallback", parsing_timeout=limit)
            for text in (reference, extracted)
        )
        if not (gold and found):
            return False
        # It turns a relation into a set on one side only.
        equal = verify(gold, found, timeout_seconds=limit) or verify(found, gold, timeout_seconds=limit)
        return bool(equal) and _same_values(gold[0], found[0])
    except Exception:  # noqa: BLE001 - whatever a parser makes of arbitrary text, the answer is just not equal
        return False


def _same_values(gold: object, found: object) -> bool:
    """Whether two expressions have the same values at a few points.

    math-verify rounds to six decimals and drops differences below 1e-15, so small numbers would all be equal.
    """
    from sympy import Abs, Expr, Float, Rational

    if not (isinstance(gold, Expr) and isinstance(found, Expr)):
        return True
    symbols = sorted(gold.free_symbols | found.free_symbols, key=str)
    tolerance = 1e-6 if gold.has(Float) or found.has(Float) else 1e-12
    for seed in range(1, 4):
        point = {symbol: Rational(7 * seed + 3 * index + 1, 5 + index) for index, symbol in enumerate(symbols)}
        one, other = (each.doit().subs(point).evalf(30) for each in (gold, found))
        if Abs(one - other) > tolerance * max(Abs(one), Abs(other)):
            return False
        if not symbols:
            break
    return True
