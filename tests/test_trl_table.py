"""docs/trl.md has the table of differences from TRL that the matrix keeps. To write it: python tests/test_trl_table.py"""

import importlib
import sys
from pathlib import Path

import pytest
from differential import DIFFERENCES

PAGE = Path(__file__).parents[1] / "docs" / "trl.md"
HEAD = "| trainer: arguments | what happens | why |\n|---|---|---|\n"
WORDS = {
    "refused": "TRL trains; here it is refused",
    "own words": "both refuse; the error here is align's own",
    "accepted": "TRL fails; here it trains",
    "other numbers": "both train, with other numbers",
}
#: File of cases -> the prefixes of their names.
MATRICES = {"test_matrix_dpo": ("dpo",), "test_matrix_sft": ("bash", "guarded", "rac")}


def table(prefixes):
    """The rows of some trainers, as the page has them."""
    rows = [(name, *DIFFERENCES[name]) for name in sorted(DIFFERENCES) if name.split(":")[0] in prefixes]
    return [f"| {name} | {WORDS[kind]} | {reason} |" for name, kind, reason in rows]


def written(prefixes):
    return [line for line in PAGE.read_text().splitlines() if line.startswith(tuple(f"| {one}: " for one in prefixes))]


@pytest.mark.parametrize("matrix", MATRICES)
def test_the_page_has_the_table(matrix):
    importlib.import_module(matrix)
    expected = table(MATRICES[matrix])
    assert len(expected) > 5 and written(MATRICES[matrix]) == expected
    assert HEAD in PAGE.read_text()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    for name in MATRICES:
        importlib.import_module(name)
    before, _, _ = PAGE.read_text().partition(HEAD)
    PAGE.write_text(before + HEAD + "\n".join(row for prefixes in MATRICES.values() for row in table(prefixes)) + "\n")
