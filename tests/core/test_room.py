from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chatserver.core.claims import Identity
from chatserver.core.frames import Since
from chatserver.core.room import HELD_EVENTS, Event, Feed, Reading, Recovery, Step, recover, rights

# --- rights --------------------------------------------------------------------------------


def bearer(*roles: str, user: str = "alice", rooms: Mapping[str, str] | None = None) -> Identity:
    return Identity(
        user=user,
        session="s1",
        token_id="t1",
        roles=roles,
        rooms=rooms,
        issued_at=1_700_000_000,
        expires_at=1_700_000_900,
    )


@pytest.mark.parametrize(
    ("roles", "granted"),
    [
        ([], ""),
        (["guest"], "r"),
        (["member"], "rw"),
        (["moderator"], "rwm"),
        (["admin"], "rwm"),
        (["service"], "rwm"),
        (["banker"], ""),
        (["Admin"], ""),
        (["guest", "member"], "rw"),
        (["moderator", "guest"], "rwm"),
        (["banker", "guest"], "r"),
    ],
)
def test_the_rights_of_roles_add_up_in_every_room(roles: list[str], granted: str) -> None:
    assert rights(bearer(*roles), "general") == granted
    assert rights(bearer(*roles), "any.other:room") == granted


@pytest.mark.parametrize(
    ("rooms", "room", "granted"),
    [
        ({}, "general", ""),
        ({"general": "r"}, "general", "r"),
        ({"general": "r"}, "general2", ""),
        ({"general": "r"}, "genera", ""),
        ({"general": "r"}, "General", ""),
        ({"general": ""}, "general", ""),
        ({"general*": "r"}, "general", "r"),
        ({"general*": "r"}, "general:sub", "r"),
        ({"general*": "r"}, "genera", ""),
        ({"*": "r"}, "general", "r"),
        ({"team:*": "rw", "*": "r"}, "team:a", "rw"),
        ({"*": "rw", "team:*": "r"}, "team:a", "r"),
        ({"team:*": "rw", "team:a*": "r", "*": "rwm"}, "team:ab", "r"),
        ({"team:a*": "", "team:*": "rw"}, "team:ab", ""),
        ({"team:ab": "r", "team:a*": "rw", "team:ab*": "rwm"}, "team:ab", "r"),
        ({"team:ab": "", "*": "rw"}, "team:ab", ""),
        ({"general": "mwr"}, "general", "rwm"),
        ({"general": "m"}, "general", "m"),
        ({"team.*": "r"}, "teamx", ""),
    ],
)
def test_of_the_rooms_claim_the_exact_name_then_the_longest_prefix_counts_alone(
    rooms: dict[str, str], room: str, granted: str
) -> None:
    assert rights(bearer("admin", rooms=rooms), room) == granted


@pytest.mark.parametrize(
    ("user", "room", "granted"),
    [
        ("alice", "dm:alice:bob", "rw"),
        ("bob", "dm:alice:bob", "rw"),
        ("carol", "dm:alice:bob", ""),
        ("alice", "dm:bob:alice", ""),
        ("alice", "dm:alice:alice", ""),
        ("alice", "dm:alice", ""),
        ("alice", "dm:alice:", ""),
        ("alice", "dm::alice", ""),
        ("alice", "dm:", ""),
        ("alice", "dm:alice:bob:carol", ""),
        ("alice", "dm:alice:bob:", ""),
        ("alice", "dm:alice:bob\n", ""),
        ("alice", "dm:alice:b*b", ""),
        ("Zoe", "dm:Zoe:alice", "rw"),
        ("Zoe", "dm:alice:Zoe", ""),
        ("a" * 60, f"dm:{'a' * 60}:bob", "rw"),
        ("bob", f"dm:{'a' * 61}:bob", ""),
        ("b:c", "dm:a:b:c", ""),
    ],
)
@pytest.mark.parametrize("rooms", [None, {"*": "rwm"}, {"dm:*": "rwm"}, {}])
def test_a_direct_room_is_open_to_its_two_users_and_nobody_else(
    user: str, room: str, granted: str, rooms: dict[str, str] | None
) -> None:
    assert rights(bearer("admin", user=user, rooms=rooms), room) == granted


def test_a_room_that_merely_resembles_a_direct_one_is_an_ordinary_room() -> None:
    assert rights(bearer("member"), "dm") == "rw"
    assert rights(bearer("member"), "DM:alice:bob") == "rw"


# --- recovery ------------------------------------------------------------------------------


def state(top: int, retained: int, epoch: str = "e1", shared: int | None = None) -> Reading:
    """What a read for a position of ``e1`` returns: of another epoch, how far it was the same."""
    if shared is None:
        shared = top if epoch == "e1" else -1
    return Reading(epoch, top, top - retained + 1, shared, [])


@pytest.mark.parametrize(
    ("last", "start"), [(None, 100), (0, 100), (1, 99), (30, 70), (40, 60), (256, 60)]
)
def test_a_fresh_join_is_replayed_what_it_asks_for_and_the_log_has(
    last: int | None, start: int
) -> None:
    recovery = recover(state(100, 40), since=None, last=last, replay=1000)

    assert recovery == Recovery(start, None, None)


@pytest.mark.parametrize("since", [60, 61, 99, 100])
def test_a_position_within_the_log_is_recovered(since: int) -> None:
    recovery = recover(state(100, 40), since=Since("e1", since), last=7, replay=1000)

    assert recovery == Recovery(since, True, None)


def test_exactly_as_many_as_may_be_replayed_are_recovered_and_one_more_is_not() -> None:
    at_most = recover(state(100, 100), since=Since("e1", 70), last=None, replay=30)
    beyond = recover(state(100, 100), since=Since("e1", 69), last=10, replay=30)

    assert at_most == Recovery(70, True, None)
    assert beyond == Recovery(90, False, (70, 90))


def test_a_trimmed_log_leaves_a_gap_up_to_what_is_replayed() -> None:
    recovery = recover(state(1000, 200), since=Since("e1", 799), last=None, replay=1000)

    assert recovery == Recovery(950, False, (800, 950))


def test_a_gap_is_no_larger_than_what_the_log_has_lost() -> None:
    recovery = recover(state(1000, 20), since=Since("e1", 979), last=None, replay=1000)

    assert recovery == Recovery(980, False, (980, 980))


def test_another_epoch_proves_nothing_and_has_no_gap() -> None:
    recovery = recover(state(100, 100, "e2"), since=Since("e1", 100), last=None, replay=1000)

    assert recovery == Recovery(50, False, None)


@pytest.mark.parametrize("since", [60, 89, 90])
def test_a_position_up_to_the_fork_is_recovered_under_the_new_epoch(since: int) -> None:
    forked = state(100, 40, "e2", shared=90)
    recovery = recover(forked, since=Since("e1", since), last=7, replay=1000)

    assert recovery == Recovery(since, True, None)


def test_beyond_the_fork_the_client_saw_what_is_gone() -> None:
    forked = state(100, 40, "e2", shared=90)
    recovery = recover(forked, since=Since("e1", 91), last=7, replay=1000)

    assert recovery == Recovery(93, False, None)


def test_up_to_the_fork_is_not_enough_when_the_log_is_trimmed_beyond() -> None:
    forked = state(100, 5, "e2", shared=90)
    recovery = recover(forked, since=Since("e1", 90), last=None, replay=1000)

    assert recovery == Recovery(95, False, None)


def test_a_position_beyond_the_log_proves_nothing_and_has_no_gap() -> None:
    recovery = recover(state(100, 100), since=Since("e1", 101), last=None, replay=1000)

    assert recovery == Recovery(50, False, None)


def test_nothing_is_missing_where_the_latest_reach_back_beyond_the_position() -> None:
    recovery = recover(state(100, 100), since=Since("e1", 60), last=80, replay=30)

    assert recovery == Recovery(20, False, None)


def test_an_empty_room_is_recovered_from_its_beginning() -> None:
    assert recover(state(0, 0), since=Since("e1", 0), last=None, replay=1000) == (0, True, None)
    assert recover(state(0, 0), since=None, last=50, replay=1000) == (0, None, None)
    assert recover(state(0, 0, "e2"), since=Since("e1", 9), last=None, replay=9) == (0, False, None)


def test_a_log_trimmed_to_nothing_still_has_its_position() -> None:
    assert recover(state(9, 0), since=Since("e1", 9), last=None, replay=9) == (9, True, None)
    assert recover(state(9, 0), since=Since("e1", 7), last=None, replay=9) == (9, False, (8, 9))


@settings(max_examples=300)
@given(
    top=st.integers(0, 60),
    retained=st.integers(0, 60),
    fork=st.none() | st.integers(-1, 60),
    offset=st.none() | st.integers(0, 70),
    last=st.none() | st.integers(0, 60),
    replay=st.integers(1, 40),
)
def test_a_replay_is_retained_and_recovery_is_claimed_exactly_when_it_can_be_proved(
    top: int,
    retained: int,
    fork: int | None,
    offset: int | None,
    last: int | None,
    replay: int,
) -> None:
    assume(retained <= top and (fork is None or fork <= top))
    since = None if offset is None else Since("e1", offset)
    read = state(top, retained) if fork is None else state(top, retained, "e2", fork)

    recovery = recover(read, since=since, last=last, replay=replay)

    replayed = set(range(recovery.start + 1, top + 1))
    kept = set(range(top - retained + 1, top + 1))
    assert recovery.start <= top
    assert replayed <= kept
    if since is None:
        assert (recovery.recovered, recovery.gap) == (None, None)
        assert len(replayed) == min(last or 0, retained)
        return
    missed = set(range(since.offset + 1, top + 1))
    shared = top if fork is None else fork
    provable = since.offset <= shared and missed <= kept and len(missed) <= replay
    assert recovery.recovered is provable
    if provable:
        assert (replayed, recovery.gap) == (missed, None)
        return
    assert len(replayed) == min(50 if last is None else last, retained)
    lost = missed - replayed if fork is None else set()
    gap = set() if recovery.gap is None else set(range(recovery.gap[0], recovery.gap[1] + 1))
    assert gap == lost
    assert recovery.gap is None or gap


# --- the feed, by example ------------------------------------------------------------------


def event(offset: int, epoch: str = "e1") -> Event:
    return Event(epoch, offset, b'{"offset":%d}' % offset)


def run(first: int, last: int, epoch: str = "e1") -> list[Event]:
    return [event(offset, epoch) for offset in range(first, last + 1)]


def reading(
    top: int,
    events: list[Event],
    first: int = 1,
    epoch: str = "e1",
    shared: int | None = None,
) -> Reading:
    """For a feed under ``e1``, unless ``shared`` says otherwise."""
    if shared is None:
        shared = top if epoch == "e1" else -1
    return Reading(epoch, top, first, shared, events)


def feed_at(offset: int, epoch: str = "e1") -> Feed:
    feed = Feed()
    feed.start(Reading(epoch, offset, 1, offset, []))
    return feed


def place(feed: Feed) -> tuple[str, int | None, bool]:
    return feed.epoch, feed.offset, feed.behind


def test_a_feed_starts_at_the_top_of_the_log() -> None:
    feed = Feed()

    step = feed.start(reading(7, run(5, 7)))

    assert step == Step([], False)
    assert place(feed) == ("e1", 7, False)


def test_what_was_heard_before_the_first_reading_comes_after_it() -> None:
    feed = Feed()
    early = [feed.receive_live(e) for e in run(6, 9)]

    step = feed.start(reading(7, []))

    assert early == [Step([], False)] * 4
    assert step == Step(run(8, 9), False)
    assert place(feed) == ("e1", 9, False)


def test_live_events_pass_in_order() -> None:
    feed = feed_at(7)

    steps = [feed.receive_live(e) for e in run(8, 10)]

    assert steps == [Step([e]) for e in run(8, 10)]
    assert place(feed) == ("e1", 10, False)


def test_an_event_is_delivered_once_however_often_it_is_heard() -> None:
    feed = feed_at(7)
    feed.receive_live(event(8))

    assert feed.receive_live(event(8)) == Step([])
    assert feed.receive_live(event(3)) == Step([])
    assert not feed.behind


def test_a_hole_is_read_from_the_log_before_anything_later() -> None:
    feed = feed_at(7)

    held = [feed.receive_live(event(10)), feed.receive_live(event(11))]

    assert held == [Step([]), Step([])]
    assert place(feed) == ("e1", 7, True)

    step = feed.receive_reading(reading(10, run(8, 10)))

    assert step == Step(run(8, 11), False)
    assert place(feed) == ("e1", 11, False)


def test_a_bounded_reading_asks_for_another() -> None:
    feed = feed_at(7)
    feed.receive_live(event(100))

    step = feed.receive_reading(reading(100, run(8, 20)))

    assert step == Step(run(8, 20), False)
    assert place(feed) == ("e1", 20, True)

    step = feed.receive_reading(reading(100, run(21, 100)))

    assert step == Step(run(21, 100), False)
    assert place(feed) == ("e1", 100, False)


def test_a_trimmed_log_is_a_reset_before_its_latest_events() -> None:
    feed = feed_at(7)
    feed.receive_live(event(100))

    step = feed.receive_reading(reading(100, run(90, 100), first=60))

    assert step == Step(run(90, 100), True)
    assert place(feed) == ("e1", 100, False)


def test_a_log_trimmed_right_up_to_the_position_is_no_reset() -> None:
    feed = feed_at(7)
    feed.miss()

    assert feed.receive_reading(reading(9, run(8, 9), first=8)) == Step(run(8, 9), False)


def test_a_new_epoch_is_a_reset() -> None:
    feed = feed_at(7)
    heard = feed.receive_live(event(1, "e2"))

    step = feed.receive_reading(reading(1, run(1, 1, "e2"), epoch="e2"))

    assert heard == Step([])
    assert step == Step(run(1, 1, "e2"), True)
    assert place(feed) == ("e2", 1, False)


def test_a_new_and_empty_epoch_is_a_reset_to_its_top() -> None:
    feed = feed_at(7)
    feed.miss()

    step = feed.receive_reading(reading(0, [], epoch="e2"))

    assert step == Step([], True)
    assert place(feed) == ("e2", 0, False)


def test_a_log_that_goes_on_under_a_new_epoch_keeps_the_position() -> None:
    feed = feed_at(7)
    feed.receive_live(event(9, "e2"))

    step = feed.receive_reading(reading(9, run(8, 9, "e2"), epoch="e2", shared=7))

    assert step == Step(run(8, 9, "e2"), moved=True)
    assert place(feed) == ("e2", 9, False)


def test_behind_a_fork_that_lost_events_the_feed_goes_on_from_the_fork() -> None:
    feed = feed_at(7)
    feed.miss()

    step = feed.receive_reading(reading(6, run(6, 6, "e2"), epoch="e2", shared=5))

    assert step == Step(run(6, 6, "e2"), moved=True)
    assert place(feed) == ("e2", 6, False)


def test_a_fork_that_lost_events_and_has_no_new_ones_is_a_reset_to_its_top() -> None:
    feed = feed_at(7)
    feed.miss()

    step = feed.receive_reading(reading(5, [], epoch="e2", shared=5))

    assert step == Step([], moved=True)
    assert place(feed) == ("e2", 5, False)


def test_what_was_held_of_a_lost_epoch_does_not_keep_the_feed_behind() -> None:
    """An event held when the store came back empty made the feed read the log for ever."""
    feed = feed_at(5)
    feed.receive_live(event(7))
    feed.receive_live(event(8))

    feed.receive_reading(reading(0, [], epoch="e2"))
    if feed.behind:
        feed.receive_reading(reading(0, [], epoch="e2"))

    assert place(feed) == ("e2", 0, False)
    assert feed.receive_live(event(1, "e2")) == Step([event(1, "e2")])


def test_a_straggler_of_a_lost_epoch_costs_one_reading() -> None:
    feed = feed_at(3, "e2")
    feed.receive_live(event(7, "e1"))
    feed.receive_live(event(4, "e2"))

    step = feed.receive_reading(reading(3, [], epoch="e2", shared=3))

    assert step == Step([event(4, "e2")], False)
    assert place(feed) == ("e2", 4, False)


def test_an_epoch_that_begins_while_the_old_one_is_read_is_read_next() -> None:
    feed = feed_at(5)
    feed.receive_live(event(7))
    feed.receive_live(event(1, "e2"))

    step = feed.receive_reading(reading(7, run(6, 7)))

    assert step == Step(run(6, 7), False)
    assert feed.behind

    step = feed.receive_reading(reading(1, run(1, 1, "e2"), epoch="e2"))

    assert step == Step(run(1, 1, "e2"), True)
    assert place(feed) == ("e2", 1, False)


def test_after_a_miss_nothing_is_delivered_but_from_the_log() -> None:
    feed = feed_at(7)
    feed.miss()

    assert feed.receive_live(event(8)) == Step([])
    assert feed.receive_reading(reading(8, [event(8)])) == Step([event(8)], False)
    assert not feed.behind


def test_a_miss_while_the_log_is_being_read_asks_for_another_reading() -> None:
    """What was missed may have been stored after that reading was taken."""
    feed = feed_at(7)
    feed.miss()
    feed.miss()

    feed.receive_reading(reading(7, []))

    assert feed.behind

    step = feed.receive_reading(reading(8, [event(8)]))

    assert step == Step([event(8)])
    assert not feed.behind


def test_a_miss_before_the_first_reading_is_made_up_after_it() -> None:
    feed = Feed()
    feed.miss()

    feed.start(reading(7, []))

    assert place(feed) == ("e1", 7, True)


def test_more_than_can_be_held_is_read_again() -> None:
    feed = feed_at(0)
    top = HELD_EVENTS + 10
    for heard in run(2, top):
        feed.receive_live(heard)

    step = feed.receive_reading(reading(1, run(1, 1)))

    assert step == Step(run(1, 1))
    assert feed.behind

    step = feed.receive_reading(reading(top, run(2, top)))

    assert step == Step(run(2, top))
    assert place(feed) == ("e1", top, False)


# --- the feed, against a model -------------------------------------------------------------


class Log:
    """A room's log as the store keeps it, and what ``read.lua`` returns of it."""

    def __init__(self) -> None:
        self.generation = 1
        self.top = 0
        self.first = 1
        self.serial = 0
        self.payloads: dict[int, bytes] = {}
        self.begins = [("e1", 0)]
        """Each epoch that the log knows of, and the offset at which it began."""

    @property
    def epoch(self) -> str:
        return f"e{self.generation}"

    def append(self) -> Event:
        self.top += 1
        self.serial += 1
        self.payloads[self.top] = b"%d" % self.serial
        return Event(self.epoch, self.top, self.payloads[self.top])

    def trim(self, keep: int) -> None:
        self.first = max(self.first, self.top - keep + 1)

    def wipe(self) -> None:
        self.generation += 1
        self.top, self.first = 0, 1
        self.begins = [(self.epoch, 0)]

    def fail_over(self, lost: int) -> None:
        """To a copy that lacks the latest events; to none, and it is a plain restart."""
        self.top = max(self.first - 1, self.top - lost)
        # What the copy has not heard of: an epoch that began behind its end.
        self.begins = [begin for begin in self.begins if begin[1] <= self.top]
        self.generation += 1
        self.begins.append((self.epoch, self.top))

    def shared(self, epoch: str) -> int:
        if epoch in ("", self.epoch):
            return self.top
        ends = {old: end for (old, _), (_, end) in pairwise(self.begins)}
        return ends.get(epoch, -1)

    def read(self, epoch: str, after: int, most: int) -> Reading:
        shared = self.shared(epoch)
        if shared >= 0:
            after = max(min(after, shared), self.first - 1)
            places = range(after + 1, min(after + most, self.top) + 1)
        else:
            places = range(max(self.first, self.top - most + 1), self.top + 1)
        events = [Event(self.epoch, place, self.payloads[place]) for place in places]
        return Reading(self.epoch, self.top, self.first, shared, events)


class FeedMachine(RuleBasedStateMachine):
    """Pub/sub loses, doubles and reorders; readings are taken and arrive at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.log = Log()
        self.feed = Feed()
        self.on_the_way: list[Event] = []
        self.under_way: Reading | None = None
        self.delivered: list[Event] = []
        self.position = ("", 0)
        self.unheard = False
        """Something was lost, and neither has a miss been told since nor the log been read."""
        self.known_from = 0
        """Delivered since the log last turned out to have forgotten an epoch."""

    @initialize(before=st.integers(0, 5), keep=st.integers(0, 5), meanwhile=st.integers(0, 3))
    def subscribe(self, before: int, keep: int, meanwhile: int) -> None:
        for _ in range(before):
            self.log.append()
        self.log.trim(keep)
        first = self.log.read("", 0, 0)
        for _ in range(meanwhile):
            self.take(self.feed.receive_live(self.log.append()))
        self.position = (first.epoch, first.top)
        self.take(self.feed.start(first))

    @rule(count=st.integers(1, 4))
    def publish(self, count: int) -> None:
        self.on_the_way += [self.log.append() for _ in range(count)]

    @rule(keep=st.integers(0, 6))
    def trim(self, keep: int) -> None:
        self.log.trim(keep)

    @rule()
    def wipe(self) -> None:
        self.log.wipe()
        self.unheard = True

    @rule(lost=st.integers(0, 3))
    def fail_over(self, lost: int) -> None:
        self.log.fail_over(lost)
        self.unheard = True

    @precondition(lambda self: self.on_the_way)
    @rule(data=st.data(), again=st.booleans())
    def hear(self, data: st.DataObject, again: bool) -> None:
        chosen = data.draw(st.integers(0, len(self.on_the_way) - 1))
        heard = self.on_the_way[chosen] if again else self.on_the_way.pop(chosen)
        self.take(self.feed.receive_live(heard))

    @precondition(lambda self: self.on_the_way)
    @rule()
    def hear_all(self) -> None:
        heard, self.on_the_way = self.on_the_way, []
        for one in heard:
            self.take(self.feed.receive_live(one))

    @precondition(lambda self: self.on_the_way)
    @rule()
    def lose(self) -> None:
        self.on_the_way.clear()
        self.unheard = True

    @rule()
    def subscribe_again(self) -> None:
        self.feed.miss()
        self.unheard = False

    @precondition(lambda self: self.feed.behind and self.under_way is None)
    @rule(most=st.integers(1, 5))
    def take_reading(self, most: int) -> None:
        assert self.feed.offset is not None
        self.under_way = self.log.read(self.feed.epoch, self.feed.offset, most)

    @precondition(lambda self: self.under_way is not None)
    @rule()
    def receive_reading(self) -> None:
        assert self.under_way is not None
        arrived, self.under_way = self.under_way, None
        if arrived.shared < 0:
            # Not promised then: docs/reliability.md.
            self.known_from = len(self.delivered)
        self.take(self.feed.receive_reading(arrived))

    def take(self, step: Step) -> None:
        """What a member sees: a reset gives the position, every event must be the next one."""
        assert self.feed.offset is not None or not step.events
        if step.moved:
            assert self.feed.offset is not None
            self.position = (self.feed.epoch, self.feed.offset - len(step.events))
        for one in step.events:
            assert (one.epoch, one.offset - 1) == self.position
            self.position = (one.epoch, one.offset)
            self.delivered.append(one)

    @invariant()
    def members_are_where_the_feed_is(self) -> None:
        if self.feed.offset is not None:
            assert self.position == (self.feed.epoch, self.feed.offset)

    @invariant()
    def no_event_comes_twice_or_out_of_order(self) -> None:
        places = [(int(one.epoch[1:]), one.offset) for one in self.delivered]
        assert all(earlier < later for earlier, later in pairwise(places))

    @invariant()
    def a_fork_repeats_nothing(self) -> None:
        payloads = [one.payload for one in self.delivered[self.known_from :]]
        assert len(payloads) == len(set(payloads))

    @invariant()
    def a_feed_that_has_heard_everything_and_is_not_behind_has_the_top(self) -> None:
        if self.feed.offset is None or self.feed.behind or self.on_the_way or self.unheard:
            return
        assert self.position == (self.log.epoch, self.log.top)

    def teardown(self) -> None:
        if self.feed.offset is None:
            return
        self.subscribe_again()
        if self.on_the_way:
            self.hear_all()
        for _ in range(self.log.top + 5):
            if self.under_way is None and self.feed.behind:
                self.take_reading(3)
            if self.under_way is not None:
                self.receive_reading()

        assert not self.feed.behind
        assert self.position == (self.log.epoch, self.log.top)


FeedMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestFeedAgainstAModel = FeedMachine.TestCase
