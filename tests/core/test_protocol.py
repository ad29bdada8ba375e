from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatserver.core import errors, frames
from chatserver.core.claims import Identity
from chatserver.core.effects import (
    Abandon,
    Admit,
    Close,
    Effect,
    Ended,
    EndSession,
    Failed,
    Identify,
    Join,
    Leave,
    Outcome,
    Page,
    Publish,
    Published,
    Read,
    Refused,
    Resume,
    Transmit,
    Verified,
    Verify,
    Withhold,
)
from chatserver.core.errors import MESSAGES, ReplyCode
from chatserver.core.flow import Limits
from chatserver.core.frames import Since
from chatserver.core.protocol import CONGESTED, EXPIRED_GRACE, ChatProtocol
from chatserver.core.room import Event, Reading

NOW = 1_700_000_000.0
EXP = 1_700_000_900

ALICE = Identity(
    user="alice",
    session="s1",
    token_id="t1",
    roles=("member",),
    rooms=None,
    issued_at=int(NOW),
    expires_at=EXP,
)
LATER = replace(ALICE, token_id="t2", issued_at=EXP - 30, expires_at=EXP + 870)
GENEROUS = Limits(send_rate=1000.0, send_burst=10_000, command_rate=1000.0, command_burst=10_000)


class Peer:
    """Both sides of a ``ChatProtocol``: what a client sends, and what the shell would do."""

    def __init__(self, identity: Identity = ALICE, limits: Limits = GENEROUS) -> None:
        self.chat = ChatProtocol("c1", identity, limits, NOW)
        self.refused: list[Refused] = []
        self.welcome = self.effects()

    def effects(self) -> list[Effect]:
        """What is to be done; what is only to be counted goes to ``refused``."""
        effects = self.chat.effects()
        self.refused += [effect for effect in effects if isinstance(effect, Refused)]
        return [effect for effect in effects if not isinstance(effect, Refused)]

    def command(self, type: str, now: float = NOW, **fields: object) -> list[Effect]:
        """Send a command; returns what it led to at once."""
        self.chat.receive_frame(json.dumps({"type": type, **fields}).encode(), now)
        return self.effects()

    def answer(self, asked: Iterable[Effect], outcome: Outcome, now: float = NOW) -> list[Effect]:
        """Bring the outcome of the only effect with a reference; returns what it led to."""
        (ref,) = refs(asked)
        self.chat.receive_outcome(ref, outcome, now)
        return self.effects()

    def timer(self, now: float) -> list[Effect]:
        self.chat.handle_timer(now)
        return self.effects()

    def join(self, room: str) -> None:
        self.answer(self.command("join", room=room), reading(5, retained=5))

    def refresh(self, outcome: Outcome, now: float = NOW) -> list[Effect]:
        return self.answer(self.command("refresh", now, id=9, token="x"), outcome, now)


def refs(effects: Iterable[Effect]) -> list[int]:
    return [e.ref for e in effects if isinstance(e, Publish | Join | Read | Verify | EndSession)]


def sent(effects: Iterable[Effect]) -> list[dict[str, Any]]:
    return [json.loads(e.payload) for e in effects if isinstance(e, Transmit)]


def exact(effects: Iterable[Effect]) -> list[tuple[type, Effect]]:
    """Effects with their types, for named tuples of the same fields are equal: Leave, Abandon."""
    return [(type(effect), effect) for effect in effects]


def only(effects: list[Effect]) -> Any:
    """The one frame that is all that was done."""
    (frame,) = sent(effects)
    assert len(effects) == 1
    return frame


def error(code: ReplyCode, id: object = None, **fields: object) -> dict[str, object]:
    head = {"type": "error"} if id is None else {"type": "error", "id": id}
    return {**head, "code": code.value, "message": MESSAGES[code], **fields}


def reading(top: int, retained: int = 0, epoch: str = "e1") -> Reading:
    return Reading(epoch, top, top - retained + 1, top if epoch == "e1" else -1, [])


def published(offset: int = 1, *, duplicate: bool = False) -> Published:
    return Published("e1", offset, 1760000002345, duplicate)


def claims(rooms: Mapping[str, str], token: Identity = ALICE) -> Identity:
    return replace(token, rooms=rooms)


# --- welcome -------------------------------------------------------------------------------


def test_a_welcome_comes_first_and_says_everything() -> None:
    peer = Peer(replace(ALICE, roles=("member", "x")), Limits())

    assert only(peer.welcome) == {
        "type": "welcome",
        "protocol": 1,
        "connection": "c1",
        "session": "s1",
        "user": "alice",
        "roles": ["member", "x"],
        "ts": 1_700_000_000_000,
        "expires_at": 1_700_000_900_000,
        "ping_interval": 25_000,
        "limits": {
            "frame_bytes": 65536,
            "rooms": 256,
            "send_rate": 10.0,
            "send_burst": 20,
            "command_rate": 50.0,
            "command_burst": 320,
            "key_window": 600_000,
            "history": 1000,
            "replay": 1000,
        },
    }


def test_times_and_durations_are_whole_milliseconds() -> None:
    chat = ChatProtocol("c1", ALICE, Limits(ping_interval=0.5, key_window=1.5), NOW + 0.25)

    (welcome,) = sent(chat.effects())

    assert welcome["ts"] == 1_700_000_000_250
    assert type(welcome["ts"]) is type(welcome["expires_at"]) is int
    assert welcome["ping_interval"] == 500
    assert welcome["limits"]["key_window"] == 1500


def test_effects_are_handed_out_once() -> None:
    assert Peer().effects() == []


# --- join and leave ------------------------------------------------------------------------


def test_a_join_registers_reads_and_is_admitted_right_after_its_ack() -> None:
    peer = Peer()

    asked = peer.command("join", id=1, room="general")
    done = peer.answer(asked, reading(12, retained=12))

    assert exact(asked) == exact([Join(1, "general", None, 0)])
    assert sent(done) == [
        {
            "type": "ack",
            "id": 1,
            "room": "general",
            "epoch": "e1",
            "offset": 12,
            "rights": "rw",
            "replay": 0,
        }
    ]
    assert exact(done[1:]) == exact([Admit("general", 12, reading(12, retained=12))])


def test_a_join_may_ask_for_the_latest_events() -> None:
    peer = Peer()

    asked = peer.command("join", id=1, room="a", last=5)
    done = peer.answer(asked, reading(12, retained=3))

    assert exact(asked) == exact([Join(1, "a", None, 5)])
    assert sent(done)[0]["replay"] == 3
    assert "recovered" not in sent(done)[0]
    assert exact([done[1]]) == exact([Admit("a", 9, reading(12, retained=3))])


def test_a_recovered_join_replays_what_was_missed() -> None:
    peer = Peer()

    asked = peer.command("join", id=1, room="a", since={"epoch": "e1", "offset": 9})
    done = peer.answer(asked, reading(12, retained=12))

    assert exact(asked) == exact([Join(1, "a", Since("e1", 9), 50)])
    assert sent(done) == [
        {
            "type": "ack",
            "id": 1,
            "room": "a",
            "epoch": "e1",
            "offset": 12,
            "rights": "rw",
            "replay": 3,
            "recovered": True,
        }
    ]
    assert exact([done[1]]) == exact([Admit("a", 9, reading(12, retained=12))])


def test_a_join_that_cannot_be_recovered_names_the_gap_and_replays_the_latest() -> None:
    peer = Peer()

    asked = peer.command("join", id=1, room="a", since={"epoch": "e1", "offset": 9}, last=7)
    done = peer.answer(asked, reading(500, retained=100))

    assert exact(asked) == exact([Join(1, "a", Since("e1", 9), 7)])
    assert sent(done) == [
        {
            "type": "ack",
            "id": 1,
            "room": "a",
            "epoch": "e1",
            "offset": 500,
            "rights": "rw",
            "replay": 7,
            "recovered": False,
            "gap": {"from": 10, "to": 493},
        }
    ]
    assert exact([done[1]]) == exact([Admit("a", 493, reading(500, retained=100))])


def test_under_another_epoch_there_is_no_gap_and_the_latest_fifty_are_replayed() -> None:
    peer = Peer()

    asked = peer.command("join", id=1, room="a", since={"epoch": "old", "offset": 9})
    (ack,) = sent(peer.answer(asked, reading(500, retained=100)))

    assert (ack["recovered"], ack["replay"]) == (False, 50)
    assert "gap" not in ack


def test_more_than_the_replay_limit_is_not_recovered() -> None:
    peer = Peer(limits=replace(GENEROUS, replay=10))

    for since in (90, 89):
        peer.command("join", id=1, room="a", since={"epoch": "e1", "offset": since}, last=0)
    for ref in (1, 2):
        peer.chat.receive_outcome(ref, reading(100, retained=100), NOW)
    acks = sent(peer.effects())

    assert [(ack["recovered"], ack["replay"]) for ack in acks] == [(True, 10), (False, 0)]


def test_a_joined_room_may_be_joined_again_elsewhere() -> None:
    peer = Peer()
    peer.join("a")

    done = peer.answer(peer.command("join", id=2, room="a", last=2), reading(9, retained=9))

    assert sent(done)[0]["replay"] == 2
    assert exact([done[1]]) == exact([Admit("a", 7, reading(9, retained=9))])


def test_two_joins_of_one_room_do_not_overtake_each_other() -> None:
    peer = Peer()

    first = peer.command("join", id=1, room="a", last=1)
    other = peer.command("join", id=2, room="b")
    second = peer.command("join", id=3, room="a", last=2)

    assert (refs(first), refs(other), refs(second)) == ([1], [2], [])

    early = peer.answer(other, reading(9, retained=9))
    done = peer.answer(first, reading(9, retained=9))

    assert early == []
    assert [frame["id"] for frame in sent(done)] == [1, 2]
    assert exact([done[-1]]) == exact([Join(3, "a", None, 2)])


def test_a_join_without_the_right_is_forbidden_and_nothing_is_asked() -> None:
    peer = Peer(claims({"a": "w", "b": "r"}))

    assert only(peer.command("join", id=1, room="a")) == error(ReplyCode.FORBIDDEN, 1)
    assert only(peer.command("join", id=2, room="c")) == error(ReplyCode.FORBIDDEN, 2)
    assert refs(peer.command("join", id=3, room="b"))


def test_the_ack_of_a_join_tells_the_rights() -> None:
    peer = Peer(claims({"a": "r", "b": "wrm"}))

    told = [sent(peer.answer(peer.command("join", id=1, room=r), reading(0))) for r in "ab"]

    assert [acks[0]["rights"] for acks in told] == ["r", "rwm"]


def test_a_direct_room_is_open_to_its_two_users() -> None:
    peer = Peer(claims({}))

    assert refs(peer.command("send", id=1, room="dm:alice:bob", body=1))
    assert refs(peer.command("send", id=2, room="dm:Zoe:alice", body=1))


def test_an_unavailable_join_leaves_nothing_behind() -> None:
    peer = Peer(limits=replace(GENEROUS, rooms=1))

    done = peer.answer(peer.command("join", id=1, room="a"), Failed(ReplyCode.UNAVAILABLE))

    assert exact(done[:2]) == exact([Abandon("a"), Leave("a")])
    assert sent(done) == [error(ReplyCode.UNAVAILABLE, 1)]
    assert refs(peer.command("join", id=2, room="b"))


def test_a_room_joined_before_stays_joined_when_repositioning_fails() -> None:
    peer = Peer()
    peer.join("a")

    done = peer.answer(peer.command("join", id=1, room="a"), Failed(ReplyCode.UNAVAILABLE))

    assert exact([done[0]]) == exact([Abandon("a")])
    assert Leave not in [type(effect) for effect in done]
    assert sent(done) == [error(ReplyCode.UNAVAILABLE, 1)]


def test_as_many_rooms_as_allowed_may_be_joined() -> None:
    peer = Peer(limits=replace(GENEROUS, rooms=2))
    peer.join("a")

    assert refs(peer.command("join", id=1, room="b"))
    assert sent(peer.command("join", id=2, room="c")) == []  # its turn comes after the other's

    peer.chat.receive_outcome(2, reading(0), NOW)

    assert sent(peer.effects()) == [
        {
            "type": "ack",
            "id": 1,
            "room": "b",
            "epoch": "e1",
            "offset": 0,
            "rights": "rw",
            "replay": 0,
        },
        error(ReplyCode.ROOM_LIMIT, 2),
    ]


def test_a_full_connection_may_reposition_a_room_and_swap_one() -> None:
    peer = Peer(limits=replace(GENEROUS, rooms=1))
    peer.join("a")

    assert only(peer.command("join", id=1, room="b")) == error(ReplyCode.ROOM_LIMIT, 1)

    peer.answer(peer.command("join", room="a"), reading(0))
    peer.command("leave", room="a")

    assert refs(peer.command("join", id=2, room="b"))


def test_a_leave_is_done_before_its_ack() -> None:
    peer = Peer()
    peer.join("a")

    done = peer.command("leave", id=1, room="a")

    assert exact([done[0]]) == exact([Leave("a")])
    assert sent(done) == [{"type": "ack", "id": 1, "room": "a"}]
    assert isinstance(done[-1], Transmit)


def test_leaving_a_room_not_joined_is_acked_too() -> None:
    done = Peer().command("leave", id=1, room="nowhere")

    assert sent(done) == [{"type": "ack", "id": 1, "room": "nowhere"}]


def test_a_leave_waits_for_the_join_before_it() -> None:
    peer = Peer()

    asked = peer.command("join", id=1, room="a")
    waiting = peer.command("leave", id=2, room="a")
    done = peer.answer(asked, reading(0))

    assert waiting == []
    assert [type(effect) for effect in done] == [Transmit, Admit, Leave, Transmit]
    assert [frame["id"] for frame in sent(done)] == [1, 2]


# --- send ----------------------------------------------------------------------------------


def test_a_send_is_published_and_acked_with_its_place() -> None:
    peer = Peer()

    (publish,) = peer.command("send", id=2, room="a", body={"text": "hi"}, key="k1")
    done = peer.answer([publish], published(12348))

    assert isinstance(publish, Publish)
    assert (publish.room, publish.user, publish.key, publish.echo) == ("a", "alice", "k1", True)
    assert json.loads(publish.head + b'12348,"ts":5' + publish.tail) == {
        "type": "message",
        "room": "a",
        "offset": 12348,
        "ts": 5,
        "user": "alice",
        "key": "k1",
        "body": {"text": "hi"},
    }
    assert only(done) == {
        "type": "ack",
        "id": 2,
        "room": "a",
        "epoch": "e1",
        "offset": 12348,
        "ts": 1760000002345,
    }


def test_a_send_needs_no_join_and_may_forgo_key_and_echo() -> None:
    (publish,) = Peer().command("send", room="a", body=1, echo=False)

    assert isinstance(publish, Publish)
    assert publish.key is None
    assert publish.echo is False


def test_the_user_is_the_tokens_whatever_the_payload_says() -> None:
    (publish,) = Peer().command(
        "send", room="a", body=1, user="eve", ts=1, offset=99, roles=["admin"]
    )

    assert isinstance(publish, Publish)
    event = json.loads(publish.head + b'1,"ts":2' + publish.tail)
    assert event == {
        "type": "message",
        "room": "a",
        "offset": 1,
        "ts": 2,
        "user": "alice",
        "body": 1,
    }


def test_a_repeated_key_is_acked_as_a_duplicate() -> None:
    peer = Peer()

    done = peer.answer(
        peer.command("send", id=1, room="a", body=1, key="k"), published(7, duplicate=True)
    )

    assert only(done) == {
        "type": "ack",
        "id": 1,
        "room": "a",
        "epoch": "e1",
        "offset": 7,
        "ts": 1760000002345,
        "duplicate": True,
    }


def test_a_send_without_the_right_is_forbidden() -> None:
    peer = Peer(replace(ALICE, roles=("guest",)))

    assert only(peer.command("send", id=1, room="a", body=1)) == error(ReplyCode.FORBIDDEN, 1)
    assert only(peer.command("send", room="a", body=1)) == error(ReplyCode.FORBIDDEN)


def test_a_direct_room_of_others_is_forbidden_even_to_an_admin() -> None:
    peer = Peer(replace(ALICE, roles=("admin",), rooms={"*": "rwm"}))

    assert only(peer.command("send", id=1, room="dm:bob:carol", body=1)) == error(
        ReplyCode.FORBIDDEN, 1
    )


def test_a_send_whose_fate_is_unknown_is_unavailable() -> None:
    peer = Peer()

    done = peer.answer(peer.command("send", id=1, room="a", body=1), Failed(ReplyCode.UNAVAILABLE))

    assert only(done) == error(ReplyCode.UNAVAILABLE, 1)


def test_a_send_without_an_id_gets_no_ack_but_an_error_if_it_fails() -> None:
    peer = Peer()

    assert peer.answer(peer.command("send", room="a", body=1), published()) == []
    assert only(
        peer.answer(peer.command("send", room="a", body=1), Failed(ReplyCode.UNAVAILABLE))
    ) == error(ReplyCode.UNAVAILABLE)


def test_sends_are_under_way_together_and_acked_in_order() -> None:
    peer = Peer()

    asked = [peer.command("send", id=n, room="a", body=n) for n in (1, 2, 3)]
    done = [peer.answer(asked[n], published(n + 1)) for n in (2, 0, 1)]

    assert [len(refs(effects)) for effects in asked] == [1, 1, 1]
    assert [[f["id"] for f in sent(effects)] for effects in done] == [[], [1], [2, 3]]


def test_a_refused_send_waits_for_the_answers_before_it() -> None:
    peer = Peer(claims({"a": "w"}))

    asked = peer.command("send", id=1, room="a", body=1)
    refused = peer.command("send", id=2, room="b", body=1)
    done = peer.answer(asked, published())

    assert refused == []
    assert [(f["type"], f["id"]) for f in sent(done)] == [("ack", 1), ("error", 2)]


def test_an_outcome_for_nothing_is_ignored() -> None:
    peer = Peer()
    asked = peer.command("send", id=1, room="a", body=1)
    peer.answer(asked, published())

    assert peer.answer(asked, published()) == []


# --- cross-posts ---------------------------------------------------------------------------


def test_a_cross_post_is_acked_with_results_in_the_order_given() -> None:
    peer = Peer(claims({"a": "w", "c": "rw", "d": "w"}))

    asked = peer.command("send", id=4, rooms=["c", "b", "a", "d"], body=1, key="k")
    publishes = [effect for effect in asked if isinstance(effect, Publish)]
    into_c, into_a, into_d = refs(asked)
    peer.chat.receive_outcome(into_d, Failed(ReplyCode.UNAVAILABLE), NOW)
    peer.chat.receive_outcome(into_a, published(8, duplicate=True), NOW)
    peer.chat.receive_outcome(into_c, published(7), NOW)

    assert [(publish.room, publish.key) for publish in publishes] == [
        ("c", "k"),
        ("a", "k"),
        ("d", "k"),
    ]
    place = {"epoch": "e1", "ts": 1760000002345}
    refused = {"code": "forbidden", "message": MESSAGES[ReplyCode.FORBIDDEN]}
    unknown = {"code": "unavailable", "message": MESSAGES[ReplyCode.UNAVAILABLE]}
    assert only(peer.effects()) == {
        "type": "ack",
        "id": 4,
        "results": [
            {"room": "c", "offset": 7, **place},
            {"room": "b", "error": refused},
            {"room": "a", "offset": 8, "duplicate": True, **place},
            {"room": "d", "error": unknown},
        ],
    }


def test_a_cross_post_that_every_room_refused_is_acked() -> None:
    ack = only(Peer(claims({})).command("send", id=1, rooms=["a", "b"], body=1))

    assert (ack["type"], ack["id"]) == ("ack", 1)
    assert [(r["room"], r["error"]["code"]) for r in ack["results"]] == [
        ("a", "forbidden"),
        ("b", "forbidden"),
    ]


def test_a_cross_post_to_one_room_is_answered_as_a_cross_post() -> None:
    peer = Peer()

    ack = only(peer.answer(peer.command("send", id=1, rooms=["a"], body=1), published(3)))

    assert ack["results"] == [{"room": "a", "epoch": "e1", "offset": 3, "ts": 1760000002345}]
    assert "room" not in ack


def test_a_cross_post_counts_as_one_send_per_room() -> None:
    peer = Peer(limits=replace(GENEROUS, send_rate=4.0, send_burst=3))

    peer.command("send", room="x", body=1)
    asked = peer.command("send", id=1, rooms=["a", "b", "c", "d"], body=1)
    peer.chat.receive_outcome(1, published(), NOW)
    for ref in refs(asked):
        peer.chat.receive_outcome(ref, published(), NOW)

    (ack,) = sent(peer.effects())
    assert ack["type"] == "ack"
    assert ["error" in result for result in ack["results"]] == [False, False, True, True]
    assert ack["results"][2]["error"] == {
        "code": "rate_limited",
        "message": MESSAGES[ReplyCode.RATE_LIMITED],
        "retry_after": 251,
    }


# --- history -------------------------------------------------------------------------------


def test_a_page_of_history_is_acked_with_whole_events() -> None:
    peer = Peer()
    events = [Event("e1", n, b'{"type":"message","offset":%d}' % n) for n in (3, 4)]

    asked = peer.command("history", id=1, room="a", before=5, limit=2)
    done = peer.answer(asked, Page(Reading("e1", 9, 1, 9, events), True))

    assert exact(asked) == exact([Read(1, "a", 5, None, 2)])
    assert only(done) == {
        "type": "ack",
        "id": 1,
        "room": "a",
        "epoch": "e1",
        "offset": 9,
        "events": [{"type": "message", "offset": 3}, {"type": "message", "offset": 4}],
        "more": True,
    }


def test_history_pages_fifty_from_the_end_or_onwards() -> None:
    peer = Peer()

    assert exact(peer.command("history", id=1, room="a")) == exact([Read(1, "a", None, None, 50)])
    assert exact(peer.command("history", id=2, room="a", after=0)) == exact(
        [Read(2, "a", None, 0, 50)]
    )


def test_history_needs_the_right_to_read_but_no_join() -> None:
    peer = Peer(claims({"a": "w", "b": "r"}))

    assert only(peer.command("history", id=1, room="a")) == error(ReplyCode.FORBIDDEN, 1)
    assert refs(peer.command("history", id=2, room="b"))


def test_history_may_be_unavailable() -> None:
    peer = Peer()

    done = peer.answer(peer.command("history", id=1, room="a"), Failed(ReplyCode.UNAVAILABLE))

    assert only(done) == error(ReplyCode.UNAVAILABLE, 1)


# --- other commands ------------------------------------------------------------------------


def test_a_ping_is_acked_with_the_time() -> None:
    assert only(Peer().command("ping", NOW + 1.5, id="p")) == {
        "type": "ack",
        "id": "p",
        "ts": 1_700_000_001_500,
    }
    assert Peer().command("ping") == []


@pytest.mark.parametrize(
    "kind",
    ["edit", "delete", "react", "typing", "read", "presence", "kick", "ban", "mute", "?"],
)
def test_a_command_of_another_version_is_of_unknown_type(kind: str) -> None:
    assert only(Peer().command(kind, id=1, room="a")) == error(ReplyCode.UNKNOWN_TYPE, 1)
    assert only(Peer().command(kind)) == error(ReplyCode.UNKNOWN_TYPE)


def test_an_invalid_command_is_answered_with_its_path() -> None:
    assert only(Peer().command("join", id=1, room="a b")) == error(
        ReplyCode.INVALID, 1, path="$.room"
    )


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\xff", errors.NOT_TEXT),
        (b"hello", errors.BAD_FRAME),
        (b"[]", errors.BAD_FRAME),
        (b"", errors.BAD_FRAME),
    ],
)
def test_what_is_no_frame_closes(data: bytes, why: errors.Disconnect) -> None:
    peer = Peer()

    peer.chat.receive_frame(data, NOW)

    assert exact(peer.effects()) == exact([Close(why)])
    assert peer.chat.closed


def test_replies_come_in_order_whatever_the_kinds() -> None:
    peer = Peer()

    asked = peer.command("send", id=1, room="a", body=1)
    behind = [
        peer.command("ping", id=2),
        peer.command("nonsense", id=3),
        peer.command("history", id=4, room="a"),
        peer.command("history", id=5, room="b"),
        peer.command("send", id=6, room="a", body=1),
    ]
    first = peer.answer(asked, published())
    peer.chat.receive_outcome(refs(first)[1], Page(reading(0), False), NOW)
    second = peer.effects()
    third = peer.answer(first[-2:-1], Page(reading(0), False))
    fourth = peer.answer(third[-1:], published())

    assert behind == [[], [], [], [], []]
    assert [frame["id"] for frame in sent(first)] == [1, 2, 3]
    assert [type(effect) for effect in first[-2:]] == [Read, Read]
    assert second == []
    assert [frame["id"] for frame in sent(third)] == [4, 5]
    assert [frame["id"] for frame in sent(fourth)] == [6]


def test_kinds_that_read_do_not_start_while_a_send_is_under_way() -> None:
    peer = Peer()

    asked = peer.command("send", id=1, room="a", body=1)

    assert peer.command("history", id=2, room="a") == []
    assert [type(e) for e in peer.answer(asked, published())] == [Transmit, Read]


def test_a_command_starts_past_one_that_is_already_refused() -> None:
    peer = Peer(claims({"a": "rw"}))

    peer.command("send", id=1, room="a", body=1)
    peer.command("nonsense", id=2)

    assert refs(peer.command("send", id=3, room="a", body=1))


def test_a_connection_with_very_much_unanswered_is_congested() -> None:
    peer = Peer()
    asked = [peer.command("send", id=n + 1, room="a", body=1) for n in range(CONGESTED - 2)]
    peer.command("ping", id="x")

    assert not peer.chat.congested

    peer.command("ping", id="y")

    assert peer.chat.congested

    for effects in asked:
        peer.answer(effects, published())

    assert not peer.chat.congested


# --- rates ---------------------------------------------------------------------------------

STINGY = Limits(send_rate=4.0, send_burst=2, command_rate=8.0, command_burst=3)


def test_sends_have_a_budget_of_their_own() -> None:
    peer = Peer(limits=STINGY)

    for n in (1, 2):
        assert refs(peer.command("send", id=n, room="a", body=1))
    assert sent(peer.command("send", id=3, room="a", body=1)) == []
    for n in (1, 2):
        peer.chat.receive_outcome(n, published(), NOW)

    assert sent(peer.effects())[-1] == error(ReplyCode.RATE_LIMITED, 3, retry_after=251)
    assert only(peer.command("ping", id=4))["type"] == "ack"


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "join", "room": "a"},
        {"type": "leave", "room": "a"},
        {"type": "history", "room": "a"},
        {"type": "refresh", "token": "x"},
        {"type": "ping"},
        {"type": "edit"},
    ],
)
def test_all_other_commands_share_one(fields: dict[str, Any]) -> None:
    peer = Peer(limits=STINGY)
    for _ in range(3):
        peer.command("ping")

    refused = peer.command(**fields, id=1)

    if fields["type"] == "edit":
        assert only(refused) == error(ReplyCode.UNKNOWN_TYPE, 1)
    else:
        assert only(refused) == error(ReplyCode.RATE_LIMITED, 1, retry_after=126)
    assert refs(peer.command("send", id=2, room="a", body=1))


def test_whoever_waits_as_long_as_told_is_served() -> None:
    peer = Peer(limits=STINGY)
    for _ in range(3):
        peer.command("ping")

    wait = only(peer.command("ping", id=1))["retry_after"] / 1000

    assert only(peer.command("ping", NOW + wait, id=2))["type"] == "ack"


def test_malformed_commands_cost_as_much_as_good_ones() -> None:
    peer = Peer(limits=STINGY)
    for _ in range(3):
        peer.command("nonsense")

    assert only(peer.command("ping", id=1))["code"] == "rate_limited"


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "ping"},
        {"type": "leave", "room": "a"},
        {"type": "nonsense"},
        {"type": "send", "room": "b", "body": 1},
        {"type": "send", "rooms": [f"r{n}" for n in range(16)], "body": 1},
    ],
)
def test_a_thousand_commands_at_one_instant_are_all_answered_in_order(
    fields: dict[str, Any],
) -> None:
    peer = Peer(claims({"a": "rw"}), Limits())

    answered = [frame for n in range(1000) for frame in sent(peer.command(**fields, id=n + 1))]

    assert [frame["id"] for frame in answered] == list(range(1, 1001))
    assert not peer.chat.closed


def test_a_flood_that_goes_on_is_cut_off() -> None:
    peer = Peer(limits=Limits())
    tick = 0
    while not peer.chat.closed:
        tick += 1
        last = peer.command("ping", NOW + tick / 200, id=tick)

    assert 5.0 <= tick / 200 <= 10.0
    assert exact(last) == exact([Close(errors.RATE_LIMITED)])


def test_a_flood_of_sends_is_cut_off() -> None:
    peer = Peer(limits=Limits())
    tick = 0
    while not peer.chat.closed:
        tick += 1
        peer.command("send", NOW + tick / 200, id=tick, rooms=["a", "b"], body=1)

    assert 5.0 <= tick / 200 <= 10.0


# --- the end of a token --------------------------------------------------------------------


@pytest.mark.parametrize(("lifetime", "ahead"), [(900, 60), (300, 60), (299, 59.8), (100, 20)])
def test_expiry_is_told_a_minute_or_a_fifth_of_the_lifetime_ahead(
    lifetime: int, ahead: float
) -> None:
    peer = Peer(replace(ALICE, expires_at=int(NOW) + lifetime))
    told_at = NOW + lifetime - ahead

    assert peer.chat.wake_at() == pytest.approx(told_at)
    assert peer.timer(told_at - 0.01) == []
    assert only(peer.timer(told_at + 0.01)) == {
        "type": "expiring",
        "expires_at": (1_700_000_000 + lifetime) * 1000,
    }


def test_expiry_is_told_once_for_each_token() -> None:
    peer = Peer()
    peer.timer(EXP - 60)

    assert peer.timer(EXP - 59) == []
    assert peer.chat.wake_at() == EXP

    peer.refresh(Verified(LATER, revoked=False), EXP - 30)

    assert peer.chat.wake_at() == LATER.expires_at - 60
    assert peer.timer(EXP - 20) == []
    assert sent(peer.timer(LATER.expires_at - 60)) == [
        {"type": "expiring", "expires_at": LATER.expires_at * 1000}
    ]


def test_the_same_token_again_is_not_told_of_twice() -> None:
    """A client that answers every ``expiring`` with the token it has would never be done."""
    peer = Peer()
    peer.timer(EXP - 60)

    done = peer.refresh(Verified(ALICE, revoked=False), EXP - 50)

    assert sent(done)[0]["type"] == "ack"
    assert peer.timer(EXP - 49) == []
    assert peer.chat.wake_at() == EXP


def test_from_exp_on_everything_is_withheld() -> None:
    peer = Peer()
    peer.timer(EXP - 60)

    assert peer.timer(EXP - 0.001) == []
    assert exact(peer.timer(EXP)) == exact([Withhold()])
    assert peer.timer(EXP + 0.1) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "join", "room": "a"},
        {"type": "leave", "room": "a"},
        {"type": "send", "room": "a", "body": 1},
        {"type": "send", "rooms": ["a", "b"], "body": 1},
        {"type": "history", "room": "a"},
    ],
)
def test_from_exp_on_commands_are_refused(fields: dict[str, Any]) -> None:
    peer = Peer()
    before = peer.command(**fields, now=EXP - 0.001)
    after = Peer().command(**fields, now=EXP, id=2)

    assert ReplyCode.TOKEN_EXPIRED not in [frame.get("code") for frame in sent(before)]
    assert exact([after[0]]) == exact([Withhold()])
    assert sent(after) == [error(ReplyCode.TOKEN_EXPIRED, 2)]
    assert len(after) == 2


def test_a_ping_is_answered_after_exp() -> None:
    done = Peer().command("ping", EXP + 0.1, id=1)

    assert exact([done[0]]) == exact([Withhold()])
    assert sent(done)[0]["type"] == "ack"


def test_a_connection_without_a_new_token_is_closed_within_a_second() -> None:
    peer = Peer()
    peer.timer(EXP)

    assert peer.chat.wake_at() == EXP + EXPIRED_GRACE
    assert EXPIRED_GRACE < 1.0
    assert peer.timer(EXP + EXPIRED_GRACE - 0.01) == []
    assert exact(peer.timer(EXP + EXPIRED_GRACE)) == exact([Close(errors.TOKEN_EXPIRED)])
    assert peer.timer(EXP + 2) == []


def test_a_late_timer_withholds_before_it_closes() -> None:
    assert exact(Peer().timer(EXP + 5)) == exact([Withhold(), Close(errors.TOKEN_EXPIRED)])


def test_a_refresh_in_between_resumes() -> None:
    peer = Peer()
    peer.join("a")
    peer.timer(EXP)

    done = peer.refresh(Verified(LATER, revoked=False), EXP + 0.2)

    assert exact([done[0]]) == exact([Identify(LATER)])
    assert sent(done)[0]["type"] == "ack"
    assert exact([done[-1]]) == exact([Resume()])
    assert peer.timer(EXP + 0.5) == []
    assert refs(peer.command("send", EXP + 0.6, id=1, room="a", body=1))


def test_a_failed_refresh_does_not_delay_the_end() -> None:
    peer = Peer()
    peer.timer(EXP)

    done = peer.refresh(Failed(ReplyCode.TOKEN_INVALID), EXP + 0.2)

    assert only(done) == error(ReplyCode.TOKEN_INVALID, 9)
    assert exact(peer.timer(EXP + 0.5)) == exact([Close(errors.TOKEN_EXPIRED)])


def test_a_join_whose_answer_comes_after_exp_is_refused() -> None:
    peer = Peer()

    done = peer.answer(peer.command("join", EXP - 0.1, id=1, room="a"), reading(5), EXP)

    assert exact(done[:3]) == exact([Withhold(), Abandon("a"), Leave("a")])
    assert only(done[3:]) == error(ReplyCode.TOKEN_EXPIRED, 1)


def test_a_page_that_comes_after_exp_is_withheld() -> None:
    peer = Peer()

    asked = peer.command("history", EXP - 0.1, id=1, room="a")
    done = peer.answer(asked, Page(reading(0), False), EXP)

    assert exact([done[0]]) == exact([Withhold()])
    assert sent(done) == [error(ReplyCode.TOKEN_EXPIRED, 1)]


def test_a_send_that_was_stored_before_exp_is_acked_after_it() -> None:
    peer = Peer()

    done = peer.answer(peer.command("send", EXP - 0.1, id=1, room="a", body=1), published(), EXP)

    assert exact([done[0]]) == exact([Withhold()])
    assert sent(done)[0]["type"] == "ack"


def test_commands_that_were_waiting_at_exp_are_refused() -> None:
    peer = Peer()
    asked = peer.command("send", EXP - 0.1, id=1, room="a", body=1)
    peer.command("join", EXP - 0.1, id=2, room="a")

    done = peer.answer(asked, published(), EXP)

    assert refs(done) == []
    assert [(f["type"], f["id"]) for f in sent(done)] == [("ack", 1), ("error", 2)]


# --- refresh -------------------------------------------------------------------------------


def test_a_refresh_is_verified_and_acked() -> None:
    peer = Peer()
    new = replace(LATER, roles=("guest", "x"))

    asked = peer.command("refresh", id=1, token="new.token.x")
    done = peer.answer(asked, Verified(new, revoked=False))

    assert exact(asked) == exact([Verify(1, "new.token.x")])
    assert exact([done[0]]) == exact([Identify(new)])
    assert sent(done) == [
        {
            "type": "ack",
            "id": 1,
            "expires_at": new.expires_at * 1000,
            "roles": ["guest", "x"],
            "left": [],
        }
    ]
    assert Resume not in [type(effect) for effect in done]
    assert peer.chat.identity == new


@pytest.mark.parametrize(
    "new",
    [
        replace(LATER, user="bob"),
        replace(LATER, session="s2"),
        replace(LATER, issued_at=ALICE.issued_at - 1),
    ],
)
@pytest.mark.parametrize("revoked", [False, True])
def test_a_token_of_another_or_an_older_one_is_a_mismatch(new: Identity, revoked: bool) -> None:
    peer = Peer()

    done = peer.refresh(Verified(new, revoked=revoked))

    assert only(done) == error(ReplyCode.IDENTITY_MISMATCH, 9)
    assert peer.chat.identity == ALICE
    assert not peer.chat.closed


def test_a_token_of_the_same_second_is_no_older() -> None:
    done = Peer().refresh(Verified(replace(ALICE, token_id="t2"), revoked=False))

    assert sent(done)[0]["type"] == "ack"


@pytest.mark.parametrize(
    "code", [ReplyCode.TOKEN_INVALID, ReplyCode.TOKEN_EXPIRED, ReplyCode.UNAVAILABLE]
)
def test_a_failed_refresh_leaves_the_old_token_running(code: ReplyCode) -> None:
    peer = Peer()

    assert only(peer.refresh(Failed(code))) == error(code, 9)
    assert peer.chat.identity == ALICE
    assert refs(peer.command("send", room="a", body=1))


def test_a_revoked_token_closes_the_connection() -> None:
    peer = Peer()

    done = peer.refresh(Verified(LATER, revoked=True))

    assert sent(done) == [error(ReplyCode.TOKEN_REVOKED, 9)]
    assert exact([done[-1]]) == exact([Close(errors.SESSION_REVOKED)])
    assert peer.chat.closed


def test_a_token_that_expired_while_it_was_verified_is_expired() -> None:
    peer = Peer()
    brief = replace(ALICE, token_id="t2", expires_at=int(NOW) + 10)

    assert only(peer.refresh(Verified(brief, revoked=False), NOW + 10)) == error(
        ReplyCode.TOKEN_EXPIRED, 9
    )
    assert peer.chat.identity == ALICE


def test_rooms_no_longer_allowed_are_left_and_listed_without_an_event() -> None:
    peer = Peer()
    for room in ("b", "a", "c"):
        peer.join(room)

    done = peer.refresh(Verified(claims({"c": "r", "a": "w"}, LATER), revoked=False))

    assert exact(done[:3]) == exact([Identify(peer.chat.identity), Leave("a"), Leave("b")])
    assert [(frame["type"], frame["left"]) for frame in sent(done)] == [("ack", ["a", "b"])]
    assert only(peer.refresh(Verified(claims({"c": "r"}, LATER), revoked=False))[1:])["left"] == []


def test_rooms_left_by_a_refresh_make_room_for_others() -> None:
    peer = Peer(limits=replace(GENEROUS, rooms=1))
    peer.join("a")
    peer.refresh(Verified(claims({"b": "r"}, LATER), revoked=False))

    assert refs(peer.command("join", id=1, room="b"))


def test_fewer_rights_apply_to_the_very_next_frame() -> None:
    peer = Peer()

    asked = peer.command("refresh", id=1, token="x")
    waiting = peer.command("send", id=2, room="a", body=1)
    done = peer.answer(asked, Verified(replace(LATER, roles=("guest",)), revoked=False))

    assert waiting == []
    assert refs(done) == []
    assert [(f["type"], f.get("code")) for f in sent(done)] == [
        ("ack", None),
        ("error", "forbidden"),
    ]


def test_a_refresh_waits_for_what_was_sent_before_it() -> None:
    peer = Peer()

    asked = peer.command("send", id=1, room="a", body=1)
    waiting = peer.command("refresh", id=2, token="x")

    assert waiting == []
    assert [type(e) for e in peer.answer(asked, published())] == [Transmit, Verify]


def test_a_refresh_without_an_id_is_not_acked() -> None:
    peer = Peer()

    done = peer.answer(peer.command("refresh", token="x"), Verified(LATER, revoked=False))

    assert exact(done) == exact([Identify(LATER)])


# --- retiring ------------------------------------------------------------------------------


def test_an_idle_connection_retires_at_once() -> None:
    peer = Peer()
    peer.answer(peer.command("send", id=1, room="a", body=1), published())

    peer.chat.retire(errors.DRAINING)

    assert exact(peer.effects()) == exact([Close(errors.DRAINING)])
    assert peer.chat.closed


def test_a_retiring_connection_answers_what_was_sent_and_takes_nothing_new() -> None:
    peer = Peer()
    asked = peer.command("send", id=1, room="a", body=1)
    peer.command("history", id=2, room="a")

    peer.chat.retire(errors.DRAINING)
    late = peer.command("send", id=3, room="a", body=1)
    first = peer.answer(asked, published())
    last = peer.answer(first, Page(reading(0), False))

    assert late == []
    assert [frame["id"] for frame in sent(first)] == [1]
    assert [frame["id"] for frame in sent(last)] == [2]
    assert exact([last[-1]]) == exact([Close(errors.DRAINING)])


def test_a_revocation_does_not_wait_for_a_retirement() -> None:
    peer = Peer()
    asked = peer.command("send", id=1, room="a", body=1)

    peer.chat.retire(errors.DRAINING)
    peer.chat.disconnect(errors.SESSION_REVOKED)

    assert exact(peer.effects()) == exact([Close(errors.SESSION_REVOKED)])
    assert peer.answer(asked, published()) == []


# --- closed --------------------------------------------------------------------------------


def test_a_closed_connection_does_nothing_more() -> None:
    peer = Peer()
    asked = peer.command("send", id=1, room="a", body=1)
    peer.command("ping", id=2)

    peer.chat.disconnect(errors.DRAINING)
    peer.chat.disconnect(errors.SERVER_ERROR)

    assert exact(peer.effects()) == exact([Close(errors.DRAINING)])
    assert peer.answer(asked, published()) == []
    assert peer.command("ping", id=3) == []
    assert peer.timer(EXP + 9) == []
    assert not peer.chat.congested


# --- whatever comes ------------------------------------------------------------------------

STEPS = st.one_of(
    st.tuples(
        st.just("command"),
        st.sampled_from(
            [
                {"type": "join", "room": "a"},
                {"type": "join", "room": "b", "since": {"epoch": "e1", "offset": 3}},
                {"type": "join", "room": "c", "last": 9},
                {"type": "join", "room": "forbidden"},
                {"type": "leave", "room": "a"},
                {"type": "send", "room": "a", "body": {"x": [1]}},
                {"type": "send", "room": "readonly", "body": 1},
                {"type": "send", "rooms": ["a", "readonly", "b"], "body": 1, "key": "k"},
                {"type": "send", "rooms": ["readonly", "forbidden"], "body": 1},
                {"type": "history", "room": "a"},
                {"type": "history", "room": "forbidden"},
                {"type": "refresh", "token": "x"},
                {"type": "ping"},
                {"type": "nonsense"},
                {"type": "join", "room": "a b"},
                {"type": "send", "room": "a"},
            ]
        ),
    ),
    st.tuples(st.just("outcome"), st.integers(0, 5)),
    st.tuples(st.just("wait"), st.sampled_from([0.0, 0.01, 0.3, 1.0, 60.0, 839.0, 840.0])),
)
RIGHTS = {"a": "rw", "b": "rw", "c": "r", "readonly": "r"}


@st.composite
def outcomes(draw: st.DrawFn, effect: Effect, now: float, token: Identity) -> Outcome:
    """Anything that the shell may bring for this effect."""
    if draw(st.integers(0, 4)) == 0:
        return Failed(ReplyCode.UNAVAILABLE)
    match effect:
        case Publish():
            return published(draw(st.integers(1, 9)), duplicate=draw(st.booleans()))
        case Join():
            return reading(draw(st.integers(4, 9)), retained=draw(st.integers(0, 4)))
        case Read():
            return Page(reading(0), draw(st.booleans()))
        case _:
            new = replace(
                token,
                issued_at=int(now) - draw(st.integers(0, 20)),
                expires_at=int(now) + draw(st.sampled_from([0, 1, 100, 900])),
                user=draw(st.sampled_from(["alice", "alice", "alice", "bob"])),
                rooms=draw(st.sampled_from([RIGHTS, RIGHTS, {"b": "r"}])),
            )
            return Verified(new, draw(st.integers(0, 9)) == 0)


class Shell:
    """Carries effects out, and watches that they keep the rules."""

    def __init__(self) -> None:
        limits = Limits(rooms=2, send_rate=2.0, send_burst=6, command_rate=5.0, command_burst=12)
        self.now = NOW
        self.chat = ChatProtocol("c1", claims(RIGHTS), limits, NOW)
        self.pending: list[Effect] = []
        self.replied: list[object] = []
        self.told: list[str] = []
        self.refusals: list[str] = []
        """What is told as an error, and what is to be counted as one: the same in the end."""
        self.withheld = False
        self.closed = False
        self.members: set[str] = set()
        assert sent(self.chat.effects())[0]["type"] == "welcome"

    def carry_out(self) -> None:
        for effect in self.chat.effects():
            assert not self.closed, "nothing comes after a close"
            match effect:
                case Transmit(payload):
                    frame = json.loads(payload)
                    assert frame["type"] in ("ack", "error", "expiring")
                    if frame["type"] != "expiring":
                        self.replied.append(frame["id"])
                    if frame["type"] == "error":
                        self.told.append(frame["code"])
                    for result in frame.get("results", ()):
                        if "error" in result:
                            self.told.append(result["error"]["code"])
                case Publish() | Join() | Read():
                    assert not self.withheld
                    self.pending.append(effect)
                case Verify():
                    self.pending.append(effect)
                case Admit(room):
                    assert not self.withheld
                    self.members.add(room)
                    assert len(self.members) <= 2
                case Leave(room):
                    self.members.discard(room)
                case Withhold():
                    assert not self.withheld
                    self.withheld = True
                case Resume():
                    assert self.withheld
                    self.withheld = False
                case Close():
                    self.closed = True
                case Identify(identity):
                    assert identity.user == "alice"
                case Refused(_, code):
                    self.refusals.append(code)


@settings(max_examples=300)
@given(st.lists(STEPS, max_size=60), st.data())
def test_every_command_gets_exactly_one_reply_in_the_order_sent(
    steps: list[tuple[str, Any]], data: st.DataObject
) -> None:
    shell = Shell()
    asked: list[int] = []

    def answer(chosen: int) -> None:
        effect = shell.pending.pop(chosen % len(shell.pending))
        outcome = data.draw(outcomes(effect, shell.now, shell.chat.identity))
        shell.chat.receive_outcome(refs([effect])[0], outcome, shell.now)
        shell.carry_out()

    for kind, what in steps:
        if kind == "command" and not shell.closed:
            asked.append(len(asked) + 1)
            shell.chat.receive_frame(json.dumps({**what, "id": asked[-1]}).encode(), shell.now)
        elif kind == "outcome" and shell.pending:
            answer(what)
        elif kind == "wait":
            shell.now += what
            if shell.chat.wake_at() <= shell.now:
                shell.chat.handle_timer(shell.now)
        shell.carry_out()
    while shell.pending:
        answer(data.draw(st.integers(0, 5)))

    if shell.closed:
        assert shell.replied == asked[: len(shell.replied)]
    else:
        assert shell.replied == asked
        assert sorted(shell.refusals) == sorted(shell.told)


# --- logout, and rights that change --------------------------------------------------------


def test_logout_ends_the_session_and_is_answered_before_the_connection_ends() -> None:
    peer = Peer()

    asked = peer.command("logout", id=1)
    done = peer.answer(asked, Ended())

    assert exact(asked) == exact([EndSession(1, "s1")])
    assert sent(done) == [{"type": "ack", "id": 1}]
    assert done[1:] == [Close(errors.SESSION_REVOKED)]


def test_logout_without_an_id_ends_the_session_all_the_same() -> None:
    peer = Peer()

    assert peer.answer(peer.command("logout"), Ended()) == [Close(errors.SESSION_REVOKED)]


def test_a_logout_that_the_store_did_not_take_changes_nothing() -> None:
    peer = Peer()

    failed = peer.answer(peer.command("logout", id=1), Failed(ReplyCode.UNAVAILABLE))

    assert only(failed) == error(ReplyCode.UNAVAILABLE, 1)
    assert not peer.chat.closed
    assert exact(peer.command("logout", id=2)) == exact([EndSession(2, "s1")])


def test_an_expired_token_is_good_enough_for_a_logout() -> None:
    peer = Peer()
    peer.timer(EXP)

    assert exact(peer.command("logout", EXP + 0.1, id=1)) == exact([EndSession(1, "s1")])


def test_a_logout_waits_for_what_was_sent_before_it() -> None:
    peer = Peer()

    publish = peer.command("send", room="a", body=1)
    assert peer.command("logout", id=1) == []

    assert exact(peer.answer(publish, published())) == exact([EndSession(2, "s1")])


def test_changed_rights_are_told_at_any_time_and_change_nothing_by_themselves() -> None:
    peer = Peer()

    peer.chat.tell_rights_changed()
    told = peer.effects()

    assert only(told) == {"type": "expiring", "expires_at": EXP * 1000, "now": True}
    assert peer.chat.wake_at() == EXP - 60


def test_a_closed_connection_is_told_nothing_of_its_rights() -> None:
    peer = Peer()
    peer.chat.disconnect(errors.DRAINING)
    peer.effects()

    peer.chat.tell_rights_changed()

    assert peer.effects() == []


# --- what is refused is said to the shell, too, which counts it -----------------------------


@pytest.mark.parametrize(
    ("type", "fields", "code"),
    [
        ("nonsense", {}, ReplyCode.UNKNOWN_TYPE),
        ("send", {"room": "!"}, ReplyCode.INVALID),
        ("send", {"room": "forbidden", "body": 1}, ReplyCode.FORBIDDEN),
        ("join", {"room": "forbidden"}, ReplyCode.FORBIDDEN),
        ("history", {"room": "forbidden"}, ReplyCode.FORBIDDEN),
    ],
)
def test_a_refused_command_is_told_to_be_counted(
    type: str, fields: dict[str, Any], code: ReplyCode
) -> None:
    peer = Peer(replace(ALICE, rooms={"a": "rw"}))
    asked = peer.command(type, id=1, **fields)

    assert sent(asked)[0]["code"] == code
    assert [refused.code for refused in peer.refused] == [code]


def test_each_room_of_a_cross_post_is_counted_that_refuses() -> None:
    peer = Peer(replace(ALICE, rooms={"a": "rw", "b": "rw"}))
    asked = peer.command("send", id=1, rooms=["a", "x", "b", "y"], body=1)
    first, second = refs(asked)
    peer.chat.receive_outcome(first, published(), NOW)
    peer.chat.receive_outcome(second, Failed(ReplyCode.UNAVAILABLE), NOW)
    peer.effects()

    codes = [refused.code for refused in peer.refused]
    assert codes == [ReplyCode.FORBIDDEN, ReplyCode.UNAVAILABLE, ReplyCode.FORBIDDEN]
    assert {type(refused.command) for refused in peer.refused} == {frames.Send}


def test_a_flood_is_counted_command_by_command() -> None:
    peer = Peer(limits=replace(GENEROUS, send_burst=2, send_rate=1.0))
    for n in range(5):
        peer.command("send", id=n + 1, room="a", body=1)

    assert [refused.code for refused in peer.refused] == [ReplyCode.RATE_LIMITED] * 3


def test_what_a_refresh_is_refused_for_is_counted() -> None:
    peer = Peer()
    peer.refresh(Failed(ReplyCode.TOKEN_INVALID))
    peer.refresh(Verified(replace(LATER, user="bob"), revoked=False))
    peer.refresh(Verified(LATER, revoked=True))

    assert [(type(each.command), each.code) for each in peer.refused] == [
        (frames.Refresh, ReplyCode.TOKEN_INVALID),
        (frames.Refresh, ReplyCode.IDENTITY_MISMATCH),
        (frames.Refresh, ReplyCode.TOKEN_REVOKED),
    ]
