from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatserver.client.editor import Editor, Key, width

LEFT, RIGHT, HOME, END, DELETE = "\x1b[D", "\x1b[C", "\x1b[H", "\x1b[F", "\x1b[3~"


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ("hello", "hello"),
        ("helo" + LEFT + "l", "hello"),
        ("ello" + HOME + "h" + END + "!", "hello!"),
        ("\x01a\x05b", "ab"),
        ("hex" + LEFT + LEFT + RIGHT + "l\x0b", "hel"),
        ("helloo\x7f", "hello"),
        ("hello\x08", "hell"),
        ("one two  \x17", "one "),
        ("one\x15two", "two"),
        ("xhello" + HOME + DELETE, "hello"),
        ("xhello" + HOME + "\x04", "hello"),
        ("a\tb", "a b"),
        ("a\x00\x07\x9bb\x1b[99~\x1bqc", "abc"),
        ("\x7f\x17\x15\x0b" + LEFT + RIGHT + DELETE, ""),
        ("na\u0308h שלום 👍", "na\u0308h שלום 👍"),
    ],
)
def test_keys_edit_the_line(keys: str, text: str) -> None:
    at_once, one_by_one = Editor(), Editor()
    assert at_once.feed(keys) == []
    for key in keys:
        one_by_one.feed(key)

    assert at_once.text == one_by_one.text == text


def test_enter_gives_the_line_and_begins_another() -> None:
    editor = Editor()

    assert editor.feed("one\rtwo\n\nth") == ["one", "two", ""]
    assert editor.text == "th"


def test_ctrl_d_ends_the_input_on_an_empty_line_only() -> None:
    editor = Editor()

    assert editor.feed("a\x04") == []
    assert editor.feed("\x7f\x04") == [Key.END]
    assert editor.feed("\x0c") == [Key.REDRAW]


def test_a_long_line_shows_where_the_cursor_is() -> None:
    editor = Editor()
    editor.feed("abcdefghij")

    assert editor.view(20) == ("abcdefghij", 0)
    assert editor.view(6) == ("fghij", 0)
    editor.feed(HOME)
    assert editor.view(6) == ("abcde", 5)
    editor.feed(RIGHT + "漢")
    assert editor.view(6) == ("a漢bc", 2)


@given(st.text(), st.integers(2, 30))
def test_whatever_is_typed_fits_and_has_no_control_character(keys: str, columns: int) -> None:
    editor = Editor()
    lines = [found for found in editor.feed(keys) if isinstance(found, str)]
    text, behind = editor.view(columns)

    assert sum(map(width, text)) < columns
    assert 0 <= behind < columns
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in "".join(lines) + text)
