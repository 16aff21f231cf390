"""The manual pages are what the commands and the configuration reader say."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from xenolith.cli.manual import pages
from xenolith.cli.xl import SUBCOMMANDS
from xenolith.toolstack.config import keys
from xenolith.toolstack.config.cpus import HostTopology
from xenolith.toolstack.config.grammar import ConfigFile, Setting
from xenolith.toolstack.config.reader import read_domain_config

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {path.name: text for path, text in pages(DOCS).items() if path.parent.name == "man"}


def test_there_is_a_page_for_each_command_and_for_its_configuration() -> None:
    assert sorted(PAGES) == ["xenolith.1", "xl.1", "xl.cfg.5"]


def test_every_subcommand_and_option_is_on_its_page() -> None:
    page = PAGES["xl.1"].replace("\\-", "-")
    for name, command in SUBCOMMANDS.items():
        assert f"\n\\fB{name}" in page
        for option in command.options:
            assert f"\\fB{option.flags}\\fR" in page


class Noting(dict[str, Setting]):
    """Settings that note which keys are looked for."""

    def __init__(self) -> None:
        super().__init__(name=Setting("a", 1), kernel=Setting("k", 2), vfb=Setting([], 3))
        self.asked: set[str] = set()

    def get(self, key: str, default: Setting | None = None) -> Setting | None:  # type: ignore[override]
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def test_every_key_that_is_read_is_on_its_page() -> None:
    settings = Noting()
    read_domain_config(ConfigFile("test", settings), HostTopology.uniform(4))
    told = {key.name for members in keys.GROUPS.values() for key in members}
    of_framebuffers = "vnc|sdl|opengl|keymap"
    unknown_here = "vif2|dtdev|pvcalls|usb|vdispl|vkb|vnuma|vsnd|vtpm"
    left = {name for name in settings.asked - told if not re.match(f"{of_framebuffers}|{unknown_here}", name)}
    assert left == set()
    assert len(settings.asked & told) > 80


@pytest.mark.parametrize("name", PAGES)
def test_the_formatter_has_nothing_to_complain_of(name: str, tmp_path: Path) -> None:
    if shutil.which("groff") is None:
        pytest.skip("there is no groff")
    (tmp_path / name).write_text(PAGES[name])
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", "-P-cbou", tmp_path / name], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert "DESCRIPTION" in done.stdout
