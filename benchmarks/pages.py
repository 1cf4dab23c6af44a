"""How long the pages take to load, in a real browser, headless.

    python benchmarks/pages.py --json benchmarks/results/pages.json

Pairs of random ids with a score each, lengths as given, through `align.inspect_pairs`, and the page of a run beside it with
`--run DIR`. Loading is from the request until the page's `load` event and until tokens of the first pair stand on the screen;
"all drawn", with `--scroll`, is once, scrolling down to the last pair. Medians. Needs `playwright`, and Chromium or Chrome.
"""

import json
import os
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from align.models import load_tokenizer
from align.report import inspect_pairs, markdown_table
from align.run_report import inspect_run


def find_browser() -> str | None:
    """Path of a Chromium or Chrome: `$ALIGN_BROWSER`, one of this system's, or the one that Playwright installed."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    known = [os.environ.get("ALIGN_BROWSER"), *map(shutil.which, names)]
    if found := next(filter(None, known), None):
        return found
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


@contextmanager
def headless(path: str) -> Iterator:
    """A running browser; without a sandbox, since root, as in a container, cannot have one."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def time_loading(browser, path: Path) -> dict[str, float]:
    """Seconds until `load`, and until the first token is on the screen."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    start = time.perf_counter()
    page.goto(path.resolve().as_uri(), wait_until="load")
    loaded = time.perf_counter() - start
    page.locator(".tokens .t").first.wait_for(state="visible")
    seen = time.perf_counter() - start
    page.close()
    return {"load, s": loaded, "tokens visible, s": seen}


def scroll_down(browser, path: Path) -> tuple[float, int]:
    """Seconds until all is drawn where a reader scrolls down as fast as the page goes, and the answers that are then there."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(path.resolve().as_uri())
    start = time.perf_counter()
    while page.locator("#more").is_visible():
        if time.perf_counter() - start > 120:
            raise SystemExit(f"{path}: scrolled down for two minutes, and not all is drawn")
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        page.wait_for_timeout(10)
    drawn, answers = time.perf_counter() - start, page.locator("article .tokens").count()
    page.close()
    return drawn, answers


def random_page(tokenizer, n: int, tokens: int, path: Path) -> Path:
    """A page of n pairs of so many tokens a side on average."""
    draw, pairs = random.Random(0), []
    for i in range(n):
        pair = {"id": f"p{i}", "prompt": "How many are there? " * 8}
        for side in ("chosen", "rejected"):
            length = draw.randrange(tokens // 2, tokens * 3 // 2)
            pair[f"{side}_ids"] = [draw.randrange(len(tokenizer)) for _ in range(length)]
            pair[f"{side}_ce_scores"] = [draw.random() for _ in range(length)]
        pairs.append(pair)
    return inspect_pairs(pairs, tokenizer, path, limit=None)


def main(
    tokenizer: Annotated[str, typer.Option(help="Folder or hub name.")] = "data/tiny-arithmetic/model",
    run: Annotated[str | None, typer.Option(help="Folder of a run, for its page.")] = None,
    pairs: int = 1000,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens per answer; may be repeated.")] = None,
    repeats: int = 5,
    scroll: Annotated[bool, typer.Option(help="Scroll down to the last pair, too.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Loads every page several times and prints medians."""
    browser_path = find_browser()
    if browser_path is None:
        raise SystemExit("there is no Chromium or Chrome; install one, or set ALIGN_BROWSER")
    rows = []
    with tempfile.TemporaryDirectory() as folder, headless(browser_path) as browser:
        pages = {
            f"{pairs:,} pairs, {length} tokens a side": random_page(
                load_tokenizer(tokenizer), pairs, length, Path(folder) / f"{length}.html"
            )
            for length in tokens or (50, 200)
        }
        if run is not None:
            pages["a run"] = inspect_run(run, Path(folder) / "run.html")[0]
        for name, path in pages.items():
            times = [time_loading(browser, path) for _ in range(repeats)]
            found = {key: round(median(each[key] for each in times), 3) for key in times[0]}
            if scroll:
                found["all drawn, s"] = round(scroll_down(browser, path)[0], 1)
            rows.append({"page": name, "MB": round(path.stat().st_size / 1e6, 2), **found})
        version = browser.version
    print(markdown_table(rows))
    if json_path is not None:
        machine = {"browser": f"Chromium {version}", "cores": os.cpu_count(), "platform": platform.platform()}
        json_path.write_text(json.dumps({"rows": rows, "repeats": repeats, **machine}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
