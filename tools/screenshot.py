"""The README's picture: `python -m tools.screenshot quickstart/selection.html docs/selection.png history_excess`."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

FLAGS = ["--disable-gpu", "--disable-quic"]  # Playwright itself gives those that keep Chromium from calling home


def find_chromium() -> str:
    """Path of the system's Chromium, or of the one that Playwright has installed.

    Raises:
        FileNotFoundError: there is neither; says how to get one.
    """
    for name in ("chromium", "google-chrome", "chrome"):
        if path := shutil.which(name):
            return path
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    if not Path(path).exists():
        raise FileNotFoundError("no Chromium: apt-get install chromium, or python -m playwright install chromium")
    return path


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium, closed at the end.

    Raises:
        FileNotFoundError: there is none.
    """
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path, args=FLAGS) as browser:
        yield browser


def take(page: Path, picture: Path, method: str | None = None) -> None:
    """A picture of a selection page, with the panel of the first dropped word.

    Args:
        page: as `tokensel.report.write_selection_page` wrote it.
        picture: PNG file to write.
        method: name of the run that is shown; the first one if there is none.
    Raises:
        FileNotFoundError: there is no such page, or no Chromium.
        ValueError: no run of the page has that name.
    """
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 1080, "height": 900}, device_scale_factor=1.5)
        tab.goto(page.resolve(strict=True).as_uri())
        names = tab.locator("#runs button").all_text_contents()
        if method is not None:
            if method not in names:
                raise ValueError(f"{page} shows {', '.join(names)}; got method {method!r}")
            # no click of a mouse, after which the token would have no ring around it
            tab.locator("#runs button").nth(names.index(method)).dispatch_event("click")
        tab.evaluate("[...document.querySelectorAll('.drop')].find(e => /[a-z]/.test(e.textContent))?.focus()")
        tab.screenshot(path=picture)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.screenshot", description=take.__doc__.partition("\n")[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("method", nargs="?")
    args = parser.parse_args()
    try:
        take(args.page, args.picture, args.method)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
