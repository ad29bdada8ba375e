"""Messages that have been sent and not acknowledged yet: which to send now, and which never again.

A message keeps its key until its outcome is settled, and may be repeated as long as the server is
sure to remember the key: for the *window* from the first attempt on that may have been stored.
Within a room messages go out in the order given; what waits to be repeated holds up the later ones
of its room. Pure: times are arguments, in seconds of one clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .backoff import wait_again
from .errors import CommandError, UnknownOutcomeError
from .events import Position

Settle = Callable[[Position | Exception], None]
Wait = Callable[[int, int | None], float]

# Of the server's window: a repetition must still arrive inside it.
WINDOW_SHARE = 0.9


@dataclass(slots=True, eq=False)
class Outgoing:
    """One message to one room. ``text`` is its frame but for the ``id``; ``settle`` is called once,
    with the position or with what became of it instead."""

    room: str
    key: str
    text: bytes
    settle: Settle
    sent_at: float | None = None
    """When the attempt now under way began; None: none is."""
    doubt_since: float | None = None
    """When the first attempt began that may have been stored."""
    not_before: float = 0.0
    refusals: int = 0


class Outbox:
    """The messages of one client, in the order given, across its connections.

    ``window`` is the server's, in seconds.
    """

    __slots__ = ("_held_until", "_messages", "_wait", "window")

    def __init__(self, window: float = math.inf, wait: Wait = wait_again) -> None:
        self.window = window
        self._wait = wait
        self._messages: dict[Outgoing, None] = {}
        self._held_until = 0.0

    def __len__(self) -> int:
        return len(self._messages)

    def add(self, message: Outgoing) -> None:
        self._messages[message] = None

    def discard(self, message: Outgoing) -> None:
        """Send it no more; nobody waits for its outcome."""
        self._messages.pop(message, None)

    def due(self, now: float) -> Iterator[Outgoing]:
        """What may be sent now, in order. Each that is sent must be `begin`-ned before the next
        one is asked for."""
        if now < self._held_until:
            return
        held = set()
        for message in list(self._messages):
            if message.sent_at is not None or message.room in held:
                continue
            if now < message.not_before:
                held.add(message.room)
            else:
                yield message

    def begin(self, message: Outgoing, now: float) -> None:
        """An attempt is on its way."""
        message.sent_at = now

    def acknowledge(self, message: Outgoing, position: Position) -> None:
        self._settle(message, position)

    def refuse(self, message: Outgoing, error: CommandError, now: float) -> None:
        """An attempt was answered with an error: repeat the message later, or give it up."""
        if error.doubtful:
            self._doubt(message)
        message.sent_at = None
        if not error.temporary:
            self._give_up(message, error)
            return
        wait = self._wait(message.refusals, error.retry_after)
        message.refusals += 1
        message.not_before = now + wait
        if error.code == "rate_limited":
            # It is the connection's rate: others would fare no better.
            self._held_until = max(self._held_until, message.not_before)

    def lose(self, message: Outgoing) -> None:
        """The connection went before an answer came."""
        self._doubt(message)
        message.sent_at = None
        message.not_before = 0.0

    def expire(self, now: float) -> None:
        """Give up what is too old to be repeated."""
        for message in list(self._messages):
            if message.sent_at is None and now >= self._deadline(message):
                self._give_up(message, None)

    def wake_at(self, now: float) -> float:
        """When `due` or `expire` may have something that they have not at present."""
        times = [math.inf]
        for message in self._messages:
            if message.sent_at is None:
                times.append(self._deadline(message))
                times.append(max(message.not_before, self._held_until))
        return min((at for at in times if at > now), default=math.inf)

    def close(self, why: Exception) -> None:
        """Nothing will be sent any more."""
        for message in list(self._messages):
            if message.sent_at is not None:
                self._doubt(message)
            self._give_up(message, why)

    def _doubt(self, message: Outgoing) -> None:
        if message.doubt_since is None:
            message.doubt_since = message.sent_at

    def _deadline(self, message: Outgoing) -> float:
        if message.doubt_since is None:
            return math.inf
        return message.doubt_since + self.window * WINDOW_SHARE

    def _give_up(self, message: Outgoing, why: Exception | None) -> None:
        if why is None or message.doubt_since is not None:
            # Also when the last attempt was refused: an earlier one may have been stored.
            self._settle(message, UnknownOutcomeError(message.key, why))
        else:
            self._settle(message, why)

    def _settle(self, message: Outgoing, outcome: Position | Exception) -> None:
        if self._messages.pop(message, message) is None:
            message.settle(outcome)
