# SPDX-License-Identifier: MPL-2.0
"""What users of Prometheus and Grafana get: rules with tests, configurations, a dashboard."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from collections.abc import Iterator

import pytest
from cmon_agent import metadata, parse
from support import EXAMPLES, NODE, ROOT, Program, http_get, node

sys.path.insert(0, str(EXAMPLES))

import make_dashboards  # noqa: E402  (it needs the path)

# names of PromQL, labels, and series that Prometheus makes itself
WORDS = set("""abs alias alertname and avg by count group_left increase instance job label_values
max max_over_time min min_over_time on or rate sum time topk unless up vector without state
collector reason remote cpu_id vcpu interface nic_tag network_uuid account server result""".split())


def promtool(*arguments: str) -> "subprocess.CompletedProcess[str]":
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed (prometheus)")
    return subprocess.run([tool, *arguments], cwd=EXAMPLES, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True)


@pytest.mark.parametrize("arguments", [("check", "rules", "rules.yml"),
                                       ("test", "rules", "rules.test.yml"),
                                       ("check", "config", "--syntax-only", "prometheus.yml"),
                                       ("check", "config", "--syntax-only", "prometheus-dns.yml"),
                                       ("check", "config", "--syntax-only",
                                        "prometheus-operator.yml")],
                         ids=" ".join)
def test_promtool_accepts_the_examples(arguments: Any) -> None:
    done = promtool(*arguments)
    assert done.returncode == 0, done.stdout


def names_in(expression: str) -> set[str]:
    """The metrics in a PromQL expression, near enough: words that are no label and no function."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"", " ", expression)
    return set(re.findall(r"(?<!\w)[a-zA-Z_][\w:]*", bare)) - WORDS


def expressions() -> Iterator[str]:
    rules = (EXAMPLES / "rules.yml").read_text()
    yield from re.findall(r"expr: ([^|\n].*)", rules)
    yield from re.findall(r"expr: \|\n((?: {10}.*\n)+)", rules)
    for name, *_ in make_dashboards.DASHBOARDS:
        shown = json.loads((EXAMPLES / "dashboards" / f"{name}.json").read_text())
        for panel in shown["panels"]:
            yield from (target["expr"] for target in panel.get("targets", ()))
        yield from (variable["query"] for variable in shown["templating"]["list"]
                    if variable["type"] == "query")


@pytest.fixture(scope="module")
def served() -> set[str]:
    """The names of all metrics of the recorded node, its zones and its agent."""
    zones = [vm["uuid"] for frame in node(NODE)["frames"] for vm in frame["vms"]]
    names: set[str] = set()
    with Program.agent("--replay", NODE) as agent:
        for path in (*(f"/v1/{uuid}/metrics" for uuid in zones), "/v1/gz/metrics", "/metrics"):
            answer = http_get(agent.address, path)
            if answer.status == 200:
                names |= {family.name for family in parse(answer.text)}
    return names


def test_rules_and_dashboards_use_only_existing_metrics(served: set[str]) -> None:
    """What proxies serve is in tests/services/test_dashboards.py."""
    recorded = set(re.findall(r"record: (\S+)", (EXAMPLES / "rules.yml").read_text()))
    tables = {row["name"] for row in metadata()}
    wanted = {name for name in set().union(*map(names_in, expressions()))
              if not re.match("cmon_(proxy|instance|quota|client)_", name)}
    assert len(wanted) > 80
    assert wanted - recorded - served - tables == set()


@pytest.mark.parametrize("name", [row[0] for row in make_dashboards.DASHBOARDS])
def test_dashboards_fit_a_screen_and_are_consistent(name: str) -> None:
    made = make_dashboards.dashboard(name)
    places = [panel["gridPos"] for panel in made["panels"]]
    taken = [(x, y) for place in places for x in range(place["x"], place["x"] + place["w"])
             for y in range(place["y"], place["y"] + place["h"])]
    assert len(taken) == len(set(taken)) and max(x for x, _ in taken) < 24
    assert len({panel["id"] for panel in made["panels"]}) == len(made["panels"])
    others = {make_dashboards.uid(row[0]) for row in make_dashboards.DASHBOARDS}
    linked = set(re.findall(r"/d/([\w-]+)", json.dumps(made)))
    assert linked <= others
    for panel in made["panels"]:        # threads are not CPUs, and share no axis with them
        drawn = " ".join(target["expr"] for target in panel.get("targets", ()))
        threads, cpus = (re.search(words, drawn) for words in (
            "load_average|_threads", "cpu_(user|sys|wait)|cpucap_limit|_cpus"))
        assert not (threads and cpus), panel["title"]
        if "alloc_fail" in drawn:       # a count, not bytes
            assert panel["fieldConfig"]["defaults"]["unit"] == "ops"


def test_the_readme_shows_metrics_that_are_served(served: set[str]) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    shown = readme.partition("## What it shows")[2].partition("##")[0]
    samples = re.findall(r"(?m)^    (.*\n)", shown)
    names = {family.name for family in parse("".join(samples))}
    assert len(names) > 8 and names <= served


def test_the_readme_shows_the_configuration_of_the_examples() -> None:
    """The README's blocks equal the examples."""
    readme = (ROOT / "README.md").read_text("utf-8")
    examples = [(EXAMPLES / name).read_text() for name in ("prometheus.yml", "prometheus-dns.yml")]
    blocks: list[str] = re.findall(r"```yaml\n(.*?)```", readme, re.S)
    assert len(blocks) == 2
    for block, example in zip(blocks, examples):
        assert block.replace("/etc/prometheus/", "") in example


# --- the command that prints them -----------------------------------------------------------------

def printed(*arguments: str, python: str = sys.executable, cwd: Path = ROOT) -> str:
    return subprocess.run([python, "cmon.py", *arguments], cwd=cwd, stdout=subprocess.PIPE,
                          check=True).stdout.decode()


def test_command_prints_rules_and_dashboards() -> None:
    assert printed("rules") == (EXAMPLES / "rules.yml").read_text("utf-8")
    listed = printed("dashboard").splitlines()[1:]
    assert [line.split()[0] for line in listed] == [row[0] for row in make_dashboards.DASHBOARDS]
    for line in listed:
        name = line.split()[0]
        assert printed("dashboard", name) == make_dashboards.text(name)
