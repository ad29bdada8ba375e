from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatserver.client.backoff import Backoff, full_jitter, wait_again
from chatserver.client.errors import DisconnectedError, RefusedError, TokenRefusedError


def most(low: float, high: float) -> float:
    """A die that always shows its highest number."""
    assert low == 0
    return high


def lost() -> DisconnectedError:
    return DisconnectedError(1006, "connection lost")


@given(st.integers(0, 10_000))
def test_a_wait_is_what_was_told_or_jitter_under_a_limit(attempt: int) -> None:
    assert 0 <= full_jitter(attempt) <= min(30, 2.0 ** min(attempt, 5))
    assert wait_again(attempt, 350) == 0.35
    assert 0 <= wait_again(attempt, None) <= 5


def test_the_limit_doubles_up_to_half_a_minute() -> None:
    backoff = Backoff(draw=most)

    assert [backoff.wait_after(lost()) for _ in range(8)] == [1, 2, 4, 8, 16, 30, 30, 30]


def test_a_connection_that_held_for_ten_seconds_starts_the_count_anew() -> None:
    backoff = Backoff(draw=most)
    waits = [backoff.wait_after(lost(), lived) for lived in (0, 9.9, 9.9, 10.0, 0)]

    assert waits == [1, 2, 4, 1, 2]


def test_what_the_server_tells_goes_before_jitter_and_counts_as_a_try() -> None:
    backoff = Backoff(draw=most)

    assert backoff.wait_after(DisconnectedError(1012, "draining", after=1500)) == 1.5
    assert backoff.wait_after(RefusedError(503, "overloaded", "No.", retry_after=7000)) == 7 + 2
    assert backoff.wait_after(lost()) == 4


@pytest.mark.parametrize(
    "why",
    [
        DisconnectedError(4500, "bad_frame"),
        DisconnectedError(4503, "session_revoked"),
        DisconnectedError(4999, "something_new", after=5),
        RefusedError(400, "token_in_url", "No."),
        RefusedError(403, "origin_denied", "No."),
        RefusedError(404, "not_found", "No."),
        TokenRefusedError(401, "token_revoked", "No."),
    ],
)
def test_some_ends_are_final(why: Exception) -> None:
    assert Backoff().wait_after(why) is None


@pytest.mark.parametrize(
    "why",
    [
        *(DisconnectedError(code, "") for code in (1000, 1001, 1006, 1009, 1011, 1012, 1013)),
        *(DisconnectedError(code, "") for code in (4401, 4408, 4429, 4430, 4499)),
        *(RefusedError(status, None, "") for status in (401, 408, 425, 429, 500, 502, 503, 504)),
        *(RefusedError(status, None, "a proxy's") for status in (400, 403, 404, 405)),
        TimeoutError(),
        OSError("the application's own"),
    ],
)
def test_after_everything_else_there_is_another_try(why: Exception) -> None:
    backoff = Backoff()

    assert all(backoff.wait_after(why) is not None for _ in range(50))


def test_a_fault_of_our_own_is_tried_three_times_at_most() -> None:
    backoff = Backoff(draw=most)
    own = [DisconnectedError(1002, ""), DisconnectedError(1007, ""), DisconnectedError(1002, "")]

    assert backoff.wait_after(own[0]) == 1
    assert backoff.wait_after(lost()) == 2
    assert backoff.wait_after(own[1]) == 4
    assert backoff.wait_after(own[2]) is None
