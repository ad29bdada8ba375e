from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatserver.core.claims import CLOCK_SKEW, MAX_LIFETIME, Identity
from chatserver.core.session import REVOCATION_SECONDS, Kind, Revocation, RevocationList

NOW = 1_700_000_000


def identity(
    *, user: str = "alice", session: str = "s1", token: str = "t1", issued_at: int = NOW
) -> Identity:
    return Identity(
        user=user,
        session=session,
        token_id=token,
        roles=("member",),
        rooms=None,
        issued_at=issued_at,
        expires_at=issued_at + 900,
    )


def listed(*revocations: Revocation) -> RevocationList:
    revoked = RevocationList()
    for revocation in revocations:
        revoked.add(revocation)
    return revoked


SESSION = Revocation(Kind.SESSION, "s1", NOW + 910)
TOKEN = Revocation(Kind.TOKEN, "t1", NOW + 910)
USER = Revocation(Kind.USER, "alice", NOW + 910, cutoff=NOW)


@pytest.mark.parametrize(
    ("revocation", "bearer", "covered"),
    [
        (SESSION, identity(), True),
        (SESSION, identity(session="s2"), False),
        (SESSION, identity(session="s2", user="s1", token="s1"), False),
        (TOKEN, identity(), True),
        (TOKEN, identity(token="t2"), False),
        (TOKEN, identity(token="t2", user="t1", session="t1"), False),
        (USER, identity(), True),
        (USER, identity(user="alice2"), False),
        (USER, identity(user="bob", session="alice", token="alice"), False),
    ],
)
def test_a_revocation_covers_its_own_kind_and_value(
    revocation: Revocation, bearer: Identity, covered: bool
) -> None:
    assert revocation.covers(bearer) is covered
    assert listed(revocation).covers(bearer) is covered


@pytest.mark.parametrize(("issued_at", "covered"), [(NOW - 1, True), (NOW, True), (NOW + 1, False)])
def test_a_users_revocation_covers_tokens_up_to_its_second(issued_at: int, covered: bool) -> None:
    bearer = identity(issued_at=issued_at)

    assert USER.covers(bearer) is covered
    assert listed(USER).covers(bearer) is covered


@pytest.mark.parametrize("revocation", [SESSION, TOKEN])
def test_a_sessions_or_tokens_revocation_has_no_cutoff(revocation: Revocation) -> None:
    assert listed(revocation).covers(identity(issued_at=NOW + 100_000))


def test_an_empty_list_covers_nobody() -> None:
    revoked = RevocationList()

    assert len(revoked) == 0
    assert revoked.entries() == []
    assert not revoked.covers(identity())


def test_adding_tells_whether_it_is_news() -> None:
    revoked = RevocationList()

    assert revoked.add(USER)
    assert not revoked.add(USER)
    assert not revoked.add(USER._replace(cutoff=NOW - 5, until=NOW))
    assert revoked.add(USER._replace(cutoff=NOW + 5))
    assert revoked.add(USER._replace(until=NOW + 2000))
    assert len(revoked) == 1


def test_neither_a_cutoff_nor_a_memory_ever_goes_back() -> None:
    revoked = listed(
        USER,
        USER._replace(cutoff=NOW + 5, until=NOW + 10),
        USER._replace(cutoff=NOW - 5, until=NOW + 2000),
    )

    assert revoked.entries() == [Revocation(Kind.USER, "alice", NOW + 2000, cutoff=NOW + 5)]


def test_the_kinds_do_not_share_names() -> None:
    revoked = listed(
        Revocation(Kind.SESSION, "x", NOW),
        Revocation(Kind.USER, "x", NOW, cutoff=NOW),
        Revocation(Kind.TOKEN, "x", NOW),
    )

    assert len(revoked) == 3


def test_an_entry_is_kept_until_its_time_and_then_goes_away() -> None:
    revoked = listed(SESSION, USER._replace(until=NOW + 5000))

    revoked.forget(NOW + 910)

    assert revoked.covers(identity(user="bob"))

    revoked.forget(NOW + 911)

    assert not revoked.covers(identity(user="bob"))
    assert [entry.kind for entry in revoked.entries()] == [Kind.USER]


def test_a_revocation_outlives_every_token_it_covers() -> None:
    # Minted by a clock that is ahead of ours, and verified by one that is behind.
    last_expiry = NOW + CLOCK_SKEW + MAX_LIFETIME + CLOCK_SKEW

    assert last_expiry <= NOW + REVOCATION_SECONDS


NAMES = st.sampled_from(["a", "b"])
REVOCATIONS = st.builds(
    Revocation,
    st.sampled_from(Kind),
    NAMES,
    st.integers(NOW, NOW + 5).map(float),
    st.integers(NOW - 2, NOW + 2),
)
IDENTITIES = st.builds(
    lambda user, session, token, issued_at: identity(
        user=user, session=session, token=token, issued_at=issued_at
    ),
    NAMES,
    NAMES,
    NAMES,
    st.integers(NOW - 3, NOW + 3),
)


@given(st.lists(REVOCATIONS, max_size=8), IDENTITIES)
def test_a_list_covers_what_any_of_its_revocations_covers(
    revocations: list[Revocation], bearer: Identity
) -> None:
    covered = listed(*revocations).covers(bearer)

    assert covered == any(revocation.covers(bearer) for revocation in revocations)


@given(st.lists(REVOCATIONS, max_size=8), st.integers(NOW - 1, NOW + 6))
def test_forgetting_drops_what_is_past_and_nothing_else(
    revocations: list[Revocation], now: int
) -> None:
    revoked = listed(*revocations)
    before = revoked.entries()

    revoked.forget(now)

    assert revoked.entries() == [entry for entry in before if entry.until >= now]
