"""What a verb promises that changes how weights are written."""

import copy
import io
import pickle
import re
from typing import Any

import torch
from torch import nn

from weightsmith.testing.kinds import Change, Check, Rewrite
from weightsmith.testing.measures import (
    apart,
    changed,
    expect,
    expect_shape,
    is_untouched,
    mixed,
    model_of,
    near,
    same,
    sgd,
    shared,
    train,
    trained,
    values,
)
from weightsmith.testing.models import EMPTY_SHARD, build, construct

# compiling takes seconds where all else takes milliseconds: few models, and of these one block for all that are equal
_COMPILED = {"conv-bn": "", "frozen": "", "vit": "blocks.1", "llama": "model.model.layers.1"}
_ABSENT = "no.such.layer"


def beginning_keeps_the_outputs(rewrite: Rewrite, name: str) -> None:
    """It returns the model, whose outputs are what they were."""
    model, x = build(name)
    before = model.eval()(x)
    model_of(rewrite.begin(model, x), model)
    allowed = rewrite.change_at_begin
    if allowed is not None:
        after = model(x)
        expect(
            near(after, before, allowed),
            f"outputs must stay within {allowed:g} of what they were, {apart(after, before)}",
        )


def a_rewritten_model_trains(rewrite: Rewrite, name: str) -> None:
    """Gradients are finite, a step moves something, and outputs stay finite."""
    model, x = build(name)
    rewrite.begin(model.train(), x)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = sgd(model)
    train(model, optimizer, x, 1)
    moves = optimizer.param_groups[0]["params"]
    expect(all(p.grad is not None for p in moves), "every parameter that requires gradients must get one")
    expect(all(p.grad.isfinite().all() for p in moves), "gradients must be finite")
    moved = any(not torch.equal(*both) for both in zip(before, model.parameters(), strict=True))
    expect(moved, "a training step must move a parameter")
    expect(model(x).isfinite().all(), "outputs must be finite after a training step")


def ending_keeps_the_outputs_that_training_gave(rewrite: Rewrite, name: str) -> None:
    """Its end returns the model, whose outputs are what training had made of them."""
    model, x = trained(rewrite, name)
    before = model.eval()(x)
    model_of(rewrite.end(model), model)
    after, allowed = model(x), rewrite.change_at_end
    expect(near(after, before, allowed), f"outputs must stay within {allowed:g} at the end, {apart(after, before)}")


def ending_gives_plain_weights_that_load_without_us(rewrite: Rewrite, name: str) -> None:
    """The model has its former classes and keys, and its state loads into a model that was never rewritten."""
    model, x = trained(rewrite, name)
    rewrite.end(model)
    plain, _ = build(name)
    expect_shape(model, plain, "from those of the model that the user brought")
    plain.load_state_dict(model.state_dict())
    expect(torch.equal(plain.eval()(x), model.eval()(x)), "a plain model with this state_dict must compute the same")


def frozen_weights_do_not_move(rewrite: Rewrite, name: str) -> None:
    """What requires no gradients has the same value after training."""
    model, x = build(name)
    frozen = [key for key, value in mixed(model).named_parameters() if not value.requires_grad]
    rewrite.begin(model, x)
    before = values(model, frozen)
    train(model, sgd(model), x, 2)
    after = values(model, frozen)
    moved = [key for key in frozen if not torch.equal(before[key], after[key])]
    expect(not moved, f"frozen parameters must not move, these did: {', '.join(moved)}")


def tied_weights_stay_tied(rewrite: Rewrite, name: str) -> None:
    """A weight with two owners has two owners at the end."""
    model, _ = trained(rewrite, name)
    rewrite.end(model)
    expect(shared(model) == shared(build(name)[0]), "weights that share a parameter must share it at the end")


def a_state_dict_or_a_copy_restores_the_rewritten_model(rewrite: Rewrite, name: str) -> None:
    """Through a state_dict, a pickled one and `copy.deepcopy`."""
    model, x = trained(rewrite, name)
    after = model.eval()(x)
    for state, how in [
        (model.state_dict(), "load_state_dict into a fresh rewritten model"),
        (pickle.loads(pickle.dumps(model.state_dict())), "pickling of the state_dict"),
    ]:
        fresh, _ = build(name)
        rewrite.begin(fresh, x)
        fresh.load_state_dict(state)
        expect(torch.equal(fresh.eval()(x), after), f"{how} must restore the outputs to the last bit")
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    expect(same(loaded, model.state_dict()), "torch.load(weights_only=True) must read the state_dict")
    copied = copy.deepcopy(model)
    expect(torch.equal(copied(x), after), "copy.deepcopy must restore the outputs to the last bit")
    rewrite.end(copied)
    expect(torch.equal(model(x), after), "ending a copy must leave the original alone")


def a_rewritten_model_compiles_without_graph_breaks(rewrite: Rewrite, name: str) -> None:
    """``torch.compile(fullgraph=True)`` gives the same function."""
    model, x = build(name)
    rewrite.begin(model, x)
    expected = model.eval()(x)
    torch._dynamo.reset()
    part: Any = model.get_submodule(_COMPILED[name])
    part.compile(backend="aot_eager", fullgraph=True)
    after = model(x)
    expect(near(after, expected, 1e-5), f"outputs must be the same under torch.compile, {apart(after, expected)}")


def an_empty_shard_is_taken(rewrite: Rewrite | Change, _name: str) -> None:
    """A layer without rows, as sharding leaves on some ranks, neither fails nor gets rows."""
    model, x = construct(EMPTY_SHARD)
    before = model.eval()(x)
    model_of(rewrite.begin(model, x), model)
    expect(model(x).shape == before.shape, "outputs must keep their shape where a layer has no rows")
    if isinstance(rewrite, Change):
        expect_shape(model, construct(EMPTY_SHARD)[0].eval(), "where a layer has no rows")
        return
    train(model, sgd(model), x, 2)
    rewrite.end(model)
    expect(model(x).isfinite().all(), "outputs must be finite where a layer has no rows")
    if rewrite.ends_plain:
        expect_shape(model, construct(EMPTY_SHARD)[0].eval(), "where a layer has no rows")


def any_float_dtype_is_kept(rewrite: Rewrite, name: str) -> None:
    """Weights and outputs keep the dtype of the model, from begin to end."""
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        model, x = build(name, dtype)
        weights = dict(model.named_parameters())
        before = values(model, weights)
        rewrite.begin(model, x)
        written = values(model, weights)
        odd = [key for key, value in written.items() if value.dtype != dtype]
        expect(not odd, f"weights of {dtype} must keep their dtype, these did not: {', '.join(odd[:3])}")
        if rewrite.change_at_begin is not None:
            atol = 2e-2 if dtype != torch.float64 else 1e-12
            moved = [key for key, value in written.items() if not torch.allclose(value, before[key], atol=atol)]
            expect(not moved, f"weights of {dtype} must stay within {atol:g}, these did not: {', '.join(moved[:3])}")
        expect(model(x).dtype == dtype, f"outputs must be {dtype}, got {model(x).dtype}")
        rewrite.end(model)
        ended = dict(model.named_parameters())
        odd = [key for key in weights.keys() & ended.keys() if ended[key].dtype != dtype]
        expect(not odd, f"weights of {dtype} must keep their dtype at the end, these did not: {', '.join(odd[:3])}")


def the_memory_format_is_kept(rewrite: Rewrite | Change, name: str) -> None:
    """Weights that are channels_last stay so."""
    model, x = build(name)
    convert: Any = model.to
    convert(memory_format=torch.channels_last)
    rewrite.begin(model, x)
    _expect_channels_last(model)
    if isinstance(rewrite, Rewrite):
        rewrite.end(model)
        _expect_channels_last(model)


def _expect_channels_last(model: nn.Module) -> None:
    kept: Any = model.get_submodule("0").weight
    expect(kept.is_contiguous(memory_format=torch.channels_last), "weights that are channels_last must stay so")


def a_model_that_is_refused_stays_as_it_was(technique: Rewrite | Change, name: str) -> None:
    """The error comes before anything is changed, and says what the technique says it does."""
    _refuses(technique, name, technique.refuses[name])


def where_that_matches_nothing_is_an_error(technique: Rewrite | Change, name: str) -> None:
    """It names the pattern and changes nothing."""
    _refuses(technique, name, re.escape(_ABSENT), where=_ABSENT)


def where_touches_only_what_it_names(technique: Rewrite | Change, name: str) -> None:
    """Globs, and a glob that excludes."""
    model, x = build(name)
    technique.begin(model, x, where=["blocks.1.*", "!*.norm?"])
    found = changed(model, build(name)[0])
    expect(found, 'where=["blocks.1.*", "!*.norm?"] must change something')
    outside = [key for key in found if not key.startswith("blocks.1.") or "norm" in key]
    expect(not outside, f'where=["blocks.1.*", "!*.norm?"] must change nothing else, it changed {", ".join(outside)}')


def _refuses(technique: Rewrite | Change, name: str, pattern: str, **options: str) -> None:
    model, x = build(name)
    given = "".join(f" with {key}={value!r}" for key, value in options.items())
    try:
        technique.begin(model, x, **options)
    except ValueError as error:
        expect(re.search(pattern, str(error)), f"the error{given} must match {pattern!r}, got {str(error)!r}")
    else:
        expect(False, f"a ValueError that matches {pattern!r} must be raised{given}")
    expect(is_untouched(model, name), f"a model that is refused{given} must stay as it was")


_A_VIT = ("vit",)

WHERE = (
    Check(where_that_matches_nothing_is_an_error, _A_VIT),
    Check(where_touches_only_what_it_names, _A_VIT),
    Check(the_memory_format_is_kept, ("conv-bn",)),
    Check(a_model_that_is_refused_stays_as_it_was, refused=True),
    Check(an_empty_shard_is_taken, (), when=lambda technique: "linear" not in technique.refuses),
)

REWRITING = (
    Check(beginning_keeps_the_outputs),
    Check(a_rewritten_model_trains),
    Check(ending_keeps_the_outputs_that_training_gave),
    Check(ending_gives_plain_weights_that_load_without_us, when=lambda rewrite: rewrite.ends_plain),
    Check(frozen_weights_do_not_move),
    Check(tied_weights_stay_tied, ("tied",)),
    Check(a_state_dict_or_a_copy_restores_the_rewritten_model),
    Check(a_rewritten_model_compiles_without_graph_breaks, tuple(_COMPILED), compiles=True),
    Check(any_float_dtype_is_kept, _A_VIT),
    *WHERE,
)
