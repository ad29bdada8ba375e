"""The page when sessions end, and when the server dies."""

from __future__ import annotations

import signal

import pytest

from chatserver.core.session import Kind
from tests.browser.conftest import OpenWindow
from tests.browser.window import expect
from tests.conftest import StartWorker
from tests.support.sessions import office
from tests.support.tokens import Issuer, unique
from tests.support.valkey import Valkey

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_who_revokes_oneself_is_told_and_the_other_goes_on(
    open_window: OpenWindow, room: str
) -> None:
    alice = await (await open_window()).enter("alice", room)
    bob = await (await open_window()).enter("bob", room)
    await bob.say("hello")
    await bob.sees_all_stored()
    await bob.press("Revoke me")
    await expect(bob.alert).to_contain_text("This session was ended. Sign in again.")
    await bob.sees_state("Disconnected")
    await bob.sees("hello")
    await expect(bob.message).to_be_disabled()
    await bob.press("Sign in again")
    await bob.enter("bob")
    await bob.join(room)
    await bob.say("again")
    await alice.sees("hello", "again")

    await alice.sees_state("Connected")


async def test_who_is_revoked_from_elsewhere_is_told(
    open_window: OpenWindow, valkey: Valkey, issuer: Issuer, room: str, user: str
) -> None:
    window = await (await open_window()).enter(user, room)
    async with office(valkey.url, issuer) as login:
        await login.revoke(Kind.USER, user)

    await expect(window.alert).to_contain_text("This session was ended. Sign in again.")


async def test_a_session_that_ended_meanwhile_is_told_when_the_page_is_loaded(
    open_window: OpenWindow, valkey: Valkey, issuer: Issuer, room: str, user: str
) -> None:
    window = await (await open_window()).enter(user, room)
    window.expect_problems("401|HTTP Authentication failed")
    await window.page.goto("about:blank")
    async with office(valkey.url, issuer) as login:
        await login.revoke(Kind.USER, user)
    await window.load()

    await expect(window.alert).to_contain_text("This session was ended. Sign in again.")


async def test_signing_out_ends_the_session_and_shows_the_door(
    open_window: OpenWindow, room: str
) -> None:
    window = await (await open_window()).enter("alice", room)
    pair = await window.page.evaluate("() => Object.values(localStorage)[0]")
    await window.press("Sign out")
    await expect(window.page.get_by_label("Your name")).to_be_focused()
    kept = await window.page.evaluate("() => localStorage.length + sessionStorage.length")
    window.expect_problems("401")
    status = await window.page.evaluate(
        """async (pair) => {
            const headers = { Authorization: `Bearer ${JSON.parse(pair).refresh_token}` };
            const answer = await fetch("/v1/tokens/refresh", { method: "POST", headers });
            return answer.status;
        }""",
        pair,
    )

    assert (kept, status) == (0, 401)


async def test_when_the_server_is_killed_and_restarted_nothing_is_missing_or_doubled(
    open_window: OpenWindow, start_worker: StartWorker, room: str
) -> None:
    server = start_worker(send_rate=1000, send_burst=1000)
    windows = [await open_window(server), await open_window(server)]
    for window, user in zip(windows, ("alice", "bob"), strict=True):
        window.expect_problems("ERR_|WebSocket connection|426|503")
        await window.enter(user, room)
    texts: list[str] = []

    async def talk(count: int) -> None:
        for _ in range(count):
            text = unique("line")
            texts.append(text)
            await windows[len(texts) % 2].say(text)

    await talk(10)
    server.signal(signal.SIGKILL)
    await talk(10)
    await server.exit_code()
    for window in windows:
        await window.sees_state("The server cannot be reached.")
    server.start()
    for window in windows:
        # It may have come back by itself.
        await window.page.locator("#retry").dispatch_event("click")
        await window.sees_state("Connected")
    await talk(4)
    for window in windows:
        await expect(window.lines).to_have_count(len(texts))
        await window.sees_all_stored()

    shown = [await window.lines.all_text_contents() for window in windows]
    assert shown[0] == shown[1]
    assert sorted(shown[0]) == sorted(texts)
    await windows[0].page.reload()
    await windows[0].sees(*shown[0])


async def test_a_double_click_on_what_moves_away_hits_nothing_else(
    open_window: OpenWindow, start_worker: StartWorker
) -> None:
    """Under "Try now" there is "Sign out" on a phone as soon as the first click is heard."""
    server = start_worker()
    window = await open_window(server, viewport={"width": 360, "height": 640})
    window.expect_problems("ERR_|WebSocket connection|426|503")
    await window.enter("alice")
    server.signal(signal.SIGKILL)
    await server.exit_code()
    await window.sees_state("The server cannot be reached.")
    await window.page.get_by_role("button", name="Try now").dblclick()
    await window.sees_state("The server cannot be reached.")
    server.start()
    await window.page.locator("#retry").dispatch_event("click")

    await window.sees_state("Connected")
