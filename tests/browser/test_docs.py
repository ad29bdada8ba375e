"""The page that docs/client-browser.md has to begin with, as it stands there."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import chatserver
from tests.support.worker import Worker

if TYPE_CHECKING:
    from playwright.async_api import Browser

pytest.importorskip("playwright", reason="needs Playwright, which is not to be had everywhere")

from playwright.async_api import expect

DOCS = Path(__file__).parents[2] / "docs" / "client-browser.md"
MODULE = Path(chatserver.__file__).parent / "web" / "chat.js"


@pytest.fixture
def page_url(worker: Worker, tmp_path: Path) -> Iterator[str]:
    """The page, beside the client's module, on another port than the server's."""
    [text] = re.findall(r"^```html\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "page.html").write_text(text.replace(":8000", f":{worker.port}"))
    shutil.copy(MODULE, tmp_path)
    files = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), files) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/page.html"
        server.shutdown()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_page_of_ones_own_on_another_port_is_as_short_as_it_is_told(
    chromium: Browser, page_url: str
) -> None:
    page = await chromium.new_page()
    await page.goto(page_url)
    # What is sent before the room is joined would load the page again.
    await page.wait_for_function("document.forms[0].onsubmit !== null")
    await page.get_by_role("textbox").fill("hello")
    await page.get_by_role("button").click()

    await expect(page.get_by_role("listitem").last).to_have_text("alice: hello")
    await page.close()
