# SPDX-License-Identifier: MPL-2.0
"""Promises about the files: the agent alone, who imports whom, maps, the kit, syntax, docs."""
from __future__ import annotations

import ast
import re
import shutil
import subprocess
import symtable
import sys
from pathlib import Path
from typing import NamedTuple
from collections.abc import Iterator

import make_docs
import pytest
from support import NODE, ROOT, Program, http_get

PROGRAMS = ("cmon_agent.py", "cmon_proxy.py", "cmon_forwarder.py", "cmon.py")
# Units of metrics are stated once, in the agent's tables, which are no kit: the command shows them.
TABLES = {"metadata"}
BANNER = re.compile(r"^# --- (.+?)( \[kit\])? (-+)$", re.M)
# The host names and folders of where this was written have no business in it, nor have people.
FOREIGN = re.compile(r"/work/|/root/|\bPLACEHOLDER\b|[\w.]+@(?!example)[\w-]+\.[a-z]{2,}", re.I)
BINARY = {".png", ".gz", ".der"}


def source(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def tracked() -> list[Path]:
    """The files that belong to the project, whether or not git is there."""
    git = shutil.which("git")
    if git and (ROOT / ".git").exists():
        listed = subprocess.run([git, "-C", str(ROOT), "ls-files", "-z"], stdout=subprocess.PIPE,
                                check=True).stdout.decode()
        return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    return [path for path in ROOT.rglob("*") if path.is_file() and not any(
        part.startswith(".") or part == "__pycache__" for part in path.relative_to(ROOT).parts)]


class Section(NamedTuple):
    name: str
    kit: bool
    first: int      # line of the banner
    last: int


def sections(text: str) -> list[Section]:
    found = [(match.group(1), bool(match.group(2)), text.count("\n", 0, match.start()) + 1)
             for match in BANNER.finditer(text)]
    ends = [line - 1 for _, _, line in found[1:]] + [text.count("\n") + 1]
    return [Section(name, kit, line, end) for (name, kit, line), end in zip(found, ends)]


def statements(text: str, section: Section) -> Iterator[ast.stmt]:
    for statement in ast.parse(text).body:
        if section.first <= statement.lineno <= section.last:
            yield statement


def defined(statement: ast.stmt) -> Iterator[str]:
    """The names that a top-level statement defines."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
        yield statement.name
    elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for node in (inner for target in targets for inner in ast.walk(target)):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
    elif isinstance(statement, (ast.If, ast.Try, ast.For, ast.With)):
        for inner in ast.iter_child_nodes(statement):
            if isinstance(inner, ast.stmt):
                yield from defined(inner)


def names_by_kit() -> tuple[set[str], set[str]]:
    """The agent's top-level names: of the kit, and of the rest."""
    text = source("cmon_agent.py")
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for section in sections(text):
        for statement in statements(text, section):
            found[section.kit] |= set(defined(statement))
    return found[True], found[False]


def exported() -> list[str]:
    for statement in ast.parse(source("cmon_agent.py")).body:
        if isinstance(statement, ast.Assign) and "__all__" in defined(statement):
            names: list[str] = ast.literal_eval(statement.value)
            return names
    raise AssertionError("no __all__")


def global_names(text: str) -> set[str]:
    """The outer names that functions and classes of a source refer to."""
    found: set[str] = set()
    tables = [symtable.symtable(text, "section", "exec")]
    while tables:
        one = tables.pop()
        tables += one.get_children()
        found |= {symbol.get_name() for symbol in one.get_symbols()
                  if symbol.is_referenced() and (symbol.is_global() or one.get_type() == "module")}
    return found


# --- alone ----------------------------------------------------------------------------------------

def test_runs_alone(tmp_path: Path) -> None:
    """The agent in an empty folder, isolated and without site-packages, serves a recorded node."""
    shutil.copy(str(ROOT / "cmon_agent.py"), str(tmp_path))
    with Program(sys.executable, "-I", "-S", tmp_path / "cmon_agent.py", "--listen", "127.0.0.1:0",
                 "--replay", NODE, cwd=tmp_path) as agent:
        assert http_get(agent.address, "/v1/gz/metrics").status == 200
    assert [path.name for path in tmp_path.iterdir()] == ["cmon_agent.py"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_importing_does_nothing(program: str, tmp_path: Path) -> None:
    """No socket, no thread, no library of the system, no log handler, no output."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import ctypes, logging, socket, threading
def refuse(*_, **__): raise SystemExit('opened at import')
socket.socket.bind = socket.socket.connect = ctypes.CDLL.__init__ = refuse
import {program[:-3]}
assert threading.active_count() == 1, threading.enumerate()
assert not logging.getLogger().handlers and not logging.getLogger('cmon').handlers
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert (done.returncode, done.stdout) == (0, b"")


# --- imports --------------------------------------------------------------------------------------

def imports(name: str) -> Iterator[tuple[str, list[str]]]:
    """Each module that a file imports, with the names that it takes from it."""
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], []
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield str(node.module).split(".")[0], [alias.name for alias in node.names]


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_import_the_standard_library_and_the_kit(program: str) -> None:
    for module, names in imports(program):
        if module == "cmon_agent":
            assert program != "cmon_agent.py", "nothing that the agent runs may import it"
            assert names, "import names, not the module"
            assert set(names) - {"__version__"} <= set(exported())
        elif module == "cmon_proxy":
            assert program == "cmon.py" and names, "for certificates: demo, certgen, setup"
        else:
            assert module not in ("cmon", "cmon_forwarder")
            known = getattr(sys, "stdlib_module_names", None)      # since Python 3.10
            assert known is None or module in known, f"{module} is not in the standard library"


def test_version_is_written_once() -> None:
    assert [name for name in PROGRAMS if re.search(r"^__version__ *=", source(name), re.M)] == [
        "cmon_agent.py"]


# --- order and map --------------------------------------------------------------------------------

@pytest.mark.parametrize("program", PROGRAMS)
def test_map_in_the_docstring_is_the_list_of_banners(program: str) -> None:
    text = source(program)
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert "Map (`grep '^# ---'`)" in docstring
    listed = re.findall(r"^    (\S.*)$", docstring[docstring.index("Map ("):], re.M)
    banners = [section.name + (" [kit]" if section.kit else "") for section in sections(text)]
    assert listed == banners
    assert all(len(match.group(0)) == 100 for match in BANNER.finditer(text))


@pytest.mark.parametrize("program", PROGRAMS)
def test_banners_have_one_form(program: str) -> None:
    """What looks like a banner but is not would be missing from the table of contents."""
    text = source(program)
    assert len(re.findall(r"^# ---", text, re.M)) == len(sections(text))


@pytest.mark.parametrize("program", PROGRAMS)
def test_files_begin_with_the_same_lines(program: str) -> None:
    lines = source(program).splitlines()
    assert lines[0] == "#!/usr/bin/env python3"
    assert lines[1] == "# SPDX-License-Identifier: MPL-2.0"
    assert any(line.startswith("from __future__ import annotations  # a SyntaxError here: this "
                               "program needs Python 3.9") for line in lines)


# --- the kit --------------------------------------------------------------------------------------

def test_the_kit_exports_what_the_other_programs_import() -> None:
    kit, _ = names_by_kit()
    wanted = {name for program in PROGRAMS for module, names in imports(program)
              if module == "cmon_agent" for name in names} - {"__version__"}
    assert sorted(exported(), key=str.lower) == exported()
    assert set(exported()) == wanted <= kit | TABLES


def test_the_kit_uses_only_the_kit() -> None:
    text = source("cmon_agent.py")
    kit, rest = names_by_kit()
    lines = text.splitlines(keepends=True)
    wrong = [f"{section.name}: {name}" for section in sections(text) if section.kit
             for name in global_names("".join(lines[section.first - 1:section.last]))
             if name in rest - kit]
    assert not wrong


# --- text -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", [path.relative_to(ROOT).as_posix() for path in tracked()
                                  if path.suffix == ".py"])
def test_syntax_is_that_of_python_3_9(path: str) -> None:
    ast.parse(source(path), feature_version=(3, 9))


@pytest.mark.parametrize("program", PROGRAMS)
def test_lines_are_short_and_clean(program: str) -> None:
    wrong = [f"{number}: {line}" for number, line in enumerate(source(program).split("\n"), 1)
             if len(line) > 100 or line != line.rstrip() or "\t" in line]
    assert not wrong


@pytest.mark.parametrize("program", PROGRAMS)
def test_public_names_are_explained(program: str) -> None:
    """A docstring on each public function and class (a method of a Protocol's kind excepted)."""
    silent = [node.name for node in ast.parse(source(program)).body
              if isinstance(node, (ast.FunctionDef, ast.ClassDef))
              and not node.name.startswith("_") and ast.get_docstring(node) is None]
    assert not silent


def test_no_file_mentions_where_it_was_written() -> None:
    wrong = []
    for path in tracked():
        if path.suffix in BINARY or path.name in ("LICENSE", "test_layout.py"):
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if FOREIGN.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not wrong


# --- docs -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", sorted(make_docs.GENERATED))
def test_docs_are_not_stale(path: str) -> None:
    """`make docs` rewrites them."""
    assert source(path) == make_docs.GENERATED[path](), f"{path} is stale: make docs"


@pytest.mark.parametrize("document", ["README.md", "bench/README.md", *sorted(
    f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_files_named_in_the_documents_exist(document: str) -> None:
    text = source(document)
    folder = (ROOT / document).parent
    named = {ROOT / name for name in re.findall(
        r"\b(?:smf|examples|docs|tests|bench)/[\w./-]*[\w/]", text)}
    named |= {folder / name for name in re.findall(r"\]\(([\w./-]+)[)#]", text)}
    assert named
    assert [str(name) for name in sorted(named) if not name.exists()] == []


def section_of(document: str, title: str) -> str:
    return re.split(r"(?m)^## ", source(document).partition(f"## {title}\n")[2])[0]


@pytest.mark.parametrize("program, title", [
    ("cmon_agent.py", "Agent"), ("cmon_proxy.py", "Proxy"), ("cmon_forwarder.py", "Forwarder")])
def test_the_documents_have_every_endpoint_and_no_other(program: str, title: str) -> None:
    """Each route of the program is in docs/ENDPOINTS.md, with the same parts."""
    routes = set(re.findall(r'Route\(\s*"(?:GET|POST)",\s*"(/[^"]*)"', source(program)))
    if program == "cmon_proxy.py":
        routes |= set(make_docs.cmon_proxy.ADMIN_PAGES)
    told = set(re.findall(r"`(/[^`?]*)`", section_of("docs/ENDPOINTS.md", title)))
    assert routes == told


def test_messages_that_the_documents_explain_exist() -> None:
    said = "".join(source(program) for program in PROGRAMS) + source("smf/cmon-agent-setup")
    said = re.sub(r'"\s*\n\s*f?"', "", said)            # texts that go on in the next line
    rows = re.findall(r"(?m)^\| `([^`]+)` \| [^|]+\|$",
                      section_of("docs/TROUBLESHOOTING.md", "Messages of the programs"))
    assert len(rows) > 5
    assert [row for row in rows if row not in said] == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_older_python_reaches_the_version_message(program: str) -> None:
    """Python 3.7 can parse the check: otherwise it would only report `invalid syntax`."""
    ast.parse(source(program), feature_version=(3, 7))
