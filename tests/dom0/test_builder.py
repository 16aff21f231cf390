"""What the builder's initial map lets a kernel do before it has one of its own."""

from __future__ import annotations

import pytest

from kernels import ENTRY, elf, linux_notes
from xenolith.dom0.builder import _executable_pages
from xenolith.dom0.image import load_image

_TEXT, _DATA = (0x1000000, b"text", 0x2000), (0x1002000, b"data", 0x3000)
R, W, X = 4, 2, 1


@pytest.mark.parametrize(
    ("entry", "executable"),
    [(ENTRY, range(0x1000, 0x1002)), (ENTRY + 0x2100, range(0x1000, 0x1005))],
    ids=["in its text", "in its data, as Linux 6.18 and later"],
)
def test_linux_executes_what_its_headers_say_and_where_it_is_entered(entry: int, executable: range) -> None:
    image = load_image(elf([_TEXT, _DATA], linux_notes(entry=entry), flags=[R | X, R | W]))
    assert list(_executable_pages(image, 0x2000).nonzero()[0]) == list(executable)


def test_another_kernel_may_execute_everywhere() -> None:
    image = load_image(elf([_TEXT], linux_notes(guest_os="Mini-OS"), flags=[R | X]))
    assert _executable_pages(image, 0x1100).all()
