"""The page of fedrebasin inspect, and the picture in it."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import networks
import pytest
import torch
from inspected import run
from torch import nn

from fedrebasin import PermutationSpec, trace
from fedrebasin.simulations.inspection_picture import layers, lines

pytestmark = pytest.mark.usefixtures("at_home")


class Page(HTMLParser):
    """Text and links of a page whose tags must be closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_whole_names_every_perm_and_loads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    line = f"inspected_nets:Tokens --input 2x5:int64 --html {path} --save {tmp_path}/spec.json"
    assert run(line) == 0
    spec = PermutationSpec.load(tmp_path / "spec.json")
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text.replace("<wbr>", ""))  # where a name may break
    assert page.open == [] and "script" not in page.tags
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not re.search(r"https?://|url\(|@import", text)
    assert set(spec.perm_shapes) <= set(page.texts) and len(spec.perm_shapes) > 1
    for perm in spec.perm_shapes:  # in the picture too
        assert any(title.startswith(f"{perm}: ") for title in page.texts)
    for reason in ("table", "output"):
        assert reason in page.texts
    assert text.count('<g class="line c') == len(spec.perm_shapes)
    assert "passed on random weights" in text and "2x5:int64" in text


def test_names_are_escaped_in_the_page(tmp_path: Path) -> None:
    strange = nn.ModuleDict({"a<b>&": nn.Linear(4, 3), "c": nn.Linear(3, 2)})
    strange.forward = lambda x: strange["c"](strange["a<b>&"](x))  # type: ignore[assignment]
    sys.modules["inspected_strange"] = strange_module = type(sys)("inspected_strange")
    strange_module.net = strange  # type: ignore[attr-defined]
    assert run(f"inspected_strange:net --input 3x4 --html {tmp_path}/page.html") == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "a&lt;b&gt;&amp;" in text and "a<b>&" not in text


def test_lines_that_meet_in_a_row_never_share_a_lane() -> None:
    net = networks.DenseBlock()
    spec = trace(net, networks.IMAGE)
    rows = layers(spec)
    drawn = lines(spec, rows)
    assert {line.perm for line in drawn} == set(spec.perm_shapes)
    for line in drawn:
        touched = {rows[row].name for row in line.dots}
        assert touched == {axis.name.rpartition(".")[0] for axis in spec.tied[line.perm]}
        others = [other for other in drawn if other is not line and other.lane == line.lane]
        assert all(other.last < line.first or line.last < other.first for other in others)


def test_a_long_chain_needs_few_lanes() -> None:
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(120)))
    spec = trace(net, (torch.zeros(2, 3),))
    drawn = lines(spec, layers(spec))
    assert len(drawn) == 119 and {line.lane for line in drawn} == {0, 1}
    assert [line.dots for line in drawn[:2]] == [{0: "first", 1: "later"}, {1: "first", 2: "later"}]
