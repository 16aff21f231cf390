"""A command's output crosses the console byte for byte, whatever it contains and however it arrives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xenolith.debian.framing import CommandOutput, new_nonce

NONCE = "0123456789abcdef"
BEGIN = b"\x1e" + NONCE.encode() + b" begin\n"
END = b"\x1e" + NONCE.encode() + b" exit "

# Output that is arbitrary, and output made of the very pieces that marks are made of.
_mark_pieces = st.sampled_from(
    [b"\x1e", NONCE.encode(), b" exit ", b" begin\n", b"0", b"42", b"999", b"\n", BEGIN, END]
)
_output = st.one_of(st.binary(max_size=300), st.lists(_mark_pieces, max_size=12).map(b"".join)).filter(
    lambda output: CommandOutput(NONCE)._end.search(output) is None
)


def _feed(stream: bytes, cuts: list[int]) -> tuple[bytes, CommandOutput]:
    decoder = CommandOutput(NONCE)
    received, start = b"", 0
    for cut in [*sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]:
        received += decoder.feed(stream[start:cut])
        start = cut
    return received + decoder.finish(), decoder


@given(
    boot=st.binary(max_size=200).filter(lambda boot: b"\x1e" not in boot),
    output=_output,
    status=st.integers(0, 255),
    after=st.binary(max_size=50),
    cuts=st.lists(st.integers(0, 10_000), max_size=20),
)
def test_output_and_status_are_exact_however_the_console_is_cut(
    boot: bytes, output: bytes, status: int, after: bytes, cuts: list[int]
) -> None:
    stream = boot + BEGIN + output + END + str(status).encode() + b"\n" + after
    received, decoder = _feed(stream, cuts)
    assert received == output
    assert decoder.exit_status == status
    assert decoder.preamble == boot


@given(output=_output, cuts=st.lists(st.integers(0, 10_000), max_size=20))
def test_a_domain_that_dies_midway_loses_no_output_and_has_no_status(output: bytes, cuts: list[int]) -> None:
    received, decoder = _feed(BEGIN + output, cuts)
    assert received == output
    assert decoder.exit_status is None


@given(output=st.binary(max_size=300), cuts=st.lists(st.integers(0, 10_000), max_size=20))
def test_a_domain_that_never_starts_the_command_shows_what_it_said(output: bytes, cuts: list[int]) -> None:
    received, decoder = _feed(output, cuts)
    assert (received, decoder.started, decoder.preamble) == (b"", False, output)


@given(output=_output.filter(lambda output: b"\x1e" not in output), size=st.integers(1, 300))
def test_output_without_marks_is_not_delayed(output: bytes, size: int) -> None:
    decoder = CommandOutput(NONCE)
    decoder.feed(BEGIN)
    for start in range(0, len(output), size):
        piece = output[start : start + size]
        assert decoder.feed(piece) == piece


def test_the_marks_of_another_run_are_output() -> None:
    foreign = b"\x1e" + new_nonce().encode() + b" exit 0\n"
    received, decoder = _feed(BEGIN + foreign + END + b"3\n", [])
    assert (received, decoder.exit_status) == (foreign, 3)
