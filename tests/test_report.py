"""The report of a sweep: one page, no other file, nothing of a record taken for markup."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from made_records import make

from avalanche_fmlora.cli import main
from avalanche_fmlora.results.record import Record, write_record
from avalanche_fmlora.results.report import CAPTIONS, report_page
from avalanche_fmlora.results.table import paired_rows as differences
from avalanche_fmlora.results.table import render, render_paired, summary_rows

EVIL = "<script>alert('x')</script> & \"quoted\""


class Page(HTMLParser):
    """Tags with their attributes, tables as rows of texts, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def sweep() -> list[Record]:
    records = [make(0.7, method="fm_lora", order=o) for o in range(3)]
    records += [make(0.5 + o / 100, method="ncm", order=o) for o in range(3)]
    records += [make(0.9, method="joint", order=o, joint=True) for o in range(3)]
    records[0]["environment"] |= {"torch": "2.4.0", "processor": "a slow one"}
    return [*records, make(method="l2p", label=EVIL, options={"name": EVIL}, error=f"ValueError: {EVIL}")]


@pytest.fixture(scope="module")
def text() -> str:
    return report_page(sweep(), f"Sweep {EVIL}")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def cells(markdown: str) -> list[list[str]]:
    """Rows of a Markdown table without its ruler and its bold marks, blocks as their one cell."""
    lines = [[c.strip().strip("*").replace("**", "") for c in row.split("|")[1:-1]] for row in markdown.splitlines()]
    return [line if any(line[1:]) else line[:1] for k, line in enumerate(lines) if k != 1]


def test_tables_are_those_of_the_table_command(page: Page) -> None:
    summary, paired, runs = page.tables
    expected = [[c.replace("\\|", "|") for c in row] for row in cells(render(summary_rows(sweep())))]
    assert summary == [row[1:] if len(row) > 1 else row for row in expected]
    shown = [row[2:] if len(row) > 1 else row for row in cells(render_paired(differences(sweep())))]
    assert paired == shown
    assert len(runs) == 1 + len(sweep())
    assert runs[1][:9] == ["glyphs", "fm_lora", "finished", "0", "0", "47.5", "61.3", "5.0", "1,001"]
    assert "Paired differences from fm_lora" in page.text


def test_bold_is_bold(text: str) -> None:
    assert "<b>47.5 ± 0.0</b>" in text


def test_nothing_of_a_record_is_markup_and_nothing_is_fetched(page: Page, text: str) -> None:
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form"})
    assert page.text.count(EVIL) >= 4, "title, row, configuration and error show it as it is"
    addresses = [
        attributes[k] or "" for _, attributes in page.tags for k in ("src", "href", "action") if k in attributes
    ]
    assert all(address.startswith(("data:image/svg+xml;base64,", "#")) for address in addresses)
    targets = {attributes.get("id") for _, attributes in page.tags}
    assert all(address[1:] in targets for address in addresses if address.startswith("#"))
    assert not re.search(r"url\(|@import|https?://", text)


def test_figures_are_inside_with_a_text_beside_each(page: Page) -> None:
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    # `make` gives ranks, complexity and similarity: every kind can be drawn.
    assert [image["alt"] for image in images] == list(CAPTIONS.values())
    for image in images:
        svg = base64.b64decode((image["src"] or "").split(",")[1]).decode()
        assert "<svg" in svg
        assert "/tmp" not in svg


def test_failures_remarks_and_machines_are_told(page: Page) -> None:
    assert f"ValueError: {EVIL}" in page.text
    assert "10, of which 9 finished, 1 failed" in page.text
    assert "Failed, and in no mean: l2p-glyphs-s0-o0-" in page.text
    assert "several values of torch" in page.text
    assert "a slow one" in page.text
    assert 'method_options.name: "<script>' in page.text


def test_the_page_depends_on_the_records_only(text: str) -> None:
    assert report_page(sweep()[::-1], f"Sweep {EVIL}") == text


def test_protocols_have_sections_of_their_own() -> None:
    mixed = [make(method="ncm"), make(method="ncm", training={"epochs": 9}), make(benchmark={"name": "birds"})]
    page = Page(report_page(mixed, "x", "ncm"))
    assert [a["href"] for tag, a in page.tags if tag == "a"] == ["#s1", "#s2", "#s3", "#runs", "#machines"]
    assert "training.epochs=9" in page.text
    assert "2 protocols" in page.text
    assert len(page.tables) == 4, "one method a section: nothing to compare"


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    for record in sweep()[:4]:
        write_record(record, tmp_path / "mine" / "records")
    done = CliRunner().invoke(main, ["report", str(tmp_path / "mine"), "--paired", "ncm"])
    assert done.stdout.strip() == str(tmp_path / "mine" / "report.html")
    page = Page((tmp_path / "mine" / "report.html").read_text())
    assert page.text.count("Paired differences from ncm") == 1
    assert "mine" in page.text
    assert str(tmp_path) not in page.text
    for arguments, message in (([str(tmp_path / "mine"), "--paired", "x"], "reference"), (["none"], "does not exist")):
        wrong = CliRunner().invoke(main, ["report", *arguments])
        assert (wrong.exit_code, message in wrong.stderr) == (1, True)
    with pytest.raises(ValueError, match="at least one record"):
        report_page([], "x")
