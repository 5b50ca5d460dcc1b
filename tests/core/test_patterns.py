import random
import re
from itertools import product

import pytest

from weightsmith.core.errors import UsageError
from weightsmith.core.patterns import compile_pattern

USED = [
    r"q_proj",
    r"model\.layers\.(0|1|12)\.self_attn\.(q|k|v)_proj",
    r".*\.layers\.[0-9]{1,2}\..*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?",
    r"(?:.*?(?:language|text).*?(?:attn|mlp).*?(?:q_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:(?:up_proj)))",
    r"^(.*\.)?([^.]+_proj)$",
    r"a{2,}b?\d*\w+\S\s{0}",
    r"[]a-c^-]+|[^]x]",
    r"x{y}|\{|a{,2}",
    r"",
]
NAMES = [
    "q_proj",
    "model.layers.12.self_attn.q_proj",
    "model.layers.7.mlp.up_proj",
    "base.text_model.layers.3.self_attn.q_proj",
    "model.layers.123.mlp.down_proj",
    "aa7b_x",
    "aaab1_",
    "x{y}",
    "{",
    "a]^-",
    "b",
    "aa",
    "",
]


@pytest.mark.parametrize("pattern", USED)
def test_patterns_match_as_re_does(pattern):
    matches = compile_pattern(pattern, "here")
    assert [matches(name) for name in NAMES] == [bool(re.fullmatch(pattern, name)) for name in NAMES]


def test_random_patterns_match_as_re_does():
    draw = random.Random(0)
    names = ["".join(letters) for n in range(5) for letters in product("ab.", repeat=n)]
    tried = 0
    while tried < 300:
        pattern = "".join(
            draw.choice(["a", "b", ".", r"\.", "(", ")", "|", "*", "+", "?", "{1,2}", "[ab]", "^", "$"])
            for _ in range(draw.randint(1, 9))
        )
        try:
            theirs = re.compile(pattern)
            ours = compile_pattern(pattern, "here")
        except (re.error, UsageError):
            continue
        tried += 1
        assert [name for name in names if ours(name)] == [name for name in names if theirs.fullmatch(name)], pattern


@pytest.mark.parametrize(
    "pattern", ["(a+)+", "(a|a)*", "(a|aa)+", "a?" * 40 + "a" * 40, "(a|a)" * 40, "(.*)*" * 9, "(((a*)*)*)*"]
)
def test_patterns_that_make_re_hang_are_matched(pattern):
    matches = compile_pattern(pattern, "here")
    assert matches("a" * 40)
    assert not matches("a" * 40 + "!") or "." in pattern


def test_a_pattern_that_takes_too_many_steps_is_given_up():
    matches = compile_pattern("(a?){999}" * 9, "here")
    with pytest.raises(UsageError, match=r"here: the pattern .* takes too many steps"):
        matches("a" * 5000)


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        ")",
        "(()",
        "a)",
        "*",
        "+a",
        "a**",
        "a+*",
        "[",
        "[z-a]",
        "\\",
        "(?=a)",
        "(?!a)",
        "(?P<x>a)",
        "(?i)a",
        r"(a)\1",
        "a{3,2}",
        r"\x41",
        "(" * 60 + ")" * 60,
        "a" * 200_001,
        "|*",
    ],
)
def test_what_is_no_pattern_or_not_known_is_one_error(pattern):
    with pytest.raises(UsageError, match=r"^config, key: the pattern "):
        compile_pattern(pattern, "config, key")
