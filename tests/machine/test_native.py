"""Native code: compiled when first wanted, never out of date, and its absence has a reason."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable
from ctypes import c_bool, c_uint8, c_uint32, c_uint64
from pathlib import Path
from typing import Any

import pytest

from xenolith.machine import native

needs_compiler = pytest.mark.skipif(native.missing() is not None, reason=f"no native code here: {native.missing()}")


WARNINGS = (
    *("-Wall", "-Wextra", "-Wconversion", "-Wno-sign-conversion", "-Wshadow"),
    *("-Wcast-qual", "-Wcast-align", "-Wpointer-arith", "-Wvla", "-Werror"),
)


class Pair(ctypes.Structure):
    _fields_ = (("first", c_uint64), ("bytes", c_uint8 * 3 * 2), ("last", c_bool))


class Longer(Pair):
    _fields_ = (("more", c_uint32),)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    for function in (native._build, native._load, native._compiler):
        function.cache_clear()
    return tmp_path / "cache" / "xenolith" / "native"


def written(directory: Path, text: str) -> Path:
    source = directory / "example.c"
    source.write_text(text)
    return source


@needs_compiler
def test_c_and_python_share_a_structure_and_its_base(tmp_path: Path) -> None:
    source = written(tmp_path, "u64 sum(struct longer *p) { return p->first + p->bytes[1][2] + p->last + p->more; }")
    library = native.load(source, native.declare("longer", Longer))
    value = Longer(first=1 << 40, last=True, more=5)
    value.bytes[1][2] = 200
    library.sum.argtypes, library.sum.restype = (ctypes.c_void_p,), c_uint64
    assert library.sum(ctypes.addressof(value)) == (1 << 40) + 206


@needs_compiler
def test_a_changed_source_is_compiled_again_and_an_unchanged_one_is_not(tmp_path: Path, cache: Path) -> None:
    source = written(tmp_path, "int answer(void) { return 41; }")
    assert native.load(source).answer() == 41
    (first,) = cache.iterdir()
    made = first.stat().st_mtime_ns
    native._build.cache_clear()
    native.load(source)
    assert first.stat().st_mtime_ns == made
    written(tmp_path, "int answer(void) { return 42; }")
    assert native.load(source).answer() == 42
    assert len(list(cache.iterdir())) == 2


@needs_compiler
def test_an_error_of_the_compiler_names_the_file_and_the_line(tmp_path: Path, cache: Path) -> None:
    source = written(tmp_path, "int answer(void)\n{\n    return nonsense;\n}\n")
    with pytest.raises(native.Missing, match=r"(?s)cannot compile example\.c.*example\.c:3.*nonsense"):
        native.load(source)
    assert list(cache.iterdir()) == []


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(native.Missing, match=r"no C compiler .*apt install gcc"):
        native.load(written(tmp_path, ""))


@needs_compiler
def test_a_compiler_may_be_given_with_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    monkeypatch.setenv("CC", f"{native._compiler()} -DANSWER=42")
    assert native.load(written(tmp_path, "int answer(void) { return ANSWER; }")).answer() == 42


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("no-such-compiler -O2", "CC=no-such-compiler -O2 names no program"),
        ("'cc", "is no command: No closing quotation"),
        ("false", "false cannot compile example.c: it ends with status 1"),
        ("true", "true cannot compile example.c: it ends with status 0 and makes nothing"),
        ("sh -c 'exec sleep 1000'", "has not ended after 0.1 seconds"),
    ],
)
def test_a_compiler_that_does_not_work_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path, named: str, why: str
) -> None:
    monkeypatch.setenv("CC", named)
    monkeypatch.setattr(native, "COMPILE_SECONDS", 0.1 if "sleep" in named else 60)
    with pytest.raises(native.Missing, match=re.escape(why)):
        native.load(written(tmp_path, ""))


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XENOLITH_NATIVE", "off")
    with pytest.raises(native.Missing, match="XENOLITH_NATIVE=off"):
        native.load(written(tmp_path, ""))


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(native.Missing, match=r"cannot compile into .*file/xenolith/native"):
        native.load(written(tmp_path, ""))


@needs_compiler
@pytest.mark.parametrize(
    ("code", "report"),
    [
        ("int answer(volatile int n) { int a[2] = {1, 2}; return a[n]; }", "AddressSanitizer|out of bounds"),
        ("int answer(volatile int n) { return 0x7fffffff + n; }", "signed integer overflow"),
    ],
)
def test_sanitizers_end_the_process_at_the_first_error(tmp_path: Path, code: str, report: str) -> None:
    compiler = native._compiler()
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip(f"{compiler} has no sanitizers")
    program = "import sys, pathlib; from xenolith.machine import native; " + (
        "native.load(pathlib.Path(sys.argv[1])).answer(int(sys.argv[2])); print('went on')"
    )
    environment = {"XENOLITH_NATIVE": "sanitize", "ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": " ".join(libraries)}
    fine, ended = (
        subprocess.run(
            [sys.executable, "-c", program, written(tmp_path, code), argument],
            capture_output=True,
            text=True,
            env=os.environ | environment,
        )
        for argument in ("0", "2")
    )
    assert fine.returncode == 0, fine.stderr
    assert fine.stdout == "went on\n"
    assert ended.returncode != 0
    assert re.search(report, ended.stderr)
    assert ended.stdout == ""


def _sources() -> list[tuple[str, Callable[[], tuple[Path, str, tuple[Path, ...]]]]]:
    from xenolith.hypervisor import ring0
    from xenolith.machine.engines.adaptive import extended_native
    from xenolith.machine.engines.kvm import native_run
    from xenolith.machine.engines.unicorn import deliver, softmmu

    def source_of(module: Any) -> Callable[[], tuple[Path, str, tuple[Path, ...]]]:
        return lambda: (module.SOURCE, module.declarations(), getattr(module, "HALVES", ()))

    modules: tuple[Any, ...] = (ring0, native_run, extended_native, deliver, softmmu)
    return [(module.SOURCE.name, source_of(module)) for module in modules]


@needs_compiler
@pytest.mark.parametrize("source", [pytest.param(source, id=name) for name, source in _sources()])
def test_our_c_compiles_without_a_warning(
    source: Callable[[], tuple[Path, str, tuple[Path, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "OPTIONS", (*native.OPTIONS, *WARNINGS))
    native.build(*source())


@needs_compiler
def test_halves_come_first_and_an_error_in_one_names_it(tmp_path: Path) -> None:
    half = tmp_path / "half.c"
    half.write_text("static int half(void) { return 21; }\n")
    source = written(tmp_path, "int whole(void) { return 2 * half(); }")
    assert native.load(source, halves=(half,)).whole() == 42
    half.write_text("\nstatic int half(void) { return nonsense; }\n")
    with pytest.raises(native.Missing, match=r"(?s)cannot compile example\.c.*half\.c:2.*nonsense"):
        native.load(source, halves=(half,))
