import numpy as np
import pytest
from gan_reference import GOLDEN, genotypes
from hypothesis import given, settings
from hypothesis import strategies as st

from weightsmith.core.errors import UsageError
from weightsmith.search import Gene, SearchSpace
from weightsmith.search.gan.genotypes import (
    DISCRIMINATOR_SPACE,
    DISCRIMINATORS,
    GENERATOR_SPACE,
    GENERATORS,
    discriminator_genotype,
    generator_genotype,
)
from weightsmith.search.variation import first_population, offspring

SPACES = [GENERATOR_SPACE, DISCRIMINATOR_SPACE]
both = pytest.mark.parametrize("space", SPACES, ids=["generator", "discriminator"])


def test_sizes_are_those_of_the_paper():
    assert GENERATOR_SPACE.size() == 147_744**3
    assert DISCRIMINATOR_SPACE.size() == 511_488**3


@pytest.mark.parametrize("name", ["G*", "adversarialnas"])
def test_published_generators_are_valid(name):
    assert GENERATOR_SPACE.check(GENERATORS[name]) == generator_genotype(name)


@pytest.mark.parametrize("name", ["D_C", "D_S", "D_autogan"])
def test_published_discriminators_are_valid(name):
    assert DISCRIMINATOR_SPACE.check(DISCRIMINATORS[name]) == discriminator_genotype(name)


def differing_genes(one, other):
    return sum(a != b for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True))


def test_the_generator_is_four_genes_from_the_one_of_adversarialnas():
    assert differing_genes(GENERATORS["G*"], GENERATORS["adversarialnas"]) == 4


def test_an_unknown_name_lists_near_ones():
    with pytest.raises(UsageError, match="did you mean 'D_S' or 'D_C'"):
        discriminator_genotype("D_B")


@pytest.mark.parametrize("kind", ["g", "d"])
def test_the_reference_operators_change_one_gene_as_ours_do(kind):
    parents = genotypes(f"ops.{kind}_parent")
    for children in ("mutated", "crossed"):
        found = genotypes(f"ops.{kind}_{children}")
        assert all(differing_genes(parent, child) == 1 for parent, child in zip(parents, found, strict=True))
    if kind == "g":
        assert all(GENERATOR_SPACE.is_valid(child) for child in genotypes("ops.g_mutated"))


@both
@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_variation_keeps_genotypes_valid_and_changes_one_gene(space, seed):
    rng = np.random.default_rng(seed)
    one, other = space.sample(rng), space.sample(rng)
    assert space.check(one) == one
    mutant, crossed = space.mutate(one, rng), space.crossover(one, other, rng)
    for child in (mutant, crossed):
        assert child is not None
        assert space.check(child) == child
        changed = [i for c in range(3) for i in range(7) if child[c][i] != one[c][i]]
        assert len(changed) == 1 or (space is DISCRIMINATOR_SPACE and changed == [5, 6])
    where = [(c, i) for c in range(3) for i in range(7) if crossed[c][i] != one[c][i]]
    assert any(crossed[c][i] == other[c][i] for c, i in where)


def test_none_is_sampled_as_often_as_rejection_says():
    rng = np.random.default_rng(0)
    drawn = np.array([GENERATOR_SPACE.sample(rng) for _ in range(3000)]).reshape(-1, 7)
    shares = (drawn == 0).mean(axis=0)
    assert abs(shares[2:4] - 1 / 8).max() < 0.015
    assert abs(shares[4:7] - 48 / 342).max() < 0.015
    drawn = np.array([DISCRIMINATOR_SPACE.sample(rng) for _ in range(3000)]).reshape(-1, 7)
    assert abs((drawn[:, 1:5] == 0).mean(axis=0) - 1 / 8).max() < 0.015
    assert ((drawn[:, 5] < 0) == (drawn[:, 6] < 0)).all()


def test_equal_parents_have_no_crossover_and_fall_back_to_mutation():
    rng, g = np.random.default_rng(0), GENERATORS["G*"]
    assert GENERATOR_SPACE.crossover(g, g, rng) is None
    (child,) = offspring(GENERATOR_SPACE, [g], 1, {g}, rng, crossover=1.0)
    assert differing_genes(child, g) == 1


def test_crossover_never_takes_a_gene_that_leaves_a_dead_node():
    base = ((0, 0, 1, 0, 1, 0, 0),) * 3
    other = ((0, 0, 0, 2, 1, 0, 0),) * 3
    rng = np.random.default_rng(0)
    for _ in range(30):  # taking the 0 of gene 2 alone would leave node 2 without input
        child = GENERATOR_SPACE.crossover(base, other, rng)
        assert GENERATOR_SPACE.is_valid(child)
        assert all(cell[2] == 1 for cell in child)


def test_an_exhausted_space_gives_fewer_children():
    space, rng = SearchSpace.of(a=2, b=2), np.random.default_rng(0)
    seen = set()
    first = first_population(space, 3, seen, rng)
    assert len(offspring(space, first, 4, seen, rng)) == 1
    assert offspring(space, first, 4, seen, rng) == []
    assert len(seen) == 4


def test_a_gene_of_one_value_is_never_mutated():
    space = SearchSpace((Gene("fixed", 3, 3),))
    assert space.mutate(((3,),), np.random.default_rng(0)) == ((3,),)


@pytest.mark.parametrize(
    ("genotype", "words"),
    [
        ([[1, 1, 1, 0, 2, 3]] * 3, "a genotype has 3 cells of 7 genes, got .* as cell 0"),
        ([[1, 1, 1, 0, 2, 3, 1]] * 2, "a genotype has 3 cells of 7 genes"),
        ([[1, 1, 1, 0, 2, 3, 1]] * 2 + [[1, 3, 1, 0, 2, 3, 1]], "cell 2, gene 'up1' must be .* from 0 to 2, got 3"),
        ([[1, 1, 1, 0, 2, 3, 1.0]] * 3, "cell 0, gene '2->3' must be a whole number"),
        ([[1, 1, 1, 0, 2, 3, 1]] * 2 + [[1, 1, 0, 0, 2, 3, 1]], "cell 2 is invalid: node 2 has no input"),
        ([[1, 1, 1, 0, 0, 0, 0]] * 3, "cell 0 is invalid: node 3 has no input"),
        ("G*", "a genotype has 3 cells"),
        (None, "a genotype has 3 cells"),
    ],
)
def test_invalid_generators_name_cell_and_gene(genotype, words):
    with pytest.raises(ValueError, match=words):
        GENERATOR_SPACE.check(genotype)


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ([0, 1, 1, 1, 1, 0, 0], "gene '0->1' must be a whole number from 1 to 6, got 0"),
        ([1, 0, 0, 1, 1, 0, 0], "node 2 has no input"),
        ([1, 1, 1, 0, 0, 0, 0], "node 3 has no input"),
        ([1, 1, 1, 1, 1, -1, 0], "'down on 2' and 'down on 3' must be both -1"),
        ([1, 1, 1, 1, 1, 0, -1], "'down on 2' and 'down on 3' must be both -1"),
    ],
)
def test_invalid_discriminators_name_cell_and_gene(cell, words):
    with pytest.raises(UsageError, match=words):
        DISCRIMINATOR_SPACE.check([cell] * 3)


@both
def test_text_arrays_and_tensors_are_read(space):
    one = space.sample(np.random.default_rng(1))
    assert space.from_text(space.to_text(one)) == one
    assert space.check(np.array(one)) == one
    assert space.check(GOLDEN["params.g" if space is GENERATOR_SPACE else "params.d"][0])
    for bad in ("1 2 / x", "", "1.5 / 2"):
        with pytest.raises(UsageError):
            space.from_text(bad)


def test_spaces_without_choices_are_refused():
    for genes, cells in (((), 1), ((Gene("a", 0, 1),), 0), ((Gene("a", 2, 1),), 1)):
        with pytest.raises(UsageError):
            SearchSpace(genes, cells)
    impossible = SearchSpace((Gene("a", 0, 1),), problem=lambda cell: "never")
    with pytest.raises(UsageError, match="were all invalid: never"):
        impossible.sample(np.random.default_rng(0))
