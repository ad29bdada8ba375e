"""A session's life over two workers: traded, reused, revoked, logged out of; and how many."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from chatserver.core.session import STALE_SECONDS, Kind
from chatserver.store.link import Store
from chatserver.store.revocations import revoke
from tests.conftest import AMPLE, StartWorker
from tests.support.client import Answer, Client, exchange, http, refused, request, upgrade_headers
from tests.support.sessions import Office, office
from tests.support.stopwatch import Stopwatch
from tests.support.tokens import Issuer, unique
from tests.support.valkey import Valkey
from tests.support.worker import PATIENCE, Worker

REFRESH = "/v1/tokens/refresh"
REVOKE = "/v1/tokens/revoke"
PAGE = "https://chat.example"


@pytest.fixture(scope="module")
def second(
    valkey: Valkey, issuer: Issuer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Worker]:
    """A neighbour of ``worker``."""
    started = Worker(
        tmp_path_factory.mktemp("second") / "log",
        valkey.url,
        issuer,
        allowed_origins=PAGE,
        **AMPLE,
    )
    started.start()
    yield started
    started.stop()


@pytest.fixture
async def login(valkey: Valkey, issuer: Issuer) -> AsyncIterator[Office]:
    async with office(valkey.url, issuer) as opened:
        yield opened


async def post(worker: Worker, path: str, token: str | None, **headers: str) -> Answer:
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    return await http(worker.url, path, method="POST", headers=headers)


async def traded(worker: Worker, token: str) -> dict[str, str]:
    answer = await post(worker, REFRESH, token)
    assert answer.status == 200, answer
    pair: dict[str, str] = answer.json
    for name in ("access_token", "refresh_token"):
        worker.issuer.keep(pair[name])
    return pair


def denial(answer: Answer) -> tuple[int, str]:
    return answer.status, answer.code


# --- trading -------------------------------------------------------------------------------


async def test_a_refresh_token_is_traded_for_the_five_fields(
    worker: Worker, login: Office, user: str
) -> None:
    pair = await login.begin(user)
    before = int(time.time())
    answer = await post(worker, REFRESH, pair.refresh_token)
    fields = answer.json
    async with await Client.connect(worker.url, fields["access_token"]) as client:
        welcome = client.welcome
    login.issuer.keep(fields["refresh_token"])

    assert answer.status == 200
    assert {name: type(value) for name, value in fields.items()} == {
        "access_token": str,
        "refresh_token": str,
        "session": str,
        "expires_at": int,
        "refresh_expires_at": int,
    }
    assert fields["session"] == pair.session
    assert fields["refresh_expires_at"] == pair.refresh_expires_at
    assert before <= fields["expires_at"] // 1000 - 900 <= int(time.time())
    assert fields["expires_at"] % 1000 == 0
    assert (welcome["user"], welcome["session"]) == (user, pair.session)
    assert welcome["expires_at"] == fields["expires_at"]
    assert answer.header("cache-control") == "no-store"
    assert answer.header("content-type") == "application/json"
    assert answer.header("server") is None


async def test_a_chain_of_tokens_is_carried_on_by_whichever_worker(
    worker: Worker, second: Worker, login: Office
) -> None:
    pair = await login.begin()
    token, seen = pair.refresh_token, {pair.refresh_token}
    for each in (worker, second) * 5:
        token = (await traded(each, token))["refresh_token"]
        seen.add(token)
    async with await Client.connect(second.url, pair.access_token) as client:
        assert client.welcome["session"] == pair.session

    assert len(seen) == 11


async def test_an_access_token_from_a_trade_refreshes_a_live_socket(
    worker: Worker, second: Worker, login: Office
) -> None:
    pair = await login.begin()
    async with await Client.connect(worker.url, pair.access_token) as client:
        fields = await traded(second, pair.refresh_token)
        ack = await client.ask("refresh", token=fields["access_token"])

    assert (ack["type"], ack["expires_at"]) == ("ack", fields["expires_at"])


async def test_an_answer_that_was_lost_is_given_again_by_the_other_worker_to_the_byte(
    worker: Worker, second: Worker, login: Office
) -> None:
    pair = await login.begin(rooms={"b": "r", "a": "rw"})
    answers = [
        await post(each, REFRESH, pair.refresh_token)
        for each in (worker, second, worker, second, worker, second)
    ]
    often = await post(worker, REFRESH, pair.refresh_token)
    successor = await traded(second, answers[0].json["refresh_token"])

    assert [answer.status for answer in answers] == [200] * 6
    assert len({answer.body for answer in answers}) == 1
    assert denial(often) == (429, "rate_limited")
    assert 1 <= int(often.header("retry-after") or 0) <= 60
    assert successor["session"] == pair.session


async def test_fifty_trades_at_once_over_two_workers_make_one_successor(
    worker: Worker, second: Worker, login: Office
) -> None:
    pair = await login.begin()
    answers = await asyncio.gather(
        *(post(each, REFRESH, pair.refresh_token) for each in (worker, second) * 25)
    )
    statuses = [answer.status for answer in answers]
    bodies = {answer.body for answer in answers if answer.status == 200}
    [body] = bodies
    token = next(answer.json["refresh_token"] for answer in answers if answer.body == body)

    assert (statuses.count(200), statuses.count(429)) == (6, 44)
    assert (await traded(second, token))["session"] == pair.session


async def test_reuse_on_the_other_worker_ends_the_session_on_both(
    worker: Worker, second: Worker, login: Office
) -> None:
    pair = await login.begin()
    async with (
        await Client.connect(worker.url, pair.access_token) as here,
        await Client.connect(second.url, pair.access_token) as there,
    ):
        following = await traded(worker, pair.refresh_token)
        latest = await traded(worker, following["refresh_token"])
        answer = await post(second, REFRESH, pair.refresh_token)
        with Stopwatch() as watch:
            ends = await asyncio.gather(here.until_closed(), there.until_closed())
    after = [await post(each, REFRESH, latest["refresh_token"]) for each in (worker, second)]
    handshakes = [await refused(each.url, latest["access_token"]) for each in (worker, second)]

    assert denial(answer) == (401, "token_revoked")
    assert watch.seconds < 3.0  # a second, on a loaded machine
    for frames, code in ends:
        assert code == 4503
        assert [(f["type"], f["code"], f["reconnect"]) for f in frames] == [("bye", 4503, False)]
    assert [denial(each) for each in after + handshakes] == [(401, "token_revoked")] * 4


async def test_the_token_before_is_reuse_after_the_leeway(
    worker: Worker, second: Worker, login: Office
) -> None:
    pair = await login.begin()
    following = await traded(worker, pair.refresh_token)
    await login.age(pair.session, 10_001)
    answers = [
        await post(second, REFRESH, pair.refresh_token),
        await post(worker, REFRESH, following["refresh_token"]),
    ]

    assert [denial(answer) for answer in answers] == [(401, "token_revoked")] * 2


# --- what is refused -----------------------------------------------------------------------


async def test_what_cannot_be_traded_says_why(worker: Worker, login: Office, user: str) -> None:
    pair, old = await login.begin(user), await login.begin(user)
    forged = pair.refresh_token.replace(".1.", ".2.")
    await login.change(old.session, expires_at=int(time.time()) - 1)
    answers = {
        "token_invalid": await post(worker, REFRESH, forged),
        "token_expired": await post(worker, REFRESH, old.refresh_token),
        "token_missing": await post(worker, REFRESH, None),
    }
    await login.revoke(Kind.SESSION, pair.session)
    answers["token_revoked"] = await post(worker, REFRESH, pair.refresh_token)
    challenges = {code: answer.header("www-authenticate") for code, answer in answers.items()}

    for code, answer in answers.items():
        assert denial(answer) == (401, code)
        assert answer.header("cache-control") == "no-store"
        assert set(answer.json) == {"error"}
    assert challenges.pop("token_missing") == "Bearer"
    assert set(challenges.values()) == {'Bearer error="invalid_token"'}


@pytest.mark.parametrize(
    "token", ["x", "rt1.", "rt1.a.b.c.d", "eyJhbGciOiJIUzI1NiJ9.e30.AAAA", "é", "A" * 3000]
)
async def test_garbage_is_no_refresh_token(worker: Worker, token: str) -> None:
    assert denial(await post(worker, REFRESH, token)) == (401, "token_invalid")


async def test_neither_token_passes_for_the_other(worker: Worker, login: Office) -> None:
    pair = await login.begin()
    answers = [
        await post(worker, REFRESH, pair.access_token),
        await refused(worker.url, pair.refresh_token),
    ]
    async with await Client.connect(worker.url, pair.access_token) as client:
        error = await client.ask("refresh", token=pair.refresh_token)

    assert [denial(answer) for answer in answers] == [(401, "token_invalid")] * 2
    assert error["code"] == "token_invalid"
    assert (await traded(worker, pair.refresh_token))["session"] == pair.session


@pytest.mark.parametrize("path", [REFRESH, REVOKE])
async def test_only_a_post_without_body_and_query_is_taken(
    worker: Worker, login: Office, path: str
) -> None:
    """And nothing has become of the token by the rest."""
    pair = await login.begin()
    token = pair.refresh_token
    bearer = {"Authorization": f"Bearer {token}"}
    methods = {
        method: await http(worker.url, path, method=method, headers=bearer)
        for method in ("GET", "PUT", "DELETE", "PATCH")
    }
    with_body = [
        await exchange(
            worker.url,
            request(worker.url, path, method="POST", headers=bearer | framing) + body,
        )
        for framing, body in (
            ({"Content-Length": "2"}, b"{}"),
            ({"Transfer-Encoding": "chunked"}, b"2\r\n{}\r\n0\r\n\r\n"),
        )
    ]
    in_url = [
        await http(worker.url, f"{path}?{query}", method="POST", headers=bearer)
        for query in (f"token={token}", f"refresh_token={token}", f"x={token}", "token=")
    ]
    twice = await http(
        worker.url,
        path,
        method="POST",
        headers=bearer,
        more=[("Authorization", f"Bearer {token}")],
    )

    for method, answer in methods.items():
        assert denial(answer) == (405, "method_not_allowed"), method
        assert answer.header("allow") == "POST"
    assert [answer.status for answer in with_body] == [400, 400]
    assert [denial(answer) for answer in in_url] == [(400, "token_in_url")] * 4
    assert denial(twice) == (400, "ambiguous_credentials")
    assert (await login.state(pair.session))["generation"] == "1"
    assert (await traded(worker, token))["session"] == pair.session


@pytest.mark.parametrize("path", [REFRESH, REVOKE])
async def test_pages_of_allowed_origins_may_ask_and_read(
    second: Worker, login: Office, path: str
) -> None:
    preflight = await http(
        second.url,
        path,
        method="OPTIONS",
        headers={
            "Origin": PAGE,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        },
    )
    pair = await login.begin()
    answer = await post(second, path, pair.refresh_token, Origin=PAGE)
    bad = await post(second, REFRESH, "x", Origin=PAGE)

    assert preflight.status in (200, 204)
    assert preflight.header("access-control-allow-methods") == "POST"
    assert (preflight.header("access-control-allow-headers") or "").lower() == "authorization"
    assert [answer.status, bad.status] == [200, 401]
    for each in (preflight, answer, bad):
        assert each.header("access-control-allow-origin") == PAGE
        assert each.header("access-control-allow-credentials") is None


@pytest.mark.parametrize("path", [REFRESH, REVOKE])
@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://chat.example", "https://chat.example.evil", "null"]
)
async def test_pages_of_other_origins_get_nothing_done(
    second: Worker, login: Office, path: str, origin: str
) -> None:
    pair = await login.begin()
    answer = await post(second, path, pair.refresh_token, Origin=origin)
    preflight = await http(second.url, path, method="OPTIONS", headers={"Origin": origin})

    assert denial(answer) == denial(preflight) == (403, "origin_denied")
    assert answer.header("access-control-allow-origin") is None
    assert (await login.state(pair.session))["generation"] == "1"
    assert (await login.state(pair.session))["ended"] == ""


@pytest.mark.usefixtures("prompt")
async def test_a_store_that_is_away_is_no_reason_to_log_in_again(
    start_worker: StartWorker, own_valkey: Valkey, issuer: Issuer
) -> None:
    worker = start_worker(own_valkey)
    async with office(own_valkey.url, issuer) as login:
        pair = await login.begin()
    own_valkey.freeze()
    answers = [await post(worker, path, pair.refresh_token) for path in (REFRESH, REVOKE)]
    own_valkey.thaw()

    for answer in answers:
        assert denial(answer) == (503, "unavailable")
        assert int(answer.header("retry-after") or 0) >= 1


# --- ending --------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["access", "expired access", "refresh", "superseded refresh"])
async def test_whichever_token_is_handed_in_its_session_is_over_everywhere_when_it_returns(
    worker: Worker, second: Worker, login: Office, user: str, what: str
) -> None:
    pair, other = await login.begin(user), await login.begin(user)
    latest = await traded(worker, pair.refresh_token)
    then = int(time.time()) - 900
    handed_in = {
        "access": pair.access_token,
        "expired access": login.issuer.token(user, session=pair.session, issued_at=then),
        "refresh": latest["refresh_token"],
        "superseded refresh": pair.refresh_token,
    }[what]
    async with (
        await Client.connect(worker.url, pair.access_token) as here,
        await Client.connect(second.url, pair.access_token) as there,
        await Client.connect(second.url, other.access_token) as bystander,
    ):
        answer = await post(second, REVOKE, handed_in)
        handshakes = [
            await refused(each.url, token)
            for token in (pair.access_token, latest["access_token"])
            for each in (worker, second)
        ]
        trades = [await post(each, REFRESH, latest["refresh_token"]) for each in (worker, second)]
        ends = await asyncio.gather(here.until_closed(), there.until_closed())
        pong = await bystander.ping()

    assert (answer.status, answer.json) == (200, {})
    assert answer.header("cache-control") == "no-store"
    assert [denial(each) for each in handshakes + trades] == [(401, "token_revoked")] * 6
    assert [code for _, code in ends] == [4503, 4503]
    assert pong["type"] == "ack"
    assert (await traded(worker, other.refresh_token))["session"] == other.session


@pytest.mark.parametrize("token", ["x", "rt1.x", "eyJhbGciOiJIUzI1NiJ9.e30.AAAA", "A" * 3000])
async def test_a_token_that_nobody_knows_is_as_good_as_revoked(worker: Worker, token: str) -> None:
    answer = await post(worker, REVOKE, token)

    assert (answer.status, answer.json) == (200, {})


async def test_a_forged_token_ends_nothing(worker: Worker, login: Office, user: str) -> None:
    pair = await login.begin(user)
    forged = [
        pair.refresh_token.replace(".1.", ".2."),
        Issuer().token(user, session=pair.session),
        Issuer().token(user, session=pair.session, issued_at=int(time.time()) - 1000),
    ]
    async with await Client.connect(worker.url, pair.access_token) as client:
        answers = [await post(worker, REVOKE, each) for each in forged]
        pong = await client.ping()

    assert [(answer.status, answer.json) for answer in answers] == [(200, {})] * 3
    assert pong["type"] == "ack"
    assert (await login.state(pair.session))["ended"] == ""


async def test_revoking_twice_is_answered_alike(worker: Worker, login: Office) -> None:
    pair = await login.begin()
    answers = [await post(worker, REVOKE, pair.refresh_token) for _ in range(3)]

    assert [(answer.status, answer.json) for answer in answers] == [(200, {})] * 3


async def test_no_handshake_succeeds_once_a_revocation_has_returned(
    worker: Worker, second: Worker, issuer: Issuer, valkey: Valkey
) -> None:
    tokens = {unique("s"): "" for _ in range(300)}
    for session in tokens:
        tokens[session] = issuer.token(unique("user"), session=session)
    answers: list[Answer] = []
    async with Store(valkey.url) as store:
        for n, (session, token) in enumerate(tokens.items()):
            outcome = await revoke(store.call, Kind.SESSION, session)
            answers.append(await refused((worker, second)[n % 2].url, token))
            assert outcome.complete

    assert [denial(answer) for answer in answers] == [(401, "token_revoked")] * 300


async def test_logging_out_everywhere_and_in_again_at_once_works(
    worker: Worker, second: Worker, login: Office, user: str
) -> None:
    old = [await login.begin(user) for _ in range(2)]
    async with (
        await Client.connect(worker.url, old[0].access_token) as here,
        await Client.connect(second.url, old[1].access_token) as there,
    ):
        await login.revoke(Kind.USER, user)
        new = await login.begin(user)
        refusals = [
            await refused(each.url, pair.access_token) for pair in old for each in (worker, second)
        ]
        ends = await asyncio.gather(here.until_closed(), there.until_closed())
        for each in (worker, second):
            async with await Client.connect(each.url, new.access_token) as client:
                assert client.welcome["session"] == new.session

    assert [denial(answer) for answer in refusals] == [(401, "token_revoked")] * 4
    assert [code for _, code in ends] == [4503, 4503]
    assert (await traded(worker, new.refresh_token))["session"] == new.session


async def test_what_two_revocations_cover_at_once_is_closed_and_the_worker_goes_on(
    start_worker: StartWorker, own_valkey: Valkey, issuer: Issuer, user: str
) -> None:
    worker = start_worker(own_valkey)
    for n in range(10):
        session, token_id = unique("s"), unique("t")
        token = issuer.token(f"{user}{n}", session=session, token_id=token_id)
        async with await Client.connect(worker.url, token) as client:
            async with Store(own_valkey.url) as store:
                outcomes = await asyncio.gather(
                    revoke(store.call, Kind.SESSION, session),
                    revoke(store.call, Kind.USER, f"{user}{n}"),
                    revoke(store.call, Kind.TOKEN, token_id),
                )
            _, code = await client.until_closed()
        assert code == 4503
        assert [outcome.complete for outcome in outcomes] == [True] * 3


# --- logout on the socket ------------------------------------------------------------------


async def test_logout_is_acked_and_closes_every_socket_of_the_session(
    worker: Worker, second: Worker, login: Office, user: str
) -> None:
    pair, other = await login.begin(user), await login.begin(user)
    async with (
        await Client.connect(worker.url, pair.access_token) as here,
        await Client.connect(worker.url, pair.access_token) as beside,
        await Client.connect(second.url, pair.access_token) as there,
        await Client.connect(second.url, other.access_token) as bystander,
    ):
        await here.command("logout", id="bye")
        frames, code = await here.until_closed()
        ends = await asyncio.gather(beside.until_closed(), there.until_closed())
        pong = await bystander.ping()
    answer = await post(worker, REFRESH, pair.refresh_token)

    assert frames[0] == {"type": "ack", "id": "bye"}
    assert [(f["type"], f["code"], f["reconnect"]) for f in frames[1:]] == [("bye", 4503, False)]
    assert code == 4503
    for others, closed in ends:
        assert ([frame["type"] for frame in others], closed) == (["bye"], 4503)
    assert pong["type"] == "ack"
    assert denial(answer) == (401, "token_revoked")


async def test_logout_is_allowed_when_the_token_has_expired(
    worker: Worker, second: Worker, issuer: Issuer, user: str, room: str
) -> None:
    """The grace is half a second: on a loaded machine it may be over, once."""
    for _ in range(6):
        session = unique("s")
        issued_at = int(time.time()) + 3 - 100  # time enough to connect
        expiring = issuer.token(user, session=session, issued_at=issued_at, lifetime=100)
        async with (
            await Client.connect(worker.url, expiring) as here,
            await Client.connect(second.url, issuer.token(user, session=session)) as there,
        ):
            try:
                while (await here.ask("leave", room=room))["type"] == "ack":
                    pass
                await here.command("logout", id="out")
                frames, code = await here.until_closed()
            except ConnectionClosed:
                continue
            frames = [frame for frame in frames if frame["type"] != "expiring"]
            if code == 4401 and frames[0]["type"] == "bye":
                continue
            _, elsewhere = await there.until_closed()

        assert frames[0] == {"type": "ack", "id": "out"}
        assert (code, elsewhere) == (4503, 4503)
        return
    pytest.fail("no logout came in time")


@pytest.mark.usefixtures("prompt")
async def test_logout_that_the_store_has_not_taken_says_so(
    start_worker: StartWorker, own_valkey: Valkey, issuer: Issuer, user: str
) -> None:
    worker = start_worker(own_valkey)
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        own_valkey.freeze()
        error = await client.ask("logout")
        own_valkey.thaw()
        # It may have happened all the same; if not, it does now.
        code = 0
        deadline = time.monotonic() + PATIENCE
        with suppress(ConnectionClosed):
            while (await client.ask("logout"))["type"] == "error":
                assert time.monotonic() < deadline
        _, code = await client.until_closed()

    assert (error["type"], error["code"]) == ("error", "unavailable")
    assert code == 4503


# --- how many connections ------------------------------------------------------------------


@pytest.fixture
def pair_of_workers(start_worker: StartWorker) -> tuple[Worker, Worker]:
    return start_worker(user_connections=2), start_worker(user_connections=2)


async def test_a_users_connections_are_counted_on_all_workers_together(
    pair_of_workers: tuple[Worker, Worker], issuer: Issuer, user: str
) -> None:
    one, other = pair_of_workers
    tokens = [issuer.token(user, session=unique("s")) for _ in range(3)]
    async with await Client.connect(one.url, tokens[0]) as first:
        async with await Client.connect(other.url, tokens[1]) as second:
            answers = [await refused(each.url, tokens[2]) for each in (one, other)]
            pongs = [await client.ping() for client in (first, second)]
        async with await Client.connect(one.url, issuer.token(unique("user"))) as stranger:
            await stranger.ping()
        third = await admitted(one, tokens[2])
        async with third:
            await third.ping()

    for answer in answers:
        assert denial(answer) == (429, "too_many_connections")
        assert int(answer.header("retry-after") or 0) >= 1
    assert [pong["type"] for pong in pongs] == ["ack", "ack"]


async def admitted(worker: Worker, token: str, asked: list[float] | None = None) -> Client:
    """The first connection that is not refused for there being too many, and when it was asked for
    each."""
    asked = [] if asked is None else asked
    async with asyncio.timeout(PATIENCE):
        while True:
            asked.append(time.monotonic())
            try:
                return await Client.connect(worker.url, token)
            except InvalidStatus as error:
                if error.response.status_code != 429:
                    raise


@pytest.mark.parametrize("newcomer", [0, 1])
async def test_of_the_same_session_the_silent_one_makes_room_wherever_it_is(
    pair_of_workers: tuple[Worker, Worker], issuer: Issuer, user: str, newcomer: int
) -> None:
    token = issuer.token(user, session=unique("s"))
    async with (
        await Client.connect(pair_of_workers[0].url, token) as silent,
        await Client.connect(pair_of_workers[1].url, token) as lively,
    ):
        for _ in range(10):
            await lively.ping()
        async with await Client.connect(pair_of_workers[newcomer].url, token) as third:
            frames, code = await silent.until_closed()
            pongs = [await client.ping() for client in (lively, third)]

    assert code == 4505
    assert [(f["type"], f["code"], f["reconnect"]) for f in frames] == [("bye", 4505, False)]
    assert [pong["type"] for pong in pongs] == ["ack", "ack"]


async def test_another_sessions_connections_make_no_room(
    pair_of_workers: tuple[Worker, Worker], issuer: Issuer, user: str
) -> None:
    one, other = pair_of_workers
    mine, others = (issuer.token(user, session=unique("s")) for _ in range(2))
    async with (
        await Client.connect(one.url, others) as first,
        await Client.connect(other.url, mine) as second,
        await Client.connect(one.url, mine) as third,
    ):
        _, code = await second.until_closed()
        pongs = [await client.ping() for client in (first, third)]

    assert code == 4505
    assert [pong["type"] for pong in pongs] == ["ack", "ack"]


async def test_a_worker_that_was_killed_locks_nobody_out_for_longer_than_its_lease(
    pair_of_workers: tuple[Worker, Worker], issuer: Issuer, user: str
) -> None:
    victim, healthy = pair_of_workers
    places = [
        await Client.connect(victim.url, issuer.token(user, session=unique("s"))) for _ in range(2)
    ]
    token = issuer.token(user, session=unique("s"))
    full = await refused(healthy.url, token)
    victim.signal(signal.SIGKILL)
    killed_at = time.monotonic()
    asked: list[float] = []
    async with await admitted(healthy, token, asked) as client:
        await client.ping()
    for place in places:
        await place.until_closed()

    assert denial(full) == (429, "too_many_connections")
    # Whoever asks when the lease is over is let in.
    assert all(at < killed_at + STALE_SECONDS + 0.1 for at in asked[:-1])


async def test_a_handshake_that_failed_takes_no_place(
    pair_of_workers: tuple[Worker, Worker], issuer: Issuer, user: str
) -> None:
    """Neither one that was refused nor one whose client left at once."""
    one, other = pair_of_workers
    token = issuer.token(user, session=unique("s"))
    headers = upgrade_headers() | {"Authorization": f"Bearer {token}"}
    for _ in range(20):
        await refused(one.url, Issuer().token(user))
        await http(one.url, headers={"Authorization": f"Bearer {token}"})
        _, writer = await asyncio.open_connection("127.0.0.1", one.port)
        writer.write(request(one.url, headers=headers))
        writer.transport.abort()
    tokens = [issuer.token(user, session=unique("s")) for _ in range(2)]
    async with await admitted(one, tokens[0]) as first, await admitted(other, tokens[1]) as second:
        assert [(await client.ping())["type"] for client in (first, second)] == ["ack", "ack"]
