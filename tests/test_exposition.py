# SPDX-License-Identifier: MPL-2.0
"""The text format: exact output; input parsed strictly, or line by line."""
from __future__ import annotations

import math
import random

import pytest

from cmon_agent import (
    COUNTER, GAUGE, ExpositionError, Family, Sample, merge, parse, parse_lines, render)


def gauge(name: str, *samples: tuple[dict[str, str], float]) -> Family:
    return Family(name, GAUGE, "Help.", [Sample(tuple(labels.items()), value)
                                         for labels, value in samples])


RENDERED = [
    ("an integer is exact", ({}, 2 ** 64 - 1), "a 18446744073709551615\n"),
    ("a float reads back equal", ({}, 0.1), "a 0.1\n"),
    ("a big float keeps its exponent", ({}, 1e300), "a 1e+300\n"),
    ("infinity", ({}, -math.inf), "a -Inf\n"),
    ("not a number", ({}, math.nan), "a NaN\n"),
    ("a truth value is a number", ({}, True), "a 1\n"),
    ("labels are escaped", ({"l": 'x"\\\ny'}, 1), 'a{l="x\\"\\\\\\ny"} 1\n'),
    ("labels keep their order", ({"z": "1", "b": "2"}, 1), 'a{z="1",b="2"} 1\n'),
]


@pytest.mark.parametrize("sample, line", [row[1:] for row in RENDERED],
                         ids=[row[0] for row in RENDERED])
def test_samples_are_written(sample: tuple[dict[str, str], float], line: str) -> None:
    page = render([gauge("a", sample)])
    assert page == "# HELP a Help.\n# TYPE a gauge\n" + line
    assert render(parse(page)) == page


def test_help_is_escaped_and_a_family_without_samples_is_left_out() -> None:
    assert render([Family("a", COUNTER, "one\ntwo \\", [Sample((), 1)]), gauge("b")]) == \
        "# HELP a one\\ntwo \\\\\n# TYPE a counter\na 1\n"


@pytest.mark.parametrize("name", ["1a", "a b", "", "a-b", "é", "a\n"])
def test_a_name_that_breaks_the_format_is_refused(name: str) -> None:
    with pytest.raises(ExpositionError):
        render([gauge(name, ({}, 1))])


HISTOGRAM = ('# TYPE h histogram\nh_bucket{le="1"} 2\nh_bucket{le="+Inf"} 3\nh_sum 4.5\n'
             'h_count 3\n')
GOOD = [
    ("a bare sample", "a 1\n", ["a"]),
    ("a timestamp is dropped", "a 1 1700000000000\n", ["a"]),
    ("blanks and tabs between words", "a \t 1  5 \n", ["a"]),
    ("blanks inside braces", 'a { x = "1" , y = "2" , } 3\n', ["a"]),
    ("empty braces", "a{} 1\n", ["a"]),
    ("comments and empty lines", "# hello\n\n#\n# EOF\na 1\n", ["a"]),
    ("CR LF", "a 1\r\nb 2\r\n", ["a", "b"]),
    ("special values", "a NaN\nb +Inf\nc -inf\n", ["a", "b", "c"]),
    ("a histogram is one family", HISTOGRAM, ["h"]),
    ("a histogram as artedi prints it", '# TYPE h histogram\nh{le="1"} 2\nh{le="+Inf"} 3\n'
     "h_sum 4\nh_count 3\n", ["h"]),
    ("an empty page", "", []),
    ("_count without a histogram is a name of its own", "x_count 1\nx 2\n", ["x_count", "x"]),
]
BAD = [
    ("a page that is cut off", "a 1", "truncated"),
    ("a dash instead of a number", "a -\n", "line 1: '-' is not a number"),
    ("no value", "a\n", "line 1"),
    ("an empty value", "ok 1\na \n", "line 2"),
    ("undefined", "a undefined\n", "not a number"),
    ("an unquoted label", "a{x=1} 1\n", "not closed or not quoted"),
    ("an open label", 'a{x="1 1\n', "not closed or not quoted"),
    ("a wrong escape", 'a{x="\\t"} 1\n', "not closed or not quoted"),
    ("a label twice", 'a{x="1",x="2"} 1\n', "duplicate label"),
    ("a series twice", 'a{x="1",y="2"} 1\na{y="2",x="1"} 1\n', "same labels twice"),
    ("an unknown type", "# TYPE a number\na 1\n", "unknown type"),
    ("TYPE behind its samples", "a 1\n# TYPE a gauge\n", "second TYPE of a, or TYPE after"),
    ("a number of a million digits", "a " + "9" * 1_000_000 + "\n", "is not a number"),
    ("digits of another script", "a ٣\n", "is not a number"),
    ("a float as timestamp", "a 1 1.5\n", "timestamp"),
    ("three values", "a 1 2 3\n", "one value"),
    ("a line of garbage", "\x00\xff\n", "no metric name"),
]


@pytest.mark.parametrize("page, names", [row[1:] for row in GOOD], ids=[row[0] for row in GOOD])
def test_a_good_page_is_parsed(page: str, names: list[str]) -> None:
    families = parse(page)
    assert [family.name for family in families] == names
    assert parse_lines(page) == (families, [])


@pytest.mark.parametrize("page, problem", [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_bad_page_is_refused_with_its_line(page: str, problem: str) -> None:
    with pytest.raises(ExpositionError, match=problem.replace("(", r"\(")):
        parse(page)


def test_a_bad_line_costs_only_itself() -> None:
    families, problems = parse_lines("# TYPE a counter\na 1\nb oops\n# TYPE c what\nc 3\n")
    assert [(family.name, family.kind) for family in families] == [("a", "counter"),
                                                                  ("c", "untyped")]
    assert [problem.split(":")[0] for problem in problems] == ["line 3", "line 4"]


def test_samples_are_limited() -> None:
    page = "".join(f"a{{i=\"{i}\"}} 1\n" for i in range(20))
    with pytest.raises(ExpositionError, match="more than 10 samples"):
        parse(page, max_samples=10)
    families, problems = parse_lines(page, max_samples=10)
    assert len(families[0].samples) == 10 and len(problems) == 10


def test_merging_makes_families_contiguous_and_reports_omissions() -> None:
    merged, problems = merge([
        gauge("a", ({"x": "1"}, 1)), gauge("b", ({}, 1)),
        gauge("a", ({"x": "2"}, 2), ({"x": "1"}, 9)),
        Family("b", COUNTER, "", [Sample((), 5)])])
    assert [(family.name, [s.value for s in family.samples]) for family in merged] == \
        [("a", [1, 2]), ("b", [1])]
    assert len(problems) == 2
    assert "more than once" in problems[0] and "already a gauge" in problems[1]


def test_merging_refuses_a_name_that_collides_with_a_histogram() -> None:
    merged, problems = merge([*parse(HISTOGRAM), gauge("h_sum", ({}, 1)), gauge("h", ({}, 1))])
    assert [family.name for family in merged] == ["h"] and len(problems) == 2


def random_families(seed: int) -> list[Family]:
    chance = random.Random(seed)
    letters = "ab\"\\\n {}=,é\t#€"
    families = []
    for index in range(chance.randrange(1, 8)):
        samples = [Sample(tuple((f"l{n}", "".join(chance.choices(letters, k=chance.randrange(6))))
                                for n in range(chance.randrange(3))) + (("id", str(number)),),
                          chance.choice([0, -5, 2 ** 64 - 1, 1.5, 1e-9, math.inf]))
                   for number in range(chance.randrange(1, 5))]
        families.append(Family(f"m{index}", chance.choice(["counter", "gauge", "untyped"]),
                               "".join(chance.choices(letters, k=5)).strip(), samples))
    return families


@pytest.mark.parametrize("seed", range(50))
def test_rendered_pages_parse_to_the_same_families(seed: int) -> None:
    families = random_families(seed)
    assert parse(render(families)) == families


@pytest.mark.parametrize("seed", range(50))
def test_garbage_parses_or_raises_exposition_error(seed: int) -> None:
    chance = random.Random(seed)
    page = list(render(random_families(seed)))
    for _ in range(chance.randrange(1, 20)):
        page[chance.randrange(len(page))] = chr(chance.choice([0, 9, 10, 34, 35, 92, 123, 125,
                                                               chance.randrange(0x3000)]))
    text = "".join(page)
    families, problems = parse_lines(text)
    assert isinstance(problems, list)
    assert parse(render(families)) == families      # what was kept is good
    try:
        parse(text)
    except ExpositionError:
        pass
