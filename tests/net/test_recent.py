"""Recent events: which are kept, and which go first."""

from __future__ import annotations

import pytest

from chatserver.core.room import Event
from chatserver.net import recent
from chatserver.net.recent import Memory, Recent


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "ROOM_BYTES", 40)
    monkeypatch.setattr(recent, "TOTAL_BYTES", 60)


def event(offset: int) -> Event:
    return Event("e", offset, b"ten bytes!")


def offsets(room: Recent, position: int) -> list[int] | None:
    found = room.after(position)
    return None if found is None else [event.offset for event in found]


def test_what_reaches_back_to_a_position_is_all_that_comes_after_it() -> None:
    room = Recent()
    room.add([event(3), event(4), event(5)])

    assert offsets(room, 2) == [3, 4, 5]
    assert offsets(room, 4) == [5]
    assert offsets(room, 5) == []


def test_what_does_not_reach_back_to_a_position_is_none_of_it() -> None:
    room = Recent()
    empty = offsets(room, 0)
    room.add([event(3)])

    assert empty is None
    assert offsets(room, 1) is None


def test_of_one_room_the_oldest_go_first() -> None:
    room = Recent()
    room.add(map(event, range(1, 7)))

    assert offsets(room, 1) is None
    assert offsets(room, 2) == [3, 4, 5, 6]


def test_of_all_rooms_the_one_that_was_silent_longest_goes_first() -> None:
    memory, rooms = Memory(), [Recent(), Recent(), Recent()]
    first, second, third = rooms
    memory.remember(first, [event(1), event(2)])
    memory.remember(second, [event(1), event(2)])
    memory.remember(first, [event(3)])
    memory.remember(third, [event(1), event(2)])

    assert [offsets(room, 0) for room in rooms] == [[1, 2, 3], None, [1, 2]]


def test_what_was_forgotten_makes_space_for_others() -> None:
    memory, first, second = Memory(), Recent(), Recent()
    memory.remember(first, map(event, range(1, 5)))
    memory.forget(first)
    memory.forget(first)
    memory.remember(second, map(event, range(1, 5)))
    memory.remember(first, [event(5), event(6)])

    assert offsets(second, 0) == [1, 2, 3, 4]
    assert offsets(first, 4) == [5, 6]
