"""The page of a reproduction: whole in itself, all claims on it, nothing unescaped."""

import base64
import re
from html.parser import HTMLParser

import pytest
from reproduction_report import make_report

from ibft.analysis.figures import FIGURES
from ibft.errors import DataError
from ibft.reproduce.claims import TOPICS, make_claims
from ibft.reproduce.page import flattened, write_page

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """tags: (name, attributes) of each. text: of the body. open: what is not closed; wrong: closed out of order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.words, self.open, self.wrong = [], [], [], []
        self.feed(html)
        self.text = re.sub(r"\s+", " ", "".join(self.words).replace("\u00a0", " "))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.wrong.append(tag)

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def page_of(tmp_path, report, figures=()):
    folder = tmp_path / "figures"
    folder.mkdir(exist_ok=True)
    for name in figures:
        (folder / f"{name}.svg").write_text(f"<svg xmlns='http://www.w3.org/2000/svg'><!-- {name} --></svg>")
    write_page(report, folder, tmp_path / "out" / "page.html")
    html = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture
def whole(tmp_path):
    return page_of(tmp_path, make_report(), [figure.name for figure in FIGURES])


def test_it_is_whole_in_itself(whole):
    html, page = whole
    assert (page.open, page.wrong) == ([], [])
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "base"}
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            if name in attributes:
                assert re.match("data:|#", attributes[name]), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import|https?:", html)
    assert ("html", {"lang": "en"}) in page.tags
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in html


def test_links_lead_somewhere(whole):
    _, page = whole
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"} <= set(ids)


def test_all_claims_come_first(whole):
    _, page = whole
    claims = make_claims(make_report())
    places = [page.text.index(claim["text"]) for claim in claims]
    assert places == sorted(places)
    topics = [page.text.index(heading) for heading in TOPICS.values()]
    assert topics == sorted(topics)
    assert max(places) < page.text.index("fig1b.") < page.text.index("How each run ended")


def test_claims_of_the_report_are_taken_as_they_are(tmp_path):
    report = {**make_report(), "claims": [{"topic": "of its own", "text": "Only this.", "verdict": "higher"}]}
    _, page = page_of(tmp_path, report)
    assert "of its own" in page.text
    assert "Only this." in page.text
    assert TOPICS["barrier"] not in page.text


def test_figures_are_in_it_with_captions(whole):
    _, page = whole
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    for figure, image in zip(FIGURES, images, strict=True):
        kind, data = image["src"].split(",")
        assert kind == "data:image/svg+xml;base64"
        assert f"<!-- {figure.name} -->" in base64.b64decode(data).decode()
        assert image["alt"] == figure.caption
        assert f"{figure.name}. {figure.caption}" in page.text


def test_absent_figures_are_named(tmp_path):
    _, page = page_of(tmp_path, make_report(), ["fig2"])
    assert "Not drawn, for want of rows: fig1b, fig3, fig4, fig5, fig6, fig7, fig8." in page.text


def test_tables_scroll_in_a_box(whole):
    html, page = whole
    tables = sum(tag == "table" for tag, _ in page.tags)
    assert tables == html.count('<div class="scroll" tabindex="0"') >= 6
    assert "tiny, temperature 0.6: 12 problems, in %, with 95 % interval" in page.text


def test_training_settings_and_how_to_make_it_again(whole):
    _, page = whole
    for text in (
        "FT, seed 1: held-out CE rises: 3 < 5 & falls never",
        "train.learning_rate",
        "0123456789abcdef",
        "torch2.13.0",
        "CPU (1 threads)",
        "ibft-fast reproduce from recipe.yaml -o again",
        "ibft-fast analyze figures report.json -o figures",
        "data.drop_ids=most.json",
    ):
        assert text in page.text, text


def test_nothing_is_taken_for_html(tmp_path):
    nasty = "<script>alert('x')</script>\"&"
    report = make_report()
    report |= {"name": nasty, "device": nasty, "commit": nasty, "versions": {nasty: nasty}, "settings": {nasty: nasty}}
    report["models"][0] |= {"what": nasty, "changes": {nasty: nasty}}
    for table in ("counts", "training"):
        for row in report[table]:
            row["model"] = nasty if row["model"] == "IB-FT, beta 0" else row["model"]
    report["models"][3]["name"] = nasty
    report["training"][0]["warnings"] = [nasty]
    report["suites"] = {nasty: report["suites"]["tiny"]}
    for row in report["counts"]:
        row["suite"] = nasty
    html, page = page_of(tmp_path, report)
    assert "<script" not in html
    assert page.text.count("alert('x')") > 20
    assert (page.open, page.wrong) == ([], [])


def test_a_report_with_little_in_it(tmp_path):
    report = make_report()
    for table in ("counts", "memorization", "deciles", "geometry", "training", "models", "seeds"):
        report[table] = []
    report |= {"suites": {}, "settings": {}, "versions": {}, "commit": None}
    _, page = page_of(tmp_path, report)
    for text in ("No samples were judged.", "Nothing was trained.", "Commit: not known", "unmeasured"):
        assert text in page.text


def test_settings_are_flattened():
    tree = {"a": {"b": 1, "c": {}}, "models": [{"name": "FT", "x": None}, {"y": [1, 2]}]}
    assert dict(flattened(tree)) == {
        "a.b": 1, "a.c": {}, "models.FT.name": "FT", "models.FT.x": None, "models.1.y": [1, 2],
    }  # fmt: skip


def test_two_pages_have_equal_bytes(tmp_path):
    assert page_of(tmp_path, make_report(), ["fig2"])[0] == page_of(tmp_path, make_report(), ["fig2"])[0]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file"):
        write_page(make_report(), tmp_path, tmp_path / "file" / "page.html")
