"""Every page, opened in a real browser: no error, no request, tokens on the screen, numbers under the pointer."""

import json
import sys
from pathlib import Path

import pytest
from conftest import byte_level_tokenizer, random_pairs
from test_run_report import HOSTILE, LOG, make_run, trace

from align.report import inspect_pairs, inspect_traces
from align.run_report import inspect_run
from align.token_texts import token_texts

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

pytest.importorskip("playwright", reason="playwright is not installed; it comes with the extra `dev`")
from pages import find_browser, headless, scroll_down, time_loading  # noqa: E402
from playwright.sync_api import expect  # noqa: E402

TOKENIZER = byte_level_tokenizer()


@pytest.fixture(scope="module")
def browser():
    path = find_browser()
    if path is None:
        pytest.skip("there is no Chromium or Chrome to open pages with; install one, or set ALIGN_BROWSER to its path")
    with headless(path) as browser:
        yield browser


@pytest.fixture
def open_page(browser):
    """Opens a page; in the end, it must have said nothing on the console and asked for nothing but itself."""
    said, contexts = [], []

    def open_(path, **settings):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on(
            "request",
            lambda request: said.append(f"request: {request.url}") if not allowed(request.url, path) else None,
        )
        page.goto(path.resolve().as_uri())
        return page

    def allowed(url, path):
        return url.partition("#")[0] == path.resolve().as_uri() or url.startswith("data:")

    yield open_
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """One of each page, and the rows that are on it."""
    folder = tmp_path_factory.mktemp("pages")
    pairs = random_pairs(1000, vocab_size=390, columns=("ce_scores", "ref_logps"))
    pairs[0]["prompt"] = f"<script>alert(1)</script>{HOSTILE}"
    traces = [trace(i) for i in range(1000)]
    run_pairs, _ = make_run(folder / "run")
    return {
        "pairs": (inspect_pairs(pairs, TOKENIZER, folder / "pairs.html", limit=None), pairs),
        "traces": (inspect_traces(traces, TOKENIZER, folder / "traces.html", limit=None), traces),
        "run": (inspect_run(folder / "run", folder / "run.html")[0], run_pairs),
    }


WHERE = {"pairs": ("rejected", "ce_scores"), "traces": ("trace", "student_probs"), "run": ("rejected", "ce_scores")}


def shown_side(row, name):
    """Ids and scores of the answer that the test looks at."""
    side, column = WHERE[name]
    return (row["completion_ids"], row[column]) if side == "trace" else (row[f"{side}_ids"], row[f"{side}_{column}"])


@pytest.mark.parametrize("name", WHERE)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_are_on_the_screen(open_page, pages, name, scheme):
    path, rows = pages[name]
    page = open_page(path, color_scheme=scheme)
    for place in range(3):
        ids, _ = shown_side(rows[place], name)
        box = page.locator("#pairs article").nth(place).locator(".tokens").last
        box.scroll_into_view_if_needed()
        spans = box.locator(".t")
        assert spans.count() == len(ids)
        texts = token_texts(TOKENIZER, ids)
        for k, text in enumerate(texts):
            if text.strip() and "\n" not in text and "\t" not in text:
                assert spans.nth(k).text_content() == text
                area = spans.nth(k).bounding_box()
                assert area["width"] > 1 and area["height"] > 5
    # It is readable: text and background differ, and the scores' colours do, too.
    colours = page.evaluate("""() => [...document.querySelectorAll('#pairs .t')].slice(0, 300).map(span => {
        const style = getComputedStyle(span);
        return [style.color, style.backgroundColor];
    })""")
    assert len({background for _, background in colours}) > 3 and all(ink != background for ink, background in colours)


def until(page, act, seen, tries=50):
    """Acts again until it is seen: a page that is drawing, or scrolling, on a busy machine answers the next movement."""
    for _ in range(tries):
        act()
        if seen():
            return
        page.wait_for_timeout(100)
    raise AssertionError("the page never answered the pointer")


def point_at(page, element, tip="#tip"):
    """Scrolls first, and lets the scrolling end: the number at a token vanishes when the page moves."""

    def act():
        page.mouse.move(1, 1)
        element.scroll_into_view_if_needed()
        page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        element.hover()

    until(page, act, page.locator(tip).is_visible)


@pytest.mark.parametrize("name", WHERE)
def test_the_pointer_shows_a_token_and_its_number(open_page, pages, name):
    path, rows = pages[name]
    page = open_page(path)
    ids, scores = shown_side(rows[2], name)
    assert len(ids) > 3
    spans = page.locator("#pairs article").nth(2).locator(".tokens").last.locator(".t")
    tip = page.locator("#tip")
    assert not tip.is_visible()
    for k in sorted({0, len(ids) // 2, len(ids) - 1}):
        point_at(page, spans.nth(k))
        assert tip.is_visible()
        said = tip.inner_text()
        assert f"id {ids[k]} · position {k} of {len(ids)}" in said
        assert float(tip.locator("b").first.inner_text().replace("−", "-")) == pytest.approx(scores[k], rel=5e-5)
    page.locator("h1").hover()
    assert not tip.is_visible()


@pytest.mark.parametrize("name", WHERE)
def test_on_a_phone_nothing_is_wider_than_the_screen_and_a_tap_shows_a_number(open_page, pages, name):
    path, rows = pages[name]
    page = open_page(path, viewport={"width": 390, "height": 800}, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#pairs .t").first.tap()
    assert page.locator("#tip").is_visible() and "position 0 of" in page.locator("#tip").inner_text()


def test_pairs_are_found_sorted_and_coloured_by_another_column(open_page, pages):
    path, rows = pages["pairs"]
    page = open_page(path)
    page.locator("#filter").fill("p777")
    expect(page.locator("#count")).to_have_text("1 found")
    assert page.locator("#pairs h2").all_text_contents() == ["p777"]
    page.locator("#filter").fill("")
    expect(page.locator("#count")).to_have_text("")
    page.locator("#order").select_option("low")
    lowest = min(rows, key=lambda row: min(row["rejected_ce_scores"]))
    assert page.locator("#pairs h2").first.text_content() == lowest["id"]
    page.locator("#column").select_option(label="ref_logps")
    point_at(page, page.locator("#pairs .t").first)
    assert "ref_logps" in page.locator("#tip div").nth(1).inner_text()


def test_the_run_page_changes_files_and_its_charts_answer(open_page, pages):
    path, _ = pages["run"]
    page = open_page(path)
    page.locator("#set").select_option(label="traces.jsonl")
    assert "traces.jsonl" in page.locator("#about").inner_text()
    assert page.locator("#pairs article").first.locator("h3").text_content().startswith("Trace")
    point_at(page, page.locator("#pairs .t").first)
    assert "student_probs" in page.locator("#tip").inner_text()
    # Every point of a curve, under the pointer.
    chart = page.locator("svg[data-lines]").first
    chart.scroll_into_view_if_needed()
    tip = page.locator("#chart-tip")
    points = json.loads(chart.get_attribute("data-lines"))[0]["points"]
    for entry, (step, loss, x, y) in zip(LOG, points, strict=True):

        def act(x=x, y=y):
            area = chart.bounding_box()
            page.mouse.move(area["x"] + x / 320 * area["width"], area["y"] + y / 150 * area["height"])

        until(page, act, lambda step=step: tip.inner_text().split("\n")[0] == f"step {step}")
        assert step == entry["step"]
        said = tip.inner_text().split("\n")
        assert float(said[1].removeprefix("train ")) == loss == pytest.approx(entry["loss"], rel=1e-4)
    until(page, lambda: page.mouse.move(1, 1), lambda: not tip.is_visible())
    bar = page.locator("#scores rect.bar").nth(12)
    point_at(page, bar, "#chart-tip")
    assert "% of chosen" in tip.inner_text()
    for words in ("cDPO!", "problems without a right completion", "score contrastive"):
        assert page.get_by_text(words, exact=True).first.is_visible()
    settings = page.locator("details dd", has_text="value-7")
    assert not settings.is_visible()
    page.locator("details summary").nth(1).click()
    assert settings.is_visible()


def test_charts_answer_the_keyboard(open_page, pages):
    page = open_page(pages["run"][0])
    tip = page.locator("#chart-tip")
    chart = page.locator("svg[data-lines]").first
    chart.scroll_into_view_if_needed()
    chart.focus()
    # Focus scrolls, and what a tip says vanishes when the page moves: the scrolling ends first.
    page.evaluate(
        "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 100))))"
    )
    said = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
        tip.wait_for(state="visible")
        said.append(tip.inner_text().split("\n")[0])
    assert said == ["step 10", "step 20", "step 10", "step 10"]
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    page.keyboard.press("ArrowLeft")
    assert tip.inner_text().split("\n") == ["step 60", "train 0.11667", "eval 0.25"]
    page.locator("svg[data-bars]").first.focus()
    assert not tip.is_visible()
    page.keyboard.press("ArrowRight")
    assert "% of chosen" in tip.inner_text()


def test_a_lone_point_has_the_colour_of_its_name(open_page, pages):
    page = open_page(pages["run"][0])
    figure = page.locator("figure", has=page.locator("svg[data-lines]")).first
    names = figure.locator(".names i").evaluate_all("each => each.map(i => getComputedStyle(i).backgroundColor)")
    (dot,) = figure.locator("circle").evaluate_all("each => each.map(i => getComputedStyle(i).fill)")
    assert dot == names[1] != names[0]


@pytest.mark.parametrize("width", [1280, 390])
def test_the_evaluation_is_all_on_the_screen(open_page, pages, width):
    """With three metrics; on a phone, at least without its whiskers, and the rest by scrolling."""
    page = open_page(pages["run"][0], viewport={"width": width, "height": 900})
    box = page.locator("#evaluation .scroll")
    room, needed = box.evaluate("box => [box.clientWidth, box.scrollWidth]")
    assert page.locator("#evaluation td.whisk").first.is_visible() == (width > 1000)
    assert needed <= room or width < 1000
    assert page.locator("#evaluation td.n").first.inner_text() == "40"


def test_a_hostile_run_stays_text(open_page, tmp_path):
    make_run(tmp_path / "run")
    for path in (tmp_path / "run").rglob("*"):
        if path.suffix == ".jsonl" or path.name == "summary.json" or path.name.endswith("manifest.json"):
            text = path.read_text()
            for word in ("the base", "the", "x", "value-7", "hash", "p1", "t1"):
                text = text.replace(f'"{word}"', json.dumps(f"{word}<script>console.log(1)</script>{HOSTILE}"))
            path.write_text(text)
    page = open_page(inspect_run(tmp_path / "run", tmp_path / "page.html")[0])
    assert page.locator("#pairs article").count() > 5 and page.get_by_text("<script>console.log(1)").count() > 5
    assert page.locator("img").count() == 0


def test_a_thousand_pairs_load_in_time(browser, pages):
    """3 seconds on a quiet machine are promised (benchmarks/pages.py measures); the limit here is for a busy one."""
    found = time_loading(browser, pages["pairs"][0])
    assert found["tokens visible, s"] < 15
    assert scroll_down(browser, pages["pairs"][0])[1] == 2000  # and all of them are drawn in the end
