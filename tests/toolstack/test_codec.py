"""Values survive the socket; anything else than what the types allow does not."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenolith.toolstack.config.cpus import HostTopology
from xenolith.toolstack.config.reader import parse_domain_config
from xenolith.toolstack.daemon.codec import CodecError, decode, encode
from xenolith.toolstack.daemon.protocol import METHODS, from_bytes, to_bytes


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Level(IntEnum):
    LOW = 1
    HIGH = 2


@dataclass
class Inner:
    name: str
    amounts: list[int] = field(default_factory=list)


@dataclass
class Outer:
    number: int
    share: float
    flag: bool
    colour: Colour
    level: Level
    blob: bytes
    uuid: UUID
    path: Path
    inner: Inner
    pairs: tuple[int, ...]
    fixed: tuple[str, int]
    chosen: frozenset[int]
    table: dict[str, Inner]
    maybe: int | None = None


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)
inners = st.builds(Inner, names, st.lists(st.integers(), max_size=3))
outers = st.builds(
    Outer,
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.sampled_from(Colour),
    st.sampled_from(Level),
    st.binary(max_size=20),
    st.builds(uuid4),
    names.map(lambda name: Path("/x") / name.replace("/", "_")),
    inners,
    st.lists(st.integers(), max_size=3).map(tuple),
    st.tuples(names, st.integers()),
    st.frozensets(st.integers(), max_size=4),
    st.dictionaries(names, inners, max_size=3),
    st.none() | st.integers(),
)


@given(outers)
def test_what_is_encoded_is_decoded_to_the_same(value: Outer) -> None:
    assert decode(Outer, json.loads(json.dumps(encode(value)))) == value


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=10,
)


@given(json_values, st.sampled_from([Outer, Inner, *(method.result for method in METHODS.values())]))
def test_any_json_is_decoded_to_the_type_or_refused(value: Any, expected: Any) -> None:
    try:
        decode(expected, value)
    except CodecError as error:
        assert str(error)


@given(st.binary(max_size=80) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_message_or_refused(body: bytes) -> None:
    try:
        message = from_bytes(body)
    except CodecError:
        return
    assert from_bytes(to_bytes(message)[4:]) == message


@pytest.mark.parametrize(
    ("expected", "value", "complaint"),
    [
        (int, True, "value must be of type int, not True"),
        (int, "5", "value must be of type int, not '5'"),
        (list[int], [1, None], r"value\[1\] must be of type int, not None"),
        (Inner, {}, "value lacks the field 'name'"),
        (Inner, {"name": "a", "extra": 1}, "value has no field 'extra'"),
        (Inner, {"name": "a", "amounts": [1, "x"]}, r"value.amounts\[1\] must be of type int"),
        (Colour, "green", "value must be one of red, blue, not 'green'"),
        (bytes, "%%%", "value must be base64"),
        (bytes, "\N{BULLET}", "value must be base64"),
        (float, 10**400, "value is out of range"),
        (UUID, "x", "value must be a UUID, not 'x'"),
        (Path, "a\0b", "value must be a path"),
        (tuple[str, int], ["a"], "value must have 2 elements, not 1"),
    ],
)
def test_a_complaint_says_where_and_what(expected: Any, value: Any, complaint: str) -> None:
    with pytest.raises(CodecError, match=complaint):
        decode(expected, value)


def test_every_recorded_configuration_survives_the_socket() -> None:
    """What xl.cfg can say, the protocol can carry."""
    directory = Path(__file__).parent / "xlcfg"
    carried = 0
    for line in (directory / "recorded.jsonl").read_text().splitlines():
        case = json.loads(line)
        if case["status"] == 0:
            config, _ = parse_domain_config(case["cfg"], "x.cfg", HostTopology.uniform(1))
            assert decode(type(config), json.loads(json.dumps(encode(config)))) == config
            carried += 1
    assert carried > 300
