"""The page when its token runs out."""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any

import pytest

from tests.browser.conftest import OpenWindow
from tests.browser.window import Window, expect
from tests.conftest import StartWorker
from tests.support.worker import PATIENCE

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIFETIME = 10
"""Seconds that the shortest token is good for."""


TELLS_WHAT_IS_LEFT = r"""(first) => {
    const pair = JSON.parse(Object.values(localStorage)[0]);
    const clock = document.querySelector("[role=timer]").textContent;
    const [minutes, seconds] = clock.match(/\d+/g).map(Number);
    const left = (pair.expires_at - Date.now()) / 1000;
    return pair.expires_at > first.expires_at && Math.abs(60 * minutes + seconds - left) < 2;
}"""
"""Of another token than the first."""


async def states(window: Window) -> list[str]:
    """Every state that the window has shown since it was first asked."""
    seen: list[str] = await window.page.evaluate(
        """() => {
            const state = document.getElementById("state");
            if (window.seen === undefined) {
                window.seen = [state.textContent];
                new MutationObserver(() => window.seen.push(state.textContent)).observe(
                    state, { childList: true });
            }
            return window.seen;
        }"""
    )
    return seen


async def tokens(window: Window) -> Any:
    """What is stored of the window's session."""
    return json.loads(await window.page.evaluate("() => Object.values(localStorage)[0]"))


async def test_a_token_that_expires_is_refreshed_unseen(
    open_window: OpenWindow, start_worker: StartWorker, room: str
) -> None:
    server = start_worker(access_seconds=LIFETIME)
    alice = await (await open_window(server)).enter("alice", room)
    assert await states(alice) == ["Connected"]
    first = await tokens(alice)
    async with asyncio.timeout(LIFETIME + PATIENCE):
        while await tokens(alice) == first:
            await asyncio.sleep(0.1)
    await alice.say("before")
    await asyncio.sleep(max(0.0, first["expires_at"] / 1000 - time.time()) + 0.5)
    await alice.say("after")
    await alice.sees_all_stored()

    assert await states(alice) == ["Connected"]
    await expect(alice.page.get_by_role("timer")).to_have_text(re.compile("0:0[1-9]|0:10"))


async def test_a_token_is_refreshed_at_the_press_of_a_button(
    open_window: OpenWindow, room: str
) -> None:
    alice = await (await open_window()).enter("alice", room)
    first = await tokens(alice)
    clock = alice.page.get_by_role("timer")
    await expect(clock).to_have_text(re.compile("Token good for 14:5[0-7]"))
    await alice.press("Refresh token")

    await alice.page.wait_for_function(TELLS_WHAT_IS_LEFT, arg=first)
