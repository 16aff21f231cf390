"""The 9P2000.L protocol and its Xen transport as data (9p(5) of Plan 9; Linux: include/net/9p/9p.h; public/io/9pfs.h).

A message is its size, type and tag, then fields.  A request's type is even and its answer's is one more; any request
may be answered with RLERROR instead.
"""

from struct import Struct
from typing import Final

VERSION: Final = b"9P2000.L"
NOTAG: Final = 0xFFFF  # of TVERSION
MAXWELEM: Final = 16  # names in a TWALK
HEADER: Final = Struct("<IBH")
IOHDRSZ: Final = 24  # what a TREAD, TWRITE or TREADDIR has at most besides its data

RLERROR: Final = 7
TSTATFS: Final = 8
TLOPEN: Final = 12
TLCREATE: Final = 14
TSYMLINK: Final = 16
TMKNOD: Final = 18
TRENAME: Final = 20
TREADLINK: Final = 22
TGETATTR: Final = 24
TSETATTR: Final = 26
TXATTRWALK: Final = 30
TXATTRCREATE: Final = 32
TREADDIR: Final = 40
TFSYNC: Final = 50
TLOCK: Final = 52
TGETLOCK: Final = 54
TLINK: Final = 70
TMKDIR: Final = 72
TRENAMEAT: Final = 74
TUNLINKAT: Final = 76
TVERSION: Final = 100
TATTACH: Final = 104
TFLUSH: Final = 108
TWALK: Final = 110
TREAD: Final = 116
TWRITE: Final = 118
TCLUNK: Final = 120
TREMOVE: Final = 122

FIELDS: Final = {
    TSTATFS: "fid",
    TLOPEN: "fid flags:4",
    TLCREATE: "fid name flags:4 mode:4 gid:4",
    TSYMLINK: "fid name target:s gid:4",
    TMKNOD: "fid name mode:4 major:4 minor:4 gid:4",
    TRENAME: "fid dfid name",
    TREADLINK: "fid",
    TGETATTR: "fid mask:8",
    TSETATTR: "fid valid:4 mode:4 uid:4 gid:4 size:8 atime:8 atime_ns:8 mtime:8 mtime_ns:8",
    TXATTRWALK: "fid newfid attribute:s",
    TXATTRCREATE: "fid attribute:s size:8 flags:4",
    TREADDIR: "fid offset:8 count:4",
    TFSYNC: "fid datasync:4",
    TLOCK: "fid type:1 flags:4 start:8 length:8 process:4 client:s",
    TGETLOCK: "fid type:1 start:8 length:8 process:4 client:s",
    TLINK: "dfid fid name",
    TMKDIR: "fid name mode:4 gid:4",
    TRENAMEAT: "fid name dfid newname",
    TUNLINKAT: "fid name flags:4",
    TVERSION: "msize:4 version:s",
    TATTACH: "newfid afid:4 user:s tree:s uid:4",
    TFLUSH: "oldtag:2",
    TWALK: "fid newfid names",
    TREAD: "fid offset:8 count:4",
    TWRITE: "fid offset:8 data",
    TCLUNK: "fid",
    TREMOVE: "fid",
}
"""The fields of each request: of so many bytes, or s: a string (its length in 2 bytes), data: the same with 4 bytes.

fid, dfid (in use) and newfid have 4 bytes, name is a string, names are strings behind their number in 2 bytes.
"""

RGETATTR_OWNER: Final = HEADER.size + 8 + 13 + 4  # where its uid and gid are, behind what is valid, qid and mode

P9_DOTL_ACCMODE: Final = 0o3
P9_DOTL_CREATE: Final = 0o100
P9_DOTL_EXCL: Final = 0o200
P9_DOTL_TRUNC: Final = 0o1000
P9_DOTL_APPEND: Final = 0o2000
P9_DOTL_NONBLOCK: Final = 0o4000
P9_DOTL_DSYNC: Final = 0o10000
P9_DOTL_LARGEFILE: Final = 0o100000
P9_DOTL_DIRECTORY: Final = 0o200000
P9_DOTL_NOFOLLOW: Final = 0o400000
P9_DOTL_NOATIME: Final = 0o1000000
P9_DOTL_SYNC: Final = 0o4000000

P9_LOCK_SUCCESS: Final = 0
P9_LOCK_TYPE_UNLCK: Final = 2

# --- the ring of Xen's transport: words of its first frame, and where its data is

IN_CONS: Final = 0
IN_PROD: Final = 1
OUT_CONS: Final = 16
OUT_PROD: Final = 17
RING_ORDER: Final = 32
FIRST_REF: Final = 33  # of 1 << order frames: "in", to the guest, the first half; "out" the other
