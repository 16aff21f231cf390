"""What of a domain's memory has to be said, so that whoever has all that was said before has all of it.

While the domain runs, the pages that were written to since they were said last; when it stands still, the rest.  Which
those are says the host's kernel (`write_tracking`).  A frame that was given back and is empty again is said as zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from xenolith.abi.x86 import PAGE_SHIFT
from xenolith.dom0.migration.save import filled, runs, write_frames

if TYPE_CHECKING:
    import numpy.typing as npt

    from xenolith.dom0.migration.stream import Writer
    from xenolith.hypervisor.control import Control, StillDomain
    from xenolith.machine.memory import Frames


class Changes:
    """Follows one domain. Close it: writing costs the domain a little more until then."""

    def __init__(self, control: Control, domid: int) -> None:
        """Raises NotTracked."""
        self._control = control
        self._domid = domid
        self._tracking = control.track_writes(domid)
        self._memory = memoryview(b"")
        self._said: npt.NDArray[np.bool_] | None = None  # of each frame, whether what was said of it is not all zeros
        self._looked_at: npt.NDArray[np.bool_] | None = None

    @property
    def follows(self) -> bool:
        """Something was said, from which to go on."""
        return self._said is not None

    def look(self) -> Frames:
        """The frames to be said now, while the domain runs: all at first. Raises NotTracked."""
        if self._said is None:
            mfns, self._memory = self._control.running_frames(self._domid)
            self._said = np.zeros(len(self._memory) >> PAGE_SHIFT, dtype=bool)
            return np.concatenate([mfns[:0], *(filled(self._memory, *run) for _, run in runs(mfns))])
        self._looked_at = written = self._tracking.written()
        mfns, self._memory = self._control.running_frames(self._domid, written)
        others = written.copy()
        others[mfns] = False
        self._tracking.put_back(others)  # it may be about to get one of them
        return mfns

    def put_back(self) -> None:
        """What `look` found last is to be found once more."""
        if self._looked_at is not None:
            self._tracking.put_back(self._looked_at)

    def say(self, writer: Writer, mfns: Frames) -> None:
        """Write these frames as they are at this moment."""
        assert self._said is not None
        self._said[mfns] = True
        write_frames(writer, self._memory, mfns)

    def say_rest(self, writer: Writer, still: StillDomain) -> int:
        """Write what is left to be said of a domain that stands still; how many pages. Raises NotTracked."""
        own, populated = still.frames.mfns, still.populated
        if self._said is None:
            self._said = np.zeros(len(populated), dtype=bool)
            wanted = populated[own]
            self._tracking.written()
        else:
            wanted = self._tracking.written()[own] | (self._said[own] & ~populated[own])
        mfns = own[wanted]
        self._said[mfns] = populated[mfns]
        write_frames(writer, still.memory, mfns)
        return len(mfns)

    def close(self) -> None:
        """Follow it no more."""
        self._tracking.close()
