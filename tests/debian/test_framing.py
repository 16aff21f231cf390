"""A command's output crosses the console byte for byte, whatever it contains and however it arrives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xenolith.debian.framing import END_OF_INPUT, CommandOutput, input_chunk, new_nonce

NONCE = "0123456789abcdef"
BEGIN = b"\x1e" + NONCE.encode() + b" begin\n"
BEGIN_WITH_SYSRQ = b"\x1e" + NONCE.encode() + b" begin sysrq\n"
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
    begin=st.sampled_from([BEGIN, BEGIN_WITH_SYSRQ]),
)
def test_output_and_status_are_exact_however_the_console_is_cut(
    boot: bytes, output: bytes, status: int, after: bytes, cuts: list[int], begin: bytes
) -> None:
    stream = boot + begin + output + END + str(status).encode() + b"\n" + after
    received, decoder = _feed(stream, cuts)
    assert received == output
    assert decoder.exit_status == status
    assert decoder.preamble == boot
    assert decoder.sysrq is (begin == BEGIN_WITH_SYSRQ)


def _as_linux_takes_it(console: bytes) -> bytes:
    """What arrives at a terminal whose console has magic SysRq keys: drivers/tty/hvc/hvc_console.c in Linux."""
    arrived, pressed = bytearray(), False
    for byte in console:
        if byte == 0x0F:
            pressed = not pressed
            if pressed:
                continue
        elif pressed:
            raise AssertionError("a magic SysRq key")
        arrived.append(byte)
        pressed = False
    return bytes(arrived)


@given(
    pieces=st.lists(st.one_of(st.binary(min_size=1), st.text("\x0f0\n", min_size=1).map(str.encode))),
    sysrq=st.booleans(),
)
def test_input_arrives_byte_for_byte_with_its_end(pieces: list[bytes], sysrq: bool) -> None:
    console = b"".join(input_chunk(piece, sysrq=sysrq) for piece in pieces) + END_OF_INPUT
    arrived = _as_linux_takes_it(console) if sysrq else console
    received = b""
    while True:
        length, _, arrived = arrived.partition(b"\n")
        if not int(length):
            break
        received, arrived = received + arrived[: int(length)], arrived[int(length) :]
    assert received == b"".join(pieces)
    assert arrived == b""


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
