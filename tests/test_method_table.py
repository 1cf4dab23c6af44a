"""README's table of methods by parallelism and quantization names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_cell_says_what_shows_it():
    text = (ROOT / "README.md").read_text()
    part = text.split("| method | weights | 1 process | DDP | FSDP2 | ZeRO-3 |", 1)[1].split("Refused:", 1)[0]
    tests = dict(re.findall(r"^(\d+)\. `(tests/test_\w+\.py::test_\w+)`$", part, re.MULTILINE))
    for test in tests.values():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(), test
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("| ")
    ]
    assert len(rows) >= 10
    cells = [cell for row in rows for cell in row[2:]]
    assert {len(row) for row in rows} == {6} and set(cells) == {*(f"tested {n}" for n in tests), "untested", "refused"}
