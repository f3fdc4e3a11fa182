"""The report as a text: what it says, and that it needs nothing from elsewhere."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from comparison_fixtures import classification, language_modeling
from mhe_lightning.comparison.html import headline, html_report, write_report
from mhe_lightning.comparison.plots import figures
from mhe_lightning.comparison.results import Estimate

TABLE = "<table><tr><td>results</td></tr></table>"
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Elements with their attributes, and a check that they are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def ids(self, tag: str | None = None) -> list[str]:
        return [str(a["id"]) for name, a in self.elements if "id" in a and tag in (None, name)]


@pytest.fixture(scope="module")
def text() -> str:
    return html_report(
        [language_modeling(), classification()],
        [TABLE, TABLE],
        title="Attention compared",
        command="mhe compare runs/* > out.html",
        overview="<table><caption>all tasks</caption></table>",
    )


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_nothing_is_asked_from_the_network(text: str, page: Page) -> None:
    assert re.findall(r"(?:https?:)?//[a-z]", text) == []
    assert "@import" not in text
    for name, attributes in page.elements:
        assert name not in {"script", "iframe", "object", "embed", "base"}
        for key in ("src", "href", "xlink:href", "data", "poster", "action", "srcset"):
            assert (attributes.get(key) or "#").startswith(("#", "data:")), (name, attributes)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_every_figure_is_there_with_a_caption(text: str, page: Page) -> None:
    expected = [f"fig-{c.task}-{stem}" for c in (language_modeling(), classification()) for stem in figures(c)]
    assert page.ids("figure") == expected
    assert [name for name, _ in page.elements].count("figcaption") == len(expected)
    assert text.count('<svg viewBox="0 0') == len(expected)


def test_no_id_is_given_twice_and_every_reference_has_its_target(text: str, page: Page) -> None:
    ids = page.ids()
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)|aria-labelledby="([^"]*)"', text)
    assert {a or b or c for a, b, c in targets} <= set(ids)


def test_the_style_of_a_figure_stays_in_it(text: str) -> None:
    inside = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)[1:]
    assert inside
    assert all(rule.strip().startswith("#fig-") for rule in inside)


def test_a_page_has_its_language_its_charset_and_an_outline(text: str, page: Page) -> None:
    tags = [name for name, _ in page.elements]
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">')
    assert tags.count("h1") == 1
    assert tags.index("h1") < tags.index("h2") < tags.index("h3")
    assert ("link", {"rel": "icon", "href": "data:,"}) in page.elements


def test_the_answer_comes_before_table_and_figures(text: str) -> None:
    section = text[text.index('<section id="task-wikitext-2-v1"') :]
    order = [section.index(part) for part in ("mhe_add</strong> keeps", TABLE, "<figure", "What was compared")]
    assert order == sorted(order)


def test_contents_are_listed_when_there_are_several_tasks(text: str) -> None:
    assert '<nav aria-label="Contents"><ul><li><a href="#task-wikitext-2-v1">' in text
    alone = html_report([classification()], [TABLE], title="t", command="c")
    assert "<nav" not in alone


def test_the_command_the_facts_and_the_notes_are_shown(text: str) -> None:
    assert "mhe compare runs/* &gt; out.html" in text
    assert "<dt>tokens a step</dt><dd>32,768</dd>" in text
    assert "Seed 3 of el_att was run on another machine." in text
    for term in ("PRR", "PEoP", "95 % confidence intervals", "paired t test"):
        assert term in text


def test_a_note_that_the_table_has_is_not_repeated() -> None:
    comparison = replace(classification(), notes=["One & two."])
    table = "<table><tr><td>One &amp; two.</td></tr></table>"
    assert html_report([comparison], [table], title="t", command="c").count("One &amp; two.") == 1


def test_what_users_write_is_escaped() -> None:
    evil = "<b>&\"'"
    comparison = classification()
    comparison = replace(
        comparison,
        task=evil,
        split=evil,
        reference=evil,
        metric=replace(comparison.metric, name=evil),
        variants=[replace(v, name=evil if v.name == "mha" else v.name) for v in comparison.variants],
        facts={evil: evil},
        notes=[evil],
    )
    text = html_report([comparison], [TABLE], title=evil, command=evil)
    assert "<b>" not in text
    assert Page(text).ids("figure") == ["fig-b-pareto", "fig-b-retention"]


def test_tasks_whose_names_read_alike_get_ids_of_their_own() -> None:
    comparisons = [classification("a b"), classification("a/b"), classification("***")]
    page = Page(html_report(comparisons, [TABLE] * 3, title="t", command="c"))
    assert [name.removesuffix("-pareto") for name in page.ids("figure") if name.endswith("-pareto")] == [
        "fig-a-b",
        "fig-a-b--2",
        "fig-task",
    ]


def test_each_comparison_needs_its_table() -> None:
    with pytest.raises(ValueError, match=r"tables \(0\) must be as many as comparisons \(1\)"):
        html_report([classification()], [], title="t", command="c")


# The sentences


def sentence(name: str, **changes: object) -> str:
    comparison = language_modeling()
    (variant,) = [v for v in comparison.variants if v.name == name]
    return headline(comparison, replace(variant, **changes))  # type: ignore[arg-type]


def test_a_headline_tells_what_is_kept_and_at_which_cost() -> None:
    assert sentence("mhe_add", retained=Estimate(0.993, 0.005, 3)) == (
        "mhe_add keeps 99.3 ± 0.5 % of mha’s ppl with 31 % of its attention parameters and 8.3 % of its cache."
    )


def test_a_headline_of_one_seed_has_no_interval() -> None:
    assert "keeps 99.3 % of" in sentence("mhe_add", retained=Estimate(0.993, None, 1))


def test_a_headline_leaves_out_the_cache_of_an_encoder() -> None:
    assert sentence("skv", cache_bytes_per_token=None).endswith("with 75 % of its attention parameters.")


def test_a_headline_without_retention_tells_the_score() -> None:
    comparison = classification()
    assert headline(comparison, comparison.variants[2]) == (
        "sha has accuracy 89.80 ± 0.20 % with 31 % of its attention parameters (retention is not defined)."
    )


def test_a_headline_without_the_reference_says_so() -> None:
    comparison = classification()
    alone = replace(comparison, variants=comparison.variants[1:])
    assert headline(alone, alone.variants[0]).endswith("there is no run of mha to compare it with.")


# Files


def test_the_report_is_written_with_its_plots(tmp_path: Path) -> None:
    paths = write_report(tmp_path / "new", [classification()], [TABLE], title="t", command="c")
    assert [str(path.relative_to(tmp_path / "new")) for path in paths] == [
        "report.html",
        "plots/glue-sst2-pareto.png",
        "plots/glue-sst2-pareto.svg",
        "plots/glue-sst2-retention.png",
        "plots/glue-sst2-retention.svg",
    ]
    assert sorted(paths) == sorted(path for path in (tmp_path / "new").rglob("*") if path.is_file())
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in paths[2].read_bytes()
    assert paths[0].read_text("utf-8") == html_report([classification()], [TABLE], title="t", command="c")
