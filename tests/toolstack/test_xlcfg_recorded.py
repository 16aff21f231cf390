"""Every configuration that xl 4.17 was asked about gives its answer: the JSON, the messages and the exit status.

NAME.cfg and NAME.out are the whole texts, recorded on a host with two pCPUs. recorded.jsonl holds more of them, one
JSON object a line, from a host with one pCPU; there the layout of the JSON is not repeated, its order is.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from xenolith.toolstack.config.as_json import domain_config_json, render
from xenolith.toolstack.config.cpus import HostTopology
from xenolith.toolstack.config.grammar import ConfigError
from xenolith.toolstack.config.reader import parse_domain_config

DATA = Path(__file__).parent / "xlcfg"
RECORDED = [json.loads(line) for line in (DATA / "recorded.jsonl").read_text().splitlines()]


def answer(text: str, source: str, pcpus: int) -> tuple[int, list[str], str]:
    """Exit status, messages and output for a configuration file."""
    try:
        config, warnings = parse_domain_config(text, source, HostTopology.uniform(pcpus))
    except ConfigError as error:
        return error.status, error.diagnostics, ""
    return 0, warnings, render(domain_config_json(config))


def without_random_uuid(output: str, text: str) -> str:
    return output if "uuid=" in text else re.sub(r'"uuid": "[0-9a-f-]{36}"', '"uuid": "RANDOM"', output)


@pytest.mark.parametrize("path", sorted(DATA.glob("*.cfg")), ids=lambda path: path.stem)
def test_a_configuration_is_answered_byte_for_byte_as_by_xl(path: Path) -> None:
    text = path.read_text()
    status, messages, output = answer(text, path.name, pcpus=2)
    heading = [f"# rc={status}", "# stderr:", f"#   Parsing config from {path.name}"]
    transcript = "\n".join(heading + [f"#   {message}" for message in messages]) + "\n"
    assert transcript + without_random_uuid(output, text) == path.with_suffix(".out").read_text()


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case["name"])
def test_a_configuration_means_what_it_means_to_xl(case: dict[str, Any]) -> None:
    status, messages, output = answer(case["cfg"], f"{case['name']}.cfg", pcpus=1)
    assert (status, "\n".join(messages)) == (case["status"], "\n".join(case["stderr"]))
    if case["config"] is None:
        assert output == ""
    else:
        ordered = json.dumps(json.loads(without_random_uuid(output, case["cfg"])))
        assert ordered == json.dumps(case["config"])


def test_a_domain_may_be_made_whatever_device_model_was_asked_for() -> None:
    for case in RECORDED:
        if case["name"].startswith(("device_model", "dm_restrict", "stubdomain")) and case["config"]:
            text = case["cfg"]
            config, _ = parse_domain_config(text, "x.cfg", HostTopology.uniform(1))
            assert config.unsupported() == ["device_tree"] * ("device_tree" in text), case["name"]
