"""The command line: what is completed, and what is refused in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from load.options import Options, parse
from load.scenarios import SCENARIOS


def test_what_is_not_given_follows_from_what_is() -> None:
    options = parse(["fanout", "--clients", "200"])

    assert (options.rooms, options.publishers, options.rate, options.window) == (20, 20, 40, 0)
    assert options.sockets == 220
    assert options.base == "http://127.0.0.1:8000"


def test_a_window_takes_the_place_of_a_rate() -> None:
    options = parse(["fanout", "--window", "8"])

    assert (options.rate, options.window) == (0, 8)


def test_chat_has_no_publishers_and_connect_no_rooms() -> None:
    chat, connect = parse(["chat"]), parse(["connect"])

    assert (chat.publishers, chat.rooms, chat.rate) == (0, 10, 50)
    assert (connect.publishers, connect.rooms) == (0, 0)


def test_there_are_not_more_processes_than_clients() -> None:
    assert parse(["connect", "--clients", "1", "--processes", "4"]).processes == 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["juggle"], "invalid choice: 'juggle'"),
        (["fanout", "--clients", "0"], "must be more than 0"),
        (["fanout", "--clients", "many"], "invalid number value: 'many'"),
        (["fanout", "--share", "1.5"], "at most 1"),
        (["fanout", "--url", "http://127.0.0.1/"], "must be like ws://"),
        (["fanout", "--url", "ws://127.0.0.1/?token=x"], "must be like ws://"),
        (["fanout", "--rate", "5", "--window", "5"], "a closed loop"),
        (["chat", "--window", "5"], "not in chat"),
        (["fanout", "--require", "speed>1"], "there is no 'speed'"),
        (["connect", "--clients", "900000", "--processes", "1"], "ulimit -n"),
        (["revoke"], "CHATSERVER_CONTROL_KEY"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_says_why(
    words: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CHATSERVER_CONTROL_KEY", raising=False)
    with pytest.raises(SystemExit) as ended:
        parse(words)

    assert ended.value.code == 2
    assert complaint in " ".join(capsys.readouterr().err.split())


def test_the_help_names_every_scenario_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])

    text = " ".join(capsys.readouterr().out.split())
    for name, scenario in SCENARIOS.items():
        assert f"{name}: {scenario.summary}" in text
    assert "1 a requirement was not met" in text


def test_the_page_names_every_scenario() -> None:
    page = (Path(__file__).parents[2] / "docs" / "loadtest.md").read_text()

    for name in SCENARIOS:
        assert f"scripts/loadtest {name} " in page


def chat_rooms(index: int) -> list[str]:
    return SCENARIOS["chat"].rooms_of(OPTIONS, index)


OPTIONS: Options = parse(["chat", "--clients", "600", "--rooms", "30"])


def test_the_rooms_of_a_chat_are_of_many_sizes() -> None:
    sizes = [0] * OPTIONS.rooms
    for index in range(OPTIONS.clients):
        rooms = chat_rooms(index)
        assert 1 <= len(rooms) == len(set(rooms)) <= 3
        for room in rooms:
            sizes[int(room.rpartition("-")[2])] += 1

    assert sizes[0] > 5 * sizes[-1] > 0


def test_every_process_puts_a_client_into_the_same_rooms() -> None:
    assert chat_rooms(17) == chat_rooms(17)
