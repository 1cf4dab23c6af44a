"""Not a test: a stage whose second process fails, by a bad row or by a bug. Launched by test_parallel.py."""

import sys

from align.errors import AlignError, RecordError
from align.processes import leave
from align.stages import run_in_parts

kind, out = sys.argv[1:]


def compute(number, batch):
    if number == 1:
        raise RecordError("row 1: bad") if kind == "row" else RuntimeError("a bug")
    return [{"id": number}]


try:
    run_in_parts(out, [0, 1, 2, 3], compute, stage="test", settings={}, order=lambda row: row["id"])
except AlignError as error:
    leave(error)
