import pytest
from rich.console import Console

from weightsmith.core.display import is_number_format, markdown, markdown_link, markup, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢 [q]", "plain é 漢 [q]"),
        ("a\x1b[31mred\x1b[0m", "ared"),
        ("\x1b]0;title\x07a", "a"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b2Ja\x9d0;t\x9cb", "ab"),
        ("a\rb\nc\td", "a b c d"),
        ("\x1bc\x08\x00\x7f", ""),
        ("abc\u202etxt.exe", "abctxt.exe"),
        ("file\udce9", "file\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_nothing_steers_the_terminal(text, shown):
    assert printable(text) == shown
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in printable(text))


@pytest.mark.parametrize("text", ["m[/q]", "[bold]x", "a\\[b]", "end\\", "[link=http://x]y[/link]", "[/]"])
def test_markup_stands_for_itself(text):
    console = Console(width=200)
    with console.capture() as captured:
        console.print(f"[bold]{markup(text)}[/bold]", soft_wrap=True, highlight=False)
    assert captured.get() == f"{text}\n"


@pytest.mark.parametrize(
    "target", ["javascript:alert(1)", "JavaScript:x", "data:text/html,x", "/etc/passwd", "//host", "a b", "x\n", "a>b"]
)
def test_only_web_addresses_and_relative_paths_become_links(target):
    assert markdown_link("[x]", target) == r"\[x\]"


@pytest.mark.parametrize("target", ["https://example.org/a?b=c#d", "http://example.org", "charts/loss.svg", "../x.md"])
def test_those_do(target):
    assert markdown_link("a|b", target) == rf"[a\|b](<{target}>)"


def test_markdown_holds_no_html_and_no_table_cell():
    assert markdown("<b>|x\n`y`") == r"\<b\>\|x \`y\`"


def test_number_formats_are_few():
    assert all(map(is_number_format, [".3f", "%", ".1%", "+.2e", ",.0f", "g"]))
    assert not any(map(is_number_format, [".999999999f", "999999999", "s", "", "{x}", ".3f\n"]))
