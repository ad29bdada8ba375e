from __future__ import annotations

import math

from chatserver.client.errors import CommandError, DisconnectedError, UnknownOutcomeError
from chatserver.client.events import Position
from chatserver.client.outbox import Outbox, Outgoing

LOST = DisconnectedError(4503, "session_revoked")
UNAVAILABLE = CommandError("unavailable", "")
FORBIDDEN = CommandError("forbidden", "")
POSITION = Position("e1", 1)


class Sender:
    """An outbox with what came out of it. Refused messages wait for a second."""

    def __init__(self, window: float = 100.0) -> None:
        self.outbox = Outbox(window, wait=lambda attempt, told: told / 1000 if told else 1.0)
        self.settled: dict[str, object] = {}

    def add(self, key: str, room: str = "general") -> Outgoing:
        message = Outgoing(room, key, b"", lambda outcome: self.settle(key, outcome))
        self.outbox.add(message)
        return message

    def settle(self, key: str, outcome: object) -> None:
        assert key not in self.settled
        self.settled[key] = outcome

    def send(self, now: float) -> list[str]:
        """Send everything that is due."""
        sent = []
        for message in self.outbox.due(now):
            self.outbox.begin(message, now)
            sent.append(message.key)
        return sent


def test_messages_go_out_once_in_order_and_leave_when_acknowledged() -> None:
    sender = Sender()
    first, _ = sender.add("a"), sender.add("b")

    assert sender.send(0) == ["a", "b"]
    assert sender.send(1) == []
    sender.outbox.acknowledge(first, POSITION)
    assert sender.settled == {"a": POSITION}
    assert len(sender.outbox) == 1


def test_what_was_not_answered_is_repeated_before_anything_newer() -> None:
    sender = Sender()
    first, second = sender.add("a"), sender.add("b")
    sender.send(0)
    for message in (first, second):
        sender.outbox.lose(message)
    sender.add("c")

    assert sender.send(5) == ["a", "b", "c"]


def test_what_waits_holds_up_the_later_ones_of_its_room_and_no_others() -> None:
    sender = Sender()
    first = sender.add("a")
    sender.send(0)
    sender.outbox.refuse(first, UNAVAILABLE, 0)
    sender.add("b")
    sender.add("c", room="other")

    assert sender.send(0.5) == ["c"]
    assert sender.outbox.wake_at(0.5) == 1.0
    assert sender.send(1.0) == ["a", "b"]


def test_a_rate_holds_up_everything_for_as_long_as_was_told() -> None:
    sender = Sender()
    first = sender.add("a")
    sender.send(0)
    sender.outbox.refuse(first, CommandError("rate_limited", "", retry_after=350), 0)
    sender.add("b", room="other")

    assert sender.send(0.3) == []
    assert sender.outbox.wake_at(0.3) == 0.35
    assert sender.send(0.35) == ["a", "b"]


def test_a_refusal_for_good_is_the_outcome() -> None:
    sender = Sender()
    message = sender.add("a")
    sender.send(0)
    sender.outbox.refuse(message, FORBIDDEN, 0)

    outcome = sender.settled["a"]
    assert isinstance(outcome, CommandError)
    assert outcome.code == "forbidden"


def test_a_refusal_for_good_leaves_open_what_became_of_an_earlier_attempt() -> None:
    sender = Sender()
    message = sender.add("a")
    sender.send(0)
    sender.outbox.lose(message)
    sender.send(1)
    sender.outbox.refuse(message, FORBIDDEN, 1)

    outcome = sender.settled["a"]
    assert isinstance(outcome, UnknownOutcomeError)
    assert outcome.why is FORBIDDEN


def test_what_may_have_been_stored_is_repeated_inside_the_window_only() -> None:
    sender = Sender(window=100)
    message = sender.add("a")
    sender.send(10)
    sender.outbox.lose(message)
    assert sender.outbox.wake_at(10) == 100
    sender.outbox.expire(99)
    assert sender.send(99) == ["a"]
    sender.outbox.lose(message)
    sender.outbox.expire(100)

    outcome = sender.settled["a"]
    assert isinstance(outcome, UnknownOutcomeError)
    assert (outcome.key, outcome.why) == ("a", None)
    assert sender.send(101) == []


def test_an_answer_may_still_come_after_the_window() -> None:
    sender = Sender(window=100)
    message = sender.add("a")
    sender.send(0)
    sender.outbox.expire(500)
    assert sender.settled == {}
    sender.outbox.acknowledge(message, POSITION)
    assert sender.settled == {"a": POSITION}


def test_what_was_never_sent_or_surely_not_stored_does_not_grow_old() -> None:
    sender = Sender(window=100)
    sender.add("a")
    refused = sender.add("b")
    sender.outbox.begin(refused, 0)
    sender.outbox.refuse(refused, CommandError("rate_limited", "", retry_after=1), 0)
    sender.outbox.expire(5000)

    assert sender.settled == {}
    assert sender.send(5000) == ["a", "b"]


def test_at_the_end_it_is_told_what_is_not_known_and_what_was_not_sent() -> None:
    sender = Sender()
    under_way, lost, waiting = sender.add("a"), sender.add("b"), sender.add("c")
    sender.outbox.begin(under_way, 0)
    sender.outbox.begin(lost, 0)
    sender.outbox.lose(lost)
    sender.outbox.close(LOST)

    assert [type(sender.settled[key]) for key in "ab"] == [UnknownOutcomeError] * 2
    assert isinstance(sender.settled["c"], DisconnectedError)
    assert len(sender.outbox) == 0
    # Late answers are nobody's.
    sender.outbox.lose(under_way)
    sender.outbox.refuse(waiting, UNAVAILABLE, 1)


def test_what_is_discarded_is_neither_sent_nor_settled() -> None:
    sender = Sender()
    message = sender.add("a")
    sender.send(0)
    sender.outbox.discard(message)
    sender.outbox.lose(message)
    sender.outbox.acknowledge(message, POSITION)

    assert sender.send(1) == []
    assert sender.settled == {}
    assert sender.outbox.wake_at(1) == math.inf
