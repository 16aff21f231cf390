"""Layout of the shared rings of split devices (public/io/ring.h).

A ring's first 64 bytes hold four free-running 32-bit counters; entries follow, as many as the largest power of two that
fits.  Entry number i, request and later its response, is at i modulo their number.
"""

from typing import Final

# The counters, as 32-bit words of the ring.
REQ_PROD: Final = 0  # moved by the front-end
REQ_EVENT: Final = 1  # the front-end notifies when REQ_PROD gets here
RSP_PROD: Final = 2  # moved by the back-end
RSP_EVENT: Final = 3  # the back-end notifies when RSP_PROD gets here
ENTRIES: Final = 64  # bytes before the first entry
