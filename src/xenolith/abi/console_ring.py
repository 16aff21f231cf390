"""Layout of the console ring page (public/io/console.h: struct xencons_interface).

Two byte rings, seen from the guest: `in` is what it reads, `out` what it writes.  Indices are free-running 32-bit
counters; a ring's byte number i is at i modulo its size.
"""

from typing import Final

IN: Final = 0
IN_SIZE: Final = 1024
OUT: Final = 1024
OUT_SIZE: Final = 2048

# The indices, as 32-bit words of the page.
IN_CONS: Final = 3072 // 4  # moved by the guest
IN_PROD: Final = 3076 // 4  # moved by dom0
OUT_CONS: Final = 3080 // 4  # moved by dom0
OUT_PROD: Final = 3084 // 4  # moved by the guest
