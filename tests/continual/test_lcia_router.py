"""Which group a task belongs to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from weightsmith.continual import InstructionRouter, SentenceEncoder
from weightsmith.continual.similarity import tfidf_similarity
from weightsmith.core.errors import UsageError

WORDS = st.lists(
    st.sampled_from(["add", "the", "two", "numbers", "Reverse", "word", "word's", "a", "of", "x1", "überall", "_id"]),
    max_size=8,
).map(" ".join)
ADD, SUM, REVERSE = "Add the two numbers", "Compute the sum of both numbers", "Reverse the letters of the word"


def letters(texts):
    """An encoder: how often each letter occurs."""
    return [[text.lower().count(chr(97 + i)) + 1e-3 for i in range(26)] for text in texts]


@given(WORDS, WORDS, st.booleans())
@settings(max_examples=100, deadline=None)
def test_similarity_is_that_of_scikit_learn(one, other, stop):
    found = tfidf_similarity(one, other, stop_words=stop)
    try:
        vectors = TfidfVectorizer(stop_words="english" if stop else None).fit_transform([one, other]).toarray()
    except ValueError:  # empty vocabulary
        assert found == float(one == other)
        return
    assert found == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-12)


@given(st.lists(WORDS, min_size=1, max_size=4), st.lists(WORDS, min_size=1, max_size=4), st.booleans())
@settings(max_examples=50, deadline=None)
def test_similarities_are_between_0_and_1_and_the_mean_is_at_most_the_maximum(task, group, encoded):
    found = []
    for reduce in ("mean", "max"):
        router = InstructionRouter(letters if encoded else "tfidf", reduce=reduce)
        router.commit(1, group)
        found += router.similarities(task)
    assert 0 <= found[0] <= found[1] + 1e-12 <= 1 + 1e-11


def test_first_task_is_a_new_group_and_assign_changes_nothing():
    router = InstructionRouter()
    found = router.assign([ADD])
    assert (found.group, found.is_new, found.similarity, found.all_similarities) == (1, True, None, ())
    assert router.groups == []


def test_repeated_instructions_count_once():
    router = InstructionRouter(letters)
    router.commit(1, [ADD, ADD, SUM])
    assert router.groups == [[ADD, SUM]]
    assert router.similarities([ADD, REVERSE]) == router.similarities([ADD, REVERSE, ADD])


def test_only_stop_words_are_as_near_as_they_are_equal():
    assert tfidf_similarity("the of", "the of") == 1
    assert tfidf_similarity("the of", "of the") == 0
    assert tfidf_similarity("", "numbers") == 0


def test_other_languages_go_without_the_english_stop_words():
    one, other = "Addiere die two numbers", "the two of Zahlen"
    assert tfidf_similarity(one, other, stop_words=False) > tfidf_similarity(one, other)
    router = InstructionRouter(stop_words=None)
    router.commit(1, [one])
    assert router.similarities([other])[0] == tfidf_similarity(one, other, stop_words=False)


@pytest.mark.parametrize(("fallback", "group"), [("latest", 3), ("nearest", 1)])
def test_at_test_time_a_stranger_goes_to_the_fallback(fallback, group):
    router = InstructionRouter(threshold=0.9, fallback=fallback)
    for at, text in enumerate((ADD, REVERSE, "Name the capital"), 1):
        router.commit(at, [text])
    found = router.assign(["Subtract the numbers"], train=False)
    assert (found.group, found.is_new) == (group, False)
    assert found.similarity == max(found.all_similarities) < 0.9


def test_at_test_time_a_stranger_can_be_an_error():
    router = InstructionRouter(fallback="error")
    router.commit(1, [ADD])
    with pytest.raises(UsageError, match=r"nearest, 1, has similarity 0\.00, below threshold"):
        router.assign([REVERSE], train=False)


def test_a_single_prompt_is_routed_as_a_list_of_one():
    router = InstructionRouter(letters)
    router.commit(1, [ADD])
    router.commit(2, [REVERSE])
    assert [router.assign([text], train=False).group for text in (REVERSE, ADD)] == [2, 1]


def test_every_text_is_encoded_once():
    asked = []

    def encoder(texts):
        asked.extend(texts)
        return torch.tensor(letters(texts))

    router = InstructionRouter(encoder)
    router.commit(1, [ADD, SUM])
    for _ in range(3):
        router.assign([ADD, REVERSE])
    assert sorted(asked) == sorted([ADD, SUM, REVERSE])


def test_saved_and_loaded(tmp_path):
    router = InstructionRouter()
    router.commit(1, [ADD, SUM])
    router.commit(2, ["Kehre das Wort um: \u2028 \U0001f600"])
    router.save(tmp_path / "router.json")
    other = InstructionRouter()
    other.load(tmp_path / "router.json")
    assert other.groups == router.groups
    assert other.assign([SUM]) == router.assign([SUM])
    (tmp_path / "router.json").write_text('{"groups": [["a"], [1]]}')
    with pytest.raises(UsageError, match=r"router\.json"):
        other.load(tmp_path / "router.json")
    assert other.groups == router.groups


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"threshold": 1.5}, UsageError, "threshold must be between 0 and 1, got 1.5"),
        ({"threshold": float("nan")}, UsageError, "threshold"),
        ({"threshold": -0.1}, UsageError, "threshold"),
        ({"reduce": "median"}, UsageError, "reduce"),
        ({"fallback": "first"}, UsageError, "fallback"),
        ({"stop_words": "german"}, UsageError, "stop_words"),
        ({"backend": 3}, TypeError, "backend"),
    ],
)
def test_bad_settings_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        InstructionRouter(**arguments)


def test_bad_instructions_are_refused():
    router = InstructionRouter()
    with pytest.raises(ValueError, match="no groups"):
        router.assign([ADD], train=False)
    with pytest.raises(ValueError, match="at least one text"):
        router.assign([])
    with pytest.raises(TypeError, match="got one text"):
        router.assign(ADD)
    with pytest.raises(TypeError, match="got int"):
        router.commit(1, [3])
    with pytest.raises(UsageError, match="group must be between 1 and 1"):
        router.commit(2, [ADD])
    assert router.groups == []


@pytest.mark.parametrize("vectors", [[[1.0, float("nan")]], [1.0], [[1.0], [2.0]], "vector", [["a"]]])
def test_an_encoder_that_gives_something_else_is_refused(vectors):
    router = InstructionRouter(lambda _: vectors)
    router.commit(1, [ADD])
    with pytest.raises(UsageError, match="backend"):
        router.assign([ADD])


@pytest.mark.models
def test_a_real_encoder_tells_capital_letters_from_reversed_ones(real_model):
    encoder = SentenceEncoder(real_model("all-MiniLM-L6-v2"))
    upper = "Write the word in capital letters"
    by_words, by_meaning = InstructionRouter(threshold=0.3), InstructionRouter(encoder)
    for router in (by_words, by_meaning):
        router.commit(1, [REVERSE])
    assert not by_words.assign([upper]).is_new
    assert by_meaning.assign([upper]).is_new
    assert by_meaning.assign([upper]).similarity == pytest.approx(0.53, abs=0.01)
    assert not by_meaning.assign(["Reverse the letters of this word"]).is_new


def test_instructions_from_a_generator_are_read_once():
    router = InstructionRouter()
    router.commit(1, ["Add the numbers"])
    assert router.assign(text for text in ["Add the numbers"]) == router.assign(["Add the numbers"])


def test_half_a_character_is_refused_before_a_task_begins():
    with pytest.raises(UsageError, match="must be whole characters"):
        InstructionRouter().assign(["Add \ud800"])
