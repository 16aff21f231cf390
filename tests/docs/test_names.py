"""What the documents and docstrings name in code type exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("src", "tests", "bench", "guests", "docs/howto") for path in (ROOT / folder).rglob("*")]
NAME = re.compile(r"(?:`|:\w+:`)([A-Za-z_][\w.]*)(?:\(\))?`")
WORD = re.compile(r"[A-Za-z_]\w*")
OF_OTHERS = {
    *(
        "_hvm",
        "_pv",
        "server_features",
        "xsd_errors",
        "opaque",
        "do_tb_phys_invalidate",
        "tb_exec_unlock",
    ),  # Xen's and QEMU's
    *("fish_source", "zsh_source", "fstrim", "perf", "ruff", "lret"),
}


def docstrings(tree: ast.Module) -> list[str]:
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
    return [text for node in nodes if (text := ast.get_docstring(node, clean=False))]


def test_a_name_in_code_type_is_that_of_something() -> None:
    known, texts = {path.name for path in (*SOURCES, *ROOT.glob("*"))}, {}
    known |= {name.partition(".")[0] for name in known} | OF_OTHERS
    for path in SOURCES:
        if path.suffix in {".py", ".c", ".h", ".S", ".cfg"} or path.name == "Makefile":
            text = path.read_text()
            if path.suffix == ".py" and path.is_relative_to(ROOT / "src"):
                texts[path] = docstrings(ast.parse(text))
                for part in texts[path]:
                    text = text.replace(part, "")
                texts[path] += re.findall(r"#.*", text)
            known |= set(WORD.findall(re.sub(r"#.*", "", text)))
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "tests" / "README.md"):
        texts[path] = [path.read_text()]
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, parts in texts.items()
        for text in parts
        for name in NAME.findall(text)
        if name not in known and not all(part in known for part in name.split("."))
    ]
    assert not wrong
