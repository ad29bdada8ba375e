"""Tokens from a file: what it may hold, and what is said if it does not do."""

from __future__ import annotations

import json
import re
from base64 import urlsafe_b64decode
from pathlib import Path

import pytest

from load.credentials import Listed, Pairs, TokenError, from_file, from_secret

PAIR = {"access_token": "a", "refresh_token": "r", "session": "s"}


def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "tokens"
    path.write_text(text)
    return path


async def test_a_list_of_tokens_is_shared_in_turn(tmp_path: Path) -> None:
    listed = from_file(file(tmp_path, "one\ntwo\n\n"), "http://h", 5, fresh=False)

    assert isinstance(listed, Listed)
    assert [await listed.token(n) for n in range(3)] == ["one", "two", "one"]
    with pytest.raises(TokenError):
        await listed.renew(0, None)


@pytest.mark.parametrize("indent", [None, 2])
async def test_pairs_may_be_printed_in_any_way(tmp_path: Path, indent: int | None) -> None:
    text = "\n".join(json.dumps(PAIR | {"access_token": f"a{n}"}, indent=indent) for n in range(3))
    pairs = from_file(file(tmp_path, text), "http://h", 3, fresh=True)

    assert isinstance(pairs, Pairs)
    assert [await pairs.token(n) for n in range(3)] == ["a0", "a1", "a2"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty"),
        ("one\ntwo\n", "must hold pairs"),
        (json.dumps(PAIR), "holds 1 pairs for 2 clients"),
        ('{"access_token": "a"}', "is not made of JSON objects"),
        (json.dumps(PAIR) + "rest", "is not made of JSON objects"),
    ],
)
def test_a_file_that_does_not_do_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(TokenError, match=re.escape(complaint)):
        from_file(file(tmp_path, text), "http://h", 2, fresh=True)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenError, match="nowhere cannot be read"):
        from_file(tmp_path / "nowhere", "http://h", 1, fresh=False)


async def test_each_client_is_a_user_of_its_own_and_keeps_its_session(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHATSERVER_SECRET", "tomato-4f1c9a7be2d05836-9c8e3b71f0a26d54")
    minted = from_secret("run")
    tokens = [await minted.token(0), await minted.renew(0, None), await minted.token(1)]
    first, again, other = (minted._keyring.verify(token, now=_issued(token)) for token in tokens)

    assert (first.user, first.session) == (again.user, again.session)
    assert first.user != other.user
    assert first.session != other.session


def _issued(token: str) -> float:
    return float(json.loads(urlsafe_b64decode(token.split(".")[1] + "=="))["iat"])
