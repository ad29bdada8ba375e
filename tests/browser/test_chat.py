"""The page at "/" in a real browser: two people chat."""

from __future__ import annotations

import asyncio
import json
import signal
from importlib.resources import files
from typing import Any, Literal

import pytest

from tests.browser.conftest import OpenWindow
from tests.browser.window import Window, expect
from tests.support.client import Client
from tests.support.tokens import Issuer, unique
from tests.support.worker import Worker, eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
AXE = files("axe_playwright_python") / "axe.min.js"
PHONE = {"viewport": {"width": 390, "height": 844}}
MARKUP = "<img src=x onerror=\"document.title='owned'\"><script>alert(1)</script>"


async def publish(worker: Worker, issuer: Issuer, room: str, *bodies: object) -> None:
    """As another client would."""
    async with await Client.connect(worker.url, issuer.token(unique("other"))) as client:
        for body in bodies:
            await client.publish(room, body)


async def test_two_windows_chat(open_window: OpenWindow, room: str) -> None:
    alice = await (await open_window()).enter("alice", room)
    bob = await (await open_window()).enter("bob", room)
    await alice.say("hello")
    await bob.sees("hello")
    await bob.say("hi", "how are you?")
    await alice.sees("hello", "hi", "how are you?")
    await alice.say("fine")
    await bob.sees("hello", "hi", "how are you?", "fine")

    await alice.sees("hello", "hi", "how are you?", "fine")
    await alice.sees_all_stored()
    await bob.sees_all_stored()
    assert await bob.page.locator("li:not(.mine) .head:visible b").all_text_contents() == [
        "alice",
        "alice",
    ]


async def test_a_message_is_seen_before_it_is_stored_and_marked_when_it_is(
    open_window: OpenWindow, worker: Worker, room: str
) -> None:
    alice = await (await open_window()).enter("alice", room)
    await alice.say("before")
    await alice.sees_all_stored()
    worker.signal(signal.SIGSTOP)
    try:
        await alice.say("hello")
        await alice.sees("before", "hello")
        await expect(alice.page.locator(".waiting .fate")).to_have_text("Sending …")
    finally:
        worker.signal(signal.SIGCONT)
    await alice.sees_all_stored()

    await alice.sees("before", "hello")


async def test_what_cannot_be_sent_says_why_and_can_be_sent_again(
    open_window: OpenWindow, room: str
) -> None:
    alice = await (await open_window()).enter("alice", room)
    await alice.say("x" * 70_000)
    await expect(alice.page.locator("[data-fate=failed] .fate")).to_contain_text("too long")
    await alice.say("short")
    await expect(alice.page.locator("[data-fate=stored]")).to_have_count(1)
    await alice.press("Send again")

    await expect(alice.page.locator("[data-fate=failed] .fate")).to_contain_text("too long")


async def test_scrolling_up_shows_what_was_before_until_the_beginning(
    open_window: OpenWindow, worker: Worker, issuer: Issuer, room: str
) -> None:
    texts = [f"message {n}" for n in range(130)]
    await publish(worker, issuer, room, *({"text": text} for text in texts))
    alice = await (await open_window()).enter("alice", room)
    await expect(alice.lines.last).to_be_in_viewport()
    await expect(alice.lines).to_have_count(50)
    await alice.lines.last.hover()
    while await alice.lines.count() < len(texts):
        await alice.page.mouse.wheel(0, -2000)
        await asyncio.sleep(0.02)  # A wheel is turned again and again.

    await alice.sees(*texts)
    await expect(alice.page.get_by_role("button", name="Earlier messages")).to_be_hidden()


async def test_who_reads_further_up_is_not_moved_by_what_is_new(
    open_window: OpenWindow, worker: Worker, issuer: Issuer, room: str
) -> None:
    await publish(worker, issuer, room, *({"text": f"message {n}"} for n in range(60)))
    alice = await (await open_window()).enter("alice", room)
    await expect(alice.lines.last).to_have_text("message 59")
    await alice.page.get_by_text("message 40", exact=True).evaluate("e => e.scrollIntoView()")
    before = await alice.page.get_by_text("message 40", exact=True).bounding_box()
    await publish(worker, issuer, room, {"text": "new"})
    await expect(alice.lines.last).to_have_text("new")

    assert await alice.page.get_by_text("message 40", exact=True).bounding_box() == before
    await alice.say("here I am")
    await expect(alice.lines.last).to_be_in_viewport()


async def test_rooms_count_what_was_not_read(open_window: OpenWindow, room: str) -> None:
    other = unique("other")
    alice = await (await open_window()).enter("alice", other, room)
    bob = await (await open_window()).enter("bob", other)
    await bob.say("one", "two")
    link = alice.page.get_by_role("link", name=other)
    await expect(link).to_have_accessible_name(f"{other} 2 unread")
    await expect(alice.page).to_have_title(f"(2) {room}")
    await link.click()
    await alice.sees("one", "two")

    await expect(link).to_have_accessible_name(other)
    await expect(alice.page).to_have_title(other)


async def test_a_room_is_left_and_what_is_said_there_no_longer_seen(
    open_window: OpenWindow, worker: Worker, issuer: Issuer, room: str
) -> None:
    alice = await (await open_window()).enter("alice", room)
    await alice.press("Leave")
    await expect(alice.title).to_have_text("general")
    await expect(alice.page.get_by_role("link", name=room)).to_have_count(0)
    await alice.press("Leave")

    await expect(alice.title).to_have_text("No room")
    await expect(alice.message).to_be_hidden()


async def test_a_room_that_is_refused_says_why(open_window: OpenWindow, room: str) -> None:
    alice = await (await open_window()).enter("alice", room)
    await alice.page.get_by_label("Room to join").fill("dm:bob:carol")
    await alice.press("Join")
    await expect(alice.alert).to_have_text("dm:bob:carol: You may not do that in this room.")

    await expect(alice.title).to_have_text(room)


async def test_a_double_click_leaves_one_room(open_window: OpenWindow, room: str) -> None:
    alice = await (await open_window()).enter("alice", room, f"{room}-2")
    await alice.page.get_by_role("button", name="Leave").dblclick()
    await alice.page.get_by_role("button", name="Leave").dblclick()

    await expect(alice.title).to_have_text("general")
    await expect(alice.page.get_by_role("link")).to_have_text(["Second window", "general"])


async def test_a_double_click_signs_in_once(open_window: OpenWindow) -> None:
    window = await open_window()
    logins: list[str] = []
    window.page.on("request", lambda it: logins.append(it.url) if "/dev/" in it.url else None)
    await window.page.get_by_label("Your name").fill("alice")
    await window.page.get_by_role("button", name="Sign in").dblclick()
    await window.sees_state("Connected")

    assert len(logins) == 1


async def test_half_a_character_is_replaced(open_window: OpenWindow, room: str) -> None:
    alice = await (await open_window()).enter("alice", room)
    await alice.message.evaluate("e => { e.value = '\\ud83d half'; e.form.requestSubmit(); }")
    await alice.sees("\ufffd half")
    await alice.sees_all_stored()
    box = alice.page.get_by_label("Room to join")
    await box.evaluate("e => { e.value = '\\ud83d'; e.form.requestSubmit(); }")

    await expect(alice.alert).to_contain_text("\ufffd: A room's name has letters")


async def test_what_is_written_from_right_to_left_turns_nothing_else(
    open_window: OpenWindow, worker: Worker, issuer: Issuer, room: str
) -> None:
    mallory = await (await open_window()).enter("\u202ecilam", room)
    await mallory.say("\u202edesrever", "שלום, world")
    alice = await (await open_window()).enter("alice", room)
    await alice.sees("\u202edesrever", "שלום, world")
    is_left_of = """(element, [first, second]) => {
        const [one, other] = [first, second].map((at) => {
            const range = document.createRange();
            range.setStart(element.firstChild, at);
            range.setEnd(element.firstChild, at + 1);
            return range.getBoundingClientRect().left;
        });
        return one < other;
    }"""

    assert await alice.page.locator("li time").first.evaluate(is_left_of, [0, 3])
    assert not await alice.lines.last.evaluate(is_left_of, [0, 6])  # as its language begins


async def test_whatever_others_send_is_text(
    open_window: OpenWindow, worker: Worker, issuer: Issuer, room: str
) -> None:
    await publish(worker, issuer, room, {"text": MARKUP}, MARKUP, {"text": [MARKUP]}, None, 7)
    alice = await (await open_window()).enter("alice", room)
    raw = json.dumps(MARKUP)
    await alice.sees(MARKUP, raw, f'{{"text":[{raw}]}}', "null", "7")

    await expect(alice.page.locator("img, #log script")).to_have_count(0)


async def test_names_and_rooms_are_text(open_window: OpenWindow, room: str) -> None:
    mallory = await (await open_window()).enter(MARKUP, room)
    await mallory.say("hello")
    alice = await (await open_window()).enter("alice", room)
    await alice.sees("hello")
    await expect(alice.page.locator("li .head b")).to_have_text(MARKUP)
    await expect(mallory.page.locator("#me")).to_have_text(MARKUP)
    await alice.page.goto(f"{alice.page.url.partition('#')[0]}#{MARKUP}")
    await expect(alice.alert).to_contain_text(f"{MARKUP}: A room's name has letters")

    await expect(alice.page.locator("img, body script")).to_have_count(0)


async def test_a_reload_goes_on_in_the_same_rooms(open_window: OpenWindow, room: str) -> None:
    alice = await (await open_window()).enter("alice", room)
    await alice.say("hello")
    await alice.sees_all_stored()
    await alice.page.reload()
    await alice.sees_state("Connected")
    await alice.sees("hello")

    await expect(alice.page.get_by_role("link", name="general")).to_be_visible()


async def test_a_duplicated_window_shares_its_session(open_window: OpenWindow, room: str) -> None:
    first = await (await open_window()).enter("alice", room)
    async with first.page.expect_popup() as popup:
        await first.page.evaluate("() => void window.open(location.href)")
    second = Window(await popup.value, "")
    await second.sees_state("Connected")
    for window in (first, second, second, first):
        await window.press("Refresh token")
        await window.sees_state("Connected")
    await first.say("one")
    await second.say("two")

    await first.sees("one", "two")
    assert second.problems == []


async def test_a_second_window_is_somebody_elses_and_in_the_same_room(
    open_window: OpenWindow, room: str
) -> None:
    alice = await (await open_window()).enter("alice", room)
    async with alice.page.context.expect_page() as opened:
        await alice.page.get_by_role("link", name="Second window").click()
    bob = await Window(await opened.value, "").enter("bob")
    await expect(bob.title).to_have_text(room)
    await bob.say("hello")
    await alice.sees("hello")

    assert bob.problems == []


async def test_a_name_that_cannot_be_is_refused_in_words(open_window: OpenWindow) -> None:
    window = await open_window()
    window.expect_problems("400")
    await window.page.get_by_label("Your name").evaluate("e => e.maxLength = 1000")
    await window.page.get_by_label("Your name").fill("x" * 129)
    await window.press("Sign in")

    await expect(window.alert).to_contain_text("A name has 1 to 128 characters")


async def test_everything_can_be_done_by_keyboard(open_window: OpenWindow) -> None:
    window = await open_window()
    keys = window.page.keyboard
    room = unique("room")
    seen: list[str] = []

    async def tab_to(name: str) -> None:
        """Along the way, everything that has the focus shows it."""
        for _ in range(20):
            focused = window.page.locator(":focus")
            seen.append(await focused.evaluate("e => e.ariaLabel || e.innerText || e.id"))
            assert await focused.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
            if seen[-1] == name:
                return
            await keys.press("Tab")
        raise AssertionError(f"{name} is not among {seen}")

    await tab_to("name")
    await keys.type("alice")
    await keys.press("Enter")
    await window.sees_state("Connected")
    await expect(window.message).to_be_focused()
    await keys.press("Shift+Tab")
    await expect(window.page.get_by_role("log")).to_be_focused()
    await window.page.locator("#refresh").focus()
    await tab_to("Room to join")
    await keys.type(room)
    await keys.press("Enter")
    await expect(window.title).to_have_text(room)
    await keys.type("first line")
    await keys.press("Shift+Enter")
    await keys.type("second line")
    await keys.press("Enter")
    await window.sees_all_stored()
    await window.sees("first line second line")
    await window.page.locator("#refresh").focus()
    await tab_to("Revoke me")
    await keys.press("Enter")
    await expect(window.page.get_by_role("button", name="Sign in again")).to_be_focused()
    await keys.press("Enter")
    await expect(window.page.get_by_label("Your name")).to_be_focused()

    assert seen[1:5] == ["Refresh token", "Second window", "Revoke me", "Sign out"]


async def test_axe_finds_nothing_to_complain_of(open_window: OpenWindow) -> None:
    window = await open_window()
    await accessible(window)
    room = unique("room")
    await window.enter("alice", unique("other"), room)
    bob = await (await open_window()).enter("bob", room)
    await bob.say("hello")
    await window.say("hi", "x" * 70_000)
    await expect(window.page.locator("[data-fate=failed]")).to_have_count(1)
    await accessible(window)
    await window.press("Revoke me")
    await expect(window.alert).to_contain_text("Sign in again.")

    await accessible(window)


async def accessible(window: Window) -> None:
    await window.page.evaluate(AXE.read_text())
    for scheme in SCHEMES:
        await window.page.emulate_media(color_scheme=scheme)
        found = await window.page.evaluate("() => axe.run()")
        assert [violation["id"] for violation in found["violations"]] == [], found["violations"]


async def test_a_screen_reader_is_told_what_each_part_is(
    open_window: OpenWindow, room: str
) -> None:
    alice = await (await open_window()).enter("alice", room)
    await alice.say("hello")
    await alice.sees_all_stored()

    await expect(alice.page.locator("body")).to_match_aria_snapshot(f"""
        - banner:
          - heading "chatserver" [level=1]
          - status: Connected
          - timer: /Token good for 1[45]:\\d\\d/
          - button "Refresh token"
          - link "Second window"
          - button "Revoke me"
          - button "Sign out"
        - navigation "Rooms":
          - list:
            - listitem:
              - link "general"
            - listitem:
              - link "{room}"
          - textbox "Room to join"
          - button "Join"
        - main:
          - heading "{room}" [level=2]
          - button "Leave"
          - log "{room}":
            - list:
              - listitem:
                - paragraph: /alice/
                - paragraph: hello
                - paragraph: ✓ stored
          - textbox "Message"
          - button "Send"
        """)


async def test_on_a_phone_nothing_is_out_of_sight_or_too_small(
    open_window: OpenWindow, worker: Worker, issuer: Issuer, room: str
) -> None:
    await publish(worker, issuer, room, {"text": "w" * 200}, {"text": "last"})
    alice = await (await open_window(**PHONE)).enter(
        "alice", *(unique("a") for _ in range(9)), room
    )
    await expect(alice.lines.last).to_have_text("last")
    await alice.say(*map(str, range(15)))
    await alice.sees_all_stored()
    page = alice.page
    await expect(page.get_by_role("link", name=room)).to_be_in_viewport()

    assert await page.evaluate("() => document.documentElement.scrollWidth") == 390
    assert await page.evaluate("() => document.documentElement.scrollHeight") == 844
    for control in await page.locator(":is(button, .button, input, textarea):visible").all():
        box = await control.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
        assert box["height"] >= 32


async def test_with_the_server_away_signing_in_says_so(
    open_window: OpenWindow, start_worker: Any
) -> None:
    other = start_worker()
    window = await open_window(other)
    window.expect_problems("ERR_CONNECTION_REFUSED")
    other.terminate()
    await eventually(lambda: not other.alive())
    await window.page.get_by_label("Your name").fill("alice")
    await window.press("Sign in")

    await expect(window.alert).to_have_text("The server cannot be reached.")
