"""The site as a reader sees it: built once, strictly, and searched for markup that was not rendered."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from weightsmith import ROOMS
from weightsmith.techniques import TECHNIQUES

pytest.importorskip("mkdocs")

ROOT = Path(__file__).parents[2]
LEFTOVERS = {
    "a table that is no Markdown": re.compile(r"={4,}|\|\s*-{3,}"),
    "a literal block of reStructuredText": re.compile(r"::(?=\s|$)"),
    "a role": re.compile(r":(?:class|func|meth|mod|attr|ref|data):"),
    "code that was not closed": re.compile(r"``"),
    "a snippet that was not inserted": re.compile(r"--8<--"),
    "bold text that was not closed": re.compile(r"\*\*\w"),
}


class Prose(HTMLParser):
    """The text of a page outside code, scripts and styles."""

    def __init__(self):
        super().__init__()
        self.skipped, self.text = 0, []

    def handle_starttag(self, tag, attrs):
        self.skipped += tag in ("code", "pre", "script", "style")

    def handle_endtag(self, tag):
        self.skipped -= tag in ("code", "pre", "script", "style")

    def handle_data(self, data):
        if not self.skipped:
            self.text.append(data)


def leftovers(html):
    page = Prose()
    page.feed(html)
    text = " ".join(page.text)
    return {what: found[0] for what, pattern in LEFTOVERS.items() if (found := pattern.findall(text))}


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def test_every_page_is_rendered_to_the_end(site):
    pages = sorted(site.rglob("index.html"))
    assert len(pages) > 15
    assert {str(page.relative_to(site)): found for page in pages if (found := leftovers(page.read_text()))} == {}


def test_api_pages_show_verbs_first_and_fold_the_rest(site):
    html = (site / "api/quantize/index.html").read_text()
    verb, folded = html.index('id="weightsmith.quantize.flexround_"'), html.index("What these take and return")
    assert verb < html.index('id="weightsmith.quantize.Grid"') < folded
    assert folded < html.index('id="weightsmith.quantize.Activations"')


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_in_the_reference_as_what_it_is(site, room):
    html = (site / f"api/{room}/index.html").read_text()
    names = [name for card in TECHNIQUES for name in card.names if name.startswith(f"weightsmith.{room}.")]
    anchors = [f'id="{place}" class="doc' for name in names for place in (name, f"{name}.{name.rpartition('.')[2]}")]
    assert sum(anchor in html for anchor in anchors) == len({*names})


@pytest.mark.parametrize(
    "html",
    ["<p>=====  =====</p>", "<p>see :class:<code>X</code></p>", "<p>as follows::</p>", "<p>``x</p>", "<td>|---|</td>"],
)
def test_what_is_left_over_is_found(html):
    assert leftovers(html)


def test_code_may_hold_anything():
    assert not leftovers("<pre><code>a == b ===== ::</code></pre><p>fine</p>")
