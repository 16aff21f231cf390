"""VIFSPEC: one virtual network interface in the words of xl-network-configuration(5).

Comma separated `key=value` pairs; the empty string is an interface with every default. xl is lenient here: a key that
it does not know, or a mac that it cannot read, is reported and the interface is made without it. Only a rate or a
number that cannot be read stops the whole configuration. The keys `rules` and `publish` are ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from xenolith.toolstack.config.grammar import ConfigError, ConfigFile

DEFAULT_RATE_INTERVAL_US = 50_000

_UINT32_MAX = 2**32 - 1
_UINT64_MAX = 2**64 - 1


@dataclass(slots=True)
class Nic:
    """One virtual network interface. None means that the specification left it to the toolstack."""

    devid: int
    mac: bytes | None = None
    bridge: str | None = None
    ip: str | None = None
    script: str | None = None
    ifname: str | None = None
    backend_domain: str | None = None
    gatewaydev: str | None = None
    model: str | None = None
    nictype: str | None = None  # "vif" or "vif_ioemu"; the latter is for HVM only
    mtu: int = 0  # 0: the default
    trusted: bool | None = None
    rate_bytes_per_interval: int = 0  # 0: no limit
    rate_interval_us: int = 0
    rules: str | None = None  # ours: of the firewall-router, see docs/network.md
    publish: list[str] = field(default_factory=list)  # ours: [ADDRESS:]HOST:GUEST[/udp]

    @property
    def mac_text(self) -> str | None:
        return None if self.mac is None else ":".join(f"{byte:02x}" for byte in self.mac)


_TEXT_KEYS = {
    "bridge": "bridge",
    "gatewaydev": "gatewaydev",
    "ip": "ip",
    "script": "script",
    "backend": "backend_domain",
    "vifname": "ifname",
    "model": "model",
    "rules": "rules",
}

_TYPES = {"vif": "vif", "ioemu": "vif_ioemu"}


def parse_vif(file: ConfigFile, spec: str, devid: int) -> Nic:
    """The interface that `spec`, the element `devid` of the list, describes."""
    nic = Nic(devid)
    for token in filter(None, spec.split(",")):
        _parameter(file, nic, token.lstrip(" "))
    return nic


def _parameter(file: ConfigFile, nic: Nic, token: str) -> None:
    key, equals, value = token.partition("=")
    if not equals and key in ("trusted", "untrusted"):
        nic.trusted = key == "trusted"
    elif not equals:
        file.warn(f"unrecognized argument `{token}'")
    elif key in _TEXT_KEYS:
        setattr(nic, _TEXT_KEYS[key], value)
    elif key == "mac":
        _mac(file, nic, value)
    elif key == "publish":
        nic.publish.append(value)
    elif key == "type":
        if value not in _TYPES:
            file.warn("Invalid parameter `type'.")
        nic.nictype = _TYPES.get(value, nic.nictype)
    elif key == "netdev":
        file.warn("the netdev parameter is deprecated, please use gatewaydev instead")
        nic.gatewaydev = value
    elif key == "accel":
        file.warn("the accel parameter for vifs is currently not supported")
    elif key == "rate":
        nic.rate_bytes_per_interval, nic.rate_interval_us = parse_rate(file, value)
    elif key == "devid":
        nic.devid = _unsigned(file, value)
    elif key == "mtu":
        nic.mtu = _unsigned(file, value)
    else:
        file.warn(f"unrecognized argument `{token}'")


def _mac(file: ConfigFile, nic: Nic, text: str) -> None:
    """Six hexadecimal bytes with any one character between them; what was read before an error stays, as in xl."""
    octets = bytearray(nic.mac or bytes(6))
    for index in range(6):
        digits = re.match(r"[ \t]*(?:0[xX](?=[0-9a-fA-F]))?([0-9a-fA-F]+)", text)
        if digits is None or int(digits[1], 16) > 255:
            file.warn("Invalid parameter `mac'.")
            break
        octets[index] = int(digits[1], 16)
        text = text[digits.end() + 1 :]
    nic.mac = bytes(octets) if any(octets) else None


def _unsigned(file: ConfigFile, text: str) -> int:
    """The decimal number that `text` begins with."""
    digits = re.match(r"[ \t]*\+?([0-9]{1,19})", text)
    if digits is None:
        raise file.fail(f'xl: failed to convert "{text}" to number')
    return int(digits[1])


def parse_rate(file: ConfigFile, rate: str) -> tuple[int, int]:
    """Bytes per interval and the interval in microseconds of a rate such as "10Mb/s" or "2MB/s@20ms"."""
    speed, at, interval = rate.partition("@")
    if not speed:
        raise _rate_error(file, "no rate specified", rate)
    bytes_per_second = _speed(file, speed)
    interval_us = _interval_us(file, interval) if at else DEFAULT_RATE_INTERVAL_US
    if bytes_per_second > _UINT64_MAX // interval_us:
        raise _rate_error(file, "rate overflow", rate)
    return bytes_per_second * interval_us // 1_000_000, interval_us


def _speed(file: ConfigFile, text: str) -> int:
    match = re.fullmatch(r"([0-9]+)([GMK]?)([Bb])/s", text)
    if match is None:
        raise _rate_error(file, "invalid rate", text)
    number = _c_number(match[1])
    if number is None or not 0 < number <= _UINT32_MAX:
        raise _rate_error(file, "rate overflow", text)
    number *= {"G": 10**9, "M": 10**6, "K": 10**3, "": 1}[match[2]]
    return number // 8 if match[3] == "b" else number


def _interval_us(file: ConfigFile, text: str) -> int:
    match = re.fullmatch(r"([0-9]+)([mu]?)s?", text)
    if match is None:
        raise _rate_error(file, "invalid replenishment interval", text)
    number = _c_number(match[1])
    if number is not None and number <= _UINT32_MAX:
        number *= {"": 10**6, "m": 10**3, "u": 1}[match[2]]
    if number is None or not 0 < number <= _UINT32_MAX:
        raise _rate_error(file, "replenishment interval overflow", text)
    return number


def _c_number(digits: str) -> int | None:
    """Digits as strtoull base 0 reads them: a leading 0 means octal. None if a digit does not fit."""
    if len(digits) > 22:
        return _UINT64_MAX
    base = 8 if digits.startswith("0") else 10
    return int(digits, base) if base == 10 or set(digits) <= set("01234567") else None


def _rate_error(file: ConfigFile, message: str, rate: str) -> ConfigError:
    return file.fail(f"{file.source}: config parsing error in vif: {message} in `{rate}'")
