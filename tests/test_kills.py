"""Stages that are killed again and again end with the rows of an undisturbed run; see `kills.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).with_name("kills.py")


def run(*arguments: str) -> list[dict]:
    done = subprocess.run(
        [sys.executable, str(KILLS), *arguments], capture_output=True, text=True, cwd=KILLS.parent.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_stage_that_is_killed_ends_with_the_same_rows():
    (found,) = run("--works", "verify", "--kills", "3")
    assert found["killed"] == 3 and found["compared"] >= 1
    (found,) = run("--works", "pair", "--kills", "4", "--at-writes")
    assert found["killed"] == found["compared"] == 4


@pytest.mark.slow
def test_thirty_kills_of_every_stage_and_of_training():
    found = run("--kills", "30")
    assert len(found) == 20 and all(each["killed"] == 30 and each["compared"] >= 1 for each in found), found
    # Most kills strike when there is something to lose.
    assert sum(each["with_files"] for each in found) > 300


@pytest.mark.slow
def test_kills_at_the_writes_of_every_stage_and_of_training():
    found = run("--kills", "10", "--at-writes")
    assert len(found) == 20 and all(each["killed"] == each["compared"] >= 3 for each in found), found
