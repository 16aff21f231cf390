"""Frames of an agent's channel: any bytes survive, and nothing that is none gets through."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenolith.toolstack.agent.frames import MOST_BODY, Decoder, Frame, FrameError, decode, encode

FRAMES = st.builds(
    Frame, st.integers(0, 255), st.integers(0, 65535), st.binary(max_size=600) | st.just(b"\0\1" * (MOST_BODY // 2))
)


@given(st.lists(FRAMES, max_size=5), st.integers(1, 700))
def test_what_is_sent_comes_in_whatever_pieces(sent: list[Frame], size: int) -> None:
    line = b"".join(map(encode, sent))
    decoder = Decoder()
    assert [frame for at in range(0, len(line), size) for frame in decoder.feed(line[at : at + size])] == sent


@pytest.mark.parametrize("length", [249, 250, 254, 255, 508, 509, MOST_BODY])
def test_runs_of_the_longest_kind_survive(length: int) -> None:
    frame = Frame(1, 0x101, b"x" * length)
    coded = encode(frame)
    assert coded.count(b"\0") == 1
    assert decode(coded[:-1]) == frame


@given(FRAMES, st.data())
def test_a_frame_that_was_cut_off_is_none_and_the_next_one_comes(frame: Frame, data: st.DataObject) -> None:
    coded = encode(frame)
    cut = coded[: data.draw(st.integers(1, len(coded) - 2))] if len(coded) > 2 else b"\1"
    decoder = Decoder()
    assert list(decoder.feed(cut + b"\0" + encode(Frame(2, 3, b"next")))) == [None, Frame(2, 3, b"next")]


@given(st.binary(max_size=3000))
def test_any_bytes_at_all_are_frames_or_none(line: bytes) -> None:
    for frame in Decoder().feed(line):
        assert frame is None or isinstance(frame, Frame)
    with suppress(FrameError):
        decode(line.replace(b"\0", b"\1"))


def test_a_frame_without_an_end_is_not_kept() -> None:
    decoder = Decoder()
    for _ in range(100):
        assert not list(decoder.feed(b"x" * 10_000))
    assert list(decoder.feed(b"\0")) == [None]
    assert len(decoder._held) == 0
