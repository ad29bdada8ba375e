"""Sessions against a real store: begun, rotated, given other rights, ended."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from chatserver.core.claims import Identity
from chatserver.core.errors import ReplyCode, StoreUnavailable, TokenRefused
from chatserver.core.session import Kind
from chatserver.store import keys
from chatserver.store.keyring import Keyring
from chatserver.store.link import Reply
from chatserver.store.revocations import cutoff
from chatserver.store.sessions import TokenPair, TooManyReplays
from chatserver.store.topology import Argument
from tests.support.sessions import Office, office
from tests.support.tokens import Issuer, unique
from tests.support.valkey import Valkey


@pytest.fixture
async def shared(valkey: Valkey, issuer: Issuer) -> AsyncIterator[Office]:
    async with office(valkey.url, issuer) as opened:
        yield opened


@pytest.fixture
async def own(own_valkey: Valkey, issuer: Issuer) -> AsyncIterator[Office]:
    async with office(own_valkey.url, issuer) as opened:
        yield opened


def identity(office: Office, pair: TokenPair) -> Identity:
    return Keyring(office.issuer.key).verify(pair.access_token, now=time.time())


async def refusal(office: Office, token: str) -> ReplyCode:
    with pytest.raises(TokenRefused) as refused:
        await office.rotate(token)
    return refused.value.code


# --- the ordinary life ---------------------------------------------------------------------


async def test_a_login_gives_tokens_that_say_what_was_asked(shared: Office, user: str) -> None:
    before = int(time.time())
    pair = await shared.begin(user, ["member", "x"], {"general": "rw"})
    who = identity(shared, pair)

    assert (who.user, who.session, who.roles) == (user, pair.session, ("member", "x"))
    assert who.rooms == {"general": "rw"}
    assert before <= who.issued_at <= int(time.time())
    assert who.expires_at == who.issued_at + 900
    assert pair.expires_at == who.expires_at * 1000
    assert pair.refresh_expires_at == (who.issued_at + 604_800) * 1000


async def test_two_logins_of_a_user_share_nothing(shared: Office, user: str) -> None:
    one, other = await shared.begin(user), await shared.begin(user)

    assert one.session != other.session
    assert identity(shared, one).token_id != identity(shared, other).token_id


async def test_a_chain_of_rotations_goes_on_within_the_end_set_at_login(shared: Office) -> None:
    pairs = [await shared.begin()]
    for _ in range(10):
        pairs.append(await shared.rotate(pairs[-1].refresh_token))

    assert len({pair.refresh_token for pair in pairs}) == 11
    assert len({identity(shared, pair).token_id for pair in pairs}) == 11
    assert {pair.session for pair in pairs} == {pairs[0].session}
    assert {pair.refresh_expires_at for pair in pairs} == {pairs[0].refresh_expires_at}
    assert (await shared.state(pairs[0].session))["generation"] == "11"


async def test_neither_a_tokens_repr_nor_the_pairs_shows_it(shared: Office) -> None:
    pair = await shared.begin()

    assert repr(pair) == f"<TokenPair session={pair.session!r}>"


@pytest.mark.parametrize(
    ("user", "roles", "rooms"),
    [
        ("", ["member"], None),
        ("a\nb", ["member"], None),
        ("x" * 129, ["member"], None),
        ("u", ["r"] * 33, None),
        ("u", [""], None),
        ("u", [], {"gen*eral": "r"}),
        ("u", [], {"general": "rx"}),
        ("u", [], {f"{'r' * 100}{n}": "rw" for n in range(250)}),
    ],
)
async def test_what_no_token_can_say_begins_no_session(
    own: Office, user: str, roles: list[str], rooms: dict[str, str] | None
) -> None:
    with pytest.raises(ValueError, match="token"):
        await own.sessions.begin(user, roles, rooms)

    assert await own.call(["KEYS", "*family*"]) == []


async def test_a_family_is_remembered_a_day_longer_than_it_lives(shared: Office) -> None:
    pair = await shared.begin()
    left = await shared.call(["TTL", keys.family(pair.session)])

    assert 691_200 - 60 < left <= 691_200 + 1


# --- answers given again -------------------------------------------------------------------


async def test_of_fifty_at_once_one_rotates_five_are_told_again_and_the_family_lives(
    shared: Office,
) -> None:
    first = await shared.begin()
    salt = await shared.sessions.salt()
    answers = await asyncio.gather(
        *(shared.sessions.rotate(first.refresh_token, salt) for _ in range(50)),
        return_exceptions=True,
    )
    pairs = [answer for answer in answers if isinstance(answer, TokenPair)]
    successor = await shared.rotate(pairs[0].refresh_token)

    assert Counter(type(answer) for answer in answers) == {TokenPair: 6, TooManyReplays: 44}
    assert len({tuple(pair) for pair in pairs}) == 1
    assert (await shared.state(first.session))["ended"] == ""
    assert identity(shared, successor).session == first.session


async def test_fifty_over_five_connections_get_one_successor(
    shared: Office, valkey: Valkey, issuer: Issuer
) -> None:
    first = await shared.begin()
    salt = await shared.sessions.salt()

    async def ten() -> list[TokenPair | BaseException]:
        async with office(valkey.url, issuer) as other:
            return await asyncio.gather(
                *(other.sessions.rotate(first.refresh_token, salt) for _ in range(10)),
                return_exceptions=True,
            )

    answers = [each for some in await asyncio.gather(*(ten() for _ in range(5))) for each in some]
    pairs = {tuple(answer) for answer in answers if isinstance(answer, TokenPair)}

    assert Counter(type(answer) for answer in answers) == {TokenPair: 6, TooManyReplays: 44}
    assert len(pairs) == 1


async def test_an_answer_given_again_is_the_same_in_all_five_fields(shared: Office) -> None:
    first = await shared.begin()
    answer = await shared.rotate(first.refresh_token)
    await shared.age(first.session, 3_000)
    aged = await shared.rotate(first.refresh_token)
    again = [await shared.rotate(first.refresh_token) for _ in range(4)]

    assert [tuple(pair) for pair in again] == [tuple(aged)] * 4
    assert aged.refresh_token == answer.refresh_token
    with pytest.raises(TooManyReplays):
        await shared.rotate(first.refresh_token)
    assert (await shared.rotate(answer.refresh_token)).session == first.session


async def test_another_process_gives_the_same_answer_again(
    shared: Office, valkey: Valkey, issuer: Issuer
) -> None:
    first = await shared.begin(rooms={"b": "r", "a": "rw"})
    answer = await shared.rotate(first.refresh_token)
    async with office(valkey.url, issuer) as other:
        again = await other.rotate(first.refresh_token)

    assert tuple(again) == tuple(answer)


# --- reuse ---------------------------------------------------------------------------------


async def is_ended(office: Office, session: str) -> bool:
    record = await office.call(["EXISTS", f"chat:{{auth}}:revoked:session:{session}"])
    return record == 1 and (await office.state(session))["ended"] == "1"


async def test_the_token_before_is_reuse_after_the_leeway(shared: Office) -> None:
    first = await shared.begin()
    second = await shared.rotate(first.refresh_token)
    await shared.age(first.session, 10_001)

    assert await refusal(shared, first.refresh_token) is ReplyCode.TOKEN_REVOKED
    assert await is_ended(shared, first.session)
    assert await refusal(shared, second.refresh_token) is ReplyCode.TOKEN_REVOKED
    assert await refusal(shared, first.refresh_token) is ReplyCode.TOKEN_REVOKED


async def test_an_older_token_is_reuse_within_the_leeway_too(shared: Office) -> None:
    first = await shared.begin()
    second = await shared.rotate(first.refresh_token)
    third = await shared.rotate(second.refresh_token)

    assert await refusal(shared, first.refresh_token) is ReplyCode.TOKEN_REVOKED
    assert await is_ended(shared, first.session)
    for pair in (first, second, third):
        assert await refusal(shared, pair.refresh_token) is ReplyCode.TOKEN_REVOKED


async def test_reuse_ends_no_other_session_of_the_user(shared: Office, user: str) -> None:
    other = await shared.begin(user)
    first = await shared.begin(user)
    second = await shared.rotate(first.refresh_token)
    await shared.rotate(second.refresh_token)
    await refusal(shared, first.refresh_token)

    assert (await shared.rotate(other.refresh_token)).session == other.session


# --- revocation ----------------------------------------------------------------------------


async def test_a_revoked_session_rotates_no_more(shared: Office) -> None:
    pair = await shared.begin()
    await shared.revoke(Kind.SESSION, pair.session)

    assert await refusal(shared, pair.refresh_token) is ReplyCode.TOKEN_REVOKED


async def test_a_users_revocation_ends_what_was_begun_by_then_and_nothing_after(
    shared: Office, user: str
) -> None:
    before = [await shared.begin(user) for _ in range(3)]
    before.append(await shared.rotate(before[0].refresh_token))
    bystander = await shared.begin()
    await shared.revoke(Kind.USER, user)
    at = await cutoff(shared.call, user)
    after = await shared.begin(user)
    rotated = await shared.rotate(after.refresh_token)

    for pair in before:
        assert await refusal(shared, pair.refresh_token) is ReplyCode.TOKEN_REVOKED
    assert identity(shared, after).issued_at > at
    assert identity(shared, rotated).issued_at > at
    assert (await shared.rotate(bystander.refresh_token)).session == bystander.session


async def test_revoking_again_ends_the_login_that_came_between(shared: Office, user: str) -> None:
    await shared.revoke(Kind.USER, user)
    between = await shared.begin(user)
    begun_at = int((await shared.state(between.session))["begun_at"])
    # Of the second after the first revocation, which the next one must reach.
    while int((await shared.call(["TIME"]))[0]) < begun_at:
        pass
    await shared.revoke(Kind.USER, user)

    assert await refusal(shared, between.refresh_token) is ReplyCode.TOKEN_REVOKED


async def test_a_users_end_outlives_its_refresh_tokens(shared: Office, user: str) -> None:
    await shared.revoke(Kind.USER, user)

    assert await shared.call(["TTL", f"chat:{{auth}}:ended:{user}"]) >= 604_800


async def test_revoking_a_session_that_was_never_begun_stores_no_family(shared: Office) -> None:
    session = unique("s")
    await shared.revoke(Kind.SESSION, session)

    assert await shared.state(session) == {}


# --- the end by age ------------------------------------------------------------------------


async def test_a_session_is_expired_from_its_end_on(shared: Office) -> None:
    pair = await shared.begin()
    rotated = await shared.rotate(pair.refresh_token)
    (seconds, _) = await shared.call(["TIME"])
    await shared.change(pair.session, expires_at=int(seconds))

    assert await refusal(shared, rotated.refresh_token) is ReplyCode.TOKEN_EXPIRED
    assert await refusal(shared, pair.refresh_token) is ReplyCode.TOKEN_EXPIRED
    assert await shared.sessions.entitle(pair.session, roles=["guest"]) is None


async def test_no_access_token_outlives_its_session(shared: Office) -> None:
    pair = await shared.begin()
    (seconds, _) = await shared.call(["TIME"])
    await shared.change(pair.session, expires_at=int(seconds) + 100)
    rotated = await shared.rotate(pair.refresh_token)

    assert identity(shared, rotated).expires_at == int(seconds) + 100
    assert rotated.expires_at == rotated.refresh_expires_at == (int(seconds) + 100) * 1000


async def test_how_long_a_session_lasts_is_a_setting(valkey: Valkey, issuer: Issuer) -> None:
    async with office(valkey.url, issuer, refresh_seconds=60) as brief:
        pair = await brief.begin()
        rotated = await brief.rotate(pair.refresh_token)
        who = identity(brief, pair)

    assert pair.refresh_expires_at == (who.issued_at + 60) * 1000
    assert rotated.refresh_expires_at == pair.refresh_expires_at
    assert rotated.expires_at <= rotated.refresh_expires_at


# --- rights --------------------------------------------------------------------------------


async def test_other_rights_are_in_the_next_tokens(shared: Office) -> None:
    pair = await shared.begin(roles=["member"], rooms={"general": "rw"})
    family = await shared.sessions.entitle(pair.session, roles=["guest"])
    second = await shared.rotate(pair.refresh_token)
    await shared.sessions.entitle(pair.session, rooms={"news": "r"})
    third = await shared.rotate(second.refresh_token)
    await shared.sessions.entitle(pair.session, without_rooms=True)
    fourth = await shared.rotate(third.refresh_token)
    whos = [identity(shared, each) for each in (pair, second, third, fourth)]

    assert family is not None
    assert (family.roles, family.rooms) == (("guest",), {"general": "rw"})
    assert [who.roles for who in whos] == [("member",), ("guest",), ("guest",), ("guest",)]
    assert [who.rooms for who in whos] == [
        {"general": "rw"},
        {"general": "rw"},
        {"news": "r"},
        None,
    ]


async def test_rights_taken_away_while_a_token_is_traded_are_not_in_the_answer(
    shared: Office, valkey: Valkey, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between judging the family and storing its next state."""
    pair = await shared.begin(roles=["admin"])
    call = shared.call

    async def interrupted(command: list[Argument]) -> Reply:
        if command[0] == "EVALSHA":
            async with office(valkey.url, issuer) as other:
                await other.sessions.entitle(pair.session, roles=["guest"])
        return await call(command)

    monkeypatch.setattr(shared.sessions, "_call", interrupted)
    answer = await shared.rotate(pair.refresh_token)

    assert identity(shared, answer).roles == ("guest",)


async def test_no_rooms_at_all_is_not_the_same_as_no_claim(shared: Office) -> None:
    pair = await shared.begin(rooms={"general": "rw"})
    await shared.sessions.entitle(pair.session, rooms={})

    assert identity(shared, await shared.rotate(pair.refresh_token)).rooms == {}


async def test_nobody_is_entitled_in_a_session_that_is_not(shared: Office) -> None:
    pair = await shared.begin()
    await shared.revoke(Kind.SESSION, pair.session)

    assert await shared.sessions.entitle(pair.session, roles=["admin"]) is None
    assert await shared.sessions.entitle(unique("s"), roles=["admin"]) is None


async def test_nobody_is_entitled_in_a_session_that_ended_with_its_users_others(
    shared: Office, user: str
) -> None:
    before = await shared.begin(user)
    await shared.revoke(Kind.USER, user)
    after = await shared.begin(user)

    assert await shared.sessions.entitle(before.session, roles=["admin"]) is None
    assert await shared.sessions.entitle(after.session, roles=["admin"]) is not None


async def test_rights_that_no_token_can_say_change_nothing(shared: Office) -> None:
    pair = await shared.begin()
    with pytest.raises(ValueError, match="roles"):
        await shared.sessions.entitle(pair.session, roles=["r"] * 33)

    assert identity(shared, await shared.rotate(pair.refresh_token)).roles == ("member",)


# --- the store -----------------------------------------------------------------------------


async def test_an_emptied_store_knows_no_token_and_has_another_salt(own: Office) -> None:
    pair = await own.begin()
    salt = await own.sessions.salt()
    await own.call(["FLUSHALL"])
    other = await own.sessions.salt()

    assert other != salt
    assert len(salt) == len(other) == 64
    for each in (salt, other):  # a worker may not have noticed yet
        with pytest.raises(TokenRefused) as refused:
            await own.sessions.rotate(pair.refresh_token, each)
        assert refused.value.code is ReplyCode.TOKEN_INVALID


async def test_all_agree_on_the_first_salt(own: Office) -> None:
    salts = await asyncio.gather(*(own.sessions.salt() for _ in range(10)))

    assert len(set(salts)) == 1


async def dump(office: Office) -> bytes:
    """Every key with everything in it."""
    read = {
        b"string": lambda key: ["GET", key],
        b"hash": lambda key: ["HGETALL", key],
        b"stream": lambda key: ["XRANGE", key, "-", "+"],
    }
    found: list[object] = []
    for key in await office.call(["KEYS", "*"]):
        kind = await office.call(["TYPE", key])
        found += [key, await office.call(read[kind](key))]
    return repr(found).encode()


async def test_nothing_that_is_stored_can_be_used_as_a_token(own: Office, user: str) -> None:
    pairs = [await own.begin(user), await own.begin(user)]
    pairs.append(await own.rotate(pairs[0].refresh_token))
    pairs.append(await own.rotate(pairs[0].refresh_token))
    await own.revoke(Kind.SESSION, pairs[1].session)
    await own.revoke(Kind.USER, user)
    stored = await dump(own)

    assert pairs[0].session.encode() in stored
    for pair in pairs:
        for token in (pair.refresh_token, pair.access_token):
            assert token.rpartition(".")[2].encode() not in stored
    assert own.issuer.key not in stored


async def test_a_genuine_token_newer_than_a_restored_store_rotates(shared: Office) -> None:
    pairs = [await shared.begin()]
    for _ in range(4):
        pairs.append(await shared.rotate(pairs[-1].refresh_token))
    await shared.change(pairs[0].session, generation=2, replays=0)

    successor = await shared.rotate(pairs[-1].refresh_token)
    again = await shared.rotate(pairs[-1].refresh_token)

    assert tuple(again) == tuple(successor)
    assert (await shared.state(pairs[0].session))["generation"] == "6"
    assert await refusal(shared, pairs[1].refresh_token) is ReplyCode.TOKEN_REVOKED


async def test_a_forged_token_is_refused_without_asking_the_store(
    own: Office, own_valkey: Valkey
) -> None:
    pair = await own.begin()
    salt = await own.sessions.salt()
    forged = pair.refresh_token.replace(".1.", ".2.")
    own_valkey.kill()

    with pytest.raises(TokenRefused) as refused:
        await own.sessions.rotate(forged, salt)
    assert refused.value.code is ReplyCode.TOKEN_INVALID
    with pytest.raises(StoreUnavailable):
        await own.sessions.rotate(pair.refresh_token, salt)


async def test_a_family_that_vanished_is_no_session(shared: Office) -> None:
    pair = await shared.begin()
    await shared.call(["DEL", keys.family(pair.session)])

    assert await refusal(shared, pair.refresh_token) is ReplyCode.TOKEN_INVALID


async def test_a_login_between_two_revocations_of_one_second_is_ended_by_the_second(
    shared: Office,
) -> None:
    """And one after both is not, though it may have to wait for the next second."""
    user = unique("user")
    for _ in range(3):
        await shared.revoke(Kind.USER, user)
        between = await shared.begin(user)
        await shared.revoke(Kind.USER, user)
        with pytest.raises(TokenRefused) as refused:
            await shared.rotate(between.refresh_token)
        after = await shared.begin(user)
        await shared.rotate(after.refresh_token)

        assert refused.value.code is ReplyCode.TOKEN_REVOKED


async def test_the_sixth_replay_after_a_revocation_is_revoked_not_too_often(
    shared: Office,
) -> None:
    user = unique("user")
    first = await shared.begin(user)
    await shared.rotate(first.refresh_token)
    for _ in range(5):
        await shared.rotate(first.refresh_token)
    await shared.revoke(Kind.USER, user)

    with pytest.raises(TokenRefused) as refused:
        await shared.rotate(first.refresh_token)

    assert refused.value.code is ReplyCode.TOKEN_REVOKED
