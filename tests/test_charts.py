"""What the page of a run is drawn from: rows sampled from files, and the geometry of charts."""

import json
import random
import re
import tracemalloc

import pytest

from align.charts import histogram_bars, line_chart, number, thinned, ticks
from align.records import write_records
from align.report import column_summary
from align.row_sample import sample_rows


def test_a_large_file_is_sampled_evenly_and_never_held(tmp_path):
    with open(tmp_path / "scored.jsonl", "w") as file:
        for i in range(60_000):
            file.write(json.dumps({"id": f"p{i}", "text": "x" * 500}) + "\n")
    problems = []
    tracemalloc.start()
    sampled = sample_rows(tmp_path, "scored.jsonl", 2000, problems)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = (tmp_path / "scored.jsonl").stat().st_size
    assert peak < size / 6, (peak, size)
    indices = [index for index, _ in sampled.rows]
    assert sampled.total == 60_000 and len(indices) == 2000 and indices == sorted(set(indices)) and not problems
    assert all(row["id"] == f"p{index}" for index, row in sampled.rows)
    # Each tenth of the file has its share: 200 ± 5 standard deviations.
    shares = [sum(index // 6000 == tenth for index in indices) for tenth in range(10)]
    assert all(abs(share - 200) < 5 * (200 * 0.9) ** 0.5 for share in shares), shares


def test_parquet_is_sampled_as_jsonl_is(tmp_path):
    rows = [{"id": f"p{i}", "value": i} for i in range(5000)]
    write_records(tmp_path / "a.parquet", rows)
    sampled = sample_rows(tmp_path, "a.parquet", 300, [])
    assert sampled.total == 5000 and len(sampled.rows) == 300
    assert all(row == rows[index] for index, row in sampled.rows)
    assert len(sample_rows(tmp_path, "a.parquet", 10_000, []).rows) == 5000
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    problems = []
    assert sample_rows(tmp_path, "a.parquet", 300, problems).rows == [] and "a.parquet: cannot be read" in problems[0]


def test_ticks_are_round_and_within():
    assert ticks(0, 1) == [0, 0.5, 1] and ticks(0.13, 0.74) == pytest.approx([0.2, 0.4, 0.6])
    assert ticks(2, 2) == [2]
    draw = random.Random(0)
    for _ in range(500):
        low = draw.uniform(-1, 1) * 10 ** draw.uniform(-9, 9)
        high = low + 10 ** draw.uniform(-9, 9)
        if high - low > 1e-6 * abs(low):
            found = ticks(low, high)
            assert 1 <= len(found) <= 4 and all(
                low - 1e-6 * (high - low) <= t <= high + 1e-6 * (high - low) for t in found
            )


def test_thinning_loses_no_peak():
    draw = random.Random(0)
    points = [(step, draw.gauss(0, 1)) for step in range(20_000)]
    points[12_345] = (12_345, 50.0)
    points[777] = (777, -50.0)
    kept = thinned(points)
    assert {points[0], points[-1], points[12_345], points[777]} <= set(kept) <= set(points) and len(kept) <= 602
    assert kept == sorted(kept) and thinned(points[:600]) == points[:600]


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [1e308, -1e308], [1e-320, 2e-320], [1e16, 1e16 + 2], [-1e308]])
def test_a_chart_of_any_numbers_stays_in_its_frame(values):
    chart = line_chart("x", {"train": list(enumerate(values))})
    for _, _, x, y in chart["lines"][0]["points"]:
        assert 0 <= x <= 320 and 0 <= y <= 150
    assert not re.search("nan|inf", json.dumps(chart), re.IGNORECASE)


def test_numbers_in_a_few_digits():
    assert [number(v) for v in (0, 0.5, -1.5, 12345, 1e-5, 2.5e-12, 123456.0)] == [
        "0",
        "0.5",
        "−1.5",
        "12,345",
        "1e−5",
        "2.5e−12",
        "123,456",
    ]


def test_bars_are_shares_on_a_square_root_scale():
    rows = [{"chosen_ce_scores": [0.01] * 4 + [0.99], "rejected_ce_scores": [0.5] * 10}]
    bars = histogram_bars(column_summary(rows, "ce_scores", ("chosen", "rejected")), ("chosen", "rejected"))["bars"]
    up = [bar["height"] for bar in bars if not bar["down"]]
    assert (
        up[0] == pytest.approx(52 * 0.8**0.5, abs=0.06)
        and up[-1] == pytest.approx(52 * 0.2**0.5, abs=0.06)
        and sum(map(bool, up)) == 2
    )
    assert [bar["height"] for bar in bars if bar["down"]][12] == 52
