"""What holds of every configuration text, whoever wrote it."""

from __future__ import annotations

import string

from hypothesis import given
from hypothesis import strategies as st

from xenolith.toolstack.config.as_json import domain_config_json, render
from xenolith.toolstack.config.cpus import CpuSetError, HostTopology, format_cpu_set, parse_cpu_set
from xenolith.toolstack.config.disk import Disk, DiskSpecError, parse_disk, virtual_device
from xenolith.toolstack.config.grammar import ConfigError, ConfigFile, Value, read_config
from xenolith.toolstack.config.reader import parse_domain_config

HOST = HostTopology.uniform(4)

ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t", "\a": "\\a", "\b": "\\b", "\v": "\\v"}
ESCAPES |= {"\f": "\\f"}

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
values = st.recursive(texts, lambda items: st.lists(items, max_size=4), max_leaves=12)
pieces = [
    "name",
    "kernel",
    "disk",
    "vif",
    "=",
    "+=",
    "[",
    "]",
    ",",
    ";",
    "\n",
    '"',
    "'",
    "\\",
    "#",
    " ",
    "5",
    "0x1f",
    "A",
    "@",
]
mixtures = st.lists(st.sampled_from(pieces), max_size=25).map("".join)


def written(value: Value) -> str:
    """The value in the syntax of a configuration file."""
    if isinstance(value, list):
        return "[" + ",\n".join(map(written, value)) + "]"
    return '"' + "".join(ESCAPES.get(character, character) for character in value) + '"'


@given(st.dictionaries(st.text(string.ascii_lowercase, min_size=1), values, max_size=5))
def test_settings_that_were_written_down_are_read_back(settings: dict[str, Value]) -> None:
    text = "".join(f"{name} = {written(value)}\n" for name, value in settings.items())
    assert {name: setting.value for name, setting in read_config(text, "x.cfg").settings.items()} == settings


@given(texts, texts)
def test_appending_strings_concatenates_them(first: str, second: str) -> None:
    config = read_config(f"extra={written(first)}\nextra+={written(second)}\n", "x.cfg")
    assert config.string("extra") == first + second


@given(st.one_of(st.text(max_size=60), mixtures))
def test_any_text_is_either_a_configuration_or_a_list_of_errors(text: str) -> None:
    try:
        config, _ = parse_domain_config(text, "x.cfg", HOST)
    except ConfigError as error:
        assert error.diagnostics
        assert error.status
    else:
        assert render(domain_config_json(config)).endswith("}\n")


@given(mixtures)
def test_what_comes_before_an_error_does_not_change_its_report(text: str) -> None:
    """A valid line in front moves every reported line by one and nothing else."""

    def reports(content: str) -> list[str]:
        try:
            read_config(content, "x.cfg")
        except ConfigError as error:
            return error.diagnostics
        return []

    def moved(line: str) -> str:
        source, colon, rest = line.partition(":")
        number, colon2, message = rest.partition(":")
        return f"{source}:{int(number) + 1}:{message}" if source == "x.cfg" and colon and colon2 else line

    assert reports("memory=1\n" + text) == [moved(line) for line in reports(text)]


@given(st.frozensets(st.integers(0, 15)))
def test_a_printed_cpu_set_is_parsed_back(cpus: frozenset[int]) -> None:
    host = HostTopology.uniform(16)
    text = format_cpu_set(cpus, host.pcpus)
    assert parse_cpu_set("" if text == "none" else text, host) == cpus


@given(
    st.lists(st.sampled_from(["0", "3", "1-2", "^1", "^0-3", "all", "node:0", "^nodes:0", "x", "2-1", "9"])).map(
        ",".join
    )
)
def test_a_cpu_set_never_leaves_the_cpu_map(text: str) -> None:
    try:
        cpus = parse_cpu_set(text, HOST)
    except CpuSetError:
        return
    assert cpus <= set(range(HOST.map_bits))


specs = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(
            ["/img", "raw", "qcow2", "xvda", "rw", "cdrom", "vdev=xvdb", "format=", "target=/a,b", " ", "", "phy:/x"]
        )
    ).map(",".join),
)


def disk_of(spec: str) -> Disk | None:
    try:
        return parse_disk(ConfigFile("x.cfg"), spec)
    except DiskSpecError:
        return None


@given(specs)
def test_a_disk_specification_gives_a_usable_disk_or_an_error(spec: str) -> None:
    disk = disk_of(spec)
    assert disk is None or (disk.vdev is not None and disk.format is not None)


@given(texts.filter(lambda text: "\n" not in text))
def test_target_takes_the_rest_of_a_disk_specification(path: str) -> None:
    disk = disk_of(f"format=raw, vdev=xvda, access=ro, target={path}")
    assert disk is not None
    assert disk.target == path.removesuffix(",")
    assert not disk.writable


def test_virtual_devices_have_the_numbers_that_guests_expect() -> None:
    """xen-vbd-interface(7)."""
    expected = {
        "xvda": 51712,
        "xvda1": 51713,
        "xvdp15": 51712 + 255,
        "xvdq": 1 << 28 | 16 << 8,
        "xvda16": 1 << 28 | 16,
        "xvdaa": 1 << 28 | 26 << 8,
        "d5p3": 51712 + 5 * 16 + 3,
        "hda": 768,
        "hdb1": 833,
        "hdc": 5632,
        "sda": 2048,
        "sdb2": 2066,
        "51712": 51712,
        "0xca00": 51712,
        "hde": None,
        "foo": None,
        "": None,
    }
    assert {name: virtual_device(name) for name in expected} == expected
