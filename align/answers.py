"""Find the final answer of a solution, and compare it with the reference answer. Pure functions over text.

**Finding.** Text inside `<think>…</think>` is not the answer, and neither are Markdown marks around it. Four rules are tried
in this order; a rule without an answer gives way to the next one, and of several matches the last one with an answer counts.

| rule | matches | `extracted` |
|---|---|---|
| `hash` | `#### 18 dollars` | `18` |
| `boxed` | `so \\boxed{\\frac{1}{2}}` | `\\frac{1}{2}` |
| `answer_is` | `The answer is 5. Wait, the answer is 6.` | `6` |
| `answer_is` | `## Final answer`, and `$$x+1$$` on the next line | `x+1` |
| `answer_is` | `A: 26`, `"answer": 26`, `<answer>26</answer>`, `答案是26。` | `26` |
| `last_number` | `She has **73 apples**` | `73` |

A marker without an answer does not count: `#### Step 2` and `#### 1. Multiply` are headings, `The answer is below` is prose.
A quantity is taken whole: `2 1/2`, `5 million`, `5 hours and 30 minutes`, `3:30`, `5 or 7`, `5√2`. Nouns after it are left out.

**Comparing.** Both texts are normalized (Unicode, LaTeX spacing, Markdown), then compared by the first rule that applies:

| rule | equal | not equal |
|---|---|---|
| same text, spaces and case of words aside | `\\dfrac12`, `\\frac{1}{2}` | |
| exact numbers: signs, groups, decimals, fractions, mixed, repeating, `e` and `10^n`, per cent | `2 1/2`, `2.5`; `0.\\overline{3}`, `1/3` | `0.333`, `1/3` |
| units: two known ones must agree; one alone, and nouns, do not count | `3 m`, `300 cm`, `3` (each with the first) | `3 m`, `3 cm` |
| digits with a base | `204_5`, `204_{5}` | `204_6`, `204_5` |
| lists and sets in any order, `±` as two; tuples, intervals and matrices by place | `3 and 5`, `5, 3` | `(1,2)`, `(2,1)`, `[1,2]` |
| one side is an equation or inequality | `x = 5`, `5`; `2<x<3`, `(2,3)` | |
| words | `east`, `\\text{East}` | `east`, `seat` |
| anything else: math-verify, and both sides must have one value at sample points | `2\\sqrt{5}`, `\\sqrt{20}` | `1/2^{99}`, `1/2^{98}` |
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
_UNFINISHED_THINKING = re.compile(
    r"(?:<|\[)(?:think|thinking|thought|reasoning|scratchpad)[>\]]|◁think▷", re.IGNORECASE
)
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>]{1,40}\|>|</?s>|<eos>|<pad>|<end_of_turn>")


def _spoken(text: str) -> str:
    """What a solution says after its thinking, without special tokens. Thinking that does not end says nothing."""
    if "<" in text or "[" in text or "◁" in text:
        text = text[max((match.end() for match in _THINKING.finditer(text)), default=0) :]
        if opened := _UNFINISHED_THINKING.search(text):
            text = text[: opened.start()]
        text = _SPECIAL_TOKEN.sub(" ", text)
    return text


# --- Numbers and units --------------------------------------------------------------------------------------------------

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d{1,3}(?:[ ]\d{3})+(?![\d/])|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d+)?|\.\d+)"
_FRACTION = r"\\[dtc]?frac\s*(?:\{\s*[-+]?[\d.,]+\s*\}|\d)\s*(?:\{\s*[-+]?[\d.,]+\s*\}|\d)"
_POWER_OF_TEN = (
    r"(?:[eE][-+]?\d+(?!\w)|\s*(?:\\times|\\cdot|[x×·*])\s*10\s*(?:\^|\*\*)\s*(?:\{\s*[-+]?\d+\s*\}|[-+]?\d+))"
)
_CURRENCY = r"(?:(?:US|AU|CA|HK|NT)?\\?[$]|[€£¥₹₩₽₺₫฿₱₦]|(?:USD|EUR|GBP|Rs\.?)\s?)"
_NUMBER = (
    rf"[-+]?{_CURRENCY}?[ ]?[-+]?(?:\d+(?::\d+)+(?!\d)|\d+[ ]:[ ]\d+|\d*\.\d*\\overline\s*\{{\d+\}}|{_INTEGER}\s*{_FRACTION}|{_FRACTION}"
    rf"|{_INTEGER}[ ]\d+/\d+(?!\d)|{_DECIMAL}(?:\s*/\s*\d+)?){_POWER_OF_TEN}?(?:\s*\\?%)?"
)
_NUMBER_AT_START = re.compile(rf"(?:=\s*)?({_NUMBER})")
# A number begins at no letter, digit, point or exponent sign; signs and symbols of calculations may precede it.
_NUMBER_ANYWHERE = re.compile(rf"(?<![A-Za-z0-9_.^\\])(?<!\^\{{)(?<!_\{{){_NUMBER}|(?<=[=>*+/(]){_NUMBER}")
_GROUPS = re.compile(r"(?<=\d)(?:\\[,!;:]|\{,\}|,\\!|\\ |(?<=\d)'(?=\d{3}'|\d{3}\b))+\s?(?=\d{3}(?!\d))")

#: Words that multiply the number before them.
_SCALES = {
    "dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "lakh": 10**5, "crore": 10**7,
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
        "h hr hrs hour hours 小时 小時 時間 시간": Fraction(3600), "day days 天 日 일": Fraction(86400), "week weeks": Fraction(7 * 86400), "ms millisecond milliseconds": Fraction(1, 1000),
    },
    "calendar": {"month months": Fraction(1), "year years yr yrs": Fraction(12)},
    "volume": {
        "l liter liters litre litres": Fraction(1), "ml milliliter milliliters millilitre millilitres": Fraction(1, 1000),
        "gallon gallons gal": Fraction(3785411784, 10**9), "quart quarts qt": Fraction(946352946, 10**9),
        "pint pints pt": Fraction(473176473, 10**9),
    },
    "money": {"dollar dollars usd": Fraction(1), "cent cents ¢": Fraction(1, 100)},
    "angle": {"degree degrees deg": Fraction(1), "radian radians rad": Fraction(0)},
    "speed": {"mph": Fraction(1609344, 3600000), "km/h kmh kph": Fraction(1, 1) * 1000 / 3600},
}  # fmt: skip
_UNITS = {
    name: (dimension, factor)
    for dimension, units in _DIMENSIONS.items()
    for names, factor in units.items()
    for name in names.split()
}
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_UNIT_WORD = re.compile(
    rf"\s*(?:per\s+|/\s*|\\cdot\s*)?(?:[A-Za-zÀ-ÿ¢][A-Za-zÀ-ÿ'.-]*|[{_CJK}]+|[€£¥₹₩₽₺₫฿₱₦$])(?:\^\{{?-?\d\}}?|[23](?!\w))?"
)
#: Words that end a quantity, or that make another one of it.
_ENDS_QUANTITY = _words(
    "a an as at after altogether because before but by each for from given he her his how i if in into is it its left of on"
    " our per remaining she since so than that the their then there therefore they this thus total until we what when where"
    " which while who will with was were are has have had would not"
)
_CHANGES_QUANTITY = _words(
    "and or to plus minus times squared cubed half halves thirds fifths sixths sevenths eighths ninths tenths hundredths"
    " thousandths mod choose factorial more less fewer than"
)


@dataclass(frozen=True)
class _Quantity:
    """A number with its unit: `dimension` is "" without one; `factor` converts it to the dimension's first unit."""

    value: Fraction
    dimension: str = ""
    factor: Fraction = Fraction(1)
    compound: bool = False

    def equals(self, other: _Quantity) -> bool:
        if self.dimension and other.dimension:
            return self.dimension == other.dimension and self.value * self.factor == other.value * other.factor
        return self.value == other.value and not (self.compound or other.compound)


_EXACT = re.compile(
    rf"""(?P<sign3>[-+]?)10\^\{{(?P<ten>[-+]?\d+)\}}|(?P<sign>[-+]?)\s*(?:(?P<currency>{_CURRENCY})\s*(?P<sign2>[-+]?)\s*)?(?:
        (?P<begin>\d*)\.(?P<fixed>\d*)\\overline\{{(?P<repeat>\d+)\}}
      | (?P<whole>{_INTEGER})(?:\s*\\frac\{{(?P<top>\d+)\}}\{{(?P<bottom>\d+)\}}|[ ](?P<top2>\d+)/(?P<bottom2>\d+)|[ ]and[ ]a[ ](?P<half>half)\b)
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
                ("1", "2") if found["half"] else (found["top"] or found["top2"], found["bottom"] or found["bottom2"])
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
    dimension, factor = ("*money^1", Fraction(1)) if "$" in (match["currency"] or "") else ("", Fraction(1))
    if degrees := re.match(r"\s*\^\{\\circ\}", unit):
        unit, dimension = unit[degrees.end() :], "*angle^1"
    words, position = [], 0
    while len(words) < 6 and (word := _UNIT_WORD.match(unit, position)):
        name = word.group().strip()
        plain = name.rstrip(".").lower()
        variable = glued and not words and name[0].isascii() and not name[1:2].isalpha()  # 5x is no 5
        if variable or plain in _CHANGES_QUANTITY:
            break
        position = word.end()
        if not words and plain in _SCALES:
            value *= _SCALES[plain]
        else:
            words.append(name)
    found, _ = _longest_unit(words)
    if found is not None and not dimension:
        dimension, factor = found
    return _Quantity(value, dimension, factor), unit[position:].strip()


def _unit(words: list[str]) -> tuple[str, Fraction] | None:
    """Dimension and factor of a unit's words; `None` where one of them is a noun, or there are none."""
    dimension, factor, power = "", Fraction(1), 1
    for word in words:
        plain = word.rstrip(".")
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
        total = _Quantity(value / total.factor, total.dimension, total.factor, compound=True)
    return total


# --- Finding ------------------------------------------------------------------------------------------------------------

_SENTENCE_END = re.compile(r"[.?](?=\s|$)|!(?=\s+\S|\s*$)|[;。？！]|\n|[.](?=[\"')\]]*(?:\s|$))")
_ASIDE = re.compile(
    r",?\s+\(?(?:since|because|so|which|where|when|as|giving|given|for\s+all|if|after|once|who)\b|\s+\((?=[a-z])|,\s+(?=[a-z]{2,}\b(?<!and)(?<!or))"
)
_FILLER = re.compile(
    r"(?:(?:as\s+follows|approximately|approx\.?|about|around|roughly|nearly|almost|exactly|precisely|therefore|thus|hence|then|simply|just"
    r"|indeed|clearly|still|actually|also|now|so|equal\s+to|equals|given\s+by|(?:a|the)\s+total\s+(?:of\s+|is\s+)?|(?:the\s+)?(?:number|value|option|choice|letter)"
    r"(?=\s+[\d(\\$A-J])|\\approx|\\therefore|[:=≈~,])\s*)+",
    re.IGNORECASE,
)
_NOT_BUT = re.compile(r"\b(?:is\s+)?not\s[^\n.;]{1,60}?[,;]?\s+but\s+(?:rather\s+|is\s+)?", re.IGNORECASE)
_QUALIFIED = re.compile(
    r"\b(?:not|n't|never|less|fewer|more|greater|least|most|under|over|between|half|twice|double|triple|than|except|without|sum|product|difference|quotient|squared?)\b",
    re.IGNORECASE,
)
_NO_ANSWER_WORDS = _words(
    "correct right wrong incorrect clear obvious below above follows following here unknown as not simple simply found given obtained calculated"
    " computed determined the a an that this it we let first step conclusion final answer so thus therefore what how which"
)
_MATH_SPAN = re.compile(
    r"\$\$(.{1,1000}?)\$\$|\\\[(.{1,1000}?)\\\]|\\\((.{1,1000}?)\\\)|\$(?![\s$])((?:\\\$|[^$\n]){1,1000}?)(?<!\\)(?<!\s)\$(?!\d)",
    re.DOTALL,
)
# After a number: what makes it a part of a larger expression.
_GOES_ON = re.compile(
    r"\s*(?:[\^_√±≤≥<>∞\u0370-\u03ff]|\\(?!%|text|mathrm|mbox|textrm|textbf|operatorname|[,;:! )\]]|quad|\$|circ)|!(?![\s.]*$)(?!\s+[A-Z])|\{|[*/×÷·=](?!\*)"
    r"|[-+](?=\s*(?:[\d\\($.]|[A-Za-z](?![a-z])))|\((?!\s*[A-Za-z])|\.\d|:\d)|[A-Za-z](?![A-Za-z])(?<![ghmsLl])|[A-Za-z]\w*[*^(\\+-]|\d"
)
_LISTS_ON = re.compile(
    r"\s*[或和又至到や]\s*\d|\s*(?:,\s*)?(?:\$\s*)?(?:or|and|to|&|through|out\s+of)\s+(?:\$?-?\.?\d|\\[a-z]|\$|a\s+half\b|[a-z]\s*=)|\s*,\s*(?:and\s+|or\s+)?(?:[-$]|\\(?!boxed|fbox)[a-z(]|\d|[a-z]\s*=)",
    re.IGNORECASE,
)


def extract_answer(text: str) -> tuple[str | None, str | None]:
    """Find the final answer by the rules of this module.

    Returns:
        The answer and the name of the rule; both `None` where nothing is found. Never raises, whatever the text.
    """
    text = _plain(_spoken(text)[-SEARCHED_TAIL:])
    if "\\" in text or "{,}" in text:
        text = _GROUPS.sub(",", text)
    for rule, find in _RULES:
        answer = find(text)
        if answer:
            return answer, rule
    return None, None


_HASH = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)")
_FACTORIAL = re.compile(r"\d+!")
_ENUMERATED = re.compile(r"\d+\s*(?:[.):]\s+\S|\s[A-Z])|(?:step|part|case|section)\b", re.IGNORECASE)
_LABEL = re.compile(
    r"(?:(?:the|my|our|so)\s+)*(?:final\s+|correct\s+)?(?:answer|result|solution|conclusion)\b", re.IGNORECASE
)


def _find_hash(text: str) -> str | None:
    if "####" not in text:
        return None
    for match in reversed(list(_HASH.finditer(text))):
        line = _without_marks(match.group(1)).strip()
        heading = text.rfind("\n", 0, match.start()) + 1 == match.start() and text[match.end() :].strip() != ""
        if not line or _LABEL.match(line) or (heading and (_ENUMERATED.match(line) or _is_prose(line))):
            continue
        if answer := line if _FACTORIAL.fullmatch(line) else _leading_answer(line, prose=False):
            return answer
    return None


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
    answers = [_of_box(closed[-1][2])]
    for (_, end, inside), (start, _, _) in zip(reversed(closed[:-1]), reversed(closed), strict=False):
        if not _BETWEEN_BOXES.fullmatch(text[end:start]):
            break
        answers.insert(0, inside)
    return ", ".join(answers)


def _of_box(inside: str) -> str:
    """What a box holds; where it begins with words before a number, the number."""
    if re.match(r"\\(?:text|textbf|mathrm|mbox)\s*\{\s*[A-Za-z]", inside) and re.search(r"\d", inside):
        words = re.sub(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}", r"\1 ", inside)
        return _find_answer_is(words) or _leading_answer(words, prose=True) or inside
    return inside


_BETWEEN_BOXES = re.compile(
    r"[\s$]*(?:\\[)\]])?[\s$]*(?:,|,?\s*(?:and|or)|&)[\s$]*(?:\\[(\[])?\s*(?:[A-Za-z]\s*=\s*)?[\s$]*"
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
_ANSWER_TAG = re.compile(r"<answer>(?=(.{1,2000}?)</answer>)", re.IGNORECASE | re.DOTALL)
_OTHER_LANGUAGES = re.compile(
    r"(?:答案|答え|答|정답|답)\s*(?:应该是|應該是|是|为|為|は|은|는|:)\s*:?"
    r"|\b(?:respuesta|réponse|Antwort|resposta|risposta|ответ|antwoord)\b[^\n.:]{0,30}?(?:\b(?:es|est|ist|lautet|é|è|is)\b|:|=|—)\s*:?",
    re.IGNORECASE,
)


def _find_answer_is(text: str) -> str | None:
    spoken = not text.isascii()
    if spoken is False and not any(sign in text for sign in ("nswer", "NSWER", "A:", "A =", "#", "option", "choice")):
        return None
    text = _without_marks(text)
    found: dict[
        int, tuple[bool, int]
    ] = {}  # by where the answer would begin: a label or a sentence, and where a tag ends
    for match in _ANSWER_LINE.finditer(text):
        found[match.end()] = (True, 0)
    if "#" in text:
        found |= {match.end(): (True, 0) for match in _HEADING.finditer(text)}
    if any(sign in text for sign in ("nswer", "NSWER", "option", "choice")):
        found |= {match.end(): (False, 0) for match in _ANSWER_IS.finditer(text)}
        if "<" in text:
            found |= {match.end(): (False, match.end(1)) for match in _ANSWER_TAG.finditer(text)}
    if spoken:
        found |= {match.end(): (False, 0) for match in _OTHER_LANGUAGES.finditer(text)}
    for start in sorted(found, reverse=True)[:MOST_MARKERS]:
        label, tag = found[start]
        answer = _leading_answer(text[start:tag].strip(), prose=True) if tag else _after_marker(text, start, label)
        if answer:
            return answer
    return None


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
    rest = _trim(rest.split("\n")[0] if "$$" not in rest and "\\[" not in rest else rest)
    rest = _NOT_BUT.sub("", rest, count=1)
    if filler := _FILLER.match(rest):
        rest = rest[filler.end() :].strip()
    if not rest or re.match(r"(?:not|n't|never)\b", rest, re.IGNORECASE):
        return None
    if rest.startswith(("\\boxed", "\\fbox")) and (boxed := boxed_answer(rest)):
        return boxed
    if span := _MATH_SPAN.match(rest):
        return _answer_of_math(span, rest)
    if spelled := re.match(r"[a-z-]+\s\((\d+)\)", rest):
        return spelled.group(1)
    if option := re.match(r"(?:option|choice)?\s*\(?([A-Ja-j])\)?(?=[.\s,]*$|\)\s|\.\s|:\s)", rest):
        return option.group(1) if not rest[option.end() :].strip(" .,") else _sentence(rest)
    if assigned := re.match(r"\$?([A-Za-z](?:_\{?\w\}?)?(?:\([a-z]\))?|[A-Za-z ]{2,20})\s*=\s*(?=\S)", rest):
        inner = _leading_number(rest[assigned.end() :])
        return inner or _sentence(rest)
    if number := _leading_number(rest):
        return number
    sentence = _sentence(rest)
    if re.search(r"[\\^=+*/√_(){}<>\[\]]", sentence) or not re.search(r"[A-Za-z]{2,} [A-Za-z]{2,}", sentence):
        first = sentence.split(" ", 1)[0].strip(",.:;").lower()
        return sentence if sentence and first not in _NO_ANSWER_WORDS and _holds_answer(sentence) else None
    return _answer_in_words(sentence, prose)


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
    if _GOES_ON.match(after) or _LISTS_ON.match(after):
        return _sentence(rest)
    words, position = [], 0
    text = re.sub(
        r"\\(?:text|mathrm|mbox|textrm)\s*\{([^{}]*)\}|\\[,;: ]|[$~]", lambda m: f" {m.group(1) or ''} ", after
    )
    while len(words) < 6 and (word := _UNIT_WORD.match(text, position)):
        name = word.group().strip()
        plain = name.rstrip(".,").lower()
        if plain in _ENDS_QUANTITY:
            break
        if plain in _CHANGES_QUANTITY:
            goes_on = _CHANGES_WITH.get(plain)
            return _sentence(rest) if goes_on is None or goes_on.match(text, word.end()) else _in_short(match, words)
        words.append(name)
        position = word.end()
        if _same_dimension(name, re.match(rf"\s*,?\s*{_NUMBER}\s*([A-Za-z{_CJK}]+)", text[position:])):
            return _sentence(rest)  # 5 feet 6 inches
        if name.endswith("."):
            break
    return _in_short(match, words)


_ANOTHER = re.compile(r"\s*(?:the\s+|a\s+)?(?:\S+\s+)?(?:\d|\\[a-z]|half\b)")
_COMPARED = re.compile(r"\s+(?:\w+\s+)?than\s+(?:\d|[a-z]\b)")
#: What must follow some words that change a quantity, so that they do: "5 and 7", "5 more than x", not "5 more apples".
_CHANGES_WITH = {
    **dict.fromkeys(("and", "or", "to"), _ANOTHER), **dict.fromkeys(("more", "less", "fewer"), _COMPARED)
}  # fmt: skip


def _in_short(number: re.Match[str], words: list[str]) -> str:
    """A number with its scale and unit; nouns are left out."""
    words = [word.rstrip(".,") for word in words]
    scale = int(bool(words) and words[0].lower() in _SCALES)
    _, length = _longest_unit(words[scale:])
    return " ".join([_trim(number.group(1)).rstrip(","), *words[: scale + length]])


def _same_dimension(unit: str, following: re.Match[str] | None) -> bool:
    """Whether a unit, and the last group of what follows it, measure the same."""
    return following is not None and _known(unit) is not None and _known(unit) == _known(following.groups()[-1])


def _known(unit: str) -> str | None:
    return _UNITS.get(unit.rstrip(".,").lower(), (None,))[0]


def _answer_of_math(span: re.Match[str], rest: str) -> str | None:
    """The answer that begins with a math span: the span, with what belongs to it behind it."""
    inside = _inside(span)
    after = rest[span.end() :]
    if boxed := boxed_answer(inside):
        return boxed
    joined = re.match(r"\s*(?:,\s*)?(and|or|,|&)\s*", after)
    if joined and (following := _MATH_SPAN.match(after, joined.end())):
        return f"{inside}, {_answer_of_math(following, after)}"
    if _NUMBER_AT_START.fullmatch(inside):
        return _leading_number(f"{inside} {after.strip()}" if after.strip() else inside)
    return _trim(inside) or None


def _inside(span: re.Match[str]) -> str:
    return next(group for group in span.groups() if group is not None).strip()


def _sentence(rest: str) -> str:
    """The first sentence of a text, without what explains it."""
    end = _SENTENCE_END.search(rest)
    sentence = rest[: end.start()] if end else rest
    aside = _ASIDE.search(sentence)
    return _trim(sentence[: aside.start()] if aside else sentence)


_UNFINISHED = re.compile(r"(?:[-+*/×÷=(]|<<[^>]*)\s*$")
_JOINED_BEFORE = re.compile(
    rf"((?<![\w.])(?:{_NUMBER}(?:\s+[A-Za-z]+)?\s+(?:or|out\s+of|in)\s+|between\s+{_NUMBER}\s+and\s+))$"
)
_QUALIFIED_BEFORE = re.compile(
    r"\b(?:not|isn't|never|(?:less|fewer|more|greater)\s+than|at\s+(?:least|most)|half\s+(?:of|as)|twice|double|triple)\s+\$?$",
    re.IGNORECASE,
)
_PART_BEFORE = re.compile(
    r"(?:[\w)}\]]\s*[*+/×÷^]\s*|[\w)}\]]-|√|\\sqrt\s*\{?\s*|[A-Za-z]_\{?|\\frac\s*\{[^{}]*\}\s*\{?\s*)$", re.ASCII
)


def _find_number(text: str) -> str | None:
    text = _without_marks(text)
    if _UNFINISHED.search(text[-200:]):
        return None
    if formula := _last_formula(text):
        return formula
    if "$" in text or "\\" in text:
        text = _MATH_SPAN.sub(_inside, text)
    last = _last(_NUMBER_ANYWHERE, text)
    if last is None:
        return None
    start, before = last.start(), text[max(0, last.start() - 200) : last.start()]
    if _QUALIFIED_BEFORE.search(before):
        return None
    if (joined := _JOINED_BEFORE.search(before)) or (joined := _compound_before(before, text[last.end() :])):
        start -= len(joined.group(1))
    elif _PART_BEFORE.search(before):
        start = max(text.rfind(char, 0, start) for char in " =\n$>:") + 1
        start = _calculation_start(text, start)
        return _sentence(text[start:]) or None
    return _leading_number(text[start:].split("\n", 1)[0]) or _sentence(text[start:])


def _calculation_start(text: str, start: int) -> int:
    """Where the calculation begins whose last term begins at `start`."""
    before = text[max(0, start - 200) : start]
    calculation = re.search(r"(?:[\d.,$()]+\s*[-+*/×÷]\s+)+$", before)
    return start - len(calculation.group()) if calculation else start


def _compound_before(before: str, after: str) -> re.Match[str] | None:
    """The part of a compound quantity ("5 hours and ") before its last number."""
    match = re.search(rf"((?<![\w.]){_DECIMAL}\s*([A-Za-z]+|[{_CJK}]+)\s*,?\s*(?:and\s+)?)$", before)
    return match if match and _same_dimension(match.group(2), re.match(rf"\s*([A-Za-z]+|[{_CJK}]+)", after)) else None


def _last_formula(text: str) -> str | None:
    """The right side of the last formula, where no number follows it and it is more than a number."""
    if "\\" not in text and "^" not in text and "$" not in text:
        return None
    last = _last(_MATH_SPAN, text)
    if last is None or re.search(r"\d", text[last.end() :]):
        return None
    inside = _inside(last)
    if _NUMBER_AT_START.fullmatch(inside):
        return None
    if "matrix" not in inside:  # the last line of aligned equations
        inside = re.sub(r"\\(?:begin|end)\{\w+\*?\}|&", "", re.split(r"\\\\|\n", inside.rstrip("\\ \n"))[-1])
    side = re.split(r"(?<![<>!])=|\\approx|\\Rightarrow|\\implies", inside)[-1]
    if _NUMBER_AT_START.match(side.strip()):
        return _leading_number(f"{side.strip()} {text[last.end() :].strip()}".strip())
    return _trim(side) if re.search(r"\d", side) or not re.search(r"\w", text[last.end() :]) else None


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
        (r"\\(?:lvert|rvert|vert)(?![A-Za-z])", "|"), (r"\\(?:dots|ldots|cdots)(?![A-Za-z])", r"\\ldots "), (r"\\(?:tiny|small)(?![A-Za-z])", ""),
    )
]  # fmt: skip
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|max|min|gcd|lcm|det|mod"


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
    text = _NUMBER_WORDS.get(text.casefold(), text)
    return re.sub(r"^(?:\\approx|\\therefore|=|:)\s*", "", text)


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
    if quantity is not None and not quantity.compound:
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
    if option := re.fullmatch(r"\(?([A-J])(?:\)|[.:])\s+(\S.*)", left):
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
    for rule in (_same_measure, _same_base, _same_side, _same_elements, _same_words):
        if (decided := rule(left, right, depth)) is not None:
            return decided
    if (
        None in (_split(left), _split(right))
        or _explodes(left)
        or _explodes(right)
        or (seconds := _seconds_left.get()) <= 0
    ):
        return False
    start = time.monotonic()
    equal = _math_verify(left, right)
    _seconds_left.set(seconds - (time.monotonic() - start))
    return equal


_MEASURE = re.compile(rf"(.*[\d}})\w])(?:\s+|\s*\\text\{{\s*)([A-Za-z]{{1,20}}|[{_CJK}]+)\s*\}}?(\^\{{\d\}})?")


def _same_measure(left: str, right: str, depth: int) -> bool | None:
    """Expressions with a unit behind them: the unit counts where both have one."""
    parts = []
    for text in (left, right):
        match = _MEASURE.fullmatch(text)
        known = (
            match
            and not _WORDS.search(re.sub(r"\\text\{[^{}]*\}", "", match.group(1)))
            and _unit([match.group(2) + (match.group(3) or "")])
        )
        parts.append((match.group(1), known) if known else (text, None))
    (one, unit), (other, other_unit) = parts
    if not (unit or other_unit) or (one, other) == (left, right):
        return None
    return (unit is None or other_unit is None or unit == other_unit) and _same(one.strip(), other.strip(), depth + 1)


def _same_base(left: str, right: str, depth: int) -> bool | None:
    """Numbers with a base, `204_{5}`: equal where digits and base are. A ratio or time, `3:30`, is equal by parts."""
    based = [_BASED.fullmatch(text.replace(" ", "")) for text in (left, right)]
    if any(match and match.group(1)[0].isdigit() for match in based):
        return all(based) and based[0].groups() == based[1].groups()
    if ":" in left + right and "\\" not in left + right:
        halves = {text[-2:] for text in (left, right) if text[-2:] in ("am", "pm")}
        parts = [re.sub(r"\s*[ap]m$", "", text).split(":") for text in (left, right)]
        return (
            len(halves) < 2
            and len(parts[0]) == len(parts[1])
            and all(_same(a.strip(), b.strip(), depth + 1) for a, b in zip(*parts, strict=True))
        )
    return None


def _same_side(left: str, right: str, depth: int) -> bool | None:
    """Where one of two is an equation or a membership, its last side counts; an inequality becomes its interval."""
    sides = [text if _elements(text) else _last_side(text) for text in (left, right)]
    if (sides[0] == left) != (sides[1] == right):
        return _same(*sides, depth + 1)
    if sides[0] != left and re.sub(r"\s", "", left[: -len(sides[0])]) == re.sub(r"\s", "", right[: -len(sides[1])]):
        return _same(*sides, depth + 1)
    intervals = [_interval(text) for text in (left, right)]
    if any(intervals) and (all(intervals) or any(re.match(r"[(\[]", text) for text in (left, right))):
        return _same(*[interval or text for interval, text in zip(intervals, (left, right), strict=True)], depth + 1)
    return None


def _last_side(text: str) -> str:
    sides = _EQUATION.split(text)
    if len(sides) < 2 or not sides[-1].strip():
        return text
    return (sides[0] if re.fullmatch(r"\s*[A-Za-z]\s*", sides[-1]) else sides[-1]).strip()


_LESS, _GREATER = r"(<|\\leq\s*)", r"(>|\\geq\s*)"
_BOUND, _VARIABLE = r"([^<>=,]+?)", r"([A-Za-z])"


def _interval(text: str) -> str | None:
    """An inequality in one variable as an interval."""
    text = text.strip()
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
            return all(_same(element, right if other is None else left, depth + 1) for element in lone[1])
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
    if any(_WORDS.search(re.sub(r"\\(?:begin|end)\{\w+\}", "", text)) for text in texts):
        one, other = (re.sub(r"[\s.,;:'\"!?()]+", " ", text).strip().casefold() for text in texts)
        return one == other
    return None


def _explodes(expression: str) -> bool:
    """Whether evaluating the expression could take forever: towers of powers, huge exponents, factorials of factorials."""
    powers = re.findall(r"(\d*)\s*\^\s*[{(]?\s*-?(\d*)", expression)
    towers = re.search(r"\^\s*[{(]?\s*[\w.]+\s*\^", expression) is not None
    return (
        towers
        or any(len(power) > 4 or len(power) > 2 and (not base or len(base) > 3) for base, power in powers)
        or expression.count("!") > 1
        or bool(re.search(r"\d{3,}\s*!", expression))
    )


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
        return (
            bool(gold and found)
            and bool(verify(gold, found, timeout_seconds=limit))
            and _same_values(gold[0], found[0])
        )
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
