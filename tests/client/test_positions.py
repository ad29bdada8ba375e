from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from chatserver.client.events import Gap, JoinAck, Message, Missing, Position
from chatserver.client.positions import Place, Standing


def live(offset: int = 4, epoch: str = "e1") -> Place:
    place = Place("general")
    place.ask()
    place.admit(JoinAck("general", epoch, offset, "rw", 0))
    return place


def event(offset: Any, kind: str = "message") -> dict[str, Any]:
    frame = {"type": kind, "room": "general", "offset": offset}
    return frame | ({"ts": 1, "user": "bob", "body": offset} if kind == "message" else {})


def test_a_place_begins_where_the_replay_does() -> None:
    place = Place("general")

    assert place.ask() is None
    assert place.admit(JoinAck("general", "e1", 12, "rw", 3)) is None
    assert place.position == Position("e1", 9)


def test_the_next_offset_is_taken_and_an_older_one_dropped() -> None:
    place = live(4)
    message = Message("general", Position("e1", 5), 1, "bob", 5)

    assert place.receive(event(5)) == (Position("e1", 5), message)
    assert place.receive(event(5)) is None
    assert place.receive(event(1)) is None
    assert place.standing is Standing.LIVE


def test_skips_and_unknown_types_move_the_position_and_tell_nothing() -> None:
    place = live(4)

    assert place.receive(event(5, "skip")) == (Position("e1", 5), None)
    assert place.receive(event(6, "wink")) == (Position("e1", 6), None)


def test_a_frame_without_an_offset_is_ephemeral() -> None:
    place = live(4)

    assert place.receive({"type": "typing", "room": "general", "user": "bob"}) is None
    assert place.receive(event(True)) is None
    assert place.receive(event("5")) is None
    assert (place.position, place.standing) == (Position("e1", 4), Standing.LIVE)


def test_a_hole_puts_it_out_until_the_ack_of_a_join_with_since() -> None:
    place = live(4)

    assert place.receive(event(6)) is None
    assert place.standing is Standing.OUT
    assert place.receive(event(5)) is None
    assert place.ask() == Position("e1", 4)
    assert place.receive(event(7)) is None
    place.admit(JoinAck("general", "e1", 7, "rw", 3, recovered=True))
    assert place.receive(event(5)) is not None


def test_an_ack_below_what_was_reached_moves_back() -> None:
    place = live(9)
    place.leave()
    place.ask()
    gap = place.admit(JoinAck("general", "e1", 2, "rw", 1, recovered=False))

    assert gap == Gap("general", Position("e1", 1))
    assert place.position == Position("e1", 1)


def test_what_is_missing_is_told_with_its_bounds() -> None:
    place = live(2)
    place.leave()
    place.ask()
    ack = JoinAck("general", "e1", 60, "rw", 50, recovered=False, gap=Missing(3, 10))

    assert place.admit(ack) == Gap("general", Position("e1", 10), 3, 10)


def test_a_new_epoch_keeps_the_offset_and_a_reset_sets_both() -> None:
    place = live(4)

    assert place.receive({"type": "epoch", "room": "general", "epoch": "e2"}) == (
        Position("e2", 4),
        None,
    )
    reset = {"type": "reset", "room": "general", "epoch": "e3", "offset": 2}
    assert place.receive(reset) == (Position("e3", 2), Gap("general", Position("e3", 2)))
    assert place.receive(event(3)) is not None


def test_what_there_is_no_space_for_is_let_go_and_asked_for_later() -> None:
    place = live(4)

    assert place.receive(event(4), space=False) is None
    assert place.receive(event(5), space=False) is None
    assert place.standing is Standing.OUT
    assert place.receive(event(5)) is None
    assert place.ask() == Position("e1", 4)


@given(st.lists(st.integers(0, 12)), st.lists(st.booleans(), min_size=12, max_size=12))
def test_whatever_comes_offsets_are_taken_once_and_in_order(
    seen: list[int], spaces: list[bool]
) -> None:
    place = live(0)
    taken = []
    for offset, space in zip(seen, spaces * 10, strict=False):
        step = place.receive(event(offset), space)
        taken += [step[0].offset] if step else []

    assert taken == list(range(1, len(taken) + 1))
