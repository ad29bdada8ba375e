"""Chromium, one for a module, and its windows, of which nothing may go wrong unseen."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from tests.support.worker import Worker

if TYPE_CHECKING:
    from playwright.async_api import Browser

    from tests.browser.window import Window

OpenWindow = Callable[..., Coroutine[Any, Any, "Window"]]

CHROMIUM = shutil.which("chromium")
QUIET = (
    # It has none where it is run as root.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium() -> AsyncIterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium (on Debian: apt install chromium)")
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module")
async def open_window(chromium: Browser, worker: Worker) -> AsyncIterator[OpenWindow]:
    """Open windows, each of somebody else's browser; at the end nothing was amiss in any."""
    from tests.browser.window import Window

    windows: list[Window] = []

    async def open(on: Worker | None = None, **options: Any) -> Window:
        context = await chromium.new_context(**options)
        window = Window(await context.new_page(), f"http://127.0.0.1:{(on or worker).port}/")
        windows.append(window)
        await window.load()
        return window

    yield open
    for window in windows:
        await window.page.context.close()
    assert [problem for window in windows for problem in window.problems] == []
