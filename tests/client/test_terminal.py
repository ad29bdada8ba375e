from __future__ import annotations

import asyncio
import io
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from chatserver.client import Event, Gap, Left, Message, Position, backoff, terminal
from chatserver.client.screen import NAMES, Screen, colour_of, escape
from chatserver.client.stdin import PIECE, Input, Lines
from chatserver.client.terminal import chat
from tests.client.scripted import PATIENCE, Peer, refused, scripted


class Paper(io.StringIO):
    """A stream whose reader can wait for what is to appear."""

    def __init__(self) -> None:
        super().__init__()
        self._written = asyncio.Event()

    def write(self, text: str) -> int:
        self._written.set()
        return super().write(text)

    def lines(self) -> list[str]:
        return self.getvalue().splitlines()

    async def shows(self, text: str) -> None:
        async with asyncio.timeout(PATIENCE):
            while text not in self.getvalue():
                self._written.clear()
                await self._written.wait()


class Desk:
    """A user's seat: keys that feed stdin, and what comes out on two papers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.out, self.news = Paper(), Paper()
        reading, self._writing = os.pipe()
        self._stdin = os.fdopen(reading)
        # In the place of the module: pytest sets the streams of sys anew before each test.
        self.sys = SimpleNamespace(stdin=self._stdin, stdout=self.out, stderr=self.news)
        monkeypatch.setattr(terminal, "sys", self.sys)

    def type(self, text: str) -> None:
        os.write(self._writing, text.encode())

    def end(self) -> None:
        if self._writing >= 0:
            os.close(self._writing)
            self._writing = -1

    def close(self) -> None:
        self.end()
        self._stdin.close()


@pytest.fixture
async def desk(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    desk = Desk(monkeypatch)
    yield desk
    desk.close()


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits before another try take no time, unless they were told."""
    monkeypatch.setattr(backoff, "LONGEST_AGAIN", 0)
    monkeypatch.setattr("chatserver.client.client.Backoff", lambda *_: backoff.Backoff(0, 0))


async def token() -> str:
    return "t"


def message(body: object, user: str = "bob") -> Message:
    return Message("general", Position("e1", 1), 1, user, body)


def shown(event: Event, own: str = "alice", *, colour: bool = False) -> str:
    """What a screen has on it, messages and news together."""
    paper = io.StringIO()
    Screen(paper, paper, colour=colour).show(event, own)
    return paper.getvalue().removesuffix("\n")


# What is shown.


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ({"text": "hi"}, "bob: hi"),
        ({"text": "hi", "size": 1}, 'bob: {"text":"hi","size":1}'),
        ({"text": 1}, 'bob: {"text":1}'),
        ([1, None, "é"], 'bob: [1,null,"é"]'),
        ({"text": "\x1b[2J\r\nalice: yes\x9b\x7f"}, r"bob: \x1b[2J\r\nalice: yes\x9b\x7f"),
        (
            {"text": "\u202egnp.exe \u2028 \u2066 \ud800"},
            r"bob: \u202egnp.exe \u2028 \u2066 \ud800",
        ),
        (["\x9b"], r'bob: ["\x9b"]'),
        ({"text": "👨‍👩‍👧 Ünïcode שלום"}, "bob: 👨‍👩‍👧 Ünïcode שלום"),
    ],
)
def test_a_message_is_one_harmless_line(body: object, line: str) -> None:
    assert shown(message(body)) == line


def test_names_are_escaped_own_messages_marked_and_other_events_told() -> None:
    assert shown(message(1, user="b\x1bob")) == r"b\x1bob: 1"
    assert shown(message(1, user="alice")) == "> alice: 1"
    assert shown(Gap("general", Position("e", 1))).startswith("* ")
    assert shown(Left("general", "kicked")).endswith("general: kicked.")
    assert escape("plain") == "plain"


def test_in_colour_each_name_has_its_own_and_nothing_of_a_stranger_gets_through() -> None:
    line = shown(message({"text": "\x1b[31mhi"}, user="b\x1b[31mob"), colour=True)

    assert line.count("\x1b") == 4
    assert f"\x1b[{colour_of('b' + chr(27) + '[31mob')}m" in line
    assert line.endswith(r" \x1b[31mhi")
    assert colour_of("bob") == colour_of("bob")
    assert len({colour_of(f"user-{n}") for n in range(100)}) == len(NAMES)


async def test_a_stream_that_cannot_show_a_character_gets_its_escape(desk: Desk) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        join = await peer.expect("join")
        await peer.ack(join, room="general", epoch="e1", offset=1, rights="rw", replay=1)
        await peer.message(1, {"text": "naïve"})

    raw = io.BytesIO()
    desk.sys.stdout = io.TextIOWrapper(raw, "ascii")
    desk.end()
    async with scripted(script) as url:
        assert await chat(url, "general", token) == 0

    assert raw.getvalue() == b"bob: na\\xefve\n"


# Input.


@pytest.mark.parametrize("kind", ["pipe", "file"])
async def test_lines_come_whole_without_their_ends(kind: str, tmp_path: Path) -> None:
    text = "one\n\ntwo\r\nthrée\n" + "x" * (2 * PIECE + 1) + "\nlast \udc80"
    data = text.encode(errors="surrogateescape")
    if kind == "pipe":
        reading, writing = os.pipe()
        os.write(writing, data)
        os.close(writing)
    else:
        (tmp_path / "in").write_bytes(data)
        reading = os.open(tmp_path / "in", os.O_RDONLY)
    lines = Lines(Input(reading))
    read = [await lines.read() for _ in range(9)]
    os.close(reading)

    pieces = ["x" * PIECE, "x" * PIECE, "x"]
    assert read == ["one", "", "two", "thrée", *pieces, "last \ufffd", None]
    assert await lines.read() is None


async def test_a_read_cancelled_loses_nothing() -> None:
    reading, writing = os.pipe()
    lines = Lines(Input(reading))
    os.write(writing, "hé".encode()[:2])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await lines.read()
    os.write(writing, "hé\n".encode()[2:])
    assert await lines.read() == "hé"
    os.close(writing)
    os.close(reading)


# Chats.


async def test_a_chat_shows_the_room_and_sends_every_line_before_it_ends(desk: Desk) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        join = await peer.admit(2, replay=2)
        assert join["last"] == 20
        for offset, text in enumerate(["hello", "", "bye"], 3):
            await peer.store(await peer.expect("send", body={"text": text}), offset)

    desk.type("hello\n\nbye")
    desk.end()
    async with scripted(script) as url:
        assert await chat(url, "general", token) == 0

    assert desk.out.lines() == ["bob: m1", "bob: m2", "> alice: hello", "> alice: ", "> alice: bye"]
    assert desk.news.lines() == ["* In general as alice. Ctrl-D leaves."]


async def test_a_file_and_no_input_at_all_end_the_same_way(desk: Desk, tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(1, replay=1)
        await peer.store(await peer.expect("send", body={"text": "hello"}), 2)

    async def silent(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(1, replay=1)

    (tmp_path / "in").write_text("hello\n")
    async with scripted(script, silent, silent) as url:
        for path in (tmp_path / "in", "/dev/null"):
            with open(path) as stdin:  # noqa: ASYNC230
                desk.sys.stdin = stdin
                assert await chat(url, "general", token) == 0
        desk.sys.stdin = None
        assert await chat(url, "general", token) == 0

    assert desk.out.lines() == ["bob: m1", "> alice: hello", "bob: m1", "bob: m1"]


async def test_a_line_refused_for_now_goes_again_under_its_key_and_one_refused_for_good_is_told(
    desk: Desk,
) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        first = await peer.expect("send", body={"text": "one"})
        await peer.error(first, "rate_limited", retry_after=5)
        again = await peer.expect("send", body={"text": "one"}, key=first["key"])
        await peer.error(again, "unavailable")
        await peer.store(await peer.expect("send", key=first["key"]), 1)
        await peer.error(await peer.expect("send", body={"text": "two"}), "forbidden")

    desk.type("one\ntwo\n")
    desk.end()
    async with scripted(script) as url:
        assert await chat(url, "general", token) == 0

    assert desk.out.lines() == ["> alice: one"]
    assert desk.news.lines()[1:] == ["* Not sent (forbidden: No.): two"]


async def test_ctrl_c_ends_it_with_0_and_leaves_the_handler_as_it_was(desk: Desk) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await peer.socket.wait_closed()
        assert peer.socket.close_code == 1000

    async with scripted(script) as url:
        chatting = asyncio.create_task(chat(url, "general", token))
        await desk.news.shows("Ctrl-D")
        os.kill(os.getpid(), signal.SIGINT)
        assert await chatting == 0

    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


async def test_being_cancelled_is_not_ctrl_c(desk: Desk) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)

    async with scripted(script) as url:
        chatting = asyncio.create_task(chat(url, "general", token))
        await desk.news.shows("Ctrl-D")
        chatting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await chatting


async def test_a_lost_connection_is_told_and_made_again_where_it_was(desk: Desk) -> None:
    async def first(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(1, replay=1)
        send = await peer.expect("send", body={"text": "hello"})
        keys.append(send["key"])
        await peer.bye(1012, "draining", after=40)

    async def second(peer: Peer) -> None:
        await peer.welcome()
        join = await peer.admit(3, replay=2, recovered=True)
        assert join["since"] == {"epoch": "e1", "offset": 1}
        assert "last" not in join
        send = await peer.expect("send", body={"text": "hello"}, key=keys[0])
        await peer.store(send, 4)

    keys: list[str] = []
    desk.type("hello\n")
    desk.end()
    async with scripted(first, refused(503, "draining", Retry_After="0"), second) as url:
        assert await chat(url, "general", token) == 0

    assert desk.out.lines() == ["bob: m1", "bob: m2", "bob: m3", "> alice: hello"]
    assert desk.news.lines()[1:] == [
        "* Disconnected (1012 draining). Trying again in 0.0 s.",
        "* The server refused the connection (503 draining): No. Trying again in 0.0 s.",
        "* Connected again.",
    ]


async def test_what_may_be_missing_after_a_reconnect_is_told(desk: Desk) -> None:
    async def first(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(1)
        peer.socket.transport.abort()

    async def second(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(9, epoch="e2", recovered=False)
        desk.end()

    async with scripted(first, second) as url:
        assert await chat(url, "general", token) == 0

    assert "* Some messages may be missing here." in desk.news.lines()


async def test_a_line_too_old_to_be_repeated_safely_is_given_up_and_told(desk: Desk) -> None:
    async def first(peer: Peer) -> None:
        await peer.welcome(key_window=1)
        await peer.admit(0)
        await peer.expect("send")
        await peer.bye(1012, "draining", after=20)

    async def second(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0, recovered=True)

    desk.type("hello\n")
    async with scripted(first, second) as url:
        chatting = asyncio.create_task(chat(url, "general", token))
        await desk.news.shows("Connected again")
        desk.end()
        assert await chatting == 0

    assert "* Not known whether this was sent: hello" in desk.news.lines()


async def test_an_own_fault_is_not_repeated_for_ever(desk: Desk) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.socket.close(1007, "not UTF-8")

    async with scripted(script, script, script) as url:
        assert await chat(url, "general", token) == 1

    assert len(desk.news.lines()) == 3


# Ends that need somebody.


@pytest.mark.parametrize(
    ("code", "reason", "line"),
    [
        (4503, "session_revoked", "* Disconnected (4503 session_revoked). Log in again."),
        (4599, "\x1b[2Jnew", r"* Disconnected (4599 \x1b[2Jnew)."),
    ],
)
async def test_a_final_close_is_told_and_gives_1(
    desk: Desk, code: int, reason: str, line: str
) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await peer.bye(code, reason)

    async with scripted(script) as url:
        assert await chat(url, "general", token) == 1

    assert desk.news.lines()[1:] == [line]


async def test_a_refused_handshake_is_told_and_gives_1(desk: Desk) -> None:
    async with scripted(refused(401, "token_expired"), refused(503, "unavailable")) as url:
        assert await chat(url, "general", token) == 1
        assert await chat(url, "general", token) == 1

    assert desk.news.lines() == [
        "* The server refused the connection (401 token_expired): No. Get a new token.",
        "* The server refused the connection (503 unavailable): No. Try again later.",
    ]


async def test_a_token_that_has_expired_gives_1_when_there_is_no_other(desk: Desk) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await peer.bye(4401, "token_expired")

    async with scripted(script) as url:
        assert await chat(url, "general", token) == 1

    assert desk.news.lines()[-1] == "* Disconnected (4401 token_expired). Get a new token."


async def test_a_room_refused_is_told_and_gives_1(desk: Desk) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.error(await peer.expect("join"), "forbidden")

    async with scripted(script) as url:
        assert await chat(url, "general", token) == 1

    assert desk.news.lines() == [
        "* Cannot join general (forbidden): No. Ask for a token that allows this room."
    ]


async def test_being_put_out_of_the_room_is_told_and_gives_1(desk: Desk) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0, rights="r")
        await peer.say("left", room="general", reason="banned")

    async with scripted(script) as url:
        assert await chat(url, "general", token) == 1

    assert desk.news.lines() == [
        "* In general as alice (read only). Ctrl-D leaves.",
        "* You are no longer in general: banned.",
    ]


async def test_a_server_that_is_not_there_or_a_url_that_is_none_gives_1(desk: Desk) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    assert await chat(f"ws://me:secret@127.0.0.1:{port}/v1/ws", "general", token) == 1
    assert await chat("http://127.0.0.1/", "general", token) == 1

    there, url = desk.news.lines()
    assert there.startswith(f"* No connection to ws://127.0.0.1:{port}: ")
    assert there.endswith("Is the server running?")
    assert url.startswith("* Cannot connect: not a WebSocket URL")
    assert "secret" not in desk.news.getvalue()


# A real process, on a real terminal.

PROGRAM = """
import asyncio, sys
from chatserver.client.terminal import chat

async def token():
    return "t"

run = asyncio.run
if sys.argv[2] == "uvloop":
    from uvloop import run
sys.exit(run(chat(sys.argv[1], "general", token)))
"""


@asynccontextmanager
async def process(
    url: str, loop: str, stdin: int, send: Callable[[], object]
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A chat in a process of its own, joined; ``send`` is called when that is seen."""
    chatting = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, url, loop),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert chatting.stderr is not None
        assert b"Ctrl-D" in await chatting.stderr.readline()
        send()
        yield chatting
    finally:
        if chatting.returncode is None:
            chatting.kill()
        await chatting.communicate()


@pytest.fixture
def tty() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_on_a_terminal_lines_go_out_as_they_are_typed_and_ctrl_d_ends_it(
    tty: tuple[int, int], loop: str
) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await peer.store(await peer.expect("send", body={"text": "hello"}), 1)
        assert os.get_blocking(theirs)
        os.write(ours, b"\x04")

    ours, theirs = tty
    async with (
        scripted(script) as url,
        process(url, loop, theirs, lambda: os.write(ours, b"\nhello\n")) as chatting,
    ):
        out, news = await chatting.communicate()

    assert (chatting.returncode, out, news) == (0, b"> alice: hello\n", b"")
    assert os.get_blocking(theirs)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_ctrl_c_ends_the_process_with_0_and_without_a_traceback(
    tty: tuple[int, int], loop: str
) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)

    async with scripted(script) as url, process(url, loop, tty[1], lambda: None) as chatting:
        chatting.send_signal(signal.SIGINT)
        out, news = await chatting.communicate()

    assert (chatting.returncode, out, news) == (0, b"", b"")


@pytest.mark.parametrize("online", [True, False])
async def test_a_terminal_that_goes_away_ends_it(online: bool) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await (peer.socket.wait_closed() if online else peer.bye(1012, "draining", after=60_000))

    ours, theirs = pty.openpty()
    async with scripted(script) as url:
        chatting = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PROGRAM, url, "asyncio"),
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(theirs)
        seen = b""
        while b"general" not in seen or not (online or b"offline" in seen):
            seen += await asyncio.to_thread(os.read, ours, 4096)
        os.close(ours)
        async with asyncio.timeout(PATIENCE):
            _, news = await chatting.communicate()

    assert chatting.returncode in (0, 1)
    assert news == b""


async def test_the_line_being_typed_stays_below_what_comes_in(tty: tuple[int, int]) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await typed.wait()
        await peer.message(1, {"text": "an interruption"})
        await peer.store(await peer.expect("send", body={"text": "hello"}), 2)
        os.write(ours, b"\x04")

    seen = b""

    async def shows(text: bytes) -> None:
        """Wait for it, and pass over it."""
        nonlocal seen
        async with asyncio.timeout(PATIENCE):
            while text not in seen:
                try:
                    seen += os.read(ours, 4096)
                except BlockingIOError:
                    await asyncio.sleep(0.01)
        seen = seen.partition(text)[2]

    ours, theirs = tty
    typed, before = asyncio.Event(), termios.tcgetattr(theirs)
    os.set_blocking(ours, False)
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "xterm"}
    async with scripted(script) as url:
        chatting = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PROGRAM, url, "asyncio"),
            stdin=theirs,
            stdout=theirs,
            cwd=Path(__file__).parents[2],
            env=environment,
        )
        await shows(b"general> ")
        os.write(ours, b"hel")
        await shows(b"general> hel")
        typed.set()
        await shows(b"\r\x1b[Kbob: an interruption")
        await shows(b"general> hel")
        os.write(ours, b"lo\r")
        await shows(b"> alice: hello")
        assert await chatting.wait() == 0

    assert termios.tcgetattr(theirs) == before
