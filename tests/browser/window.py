"""The page in one window, with what somebody who looks at it sees and does."""

from __future__ import annotations

import re
from typing import Self

import pytest

pytest.importorskip("playwright", reason="needs Playwright, which is not to be had everywhere")

from playwright.async_api import Locator, Page, expect

from tests.support.worker import PATIENCE

__all__ = ["Window", "expect"]

expect.set_options(timeout=PATIENCE * 1000)


class Window:
    """Whatever a browser complains of is kept in ``problems``: errors, and breaches of the CSP."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.problems: list[str] = []
        self._url = url
        self._expected = "(?!)"
        page.set_default_timeout(PATIENCE * 1000)
        page.on("console", lambda message: self._complain(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self._complain(f"error: {error}"))

    def _complain(self, problem: str) -> None:
        if not re.search(self._expected, problem):
            self.problems.append(problem)

    def expect_problems(self, pattern: str) -> None:
        """The test brings about what a browser complains of in these words."""
        self._expected = pattern

    async def load(self) -> None:
        await self.page.goto(self._url)

    # What one does.

    async def enter(self, user: str, *rooms: str) -> Self:
        """Sign in, and join rooms; the last is shown."""
        await self.page.get_by_label("Your name").fill(user)
        await self.press("Sign in")
        await self.sees_state("Connected")
        for room in rooms:
            await self.join(room)
        return self

    async def join(self, room: str) -> None:
        await self.page.get_by_label("Room to join").fill(room)
        await self.press("Join")
        await expect(self.title).to_have_text(room)

    async def say(self, *texts: str) -> None:
        for text in texts:
            await self.message.fill(text)
            await self.message.press("Enter")

    async def press(self, name: str) -> None:
        await self.page.get_by_role("button", name=name, exact=True).click()

    # What one sees.

    @property
    def message(self) -> Locator:
        return self.page.get_by_role("textbox", name="Message", exact=True)

    @property
    def title(self) -> Locator:
        return self.page.get_by_role("heading", level=2)

    @property
    def lines(self) -> Locator:
        """The messages' texts."""
        return self.page.locator("#log .body")

    @property
    def alert(self) -> Locator:
        return self.page.get_by_role("alert").filter(visible=True)

    async def sees(self, *texts: str) -> None:
        """These messages and no other, in this order."""
        await expect(self.lines).to_have_text(list(texts))

    async def sees_state(self, text: str) -> None:
        await expect(self.page.get_by_role("status")).to_have_text(text)

    async def sees_all_stored(self) -> None:
        """Every message of one's own has its mark."""
        own = await self.page.locator("li.mine").count()
        await expect(self.page.locator("[data-fate=stored]")).to_have_count(own)
        await expect(self.page.locator(".waiting")).to_have_count(0)
