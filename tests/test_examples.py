# SPDX-License-Identifier: MPL-2.0
"""What users of Prometheus and Grafana get: rules with tests, configurations, a dashboard."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any
from collections.abc import Iterator

import pytest
from cmon_agent import parse
from support import EXAMPLES, NODE, ROOT, Program, http_get, node

# names of PromQL, labels, and series that Prometheus makes itself
WORDS = {"and", "by", "rate", "increase", "up", "round", "label_values", "job", "alias", "or"}


def promtool(*arguments: str) -> "subprocess.CompletedProcess[str]":
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed (prometheus)")
    return subprocess.run([tool, *arguments], cwd=EXAMPLES, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True)


@pytest.mark.parametrize("arguments", [("check", "rules", "rules.yml"),
                                       ("test", "rules", "rules.test.yml"),
                                       ("check", "config", "--syntax-only", "prometheus.yml"),
                                       ("check", "config", "--syntax-only", "prometheus-dns.yml")],
                         ids=" ".join)
def test_promtool_is_content(arguments: Any) -> None:
    done = promtool(*arguments)
    assert done.returncode == 0, done.stdout


def test_every_alert_is_tested() -> None:
    rules = (EXAMPLES / "rules.yml").read_text()
    tests = (EXAMPLES / "rules.test.yml").read_text()
    for alert in re.findall(r"alert: (\w+)", rules):
        assert re.search(rf"{alert}\n +exp_alerts:\n", tests), f"{alert}: a test in which it fires"
        assert re.search(rf"{alert}, exp_alerts: \[\]", tests), f"{alert}: one in which it does not"


def names_in(expression: str) -> set[str]:
    """The metrics in a PromQL expression, near enough: words that are no label and no function."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"", " ", expression)
    return set(re.findall(r"(?<!\w)[a-zA-Z_][\w:]*", bare)) - WORDS


def expressions() -> Iterator[str]:
    yield from re.findall(r"expr: (.*)", (EXAMPLES / "rules.yml").read_text())
    dashboard = json.loads((EXAMPLES / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    yield from (variable["query"] for variable in dashboard["templating"]["list"]
                if variable["type"] == "query")


@pytest.fixture(scope="module")
def served() -> set[str]:
    """The names of all metrics of the recorded node's zones."""
    zones = [vm["uuid"] for frame in node(NODE)["frames"] for vm in frame["vms"]]
    names: set[str] = set()
    with Program.agent("--replay", NODE) as agent:
        for uuid in zones:
            answer = http_get(agent.address, f"/v1/{uuid}/metrics")
            if answer.status == 200:
                names |= {family.name for family in parse(answer.text)}
    return names


def test_rules_and_dashboard_know_what_we_serve(served: set[str]) -> None:
    recorded = set(re.findall(r"record: (\S+)", (EXAMPLES / "rules.yml").read_text()))
    wanted = set().union(*map(names_in, expressions()))
    assert served
    assert wanted - recorded - served == set()


def test_the_readme_shows_metrics_that_are_served(served: set[str]) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    shown = readme.partition("## What it shows")[2].partition("##")[0]
    samples = re.findall(r"(?m)^    (.*\n)", shown)
    names = {family.name for family in parse("".join(samples))}
    assert len(names) > 8 and names <= served


def test_the_readme_shows_the_same_configuration() -> None:
    """Its blocks are what the examples have: nothing is explained in two ways."""
    readme = (ROOT / "README.md").read_text("utf-8")
    examples = [(EXAMPLES / name).read_text() for name in ("prometheus.yml", "prometheus-dns.yml")]
    blocks: list[str] = re.findall(r"```yaml\n(.*?)```", readme, re.S)
    assert len(blocks) == 2
    for block, example in zip(blocks, examples):
        assert example.endswith(block.replace("/etc/prometheus/", ""))
