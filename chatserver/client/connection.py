"""One connection at work: replies find their commands, nothing goes out faster than the server
allows, and silence is judged. It ends with its link; what lasts longer is the client's."""

from __future__ import annotations

import itertools
import logging
import math
from asyncio import AbstractEventLoop
from collections.abc import Callable
from typing import Any

from msgspec.structs import asdict

from .errors import CommandError, DisconnectedError
from .events import Bye, ErrorReply, Frame, encode, read
from .link import Link
from .pace import Pace
from .pulse import Pulse, Verdict

log = logging.getLogger("chatserver.client")

# An answer that is owed.
ANSWER_SECONDS = 10.0
# From the server's goodbye to the end of the connection.
BYE_SECONDS = 3.0

Answered = Callable[[Frame | None], None]
"""Gets the ack or the error, or None when the connection went before it came."""


class Connection:
    """A link that has been welcomed. Times are the loop's.

    Writing never waits: who writes asks `wait` first, and bounds what is unanswered.
    """

    __slots__ = (
        "_answers",
        "_began",
        "_commands",
        "_ids",
        "_loop",
        "_owed_since",
        "_pulse",
        "_sends",
        "link",
        "open",
    )

    def __init__(self, link: Link, loop: AbstractEventLoop) -> None:
        now, limits = loop.time(), link.welcome.limits
        self.link = link
        self.open = True
        """Until the server says goodbye: then it executes nothing more."""
        self._loop = loop
        self._began = now
        self._ids = itertools.count(1)
        self._answers: dict[int, Answered] = {}
        self._owed_since = now
        self._commands = Pace(limits.command_rate, limits.command_burst, now)
        self._sends = Pace(limits.send_rate, limits.send_burst, now)
        self._pulse = Pulse(link.welcome.ping_interval / 1000, ANSWER_SECONDS)

    @property
    def age(self) -> float:
        """Seconds since the welcome."""
        return self._loop.time() - self._began

    def left(self, expires_at: int) -> float:
        """Seconds until then, which is in milliseconds of the server's clock, whatever ours is."""
        return (expires_at - self.link.welcome.ts) / 1000 - self.age

    def wait(self, *, send: bool = False) -> float:
        """Seconds until the server would take a command, or a message; 0.0 for now."""
        now = self._loop.time()
        wait = self._commands.wait(now)
        return max(wait, self._sends.wait(now)) if send else wait

    def command(self, kind: str, answered: Answered, **fields: Any) -> None:
        self._transmit(encode({"type": kind, **fields}), answered)

    def send(self, text: bytes, answered: Answered) -> None:
        """A message, encoded but for its id."""
        self._sends.take()
        self._transmit(text, answered)

    def _transmit(self, text: bytes, answered: Answered) -> None:
        number = next(self._ids)
        if not self._answers:
            self._owed_since = self._loop.time()
        self._answers[number] = answered
        self._commands.take()
        self.link.write(b'{"id":%d,' % number + text[1:])

    def receive_reply(self, frame: Frame) -> None:
        """Take an ack or an error."""
        number = frame.get("id")
        answered = self._answers.get(number) if isinstance(number, int) else None
        if isinstance(number, int) and answered is not None:
            # What makes no sense is no answer: then it stays owed, and is asked for again.
            answered(frame)
            del self._answers[number]
            self._owed_since = self._loop.time()
        elif frame["type"] == "error":
            log.warning("error from the server: %s", read_error(frame).code)

    def receive_bye(self, bye: Bye) -> None:
        self.open = False
        self.link.bye = bye
        why = DisconnectedError(bye.code, bye.reason, bye.after)
        self._loop.call_later(BYE_SECONDS, self.link.abort, why)

    def watch(self) -> float:
        """Look whether it is alive; returns when to look again."""
        owed_since = self._owed_since if self._answers else None
        match self._pulse.judge(self.link.heard_at, owed_since, self._loop.time()):
            case Verdict.PROBE:
                self.command("ping", lambda _: None)
            case Verdict.DEAD:
                self.link.abort(DisconnectedError(1006, "no sign of life from the server"))
                return math.inf
        return self._pulse.wake_at(self.link.heard_at, owed_since)

    def lose(self) -> None:
        """It is gone: no answer will come any more."""
        self.open = False
        answers, self._answers = self._answers, {}
        for answered in answers.values():
            answered(None)


def read_error(frame: Frame) -> CommandError:
    return CommandError(**asdict(read(frame, ErrorReply)))
