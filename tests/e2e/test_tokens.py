"""The life of a token: at the handshake, at refresh, at its expiry, at its revocation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from chatserver.core.session import Kind
from chatserver.store.link import Store
from chatserver.store.revocations import cutoff, revoke
from tests.conftest import StartWorker
from tests.support.client import Client, Frame, Raw, http, refused
from tests.support.stopwatch import Stopwatch
from tests.support.tokens import Issuer, b64url, kid_of, seal, sign, unique
from tests.support.valkey import Valkey
from tests.support.worker import PATIENCE, Worker

WITHIN_A_SECOND = 3.0
"""What the protocol promises within a second, on a loaded machine."""

Forge = Callable[[Issuer, dict[str, Any], dict[str, Any]], str]


def claim(**changes: Any) -> Forge:
    """Well signed, with these claims changed; None takes one away."""

    def forge(issuer: Issuer, header: dict[str, Any], claims: dict[str, Any]) -> str:
        changed = {name: value for name, value in (claims | changes).items() if value is not None}
        return sign(header, changed, issuer.key)

    return forge


def head(**changes: Any) -> Forge:
    return lambda issuer, header, claims: sign(header | changes, claims, issuer.key)


def raw_claim(name: str, text: str) -> Forge:
    """A claim whose value is this text, which no JSON library would write."""

    def forge(issuer: Issuer, header: dict[str, Any], claims: dict[str, Any]) -> str:
        payload = json.dumps(claims | {name: "@"}).replace('"@"', text)
        parts = [b64url(json.dumps(header).encode()), b64url(payload.encode())]
        return seal(".".join(parts), issuer.key)

    return forge


def spelt(change: Callable[[str], str]) -> Forge:
    """A good token, written otherwise."""
    return lambda issuer, header, claims: change(sign(header, claims, issuer.key))


def flipped(token: str, segment: int) -> str:
    parts = token.split(".")
    part = parts[segment]
    middle = len(part) // 2
    parts[segment] = part[:middle] + ("A" if part[middle] != "A" else "B") + part[middle + 1 :]
    return ".".join(parts)


NOW = int(time.time())
FORGED: dict[str, Forge] = {
    "unsigned": lambda issuer, header, claims: (
        sign(header | {"alg": "none"}, claims, issuer.key).rpartition(".")[0] + "."
    ),
    "alg none, signed": head(alg="none"),
    "HS384": lambda issuer, header, claims: seal(
        sign(header | {"alg": "HS384"}, claims, issuer.key).rpartition(".")[0],
        issuer.key,
        "sha384",
    ),
    "RS256": head(alg="RS256"),
    "alg a list": head(alg=["HS256"]),
    "alg HS": head(alg="HS"),
    "typ JWT": head(typ="JWT"),
    "a refresh token's typ": head(typ="rt+jwt"),
    "crit": head(crit=["exp"]),
    "jku": head(jku="http://127.0.0.1:9/"),
    "b64": head(b64=False),
    "kid unknown": head(kid="x" * 16),
    "kid a path": head(kid="../../dev/null"),
    "kid a number": head(kid=1),
    "kid null": head(kid=None),
    "another secret": lambda issuer, header, claims: sign(header, claims, b"x" * 40),
    "another secret with its kid": lambda issuer, header, claims: sign(
        header | {"kid": kid_of(b"x" * 40)}, claims, b"x" * 40
    ),
    "no signature": spelt(lambda token: token.rpartition(".")[0] + "."),
    "flipped header": spelt(lambda token: flipped(token, 0)),
    "flipped claims": spelt(lambda token: flipped(token, 1)),
    "flipped signature": spelt(lambda token: flipped(token, 2)),
    "padded": spelt(lambda token: token + "="),
    "junk after": spelt(lambda token: token + "=JUNK"),
    "five segments": spelt(lambda token: token + ".e30.e30"),
    "no iss": claim(iss=None),
    "wrong iss": claim(iss="other"),
    "no aud": claim(aud=None),
    "aud a list": claim(aud=["chatserver"]),
    "no sub": claim(sub=None),
    "sub empty": claim(sub=""),
    "sub a number": claim(sub=7),
    "sub with a line feed": claim(sub="a\nb"),
    "sub long": claim(sub="x" * 129),
    "no sid": claim(sid=None),
    "no jti": claim(jti=None),
    "no iat": claim(iat=None),
    "no exp": claim(exp=None),
    "exp a string": claim(exp=str(NOW + 600)),
    "exp a float": claim(exp=NOW + 600.0),
    "exp a bool": claim(exp=True),
    "exp infinite": raw_claim("exp", "1e400"),
    "exp NaN": raw_claim("exp", "NaN"),
    "exp of 5,000 digits": raw_claim("exp", "9" * 2000),
    "16 minutes": claim(iat=NOW - 1, exp=NOW + 960),
    "iat ahead": claim(iat=NOW + 3600, exp=NOW + 3700),
    "nbf ahead": claim(nbf=NOW + 3600),
    "no roles": claim(roles=None),
    "roles a string": claim(roles="admin"),
    "roles numbers": claim(roles=[1]),
    "a thousand roles": claim(roles=["r"] * 1000),
    "rooms a list": claim(rooms=["general"]),
    "rooms with odd rights": claim(rooms={"general": "rwx"}),
    "rooms with an odd pattern": claim(rooms={"gen*eral": "r"}),
    "deep": raw_claim("x", "[" * 1200 + "]" * 1200),
}


@pytest.mark.parametrize("what", FORGED)
async def test_a_bad_token_is_refused_alike_at_the_handshake_and_at_refresh(
    worker: Worker, issuer: Issuer, user: str, what: str
) -> None:
    """The connection goes on under the token that it has."""
    forged = issuer.keep(FORGED[what](issuer, issuer.header(), issuer.claims(user)))
    answer = await refused(worker.url, forged)
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        error = await client.ask("refresh", token=forged)
        pong = await client.ping()

    assert (answer.status, answer.code) == (401, "token_invalid")
    assert answer.header("www-authenticate") == 'Bearer error="invalid_token"'
    assert (error["type"], error["code"]) == ("error", "token_invalid")
    assert pong["type"] == "ack"


async def test_every_invalid_token_is_told_the_same(
    worker: Worker, issuer: Issuer, user: str
) -> None:
    bodies = set()
    for what in ("flipped signature", "kid unknown", "no exp", "another secret", "typ JWT"):
        forged = FORGED[what](issuer, issuer.header(), issuer.claims(user))
        bodies.add((await refused(worker.url, forged)).body)

    assert len(bodies) == 1


async def test_a_token_is_expired_from_exp_on(worker: Worker, issuer: Issuer, user: str) -> None:
    now = int(time.time())
    expired = issuer.token(user, issued_at=now - 900, lifetime=900)
    answer = await refused(worker.url, expired)
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        error = await client.ask("refresh", token=expired)
        await client.ping()

    assert (answer.status, answer.code) == (401, "token_expired")
    assert error["code"] == "token_expired"


async def test_clocks_may_differ_by_five_seconds(worker: Worker, issuer: Issuer, user: str) -> None:
    ahead = issuer.token(user, issued_at=int(time.time()) + 3)
    async with await Client.connect(worker.url, ahead) as client:
        await client.ping()


async def test_the_previous_secret_still_verifies(start_worker: StartWorker, user: str) -> None:
    old, new, older = Issuer(), Issuer(), Issuer()
    worker = start_worker(secret=new.secret, secret_previous=old.secret)
    for issuer in (old, new):
        async with await Client.connect(worker.url, issuer.token(user)) as client:
            await client.ask("refresh", token=old.token(user))
            ack = await client.ask("refresh", token=new.token(user))
            assert ack["type"] == "ack"
    answer = await refused(worker.url, older.token(user))

    assert (answer.status, answer.code) == (401, "token_invalid")
    assert [issuer.secrets_in(worker.log()) for issuer in (old, new, older)] == [[], [], []]


# --- refresh -------------------------------------------------------------------------------


async def test_a_refresh_renews_the_connection_in_place(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    async with await Client.connect(worker.url, issuer.token(user, lifetime=300)) as client:
        await client.join(room)
        new = issuer.token(user, roles=["guest", "x"], lifetime=600)
        ack = await client.ask("refresh", id="r", token=new)
        forbidden = await client.ask("send", room=room, body=1)
        async with await Client.connect(worker.url, issuer.token("bob")) as bob:
            await bob.publish(room, "still here")
        [event] = await client.messages(1)

    assert set(ack) == {"type", "id", "expires_at", "roles", "left"}
    assert (ack["id"], ack["roles"], ack["left"]) == ("r", ["guest", "x"], [])
    assert ack["expires_at"] > client.welcome["expires_at"]
    assert forbidden["code"] == "forbidden"
    assert event["body"] == "still here"


async def test_rooms_that_the_new_token_does_not_allow_are_left_at_once(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    kept, lost = f"{room}-kept", f"{room}-lost"
    async with (
        await Client.connect(worker.url, issuer.token(user)) as client,
        await Client.connect(worker.url, issuer.token("bob")) as bob,
    ):
        await client.join(kept)
        await client.join(lost)
        ack = await client.ask("refresh", token=issuer.token(user, rooms={kept: "r"}))
        seen = len(client.seen)
        await bob.publish(lost, "secret")
        await bob.publish(kept, "news")
        [event] = await client.messages(1)
        again = await client.ask("join", room=lost)

    assert ack["left"] == [lost]
    assert (event["room"], event["body"]) == (kept, "news")
    assert [frame for frame in client.seen[seen:] if frame.get("room") == lost] == []
    assert again["code"] == "forbidden"


async def test_nothing_of_a_room_comes_after_the_refresh_that_lost_it(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    """While somebody publishes into it without a pause."""
    async with (
        await Client.connect(worker.url, issuer.token(user)) as client,
        await Client.connect(worker.url, issuer.token("bob")) as bob,
    ):
        await client.join(room)
        for n in range(300):
            await bob.command("send", room=room, body=n)
        ack = await client.ask("refresh", token=issuer.token(user, rooms={}))
        for n in range(300):
            await bob.command("send", room=room, body=n)
        await bob.ping()
        await client.ping()

    behind = client.seen[client.seen.index(ack) :]
    assert [frame for frame in behind if frame["type"] == "message"] == []


@pytest.mark.parametrize(
    "other", [{"user": "mallory"}, {"session": "another"}, {"issued_at": int(time.time()) - 30}]
)
async def test_a_refresh_with_anothers_or_an_older_token_is_a_mismatch(
    worker: Worker, issuer: Issuer, user: str, other: dict[str, Any]
) -> None:
    mine: dict[str, Any] = {"user": user, "session": "s1", "issued_at": int(time.time()) - 10}
    async with await Client.connect(worker.url, issuer.token(**mine)) as client:
        error = await client.ask("refresh", token=issuer.token(**(mine | other)))
        pong = await client.ping()
        same = await client.ask("refresh", token=issuer.token(**mine))

    assert (error["type"], error["code"]) == ("error", "identity_mismatch")
    assert pong["type"] == "ack"
    assert same["type"] == "ack"


async def test_a_refresh_with_a_revoked_token_ends_the_connection(
    worker: Worker, issuer: Issuer, user: str, valkey: Valkey
) -> None:
    token_id = unique("jti")
    revoked = issuer.token(user, token_id=token_id)
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        async with Store(valkey.url) as store:
            await revoke(store.call, Kind.TOKEN, token_id)
        await refused_as_revoked(worker, revoked)
        id = await client.command("refresh", token=revoked)
        frames, code = await client.until_closed()

    assert (frames[0]["type"], frames[0]["id"]) == ("error", id)
    assert frames[0]["code"] == "token_revoked"
    assert (frames[-1]["type"], frames[-1]["reconnect"]) == ("bye", False)
    assert code == 4503


# --- expiry --------------------------------------------------------------------------------


def soon(lifetime: int = 100) -> dict[str, int]:
    """A token that expires in two to three seconds: time enough for a loaded machine to use it."""
    return {"issued_at": int(time.time()) + 3 - lifetime, "lifetime": lifetime}


async def test_a_token_that_will_expire_is_told_in_time(
    worker: Worker, issuer: Issuer, user: str
) -> None:
    """20 % of its lifetime before: of 20 s issued 15 s ago, that is in a second."""
    issued_at = int(time.time()) - 14
    token = issuer.token(user, issued_at=issued_at, lifetime=20)
    async with await Client.connect(worker.url, token) as client:
        told = await client.expect("expiring")
        at = time.time()
        await client.ask("refresh", token=issuer.token(user))
        await client.ping()

    assert told == {"type": "expiring", "expires_at": (issued_at + 20) * 1000}
    assert issued_at + 16 - 0.1 <= at < issued_at + 16 + WITHIN_A_SECOND
    assert [frame["type"] for frame in client.seen].count("expiring") == 1


async def test_a_token_refreshed_in_time_is_not_told_of_the_old_ones_end(
    worker: Worker, issuer: Issuer, user: str
) -> None:
    old = soon()
    async with await Client.connect(worker.url, issuer.token(user, **old)) as client:
        await client.ask("refresh", token=issuer.token(user))
        while time.time() < old["issued_at"] + old["lifetime"] + 1:
            assert (await client.ping())["type"] == "ack"


async def test_from_exp_on_nothing_is_delivered_and_the_close_follows(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    """A refresh that failed before changes nothing."""
    options = soon()
    expires_at = options["issued_at"] + options["lifetime"]
    async with (
        await Client.connect(worker.url, issuer.token(user, **options)) as client,
        await Client.connect(worker.url, issuer.token("bob")) as bob,
    ):
        await client.join(room)
        failed = await client.ask("refresh", token="bad")
        answers: list[Frame] = []
        with pytest.raises(ConnectionClosed) as closed:  # noqa: PT012 (any of them may meet it)
            while True:
                await bob.publish(room)
                answers.append(await client.ask("history", room=room, limit=1))
                answers.append(await client.ask("ping"))
        closed_at = time.time()
        await client.until_closed()  # the end may have been met by a send: read what came before

    assert failed["code"] == "token_invalid"
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 4401
    assert expires_at <= closed_at < expires_at + WITHIN_A_SECOND
    bye = client.seen[-1]
    assert (bye["type"], bye["code"], bye["reconnect"]) == ("bye", 4401, True)
    refused = [answer for answer in answers if answer["type"] == "error"]
    assert {answer["code"] for answer in refused} <= {"token_expired"}
    first = client.seen.index(refused[0]) if refused else len(client.seen)
    assert not [frame for frame in client.seen[first:] if frame["type"] == "message"]
    # By the store's clock, which is ours.
    assert all(f["ts"] < expires_at * 1000 for f in client.seen if f["type"] == "message")


async def test_what_was_withheld_is_replayed_after_a_refresh_in_the_grace(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    """The grace is half a second: on a loaded machine the refresh may come too late, once."""
    for attempt in range(6):
        name = f"{room}-{attempt}"
        async with (
            await Client.connect(worker.url, issuer.token(user, **soon())) as client,
            await Client.connect(worker.url, issuer.token("bob")) as bob,
        ):
            await client.join(name)
            await bob.publish(name, "before")
            [before] = await client.messages(1)
            try:
                while True:
                    answer = await client.ask("history", room=name, limit=1)
                    if answer.get("code") == "token_expired":
                        break
                for n in range(3):
                    await bob.publish(name, n)
                pong = await client.ask("ping")
                expired = len(client.seen)
                ack = await client.ask("refresh", token=issuer.token(user))
            except ConnectionClosed:
                continue
            withheld = client.seen[:expired]
            await bob.publish(name, "after")
            events = [before, *await client.messages(4)]

        assert pong["type"] == ack["type"] == "ack"
        assert [event["offset"] for event in events] == [1, 2, 3, 4, 5]
        assert [event["body"] for event in events] == ["before", 0, 1, 2, "after"]
        assert [frame["body"] for frame in withheld if frame["type"] == "message"] == ["before"]
        return
    pytest.fail("no refresh came in time")


# --- revocation ----------------------------------------------------------------------------


async def refused_as_revoked(worker: Worker, token: str) -> None:
    """The worker hears of it within milliseconds; nothing here waits for its confirmation."""
    deadline = time.monotonic() + PATIENCE
    good = {"Authorization": f"Bearer {token}"}
    while (answer := await http(worker.url, headers=good)).status == 426:
        assert time.monotonic() < deadline
    assert (answer.status, answer.code) == (401, "token_revoked")
    assert answer.header("www-authenticate") == 'Bearer error="invalid_token"'


@pytest.mark.parametrize("kind", list(Kind))
async def test_what_is_revoked_is_closed_and_what_is_not_stays(
    worker: Worker, issuer: Issuer, valkey: Valkey, user: str, room: str, kind: Kind
) -> None:
    session, token_id = unique("s"), unique("t")
    options = {"session": session, "token_id": token_id}
    token = issuer.token(user, **options)
    others = {
        Kind.SESSION: issuer.token(user, session=session + "x"),
        Kind.TOKEN: issuer.token(user, session=session),
        Kind.USER: issuer.token(user + "x", session=session),
    }
    value = {Kind.SESSION: session, Kind.TOKEN: token_id, Kind.USER: user}[kind]
    async with (
        await Client.connect(worker.url, token) as first,
        await Client.connect(worker.url, token) as second,
        await Client.connect(worker.url, others[kind]) as bystander,
    ):
        for client in (first, second, bystander):
            await client.join(room)
        async with Store(valkey.url) as store:
            await revoke(store.call, kind, value)
        with Stopwatch() as watch:
            ends = [await client.until_closed() for client in (first, second)]
        await bystander.publish(room, "after")
        await bystander.messages(1)
        await refused_as_revoked(worker, token)

    assert watch.seconds < WITHIN_A_SECOND
    for frames, code in ends:
        assert code == 4503
        assert [frame["type"] for frame in frames] == ["bye"]
        assert (frames[0]["code"], frames[0]["reconnect"]) == (4503, False)
        assert "after" not in frames[0]


async def test_who_logs_in_after_a_revocation_of_the_user_gets_in(
    worker: Worker, issuer: Issuer, valkey: Valkey, user: str
) -> None:
    async with Store(valkey.url) as store:
        await revoke(store.call, Kind.USER, user)
        at = await cutoff(store.call, user)
    await refused_as_revoked(worker, issuer.token(user, issued_at=at))
    await refused_as_revoked(worker, issuer.token(user, issued_at=at - 100))
    async with await Client.connect(worker.url, issuer.token(user, issued_at=at + 1)) as client:
        await client.ping()


async def test_a_revoked_peer_that_ignores_the_close_is_gone_all_the_same(
    worker: Worker, issuer: Issuer, valkey: Valkey, user: str, room: str
) -> None:
    """It goes on sending and gets nothing in; nothing more comes out to it."""
    session = unique("s")
    async with (
        await Raw.upgraded(worker.url, issuer.token(user, session=session)) as rogue,
        await Client.connect(worker.url, issuer.token("bob")) as bob,
    ):
        await bob.join(room)
        rogue.text({"type": "join", "id": 1, "room": room})
        assert (await rogue.json())["type"] == "ack"
        async with Store(valkey.url) as store:
            await revoke(store.call, Kind.SESSION, session)
        with Stopwatch() as watch:
            frames, code = await rogue.until_closed()
            rogue.text({"type": "send", "room": room, "body": "too late"})
            await bob.publish(room, "after")
            rest = await rogue.read_to_end()
        [event] = await bob.messages(1)

    assert code == 4503
    assert [frame["type"] for frame in frames] == ["bye"]
    assert rest == b""
    assert watch.seconds < 3 * 0.5 + 0.5
    assert event["body"] == "after"


async def test_a_revocation_while_pub_sub_is_down_is_applied_by_the_beat(
    start_worker: StartWorker, own_valkey: Valkey, issuer: Issuer, user: str
) -> None:
    worker = start_worker(own_valkey)
    session = unique("s")
    async with await Client.connect(worker.url, issuer.token(user, session=session)) as client:
        async with Store(own_valkey.url) as store:
            own_valkey.command("CLIENT", "KILL", "TYPE", "pubsub")
            await revoke(store.call, Kind.SESSION, session)
        revoked_at = time.monotonic()
        _, code = await client.until_closed()
        took = time.monotonic() - revoked_at

    assert code == 4503
    assert took < 3 * 2


async def test_what_was_revoked_stays_revoked_when_the_store_is_emptied(
    start_worker: StartWorker, own_valkey: Valkey, issuer: Issuer, user: str
) -> None:
    worker = start_worker(own_valkey)
    session = unique("s")
    token = issuer.token(user, session=session)
    async with Store(own_valkey.url) as store:
        await revoke(store.call, Kind.SESSION, session)
    await refused_as_revoked(worker, token)
    own_valkey.command("FLUSHALL")
    await refused_as_revoked(worker, token)
    key = f"chat:{{auth}}:revoked:session:{session}"
    deadline = time.monotonic() + PATIENCE
    while own_valkey.command("EXISTS", key) != b":1":
        await refused_as_revoked(worker, token)
        assert time.monotonic() < deadline
    second = start_worker(own_valkey)
    await refused_as_revoked(second, token)


FORGETFUL = "the store may forget revocations and messages"


async def test_a_store_that_may_forget_what_was_revoked_is_told_of_at_the_start(
    start_worker: StartWorker, own_valkey: Valkey
) -> None:
    content = start_worker(own_valkey)
    own_valkey.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    worker = start_worker(own_valkey)
    worker.expected_errors.add(FORGETFUL)

    assert content.log_lines(FORGETFUL) == 0
    assert worker.log_lines(FORGETFUL) == 1
    assert '"maxmemory_policy": "allkeys-lru"' in worker.log()
