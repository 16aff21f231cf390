"""A stock Debian guest, obtained through the machine's own package manager, without root.

The guest is what Debian ships and nothing else: the kernel image of a `linux-image-*` package and the
statically linked shell and tools of `busybox-static`. `apt-get download` fetches both, so they are checked
against the archive's signed index exactly as for an installation (apt-secure(8)); no file of the system
changes. Where they are installed already, the installed files are copied. Where the system's package lists are
absent or out of date, lists of our own are fetched from the system's sources with the system's keys into our
cache directory (apt.conf(5): Dir::State, Dir::Cache).

A kernel of another suite than the machine's ("trixie", "sid") comes from that suite of the same archive: the system's
sources with the suite's name replaced, so with the system's mirror and keys, and lists of our own.

A package is opened with the standard library: deb(5) is an ar archive holding a compressed tar. Debian's newer
linux-image packages hold no kernel: that is in linux-binary-*, its modules in linux-modules-*, on which they depend.

Everything is kept in `$XDG_CACHE_HOME/xenolith` (`~/.cache/xenolith`):

    debian/<package>_<version>/vmlinuz    the kernel image as packaged
    debian/<package>_<version>/vmlinux    the ELF image inside it, decompressed once
    debian/<package>_<version>/modules/   those of its modules that a guest can use (debian/modules.py), once needed
    debian/<package>_<version>/busybox
    debian/<query>.json                   which package answered a query, so that no later run asks apt
    apt/                                  package lists of our own, when the system has none
    apt-<suite>/                          those of another suite

Files appear under their final names complete (written aside, then renamed) and one lock is held while
something is obtained, so any number of runs may ask at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import io
import json
import logging
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, cast
from urllib.parse import quote

import zstandard

from xenolith.dom0.image import ImageError, elf_of_image

DEFAULT_KERNEL = "linux-image-amd64"
BUSYBOX_PACKAGE = "busybox-static"

_SERIES = re.compile(r"(?P<series>\d+\.\d+)(?P<flavour>-cloud|-rt)?")
_SUITE_NAMES = (
    r"(?:bullseye|bookworm|trixie|forky|duke|oldstable|stable|testing|sid|unstable|experimental)(?:-backports)?"
)
_SUITE = re.compile(rf"(?P<suite>{_SUITE_NAMES})(?P<flavour>-cloud|-rt)?")
_PACKAGE_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_KERNEL_FILE = re.compile(r"\./boot/vmlinuz-.+|\./(?:usr/)?lib/modules/[^/]+/vmlinuz")
_WAYS_OUT = (
    "install the packages linux-image-amd64 and busybox-static, or pass a kernel of your own with --kernel "
    "(a bzImage or ELF built for Xen PV) and its --ramdisk"
)


_log = logging.getLogger(__name__)  # what takes seconds is told at the level INFO


class GuestUnavailable(Exception):
    """The guest cannot be obtained; the message says what failed and what to do."""


@dataclass(frozen=True)
class DebianGuest:
    """Where the parts of a Debian guest are on this machine. `suite` is empty for the machine's own."""

    package: str
    version: str
    suite: str
    kernel: Path
    elf: Path
    busybox: Path


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/xenolith`, by the XDG Base Directory Specification (a relative value is ignored)."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
    return base / "xenolith"


def obtain(kernel: str = DEFAULT_KERNEL, *, cache: Path | None = None) -> DebianGuest:
    """The Debian guest with this kernel, from the cache or else from the archive.

    `kernel` is a series ("6.1", "6.12"), which stands for its newest kernel that apt knows, a suite of Debian's ("sid",
    "trixie", "bookworm-backports"), which stands for the newest kernel there, either with the flavour -cloud or -rt, or
    the name of a package ("linux-image-6.1.0-56-amd64", or one that depends on a kernel, such as "linux-image-amd64").
    Raises GuestUnavailable.
    """
    if not _SERIES.fullmatch(kernel) and not _PACKAGE_NAME.fullmatch(kernel):
        raise GuestUnavailable(
            f"{kernel!r} is not a kernel version such as 6.1, 6.12 or 6.1-cloud, a suite such as trixie or sid, "
            "nor a Debian package name"
        )
    store = (cache or cache_directory()) / "debian"
    found = _recall(store, kernel)
    if found is not None:
        return found
    with locked(store):
        return _recall(store, kernel) or _fetch(store, kernel)


def refresh(kernel: str = DEFAULT_KERNEL, *, cache: Path | None = None) -> DebianGuest:
    """As `obtain`, but asks apt again which package is the newest, with new package lists."""
    root = cache or cache_directory()
    with locked(root / "debian"):
        _apt_for(root, _suite_of(kernel)).update()
        _record_of(root / "debian", kernel).unlink(missing_ok=True)
    return obtain(kernel, cache=cache)


# --- the cache ---------------------------------------------------------------------------------------------


def _record_of(store: Path, kernel: str) -> Path:
    return store / f"{kernel}.json"


def _recall(store: Path, kernel: str) -> DebianGuest | None:
    """What an earlier run recorded for this query, provided that its files are still there."""
    try:
        record = json.loads(_record_of(store, kernel).read_text())
        guest = DebianGuest(
            package=str(record["package"]),
            version=str(record["version"]),
            suite=str(record["suite"]),
            kernel=store / str(record["kernel"]),
            elf=store / str(record["elf"]),
            busybox=store / str(record["busybox"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return guest if all(part.is_file() for part in (guest.kernel, guest.elf, guest.busybox)) else None


def _fetch(store: Path, query: str) -> DebianGuest:
    suite = _suite_of(query)
    apt = _apt_for(store.parent, suite)
    own_apt = _apt_for(store.parent, "")
    kernel_package = apt.kernel_package(query)
    [holder] = apt.parts(kernel_package, "binary")
    busybox_package = own_apt.package(BUSYBOX_PACKAGE)
    kernel_home = _unpack(store, apt, kernel_package, holder, _KERNEL_FILE, "vmlinuz")
    busybox_file = re.compile(r"\./(usr/)?bin/busybox")
    busybox_home = _unpack(store, own_apt, busybox_package, busybox_package, busybox_file, "busybox")
    if not (kernel_home / "vmlinux").is_file():
        write_whole(kernel_home / "vmlinux", _elf(kernel_home / "vmlinuz"))
    guest = DebianGuest(
        package=kernel_package.name,
        version=kernel_package.version,
        suite=suite,
        kernel=kernel_home / "vmlinuz",
        elf=kernel_home / "vmlinux",
        busybox=busybox_home / "busybox",
    )
    record = asdict(guest) | {
        part: str(getattr(guest, part).relative_to(store)) for part in ("kernel", "elf", "busybox")
    }
    write_whole(_record_of(store, query), json.dumps(record, indent=1).encode())
    return guest


def _suite_of(query: str) -> str:
    suite = _SUITE.fullmatch(query)
    return suite["suite"] if suite else ""


def _apt_for(root: Path, suite: str) -> Apt:
    return Apt(root / f"apt-{suite}", suite) if suite else Apt(root / "apt")


def kernel_package_files(guest: DebianGuest, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(path, contents) of the files wanted of the packages with the guest's kernel and its modules.

    A path is "./lib/modules/..." as the package has it. The packages are downloaded anew: 70 to 110 MB.
    Raises GuestUnavailable, also when the archive has another version by now.
    """
    store = guest.kernel.parents[1]
    apt = _apt_for(store.parent, guest.suite)
    package = apt.package(guest.package)
    if package.version != guest.version:
        raise GuestUnavailable(
            f"the archive has {package.name} {package.version} now, and no modules of {guest.version}: take the newer "
            "kernel with `xenolith guest debian --update`"
        )
    for part in apt.parts(package, "base|modules"):
        with tempfile.TemporaryDirectory(dir=store, prefix="download-") as aside:
            yield from files_of_deb(apt.download(part, Path(aside)), wanted)


def _unpack(store: Path, apt: Apt, package: Package, holder: Package, wanted: re.Pattern[str], name: str) -> Path:
    """Downloads the package that holds the one file of `package` that we use; returns the directory it is in."""
    home = store / f"{package.name}_{quote(package.version, safe='~+')}"
    if (home / name).is_file():
        return home
    content = apt.installed_file(holder, wanted)
    if content is None:
        with tempfile.TemporaryDirectory(dir=store, prefix="download-") as aside:
            content = file_of_deb(apt.download(holder, Path(aside)), wanted)
    home.mkdir(exist_ok=True)
    write_whole(home / name, content, mode=0o755)
    return home


def _elf(kernel: Path) -> bytes:
    try:
        return elf_of_image(kernel.read_bytes())
    except ImageError as error:
        raise GuestUnavailable(f"{kernel}: {error}") from error


def write_whole(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Writes a file so that it is either absent or complete under its name, whenever the run is killed."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name + ".", delete=False) as aside:
        try:
            aside.write(data)
            aside.flush()
            os.fchmod(aside.fileno(), mode)
            os.replace(aside.name, path)
        except BaseException:
            os.unlink(aside.name)
            raise


@contextlib.contextmanager
def locked(store: Path) -> Iterator[None]:
    """One obtaining run at a time; the others wait and then find the result in the cache."""
    try:
        store.mkdir(parents=True, exist_ok=True)
        lock = (store / "lock").open("w")
    except OSError as error:
        raise GuestUnavailable(
            f"cannot write the cache directory {store}: {error.strerror}; set XDG_CACHE_HOME to one that you can write"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        except OSError as error:
            raise GuestUnavailable(f"cannot keep the guest in the cache directory {store}: {error}") from error


# --- apt ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """A version of a binary package that apt can download or has installed."""

    name: str
    version: str
    depends: str


class Apt:
    """The machine's apt, asked as the user we are.

    The system's package lists are used while they know what we need. Once they do not (a container image
    with its lists removed, or a package that the archive has replaced since), `update` fetches lists of our
    own into `state`, and these are used from then on.

    With `suite` it knows that suite of Debian's archive and nothing else, by lists of our own.
    """

    def __init__(self, state: Path, suite: str = "") -> None:
        self._state = state
        self._suite = suite
        self._conf = state / "apt.conf"
        if shutil.which("apt-get") is None:
            raise GuestUnavailable(
                "no apt-get on this machine, so a Debian guest cannot be fetched with its signatures checked; pass a "
                "kernel of your own with --kernel (a bzImage or ELF built for Xen PV) and its --ramdisk"
            )

    def kernel_package(self, query: str) -> Package:
        """The package with the kernel image that a query (see `obtain`) stands for."""
        series, suite = _SERIES.fullmatch(query), _SUITE.fullmatch(query)
        if series:
            version, flavour = series["series"], series["flavour"] or ""
            return self._with_update(lambda: self._newest_of_series(version, flavour), f"kernel {query}")
        if suite:
            query = f"linux-image{suite['flavour'] or ''}-amd64"
        return self._with_update(lambda: self._behind_metapackage(query), f"package {query}")

    def package(self, name: str) -> Package:
        return self._with_update(lambda: self._show([name]).get(name), f"package {name}")

    def parts(self, kernel: Package, kinds: str) -> list[Package]:
        """The packages of these kinds (a pattern) that a kernel's package is divided into; itself if it is whole."""
        names = re.findall(rf"\blinux-(?:{kinds})-\d[a-z0-9.+~-]*", kernel.depends)
        return [self.package(name) for name in names] or [kernel]

    def installed_file(self, package: Package, wanted: re.Pattern[str]) -> bytes | None:
        """The file of the package (see `file_of_deb`), when this version is installed and we may read it."""
        about = self._run(["dpkg-query", "-W", "-f", "${db:Status-Abbrev}${Version}", package.name])
        if about.stdout != f"ii {package.version}":
            return None
        for path in self._run(["dpkg-query", "-L", package.name]).stdout.splitlines():
            if wanted.fullmatch("." + path):
                with contextlib.suppress(OSError):
                    return Path(path).read_bytes()
        return None

    def download(self, package: Package, into: Path) -> Path:
        """Downloads the package's .deb, its digest checked against the signed index by apt."""
        command = ["apt-get", "-q", "download", f"{package.name}={package.version}"]
        _log.info("fetching %s %s from Debian's archive", package.name, package.version)
        result = self._run(command, cwd=into)
        if result.returncode and not any(into.glob("*.deb")):
            # Most often the archive has moved on since the lists were fetched.
            self.update()
            result = self._run(command, cwd=into)
        debs = list(into.glob("*.deb"))
        if result.returncode or len(debs) != 1:
            raise GuestUnavailable(
                f"apt-get could not download {package.name} {package.version}: {_last_words(result)}; {_WAYS_OUT}"
            )
        return debs[0]

    def update(self) -> None:
        """Fetches package lists of our own from the system's sources, trusting the keys the system trusts."""
        for needed in ("state/lists/partial", "cache/archives/partial"):
            (self._state / needed).mkdir(parents=True, exist_ok=True)
        # An unfinished update must not count as one: the configuration takes its name only when it succeeded.
        attempt = self._state / "apt.conf.new"
        settings = _apt_conf(self._state)
        if self._suite:
            sources = self._state / "suite.sources"
            sources.write_text(self._sources_of_suite())
            settings += f'Dir::Etc::sourcelist "{sources}";\nDir::Etc::sourceparts "-";\n'
        attempt.write_text(settings)
        _log.info("fetching package lists%s", self._suite and f" of {self._suite}")
        result = self._run(["apt-get", "-q", "update"], conf=attempt)
        # One broken third-party source must not keep us from Debian's; what is missing shows when asked for.
        # Without any network apt-get still ends with status 0: whether there are lists is what tells.
        if not any((self._state / "state/lists").glob("*_Packages*")):
            raise GuestUnavailable(f"apt-get update failed: {_last_words(result)}; {_WAYS_OUT}")
        attempt.replace(self._conf)

    def _sources_of_suite(self) -> str:
        """Our suite from where the system has its own (sources.list(5)): the same mirrors, trusted by the same keys."""
        stanzas = []
        system = Path(os.devnull)  # not our own configuration
        targets = self._run(["apt-get", "indextargets", "Created-By: Packages"], conf=system).stdout
        for field in map(_fields, targets.split("\n\n")):
            release, site = field.get("Release", ""), field.get("Site", "")
            kind = release.partition("-")[2]
            if field.get("Component") != "main" or not re.fullmatch(rf"{_SUITE_NAMES}(-security)?", release):
                continue
            if kind == "security" and not re.fullmatch("sid|unstable|experimental|.*-backports", self._suite):
                suite = f"{self._suite}-security"
            elif kind == "":
                suite = self._suite
            else:
                continue
            keys = _signed_by(Path(field.get("Sourcesentry", "").rpartition(":")[0]), site)
            stanzas.append(f"Types: deb\nURIs: {site}\nSuites: {suite}\nComponents: main\nArchitectures: amd64\n{keys}")
        if not stanzas:
            raise GuestUnavailable(
                f"apt's sources (/etc/apt) name no suite of Debian's, so {self._suite} cannot be found beside it; "
                + _WAYS_OUT
            )
        return "\n".join(dict.fromkeys(stanzas))

    def _with_update(self, find: Callable[[], Package | None], what: str) -> Package:
        if self._suite and not self._conf.is_file():
            self.update()
        found = find()
        if found is None:
            self.update()
            found = find()
        if found is None:
            raise GuestUnavailable(
                f"apt's sources (/etc/apt) offer no {what} for amd64; "
                "see `apt-cache pkgnames linux-image-` for what they offer, or " + _WAYS_OUT
            )
        return found

    def _newest_of_series(self, series: str, flavour: str) -> Package | None:
        """The newest kernel of a series: its name carries the ABI number, as linux-image-6.1.0-56-amd64 does."""
        shape = re.compile(rf"linux-image-{re.escape(series)}(?:\.[0-9a-z.+~]+)(?:-\d+)?{flavour}-amd64")
        names = self._run(["apt-cache", "pkgnames", f"linux-image-{series}."]).stdout.split()
        known = self._show([name for name in names if shape.fullmatch(name)])
        newest = max(known, key=lambda name: [int(number) for number in re.findall(r"\d+", name)], default=None)
        return known[newest] if newest else None

    def _behind_metapackage(self, name: str) -> Package | None:
        """The package itself, or the kernel it depends on when it is one like linux-image-amd64."""
        package = self._show([name]).get(name)
        kernel = re.search(r"\blinux-image-\d[a-z0-9+.-]*", package.depends) if package else None
        return self._show([kernel[0]]).get(kernel[0]) if kernel else package

    def _show(self, names: list[str]) -> dict[str, Package]:
        """Those of the packages that apt could download or has installed, by name."""
        if not names:
            return {}
        shown = self._run(["apt-cache", "show", "--no-all-versions", *names]).stdout
        fields = [_fields(stanza) for stanza in shown.split("\n\n")]
        return {
            field["Package"]: Package(field["Package"], field["Version"], field.get("Depends", ""))
            for field in fields
            if (field.get("Filename") or field.get("Status") == "install ok installed")
            and field.get("Architecture") in ("amd64", "all")
        }

    def _run(
        self, command: list[str], *, cwd: Path | None = None, conf: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        conf = conf or self._conf
        if command[0].startswith("apt-") and conf.is_file():
            command = [command[0], "-c", str(conf), *command[1:]]
        environment = os.environ | {"LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
        try:
            return subprocess.run(
                command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise GuestUnavailable(f"cannot run {command[0]}: {error.strerror}; {_WAYS_OUT}") from error


def _apt_conf(state: Path) -> str:
    """apt.conf(5) for private lists. System-wide hooks are left out: they clean directories that only root may."""
    hooks = ("APT::Update::Pre-Invoke", "APT::Update::Post-Invoke", "APT::Update::Post-Invoke-Success")
    settings = {
        "Dir::State": state / "state",
        "Dir::State::lists": state / "state/lists",
        "Dir::State::status": "/var/lib/dpkg/status",
        "Dir::Cache": state / "cache",
        "Acquire::Languages": "none",
        # apt run by root would drop to user _apt, who cannot write in this user's cache directory.
        "APT::Sandbox::User": "root",
    }
    lines = [f"#clear {hook};" for hook in hooks]
    lines += [f'{name} "{value}";' for name, value in settings.items()]
    return "\n".join(lines) + "\n"


def _fields(stanza: str) -> dict[str, str]:
    """The fields of a deb822(5) stanza that have one line."""
    return dict(re.findall(r"^([A-Za-z-]+): (.*)$", stanza, re.M))


def _signed_by(sources: Path, site: str) -> str:
    """The field Signed-By for a site as one of the system's source files has it; none: all keys that apt trusts."""
    try:
        text = sources.read_text()
    except OSError:
        return ""
    if sources.suffix == ".sources":
        stanza = next((stanza for stanza in re.split(r"\n\s*\n", text) if site in stanza), "")
        found = re.search(r"^Signed-By:.*\n?(?:^[ \t].*\n?)*", stanza, re.M | re.I)
        return found[0].rstrip() + "\n" if found else ""
    line = next((line for line in text.splitlines() if site in line and not line.startswith("#")), "")
    option = re.search(r"\[.*signed-by=(\S+?)[\s\]]", line)
    return f"Signed-By: {option[1]}\n" if option else ""


def _last_words(result: subprocess.CompletedProcess[str]) -> str:
    """The errors of a failed apt run in one line, without its progress; its warnings when there is no error."""
    lines = result.stderr.splitlines()
    errors = [line[3:] for line in lines if line.startswith("E: ")] or [
        line[3:] for line in lines if line.startswith("W: ")
    ]
    return "; ".join(errors[:2]) or f"it ended with status {result.returncode}"


# --- deb(5) ------------------------------------------------------------------------------------------------


_AR_MAGIC = b"!<arch>\n"
_AR_HEADER_BYTES = 60


def file_of_deb(deb: Path, wanted: re.Pattern[str]) -> bytes:
    """The first regular file of a package whose path ("./boot/...") matches. Raises GuestUnavailable.

    The archive is read as a stream and left as soon as the file is found: a kernel package starts with /boot,
    so its 400 MB of modules stay compressed.
    """
    with contextlib.closing(files_of_deb(deb, lambda path: bool(wanted.fullmatch(path)))) as files:
        for _, content in files:
            return content
    raise GuestUnavailable(f"{deb.name} has no file {wanted.pattern}; name a package that holds a kernel image")


def files_of_deb(deb: Path, wanted: Callable[[str], bool]) -> Generator[tuple[str, bytes]]:
    """(path, contents) of the regular files of a package whose path ("./boot/...") is wanted, as they come."""
    try:
        with deb.open("rb") as archive, _data_tar(archive) as tar:
            for member in tar:
                path = member.name if member.name.startswith("./") else "./" + member.name
                content = tar.extractfile(member) if member.isreg() and wanted(path) else None
                if content is not None:
                    yield path, content.read()
    except (OSError, EOFError, ValueError, tarfile.TarError, lzma.LZMAError, zstandard.ZstdError) as error:
        raise GuestUnavailable(f"{deb.name} is not a readable Debian package: {error}") from error


def _data_tar(archive: IO[bytes]) -> tarfile.TarFile:
    """Opens data.tar.* of a package as a stream of members."""
    if archive.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise ValueError("no ar archive")
    while len(header := archive.read(_AR_HEADER_BYTES)) == _AR_HEADER_BYTES:
        name, size = header[:16].decode("latin-1").rstrip(" /"), int(header[48:58])
        if name.startswith("data.tar"):
            return tarfile.open(fileobj=_decompressed(name, archive), mode="r|")
        archive.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError("no data.tar member")


def _decompressed(name: str, stream: IO[bytes]) -> IO[bytes]:
    match Path(name).suffix:
        case ".xz":
            return lzma.LZMAFile(stream)
        case ".gz":
            return cast(IO[bytes], gzip.GzipFile(fileobj=stream))
        case ".zst":
            return zstandard.ZstdDecompressor().stream_reader(stream)
        case ".tar":
            return stream
    raise ValueError(f"unknown compression of {name}")
