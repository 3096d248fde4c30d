# SPDX-License-Identifier: MPL-2.0
"""Man pages as man shows them, completion as a shell does it."""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cmon
import pytest
from support import ROOT

PAGES = sorted((ROOT / "docs" / "man").glob("*.[18]"))


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def completed(*words: str, folder: Path = ROOT) -> list[str]:
    """Bash's completions of the last word."""
    script = """
source <("$1" "$2" completion bash); shift 2
COMP_WORDS=(cmon "$@"); COMP_CWORD=$#
_cmon; printf '%s\\n' "${COMPREPLY[@]}"
"""
    done = subprocess.run([tool("bash"), "-c", script, "bash", sys.executable,
                           str(ROOT / "cmon.py"), *words], cwd=folder, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True, check=False)
    assert not done.stderr
    return [line for line in done.stdout.splitlines() if line]


# --- man pages ------------------------------------------------------------------------------------

def test_every_command_and_server_has_a_page() -> None:
    names = {path.name for path in PAGES}
    assert {f"cmon-{command.name}.1" for command in cmon.COMMANDS} <= names
    assert {"cmon.1", "cmon_agent.8", "cmon_proxy.8"} <= names


@pytest.mark.parametrize("path", PAGES, ids=[path.name for path in PAGES])
def test_man_renders_without_warning(path: Path) -> None:
    done = subprocess.run([tool("man"), "--warnings", "-l", str(path)], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False,
                          env={**os.environ, "MANWIDTH": "80", "LC_ALL": "C.UTF-8", "PAGER": "cat"})
    assert (done.returncode, done.stderr) == (0, b"")
    shown = re.sub(".\\x08", "", done.stdout.decode())
    for title in ("NAME", "SYNOPSIS", "DESCRIPTION", "EXIT STATUS", "SEE ALSO"):
        assert f"\n{title}\n" in shown
    assert "\\" not in shown.replace("\\n", "")


def test_page_of_a_command_has_its_flags_and_its_example() -> None:
    page = (ROOT / "docs" / "man" / "cmon-doctor.1").read_text()
    for word in (r"\fB\-\-prometheus\fR \fIFILE\fR", r"\fB\-\-url\fR \fIURL\fR",
                 r"cmon.py doctor web01 \-\-prometheus prometheus.yml"):
        assert word in page
    page = (ROOT / "docs" / "man" / "cmon-top.1").read_text()
    assert page.count(r"\fB\-\-groups\fR \fIA,B\fR") == 2


def test_optional_values_and_arguments_are_in_brackets() -> None:
    manual = ROOT / "docs" / "man"
    assert r"[\fB\-\-watch\fR \fI[SECONDS]\fR]" in (manual / "cmon-monitor.1").read_text()
    assert r"[\fINAME EXPR,WARN,CRIT ...\fR]" in (manual / "cmon-check.1").read_text()


# --- completion -----------------------------------------------------------------------------------

def test_bash_completes_commands_flags_and_values(tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("")
    (tmp_path / "a-folder").mkdir()
    assert completed("dis") == ["discover"]
    assert set(completed("d")) == {command.name for command in cmon.COMMANDS
                                   if command.name.startswith("d")}
    assert completed("doctor", "--prom") == ["--prometheus", "--prometheus-url"]
    assert completed("--url", "https://x", "certgen", "--re") == ["--renew"]
    assert completed("dashboard", "f") == ["fleet"]
    assert completed("completion", "z") == ["zsh"]
    assert sorted(completed("certgen", "--ssh-key", "a", folder=tmp_path)) == ["a-file", "a-folder"]
    assert completed("certgen", "--out", "a", folder=tmp_path) == ["a-folder"]
    assert completed("setup", "a", folder=tmp_path) == ["a-folder"]
    assert completed("discover", "--groups", "x") == []


@pytest.mark.parametrize("command", [command.name for command in cmon.COMMANDS])
def test_bash_knows_every_flag(command: str) -> None:
    flags = {flag for action in cmon.actions_of(cmon.parsers_of(cmon.command_line())[command])
             for flag in action.option_strings}
    assert flags <= set(completed(command, "-"))


# what zsh would offer: its own functions, told to print what they are given
ZSH = """
_arguments() { print -rl -- "$@"; state=$WANTED; }
_describe() { print -rl -- "${(@P)2}"; }
compdef() { }
source <("$1" "$2" completion zsh)
words=(discover) _cmon
"""


def test_zsh_accepts_the_script(tmp_path: Path) -> None:
    zsh = tool("zsh")
    seen = {}
    for wanted in ("command", "argument"):
        done = subprocess.run([zsh, "-f", "-c", ZSH, "zsh", sys.executable, str(ROOT / "cmon.py")],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False,
                              universal_newlines=True, env={**os.environ, "WANTED": wanted})
        assert (done.returncode, done.stderr) == (0, "")
        seen[wanted] = done.stdout
    for command in cmon.COMMANDS:
        assert f"\n{command.name}:" in seen["command"]
    assert re.search(r"(?m)^--file-sd\[write targets for .*\]:FILE:_files$", seen["argument"])
    # and zsh's own completion system loads it
    (tmp_path / "_cmon").write_text(subprocess.run(
        [sys.executable, str(ROOT / "cmon.py"), "completion", "zsh"], stdout=subprocess.PIPE,
        universal_newlines=True, check=True).stdout)
    script = f"fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -u -D; " \
        "print $_comps[cmon]"
    done = subprocess.run([zsh, "-f", "-c", script], stdout=subprocess.PIPE, check=True,
                          stderr=subprocess.PIPE, universal_newlines=True)
    assert (done.stdout, done.stderr) == ("_cmon\n", "")
