"""The checker finds every bug that is planted, under its right name, and no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.faults import history
from tests.faults.checker import Invariant, Report, check
from tests.faults.history import (
    Closed,
    Connected,
    Epoch,
    Fault,
    Final,
    History,
    Joined,
    Left,
    Logged,
    Mark,
    Position,
    Received,
    Record,
    Reset,
    Revoked,
    Sent,
    Session,
)

R = TypeVar("R", bound=Record)
ROOM = "lobby"


class Member:
    """What a client that keeps the rules knows."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.session = ""
        self.connection = ""
        self.logins = 0
        self.attempts = 0
        self.joined = False
        self.epoch = ""
        self.position = 0
        self.replayed_to = 0
        self.known = False


class Chat:
    """A server that keeps its promises, in one room, and the history that it leaves."""

    def __init__(self, members: int = 3) -> None:
        self.records: list[Record] = []
        self.now = 1_000.0
        self.epoch = "e1"
        self.epochs = 1
        self.log: list[Sent] = []
        self.faults = 0
        self.sequence = 0
        self.members = [Member(f"m{n}") for n in range(members)]
        for member in self.members:
            self.login(member)
            self.connect(member)

    def later(self, seconds: float = 0.01) -> float:
        self.now += seconds
        return self.now

    def add(self, record: Record) -> None:
        self.records.append(record)

    def login(self, member: Member) -> None:
        member.logins += 1
        member.session = f"{member.name} login {member.logins}"
        self.add(
            Session(
                at=self.later(),
                member=member.name,
                session=member.session,
                rooms={"*": "r", ROOM: "rw"},
            )
        )

    def connect(self, member: Member, *, since: bool = True) -> None:
        """Connect, and join from the position kept, if there is one."""
        if member.connection:
            return
        began = self.later()
        member.connection = f"{member.name} {began:.2f}"
        member.attempts = 0
        self.add(
            Connected(
                at=self.later(),
                member=member.name,
                session=member.session,
                connection=member.connection,
                began=began,
            )
        )
        self.join(member, since=since)

    def join(self, member: Member, *, since: bool = True) -> None:
        if not member.connection:
            return
        top = len(self.log)
        asked = Position(member.epoch, member.position) if since and member.known else None
        self.add(
            Joined(
                at=self.later(),
                member=member.name,
                connection=member.connection,
                room=ROOM,
                epoch=self.epoch,
                offset=top,
                replay=top - (asked.offset if asked else top),
                since=asked,
                recovered=True if asked else None,
            )
        )
        member.joined = member.known = True
        member.epoch = self.epoch
        member.position, member.replayed_to = asked.offset if asked else top, top
        self.deliver(member)

    def join_with_a_gap(self, member: Member, last: int = 1) -> None:
        """The server could not prove that nothing is missing, and says so."""
        if not member.connection or not member.known:
            return
        top = len(self.log)
        start = max(top - last, member.position)
        gap = (member.position + 1, start) if start > member.position else None
        self.add(
            Joined(
                at=self.later(),
                member=member.name,
                connection=member.connection,
                room=ROOM,
                epoch=self.epoch,
                offset=top,
                replay=top - start,
                since=Position(member.epoch, member.position),
                recovered=False,
                gap=gap if member.epoch == self.epoch else None,
            )
        )
        member.joined, member.epoch, member.position = True, self.epoch, start
        member.replayed_to = top
        self.deliver(member)

    def disconnect(self, member: Member, code: int = 1006) -> None:
        if member.connection:
            connection, member.connection = member.connection, ""
            member.joined = False
            self.add(Closed(at=self.later(), member=member.name, connection=connection, code=code))

    def publish(
        self, member: Member, outcome: str = "ok", *, stored: bool = True, echo: bool = True
    ) -> None:
        if not member.connection:
            return
        self.sequence += 1
        member.attempts += 1
        began = self.later()
        stored = stored and outcome != "failed"
        sent = Sent(
            at=self.later(),
            sender=member.name,
            sequence=self.sequence,
            room=ROOM,
            key=f"key {self.sequence}",
            outcome="ok" if outcome == "ok" else "failed" if outcome == "failed" else "unknown",
            began=began,
            tried=began,
            connection=member.connection,
            attempt=member.attempts,
            echo=echo,
        )
        if outcome == "ok":
            sent.epoch, sent.offset = self.epoch, len(self.log) + 1
        if stored:
            self.log.append(sent)
        self.add(sent)
        for each in self.members:
            if each.joined:
                self.deliver(each)

    def deliver(self, member: Member) -> None:
        """What it has not got yet."""
        for offset in range(member.position + 1, len(self.log) + 1):
            sent = self.log[offset - 1]
            at = self.later(0.001)
            own = sent.connection == member.connection and not sent.echo
            skipped = own and offset > member.replayed_to
            self.add(
                Received(
                    at=at,
                    member=member.name,
                    connection=member.connection,
                    room=ROOM,
                    epoch=member.epoch,
                    offset=offset,
                    kind="skip" if skipped else "message",
                    key="" if skipped else sent.key,
                    ts=0 if skipped else int(sent.at * 1000),
                )
            )
        member.position = len(self.log)

    def fork(self) -> None:
        """The log goes on under a new epoch, and nothing is lost."""
        self._new_epoch()
        for member in self.members:
            if member.joined:
                member.epoch = self.epoch
                self.add(
                    Epoch(
                        at=self.later(),
                        member=member.name,
                        connection=member.connection,
                        room=ROOM,
                        epoch=self.epoch,
                    )
                )

    def empty(self) -> None:
        """The store loses everything, and those who are there are told."""
        fault = self.fault("store_emptied")
        self._new_epoch()
        self.log = []
        for member in self.members:
            if member.joined:
                member.epoch, member.position, member.replayed_to = self.epoch, 0, 0
                self.add(
                    Reset(
                        at=self.later(),
                        member=member.name,
                        connection=member.connection,
                        room=ROOM,
                        epoch=self.epoch,
                        offset=0,
                    )
                )
            else:
                member.known = False  # Its next join says recovered: false, which is the same.
        self.over(fault)

    def _new_epoch(self) -> None:
        self.epochs += 1
        self.epoch = f"e{self.epochs}"

    def fault(self, name: str, *members: str) -> Fault:
        self.faults += 1
        fault = Fault(at=self.later(0.5), id=self.faults, name=name, phase="begin", members=members)
        self.add(fault)
        self.later(0.5)
        return fault

    def over(self, fault: Fault) -> None:
        self.later(0.5)
        self.add(replace(fault, at=self.later(), phase="end"))

    def revoke(self, member: Member) -> None:
        self.add(Revoked(at=self.later(), session=member.session))
        self.disconnect(member, 4503)
        self.later(5)
        self.login(member)

    def finish(self) -> list[Record]:
        """Everybody comes back, and the store's log is read."""
        self.add(Mark(at=self.later(), name="healed"))
        self.add(Mark(at=self.later(), name="quiet"))
        for member in self.members:
            self.connect(member)
        self.add(Final(at=self.later(), room=ROOM, epoch=self.epoch, offset=len(self.log)))
        self.add(Mark(at=self.later(), name="end"))
        for member in self.members:
            self.disconnect(member, 1000)
        for place, sent in enumerate(self.log, 1):
            entry = Logged(at=self.now, room=ROOM, epoch=self.epoch, offset=place, key=sent.key)
            self.add(entry)
        return self.records


def a_run(middle: Callable[[Chat], None] = lambda chat: None) -> list[Record]:
    """Ten messages, something, and ten more."""
    chat = Chat()
    for n in range(10):
        chat.publish(chat.members[n % 3])
    middle(chat)
    for n in range(10):
        chat.publish(chat.members[n % 3])
    return chat.finish()


def found(records: list[Record]) -> set[Invariant]:
    return {violation.invariant for violation in check(records)}


def where(records: list[Record], kind: type[R], **fields: object) -> list[int]:
    """The indexes of the records of a kind with these fields."""
    return [
        place
        for place, record in enumerate(records)
        if isinstance(record, kind)
        and all(getattr(record, name) == value for name, value in fields.items())
    ]


def the(kind: type[R], record: Record) -> R:
    assert isinstance(record, kind)
    return record


def received(records: list[Record], offset: int, member: str = "m1") -> int:
    [place] = where(records, Received, offset=offset, member=member)
    return place


def amend(records: list[Record], place: int, **fields: object) -> None:
    records[place] = replace(records[place], **fields)


# --- planted ---------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [7, 20], ids=["amid", "the last"])
def test_a_delivery_is_lost_on_one_member(offset: int) -> None:
    records = a_run()
    del records[received(records, offset)]

    assert {Invariant.NO_LOSS, Invariant.NO_GAP} <= found(records)


@pytest.mark.parametrize("offset", [7, 20], ids=["amid", "the last"])
def test_a_delivery_is_lost_on_every_member(offset: int) -> None:
    records = a_run()
    for member in ("m0", "m1", "m2"):
        del records[received(records, offset, member)]

    assert Invariant.NO_LOSS in found(records)


def test_an_acked_message_is_neither_delivered_nor_in_the_log() -> None:
    """The last one: not even the room's offset tells of it."""
    records = a_run()
    for place in reversed(
        [*where(records, Received, offset=20), *where(records, Logged, offset=20)]
    ):
        del records[place]
    amend(records, where(records, Final)[0], offset=19)

    assert found(records) == {Invariant.NO_LOSS}


def test_a_delivery_is_lost_before_a_reconnect_that_recovers() -> None:
    def away(chat: Chat) -> None:
        chat.disconnect(chat.members[1])
        chat.connect(chat.members[1])

    records = a_run(away)
    del records[received(records, 10)]

    assert Invariant.NO_LOSS in found(records) or Invariant.NO_GAP in found(records)


def test_a_recovery_says_true_and_skips_one() -> None:
    def away(chat: Chat) -> None:
        chat.disconnect(chat.members[1])
        chat.publish(chat.members[0])
        chat.connect(chat.members[1])

    records = a_run(away)
    place = where(records, Joined, member="m1")[-1]
    amend(records, place, replay=0)
    del records[received(records, 11)]

    assert {Invariant.NO_LOSS, Invariant.NO_GAP} <= found(records)


def test_a_message_is_lost_where_the_log_went_on_under_a_new_epoch() -> None:
    records = a_run(Chat.fork)
    del records[received(records, 11)]

    assert {Invariant.NO_LOSS, Invariant.NO_GAP} <= found(records)


def test_an_acked_message_is_lost_with_its_epoch_and_nobody_is_told() -> None:
    """m2 was away, and is told that nothing was lost when it comes back; the log disagrees."""

    def forget(chat: Chat) -> None:
        for member in chat.members[1:]:
            chat.disconnect(member)
        chat.publish(chat.members[0])
        chat.disconnect(chat.members[0])
        del chat.records[-2]  # Not even the sender had it.
        chat.members[0].position -= 1
        chat.log.pop()
        chat._new_epoch()
        for member in chat.members:
            chat.connect(member)

    assert Invariant.NO_LOSS in found(a_run(forget))


@pytest.mark.parametrize("later", [1, 8])
def test_a_delivery_comes_twice(later: int) -> None:
    records = a_run()
    place = received(records, 7)
    records.insert(place + later, records[place])

    assert found(records) == {Invariant.NO_DUPLICATE}


def test_a_delivery_comes_again_after_a_reconnect() -> None:
    def away(chat: Chat) -> None:
        chat.disconnect(chat.members[1])
        chat.connect(chat.members[1])

    records = a_run(away)
    [later] = [p for p in where(records, Joined, member="m1") if p > received(records, 10)]
    connection = the(Joined, records[later]).connection
    records.insert(later + 1, replace(records[received(records, 10)], connection=connection))

    assert found(records) == {Invariant.NO_DUPLICATE}


def test_a_key_is_stored_at_two_offsets() -> None:
    records = a_run()
    again = the(Sent, records[where(records, Sent)[4]]).key
    for place in [*where(records, Received, offset=9), *where(records, Logged, offset=9)]:
        amend(records, place, key=again)

    assert {Invariant.NO_DUPLICATE, Invariant.NO_LOSS} <= found(records)


def test_two_deliveries_are_swapped() -> None:
    records = a_run()
    one, other = received(records, 7), received(records, 8)
    records[one], records[other] = records[other], records[one]

    assert found(records) == {Invariant.ORDER}


def test_what_a_sender_sent_is_swapped() -> None:
    records = a_run()
    one, other = where(records, Sent, sender="m0")[:2]
    first, second = (the(Sent, records[place]).attempt for place in (one, other))
    amend(records, one, attempt=second)
    amend(records, other, attempt=first)

    assert found(records) == {Invariant.ORDER}


def test_what_was_repeated_later_may_stand_later() -> None:
    records = a_run()
    one, other = where(records, Sent, sender="m0")[:2]
    amend(records, one, attempt=the(Sent, records[other]).attempt + 1, duplicate=True)

    assert found(records) == set()


def test_an_offset_is_used_for_two_keys() -> None:
    records = a_run()
    place = where(records, Sent, offset=9)[0]
    amend(records, place, offset=8)

    assert Invariant.AGREEMENT in found(records)


def test_a_member_sees_another_message_than_the_others() -> None:
    """Both were sent, so it is not invented."""
    records = a_run(lambda chat: chat.publish(chat.members[0], "unknown", stored=False))
    [unknown] = where(records, Sent, outcome="unknown")
    amend(records, received(records, 7), key=the(Sent, records[unknown]).key)

    assert {Invariant.AGREEMENT, Invariant.NO_LOSS} <= found(records)


def test_the_store_has_another_message_than_the_members() -> None:
    records = a_run(Chat.fork)
    [place] = where(records, Logged, offset=7)
    [unsent] = where(records, Sent, offset=7)
    amend(records, unsent, outcome="unknown")
    amend(records, place, key="another")

    assert Invariant.AGREEMENT in found(records)


def test_a_hole_that_nobody_told_of() -> None:
    """The message was not acked: no loss, but a gap."""
    records = a_run(lambda chat: chat.publish(chat.members[0], "unknown"))
    del records[received(records, 11)]

    assert found(records) == {Invariant.NO_GAP}


def test_a_gap_is_told_too_short() -> None:
    def away(chat: Chat) -> None:
        chat.disconnect(chat.members[1])
        for _ in range(5):
            chat.publish(chat.members[0])
        chat.members[1].connection = "m1 again"
        session = chat.members[1].session
        chat.add(
            Connected(
                at=chat.later(),
                member="m1",
                session=session,
                connection="m1 again",
                began=chat.now,
            )
        )
        chat.join_with_a_gap(chat.members[1], last=2)

    records = a_run(away)
    [place] = where(records, Joined, recovered=False)
    assert found(records) == set()
    amend(records, place, gap=(11, 12))

    assert found(records) == {Invariant.NO_GAP}


def test_a_refused_message_is_delivered() -> None:
    records = a_run(lambda chat: chat.publish(chat.members[0], "unknown"))
    [place] = where(records, Sent, outcome="unknown")
    amend(records, place, outcome="failed", code="forbidden")

    assert found(records) == {Invariant.NOTHING_INVENTED}


def test_a_message_is_delivered_that_nobody_sent() -> None:
    records = a_run()
    amend(records, received(records, 7), key="out of the blue")

    assert Invariant.NOTHING_INVENTED in found(records)


def test_an_unknown_message_is_delivered_twice() -> None:
    def twice(chat: Chat) -> None:
        chat.publish(chat.members[0], "unknown")
        chat.log.append(chat.log[-1])

    assert found(a_run(twice)) == {Invariant.NOTHING_INVENTED}


def test_a_delivery_after_a_revocation() -> None:
    records = a_run(lambda chat: chat.revoke(chat.members[1]))
    [revoked] = where(records, Revoked)
    at = records[revoked].at + 2
    early = next(p for p in where(records, Closed, member="m1"))
    late = replace(records[received(records, 10)], offset=11, at=at, key="key 11")
    records.insert(early, late)

    assert Invariant.REVOCATION in found(records)


def test_what_lay_unread_was_not_delivered_after_a_revocation() -> None:
    def slow(chat: Chat) -> None:
        fault = chat.fault("slow_readers", "m1")
        chat.over(fault)
        chat.revoke(chat.members[1])

    records = a_run(slow)
    [revoked] = where(records, Revoked)
    amend(records, received(records, 10), at=records[revoked].at + 2)

    assert found(records) == set()


def test_a_message_is_accepted_after_a_revocation() -> None:
    def zombie(chat: Chat) -> None:
        chat.add(Revoked(at=chat.later(), session=chat.members[1].session))
        chat.later(5)

    assert Invariant.REVOCATION in found(a_run(zombie))


def test_a_revoked_session_is_let_in() -> None:
    records = a_run(lambda chat: chat.revoke(chat.members[1]))
    place = where(records, Connected, member="m1")[-1]
    amend(records, place, session="m1 login 1")

    assert Invariant.REVOCATION in found(records)


@pytest.mark.parametrize("rights", [{}, {ROOM: "w", "*": "rwm"}, {"lob*": "w", "lo*": "rw"}])
def test_a_delivery_to_somebody_who_may_not_read(rights: dict[str, str]) -> None:
    records = a_run()
    amend(records, where(records, Session, member="m1")[0], rooms=rights)

    assert Invariant.AUTHORIZATION in found(records)


def test_a_delivery_to_somebody_who_has_left() -> None:
    records = a_run()
    place = received(records, 20)
    records.insert(
        place,
        Left(
            at=records[place].at,
            member="m1",
            connection=the(Received, records[place]).connection,
            room=ROOM,
            reason="forbidden",
        ),
    )

    assert found(records) == {Invariant.AUTHORIZATION}


def test_a_message_is_accepted_from_somebody_who_may_not_write() -> None:
    records = a_run()
    amend(records, where(records, Session, member="m1")[0], rooms={ROOM: "r"})

    assert found(records) == {Invariant.AUTHORIZATION}


def test_a_message_is_shown_to_its_sender_that_wants_no_echo() -> None:
    records = a_run(lambda chat: chat.publish(chat.members[1], echo=False))
    [sent] = where(records, Sent, echo=False)
    place = received(records, 11)
    assert the(Received, records[place]).kind == "skip"
    amend(records, place, kind="message", key=the(Sent, records[sent]).key)

    assert found(records) == {Invariant.AUTHORIZATION}


def test_a_sender_that_wants_an_echo_gets_none() -> None:
    records = a_run()
    amend(records, received(records, 2), kind="skip", key="")

    assert found(records) == {Invariant.NO_LOSS}


@pytest.mark.parametrize("name", ["store_killed", "store_frozen"])
def test_an_ack_while_the_store_was_down(name: str) -> None:
    def down(chat: Chat) -> None:
        fault = chat.fault(name)
        chat.publish(chat.members[0])
        chat.over(fault)

    assert found(a_run(down)) == {Invariant.NO_FALSE_SUCCESS}


def test_a_handshake_while_the_store_was_down() -> None:
    def down(chat: Chat) -> None:
        fault = chat.fault("store_killed")
        chat.disconnect(chat.members[0])
        chat.connect(chat.members[0])
        chat.over(fault)

    assert found(a_run(down)) == {Invariant.NO_FALSE_SUCCESS}


def test_a_member_never_came_back() -> None:
    records = a_run()
    [end] = where(records, Mark, name="end")
    [closed] = where(records, Closed, member="m1")
    records.insert(end, replace(records.pop(closed), code=1006))

    assert found(records) == {Invariant.LIVENESS}


def test_a_member_caught_up_too_late() -> None:
    records = a_run()
    amend(records, received(records, 20), at=records[-1].at + 11)

    assert found(records) == {Invariant.LIVENESS}


def test_a_member_is_connected_but_no_longer_in_its_room() -> None:
    def lost(chat: Chat) -> None:
        chat.disconnect(chat.members[1])
        chat.connect(chat.members[1])

    records = a_run(lost)
    again = where(records, Joined, member="m1")[-1]
    for place in reversed([again, *where(records, Received, member="m1")]):
        if place >= again:
            del records[place]

    assert found(records) == {Invariant.LIVENESS}


# --- excusable -------------------------------------------------------------------------------


def test_everything_excusable_is_excused() -> None:
    def storm(chat: Chat) -> None:
        one, two, three = chat.members
        chat.publish(one, "unknown")
        chat.publish(two, "unknown", stored=False)
        chat.publish(three, "failed")
        chat.publish(one, echo=False)
        chat.disconnect(one)
        chat.fork()
        chat.publish(two)
        chat.connect(one)
        chat.join_with_a_gap(three, last=0)
        chat.join(two)
        chat.join(two, since=False)
        chat.empty()
        chat.publish(one)
        chat.revoke(three)
        chat.publish(one)
        chat.connect(three)

    assert check(a_run(storm)) == []


def test_the_end_of_a_log_that_another_stores_took_the_place_of_is_not_owed() -> None:
    """It was told by the old one, in the moment before."""
    records = a_run()
    amend(records, where(records, Final)[0], epoch="of before", offset=99)

    assert check(records) == []


def test_what_members_lack_of_a_log_is_missed_whoever_told_its_end() -> None:
    records = a_run()
    amend(records, where(records, Final)[0], epoch="of before", offset=99)
    for member in ("m0", "m1", "m2"):
        del records[received(records, 20, member)]

    assert Invariant.NO_LOSS in found(records)
    assert Invariant.LIVENESS in found(records)


def test_a_log_that_has_not_gone_on_yet_owes_nothing_of_before() -> None:
    """A replica that was promoted a moment ago: who comes next is told."""
    records = a_run()
    for place in where(records, Logged):
        amend(records, place, epoch="")
    for place in reversed(where(records, Logged)[15:]):
        del records[place]

    assert check(records) == []


def test_a_member_that_was_revoked_for_good_is_not_waited_for() -> None:
    records = a_run(lambda chat: chat.revoke(chat.members[1]))
    [closed] = where(records, Closed, member="m1", code=4503)
    kept = [
        record
        for place, record in enumerate(records)
        if place <= closed
        or "m1" not in (getattr(record, "member", ""), getattr(record, "sender", ""))
    ]

    assert Invariant.LIVENESS not in found(kept)


# --- generated -------------------------------------------------------------------------------

ACTS: list[Callable[[Chat, Member], None]] = [
    lambda chat, member: chat.publish(member),
    lambda chat, member: chat.publish(member),
    lambda chat, member: chat.publish(member),
    lambda chat, member: chat.publish(member, echo=False),
    lambda chat, member: chat.publish(member, "unknown"),
    lambda chat, member: chat.publish(member, "unknown", stored=False),
    lambda chat, member: chat.publish(member, "failed"),
    lambda chat, member: chat.disconnect(member),
    lambda chat, member: chat.connect(member),
    lambda chat, member: chat.join(member),
    lambda chat, member: chat.join_with_a_gap(member),
    lambda chat, member: chat.fork(),
    lambda chat, member: chat.empty(),
    lambda chat, member: chat.revoke(member),
]


@st.composite
def runs(draw: st.DrawFn) -> list[Record]:
    chat = Chat()
    steps = st.tuples(st.sampled_from(ACTS), st.sampled_from(chat.members))
    for act, member in draw(st.lists(steps, min_size=5, max_size=40)):
        act(chat, member)
    for member in chat.members:
        chat.connect(member)
    chat.publish(chat.members[0])
    chat.publish(chat.members[1])
    return chat.finish()


def answerable(records: list[Record]) -> list[int]:
    """Deliveries whose loss can be seen: not the last before the member was told of one."""
    places = []
    for place in where(records, Received):
        event = records[place]
        assert isinstance(event, Received)
        after = (
            record
            for record in records[place + 1 :]
            if isinstance(record, Received | Joined | Reset) and record.member == event.member
        )
        follower = next(after, None)
        if not isinstance(follower, Reset) and not (
            isinstance(follower, Joined) and follower.since is None
        ):
            places.append(place)
    return places


@given(runs())
def test_a_valid_history_has_no_violation(records: list[Record]) -> None:
    assert check(records) == []


@given(runs(), st.data())
def test_any_delivery_that_is_dropped_is_missed(records: list[Record], data: st.DataObject) -> None:
    del records[data.draw(st.sampled_from(answerable(records)))]

    assert found(records) & {Invariant.NO_LOSS, Invariant.NO_GAP}


@given(runs(), st.data())
def test_any_delivery_that_comes_twice_is_seen(records: list[Record], data: st.DataObject) -> None:
    place = data.draw(st.sampled_from(where(records, Received)))
    records.insert(place, records[place])

    assert Invariant.NO_DUPLICATE in found(records)


@given(runs(), st.data())
def test_any_two_deliveries_that_are_swapped_are_seen(
    records: list[Record], data: st.DataObject
) -> None:
    member = data.draw(st.sampled_from(["m0", "m1", "m2"]))
    mine = where(records, Received, member=member)
    first = data.draw(st.integers(0, len(mine) - 2))
    one, other = mine[first : first + 2]
    between = records[one + 1 : other]
    if any(isinstance(r, Joined | Reset | Epoch | Connected) for r in between):
        return
    records[one], records[other] = records[other], records[one]

    assert Invariant.ORDER in found(records)


# --- files -----------------------------------------------------------------------------------


@given(runs())
def test_a_history_is_the_same_after_it_was_written_and_read(records: list[Record]) -> None:
    assert [history.decode(history.encode(record)) for record in records] == records


def test_a_file_of_a_history_can_be_checked(tmp_path: Path) -> None:
    records = a_run()
    del records[received(records, 7)]
    written = History(tmp_path / "history")
    for record in records:
        written.add(record)
    written.close()
    again = History.read(tmp_path / "history")

    assert again.records == records
    assert check(again) == check(records) != []


def test_the_report_counts() -> None:
    def storm(chat: Chat) -> None:
        fault = chat.fault("links_slow")
        chat.publish(chat.members[0], "unknown")
        chat.over(fault)
        chat.later(5)
        chat.fork()
        chat.disconnect(chat.members[0])
        chat.connect(chat.members[0])

    report = Report.of(a_run(storm))

    assert report.outcomes == {"ok": 20, "unknown": 1}
    assert (report.delivered, report.recovered, report.not_recovered) == (63, 1, 0)
    assert (report.epochs, report.resets, report.faults) == (3, 0, {"links_slow": 1})
    latencies = (report.before, report.calm, report.faulty)
    assert [latency.deliveries for latency in latencies] == [30, 30, 3]
    assert str(report.before) == "p50 12.0 ms, p99 13.0 ms (30)"
    assert str(Report.of([]).before) == "no delivery"
    assert "21: 20 ok, 1 unknown" in str(report)
