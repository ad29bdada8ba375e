"""The rules of rotation, with literal times, and against a model of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from chatserver.core.session import Denial, Family, rotate

FAMILY = Family(
    session="s1",
    user="alice",
    roles=("member",),
    rooms={"general": "rw"},
    begun_at=1_700_000_000,
    expires_at=1_700_604_800,
    generation=7,
    rotated_at=1_700_001_000_500,
    replays=0,
    ended=False,
)
MADE = 1_700_001_000_500


@pytest.mark.parametrize(
    "now",
    [MADE, MADE + 1, MADE + 10_001, MADE + 86_400_000, 1_700_604_799_999],
)
def test_the_current_token_rotates_until_the_session_ends(now: int) -> None:
    after = rotate(FAMILY._replace(replays=5), 7, cutoff=0, now=now)

    assert after == FAMILY._replace(generation=8, rotated_at=now, replays=0)


@pytest.mark.parametrize(
    ("presented", "now", "denial"),
    [
        (6, MADE + 10_001, Denial.REUSED),
        (6, MADE + 3_600_000, Denial.REUSED),
        (5, MADE, Denial.REUSED),
        (5, MADE + 9_999, Denial.REUSED),
        (1, MADE + 1, Denial.REUSED),
        (1, MADE + 10_001, Denial.REUSED),
        (7, 1_700_604_800_000, Denial.EXPIRED),
        (7, 1_700_604_800_001, Denial.EXPIRED),
        (6, 1_700_604_800_000, Denial.EXPIRED),
        (1, 1_700_604_800_000, Denial.EXPIRED),
        (8, 1_700_604_800_000, Denial.EXPIRED),
    ],
)
def test_what_is_old_gets_nothing(presented: int, now: int, denial: Denial) -> None:
    assert rotate(FAMILY, presented, cutoff=0, now=now) is denial


@pytest.mark.parametrize("now", [MADE - 3_000, MADE, MADE + 1, MADE + 9_999, MADE + 10_000])
def test_the_token_before_gets_the_same_answer_within_the_leeway(now: int) -> None:
    """Also by a clock that went back a little."""
    assert rotate(FAMILY, 6, cutoff=0, now=now) == FAMILY._replace(replays=1)


def test_an_answer_is_given_again_five_times_and_then_refused_without_harm() -> None:
    family = FAMILY
    for count in range(1, 6):
        again = rotate(family, 6, cutoff=0, now=MADE + 2_000 * count)
        assert again == FAMILY._replace(replays=count)
        assert isinstance(again, Family)
        family = again

    assert rotate(family, 6, cutoff=0, now=MADE + 10_000) is Denial.TOO_OFTEN
    assert rotate(family, 6, cutoff=0, now=MADE + 10_001) is Denial.REUSED
    assert rotate(family, 5, cutoff=0, now=MADE + 1) is Denial.REUSED
    assert rotate(family, 7, cutoff=0, now=MADE + 10_000) == FAMILY._replace(
        generation=8, rotated_at=1_700_001_010_500
    )


@pytest.mark.parametrize("presented", [1, 5, 6, 7, 8, 100])
@pytest.mark.parametrize("now", [MADE, MADE + 10_001, 1_700_604_800_000])
def test_an_ended_family_is_revoked_whatever_is_presented(presented: int, now: int) -> None:
    assert rotate(FAMILY._replace(ended=True), presented, cutoff=0, now=now) is Denial.REVOKED


@pytest.mark.parametrize("presented", [5, 6, 7, 8])
@pytest.mark.parametrize("cutoff", [1_700_000_000, 1_700_000_001, 1_700_604_800])
def test_a_cutoff_covers_families_begun_in_its_second_or_before(
    presented: int, cutoff: int
) -> None:
    assert rotate(FAMILY, presented, cutoff=cutoff, now=MADE) is Denial.REVOKED


def test_a_family_begun_after_the_cutoff_goes_on() -> None:
    after = rotate(FAMILY, 7, cutoff=1_699_999_999, now=MADE + 5)

    assert after == FAMILY._replace(generation=8, rotated_at=1_700_001_000_505)


@pytest.mark.parametrize("presented", [8, 9, 4_000_000_000])
def test_a_token_newer_than_a_restored_store_knows_rotates(presented: int) -> None:
    after = rotate(FAMILY._replace(replays=5), presented, cutoff=0, now=MADE + 60_000)

    assert after == FAMILY._replace(
        generation=presented + 1, rotated_at=1_700_001_060_500, replays=0
    )
    assert isinstance(after, Family)
    assert rotate(after, presented, cutoff=0, now=MADE + 60_001) == after._replace(replays=1)
    assert rotate(after, presented - 1, cutoff=0, now=MADE + 60_001) is Denial.REUSED


@pytest.mark.parametrize(
    ("begun_at", "rotated_at", "issued_at"),
    [
        (1_700_000_000, 1_700_001_000_999, 1_700_001_000),
        (1_700_000_000, 1_700_000_000_000, 1_700_000_000),
        # Begun a second ahead, for the user was revoked in this one.
        (1_700_000_001, 1_700_000_000_400, 1_700_000_001),
    ],
)
def test_an_access_token_is_never_issued_before_its_session(
    begun_at: int, rotated_at: int, issued_at: int
) -> None:
    family = FAMILY._replace(begun_at=begun_at, rotated_at=rotated_at)

    assert family.issued_at == issued_at


# --- the model -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """Protocol.md, section 6, for one session: what is known of each token there ever was."""

    tokens: tuple[str, ...]
    """By generation: "good", then "traded" for the next, then "old"."""
    ends: int
    lost_until: int = 0
    repeats_left: int = 5
    revoked: bool = False

    def present(self, place: int, now: int) -> tuple[str, Model]:
        state = self.tokens[place] if place < len(self.tokens) else "good"
        if self.revoked:
            return "revoked", self
        if now >= self.ends:
            return "expired", self
        if state == "good":
            tokens = ("old",) * place + ("traded", "good")
            return "new", replace(self, tokens=tokens, lost_until=now + 10_000, repeats_left=5)
        if state == "traded" and now <= self.lost_until:
            if not self.repeats_left:
                return "too often", self
            return "same", replace(self, repeats_left=self.repeats_left - 1)
        return "reused", replace(self, revoked=True)


DENIED = {
    Denial.REVOKED: "revoked",
    Denial.EXPIRED: "expired",
    Denial.REUSED: "reused",
    Denial.TOO_OFTEN: "too often",
}


class Rotation(RuleBasedStateMachine):
    """One user's session, whose clock is an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_700_000_000_000
        self.cutoff = 0
        self.newest = 1

    @initialize()
    def start(self) -> None:
        self.login()

    @rule()
    def login(self) -> None:
        # As begin.lua: after whatever was revoked.
        begun_at = max(self.now // 1000, self.cutoff + 1)
        self.family = FAMILY._replace(
            begun_at=begun_at,
            expires_at=begun_at + 100,
            generation=1,
            rotated_at=begun_at * 1000,
        )
        self.model = Model(tokens=("good",), ends=(begun_at + 100) * 1000)
        self.saved = self.family, self.model
        self.newest = 1

    def present(self, generation: int) -> None:
        expected, self.model = self.model.present(generation - 1, self.now)
        match rotate(self.family, generation, cutoff=self.cutoff, now=self.now):
            case Family() as after:
                got = "new" if after.rotated_at != self.family.rotated_at else "same"
                if after.generation != self.family.generation:
                    got = "new"
                assert after.generation == generation + 1
                self.family = after
                self.newest = max(self.newest, after.generation)
            case Denial() as denial:
                got = DENIED[denial]
                if denial is Denial.REUSED:
                    self.family = self.family._replace(ended=True)
        assert got == expected

    @rule()
    def present_current(self) -> None:
        self.present(self.family.generation)

    @precondition(lambda self: self.family.generation > 1)
    @rule(times=st.integers(1, 6))
    def present_previous(self, times: int) -> None:
        for _ in range(times):
            self.present(self.family.generation - 1)

    @precondition(lambda self: self.family.generation > 2)
    @rule(data=st.data())
    def present_older(self, data: st.DataObject) -> None:
        self.present(data.draw(st.integers(1, self.family.generation - 2)))

    @rule()
    def present_the_newest_there_ever_was(self) -> None:
        self.present(max(self.newest, self.family.generation))

    @rule(
        milliseconds=st.sampled_from([1, 999, 1_000, 5_000, 9_999, 10_000, 10_001, 60_000])
        | st.integers(1, 120_000)
    )
    def advance(self, milliseconds: int) -> None:
        self.now += milliseconds

    @rule()
    def revoke_session(self) -> None:
        self.family = self.family._replace(ended=True)
        self.model = replace(self.model, revoked=True)

    @rule()
    def revoke_user(self) -> None:
        self.cutoff = max(self.cutoff, self.now // 1000)
        if self.family.begun_at * 1000 <= self.now:
            self.model = replace(self.model, revoked=True)
            # What is restored later is covered by the cutoff as well.
            family, model = self.saved
            self.saved = family, replace(model, revoked=True)

    @rule()
    def save(self) -> None:
        self.saved = self.family, self.model

    @rule()
    def restore(self) -> None:
        self.family, self.model = self.saved

    @invariant()
    def a_session_never_grows_older_than_it_may(self) -> None:
        assert self.family.expires_at == self.family.begun_at + 100
        assert 0 <= self.family.replays <= 5


Rotation.TestCase.settings = settings(max_examples=200, stateful_step_count=40)
TestRotation = Rotation.TestCase
