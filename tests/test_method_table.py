"""README's table of methods by parallelism and quantization names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
CELL = re.compile(r"tested: `(tests/test_\w+\.py)::(test_\w+)`|untested|refused: .+")


def test_every_cell_says_what_shows_it():
    text = (ROOT / "README.md").read_text()
    table = text.split("| method | weights | 1 process | DDP | FSDP2 | ZeRO-3 |", 1)[1].split("\n\n", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[1:]]
    assert len(rows) >= 10
    for row in rows:
        assert len(row) == 6
        for cell in row[2:]:
            found = CELL.fullmatch(cell)
            assert found, f"{row[:2]}: {cell!r}"
            if found[1]:
                assert f"def {found[2]}(" in (ROOT / found[1]).read_text(), cell
