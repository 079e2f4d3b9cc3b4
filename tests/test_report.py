"""The page holds everything itself; the plots are files that are whole or absent."""

from __future__ import annotations

import base64
import builtins
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from fedrebasin.errors import UsageError
from fedrebasin.simulations.plots import Panel, Series, save_lines, spread_apart
from fedrebasin.simulations.report import Picture, Table, duration, write_report
from fedrebasin.simulations.results import provenance


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "loss.png"
    series = [Series("plain", [0, 0.5, 1], [0.2, None, 0.3], [0.01, None, 0.02]), Series("aligned", [0, 1], [0.1, 0.2])]
    save_lines(path, [Panel("Loss", "lam", "loss", series, ticks=[0, 1], hlines=[("one", 0.1), ("two", 0.1)])])
    return path


def page_of(tmp_path, sections, **changes):
    path = tmp_path / "report.html"
    facts = provenance("fedrebasin compare --seed 1", [1], time.time() - 75)
    words = {"title": "A title", "question": "Why?", "answer": "Because.", "provenance": facts} | changes
    write_report(path, sections=sections, **words)
    return path.read_text(encoding="utf-8")


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []
        self.tags = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [value for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]


def test_the_page_refers_to_nothing_outside_itself(tmp_path, picture):
    text = page_of(tmp_path, [Picture("the loss", picture)])
    links = Links()
    links.feed(text)
    assert links.found and all(link.startswith("data:") for link in links.found)
    assert "script" not in links.tags
    assert not re.search(r"https?://|url\(|@import", text)


def test_the_page_holds_the_picture_byte_for_byte(tmp_path, picture):
    text = page_of(tmp_path, [Picture("the loss", picture)])
    encoded = re.search(r"data:image/png;base64,([^\"]+)", text).group(1)
    assert base64.b64decode(encoded) == picture.read_bytes()


def test_the_page_shows_every_number_and_text_that_it_was_given(tmp_path, picture):
    rows = [["plain", "3.49 ± 0.10", "10.1 %"], ["aligned", "0.737", "74.5 %"]]
    sections = ["A paragraph.", "## A heading", Table("caption", ["model", "loss", "top-1"], rows, "a note", [1])]
    text = page_of(tmp_path, [*sections, Picture("the loss", picture)])
    expected = ["A title", "Why?", "Because.", "A paragraph.", "<h2>A heading</h2>", "a note", "caption", "the loss"]
    for word in [*expected, *(cell for row in rows for cell in row)]:
        assert word in text
    assert text.count('class="marked"') == 1


def test_the_foot_says_how_the_numbers_came_about(tmp_path):
    text = page_of(tmp_path, [])
    for word in ("fedrebasin compare --seed 1", "commit", "torch", "cores", "1 min 15 s"):
        assert word in text


def test_text_is_never_taken_for_markup(tmp_path):
    text = page_of(tmp_path, ["a < b & <script>alert(1)</script>"], title="<b>")
    assert "<script>" not in text and "&lt;script&gt;" in text and "<title>&lt;b&gt;</title>" in text


def test_a_row_with_a_cell_too_few_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(UsageError, match="expected 2 cells"):
        page_of(tmp_path, [Table("t", ["a", "b"], [["1"]])])
    assert not (tmp_path / "report.html").exists()


def test_a_picture_that_is_missing_or_no_png_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*none\.png"):
        page_of(tmp_path, [Picture("x", tmp_path / "none.png")])
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(UsageError, match="expected a PNG file"):
        page_of(tmp_path, [Picture("x", tmp_path / "text.png")])


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_a_missing_library_is_named_with_its_remedy(tmp_path, monkeypatch, missing):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.partition(".")[0] == missing:
            raise ImportError(f"No module named {missing!r}")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=rf"need.* {missing} .*fedrebasin\[simulation\]"):
        if missing == "jinja2":
            page_of(tmp_path, [])
        else:
            save_lines(tmp_path / "x.png", [Panel("t", "x", "y", [Series("a", [0], [1])])])
    assert list(tmp_path.iterdir()) == []


def test_a_plot_that_fails_leaves_the_earlier_file_and_nothing_else(tmp_path, picture):
    before = picture.read_bytes()
    with pytest.raises(ValueError, match="shape"):
        save_lines(picture, [Panel("t", "x", "y", [Series("a", [0, 1], [1])])])
    assert picture.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]


def test_labels_beside_the_axes_keep_their_order_and_their_distance():
    places = [0.5, 0.51, 0.2, 0.5, 0.95]
    moved = spread_apart(places, 0.06)
    assert np.all(np.diff(sorted(moved)) >= 0.06 - 1e-12)
    assert [moved[i] for i in np.argsort(places, kind="stable")] == sorted(moved)
    assert spread_apart([0.1, 0.9], 0.06) == pytest.approx([0.1, 0.9])
    assert spread_apart([], 0.06) == []


@pytest.mark.parametrize(("seconds", "text"), [(0, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 0 s"), (3600, "1 h 0 min")])
def test_durations_are_written_for_people(seconds, text):
    assert duration(seconds) == text
