"""What is written about commands, keys and requests, made from their definitions: `python -m xenolith.cli.manual docs`.

The manual pages are xl(1), xl.cfg(5) and xenolith(1), in man(7)'s language; a wheel installs them. What cannot be
derived, such as where the daemon lives, is a few sentences here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import click

from xenolith.cli import main as xenolith_command
from xenolith.cli import xl
from xenolith.cli.xl_command import XlCommand
from xenolith.toolstack.config import keys
from xenolith.toolstack.daemon import page

_SOCKET = """\
Domains live in a daemon, which the first command that needs it starts and which stays. Its socket is the one that
XENOLITH_SOCKET or --socket names; else, for root, /run/xenolith/control.sock, and for others xenolith/control.sock
in XDG_RUNTIME_DIR, in /run/user/UID, or /tmp/xenolith-UID/control.sock. XENOLITH_ENGINE, XENOLITH_MEMORY (MiB),
XENOLITH_PCPUS, XENOLITH_HOST_CPUS and XENOLITH_SCHEDULER are for a daemon that a command starts."""

_XL = """\
Understands the configuration files of Xen's xl 4.17 and prints its columns, messages and exit statuses. A
subcommand may be abbreviated as long as it stays unambiguous. Where a domain is asked for, a number is a domid and
anything else a name."""

_XL_STATUSES = (
    ("0", "Done."),
    ("1", "The domain or the setting is wrong, or the output cannot be written."),
    ("2", "The command line is wrong."),
    ("3", "The machine could not do it."),
    ("6", "No configuration file was given."),
    ("130, 143, 141", "Ended by Ctrl-C, by SIGTERM, or because whoever read the output went away."),
)

_CFG = """\
A file is a sequence of KEY = VALUE, ended by a newline or a semicolon. A value is a string in single or double
quotes, a number (decimal, 0x hexadecimal, 0 octal) or a list in brackets. += appends to a string or a list. There
are no expressions. # begins a comment, which must end with a newline. A key that is not known is ignored. A key
that asks for something that a domain cannot be given here makes xl create fail; one that has no effect is named on
standard error, with the reason, and the domain made."""


def pages(directory: Path) -> dict[Path, str]:
    """The files below `directory` (docs/) that are made here, as they should be."""
    protocol = directory / "control-protocol.md"
    return {
        protocol: page.with_table(protocol.read_text()),
        directory / "man" / "xl.1": xl_1(),
        directory / "man" / "xl.cfg.5": xl_cfg_5(),
        directory / "man" / "xenolith.1": xenolith_1(),
    }


def xl_1() -> str:
    commands = xl.SUBCOMMANDS.values()
    return _joined(
        _title("xl", 1, "Xen's toolstack, for Xenolith"),
        _section("Synopsis", _paragraph(r"\fBxl\fR [\fB\-vfNtT\fR] [\fB\-\-socket\fR \fIPATH\fR] \fIcommand\fR ...")),
        _section("Description", _text(_XL)),
        _section(
            "Global options",
            _item("-f", "Force it."),
            _item("-N", "Do nothing, but say what would be done (create and config-update)."),
            _item("-v, -t, -T", "Accepted for the sake of scripts."),
            _item("--socket PATH", "The daemon to talk to."),
            _item("-h, --help", "Print the list of subcommands."),
            _item("--version", "Print the version."),
        ),
        _section("Subcommands", *map(_xl_command, commands)),
        _section("Not implemented", _text("Of the subcommands of Xen's xl: " + ", ".join(sorted(xl.NOT_YET)) + ".")),
        _section("Exit status", *(_item(status, text) for status, text in _XL_STATUSES)),
        _section("Environment and files", _text(_SOCKET)),
        _section("See also", _paragraph(r"\fBxl.cfg\fR(5), \fBxenolith\fR(1)")),
    )


def _xl_command(command: XlCommand) -> str:
    options = "".join(_item(option.flags, option.text) for option in command.options)
    described = _item(f"{command.xl_name} {command.synopsis}".strip(), f"{command.summary}.")
    return described + (f".RS\n{options}.RE\n" if options else "")


def xl_cfg_5() -> str:
    return _joined(
        _title("xl.cfg", 5, "configuration of a domain"),
        _section("Description", _text(_CFG)),
        *(
            _section(group, *(_item(f'{key.name} = {key.value}', key.text) for key in members))
            for group, members in keys.GROUPS.items()
        ),
        _section("See also", _paragraph(r"\fBxl\fR(1), \fBxenolith\fR(1)")),
    )  # fmt: skip


def xenolith_1() -> str:
    context = click.Context(xenolith_command.xenolith, info_name="xenolith")
    return _joined(
        _title("xenolith", 1, "a Xen virtual machine monitor in Python"),
        _section("Synopsis", _paragraph(r"\fBxenolith\fR \fIsubcommand\fR [...]")),
        _section("Description", _text("Runs paravirtual Xen domains, as an ordinary program and without privileges.")),
        *_click_commands(context),
        _section("Subcommands of xl", _text("Each of them is a subcommand of xenolith too: see xl(1).")),
        _section("Environment and files", _text(_SOCKET)),
        _section("See also", _paragraph(r"\fBxl\fR(1), \fBxl.cfg\fR(5)")),
    )


def _click_commands(parent: click.Context) -> Iterable[str]:
    """A section for each command below a group that is one of click's own."""
    group = parent.command
    assert isinstance(group, click.Group)
    for name in group.list_commands(parent):
        command = group.get_command(parent, name)
        assert command is not None
        context = click.Context(command, parent=parent, info_name=name)
        if isinstance(command, click.Group):
            yield from _click_commands(context)
            continue
        usage = " ".join(command.collect_usage_pieces(context))
        records = (parameter.get_help_record(context) for parameter in command.get_params(context))
        options = [record for record in records if record is not None]
        yield _section(
            context.command_path,
            _paragraph(f"\\fB{_escaped(context.command_path)}\\fR {_escaped(usage)}"),
            _help(command.help or ""),
            *(_item(flags, text) for flags, text in options),
            _help(command.epilog or ""),
        )


def _help(text: str) -> str:
    """click's help texts: paragraphs, and with \\b before them lines that stay as they are."""
    found = []
    for paragraph in filter(None, (part.strip("\n") for part in re.split(r"\n\s*\n", text))):
        if paragraph.lstrip().startswith("\b"):
            lines = [_escaped(line.rstrip()) for line in paragraph.split("\n")[1:]]
            found.append(".PP\n.nf\n" + "\n".join(lines) + "\n.fi\n")
        else:
            found.append(_text(paragraph))
    return "".join(found)


# --- man(7) ----------------------------------------------------------------------------------------------------


def _escaped(text: str) -> str:
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.M)


def _title(name: str, section: int, summary: str) -> str:
    about = f"xenolith {version('xenolith')}"
    return (
        f'.\\" made by `make docs`\n.TH "{name.upper()}" "{section}" "" "{about}"\n'
        f".SH NAME\n{_escaped(name)} \\- {_escaped(summary)}\n"
    )


def _section(name: str, *parts: str) -> str:
    return f".SH {_escaped(name.upper())}\n" + "".join(parts)


def _paragraph(roff: str) -> str:
    return f".PP\n{roff}\n"


def _text(text: str) -> str:
    return _paragraph(_escaped(" ".join(text.split())))


def _item(term: str, text: str) -> str:
    return f".TP\n\\fB{_escaped(term)}\\fR\n{_escaped(' '.join(text.split()))}\n"


def _joined(*parts: str) -> str:
    return "".join(parts)


def main() -> None:
    for path, text in pages(Path(sys.argv[1])).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
