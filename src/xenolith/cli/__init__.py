"""The `xenolith` and `xl` commands.

Loading a command takes a moment, in which Ctrl-C must not show where Python was: it ends the program with the status
that shells give to an interrupted one. Then `process.run` takes over. Only modules that Python is born with are needed
for that, so that it is in force at once.
"""

import _signal  # type: ignore[import-not-found]
import sys
from posix import _exit

INTERRUPTED = 128 + 2  # SIGINT
PIPE_CLOSED = 128 + 13  # SIGPIPE

_program = sys.argv[0].rpartition("/")[2] if sys.argv else ""
if _program in ("xl", "xenolith", "-c", "-m") and _signal.getsignal(2) is _signal.default_int_handler:
    _signal.signal(2, lambda number, frame: _exit(INTERRUPTED))
