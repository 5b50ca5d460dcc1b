"""What an optimizer promises."""

from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.testing.kinds import Check, Optimizer, State
from weightsmith.testing.measures import expect, loss_of, same, train
from weightsmith.testing.models import EMPTY_SHARD, build, construct
from weightsmith.testing.states import continuing_equals_never_having_stopped


def an_optimizer_lowers_the_loss_and_leaves_frozen_parameters_alone(optimizer: Optimizer, name: str) -> None:
    """Eight steps on one batch."""
    model, x = build(name)
    made = optimizer.make(model)
    frozen = {key: value.clone() for key, value in model.named_parameters() if not value.requires_grad}
    before = loss_of(model, x).item()
    train(model, made, x, 8)
    after = loss_of(model, x).item()
    expect(after < before, f"eight steps must lower the loss, it went from {before:.4g} to {after:.4g}")
    parameters = dict(model.named_parameters())
    moved = [key for key, value in frozen.items() if not torch.equal(parameters[key], value)]
    expect(not moved, f"frozen parameters must not move, these did: {', '.join(moved)}")


def save_load_continue_equals_never_having_stopped(optimizer: Optimizer, name: str) -> None:
    """Through a file, with the optimizer's own state_dict."""
    x = build(name)[1]

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model, _ = build(name)
        return model, optimizer.make(model)

    def step(model: nn.Module, made: torch.optim.Optimizer) -> Tensor:
        train(model, made, x, 1)
        return loss_of(model, x).detach()

    continuing_equals_never_having_stopped(State(make, step), name)


def the_same_seed_gives_the_same_weights(optimizer: Optimizer, name: str) -> None:
    """Twice the same training, twice the same weights."""
    finals = []
    for _ in range(2):
        model, x = build(name)
        train(model, optimizer.make(model), x, 3)
        finals.append(model.state_dict())
    expect(same(*finals), "the same seed must give the same weights")


def any_float_dtype_is_trained(optimizer: Optimizer, name: str) -> None:
    """Parameters keep their dtype and stay finite."""
    for dtype in (torch.float64, torch.bfloat16):
        model, x = build(name, dtype)
        train(model, optimizer.make(model), x, 3)
        expect(all(p.dtype == dtype for p in model.parameters()), f"parameters must stay {dtype}")
        expect(all(p.isfinite().all() for p in model.parameters()), f"parameters of {dtype} must stay finite")


def the_memory_format_does_not_matter(optimizer: Optimizer, name: str) -> None:
    """channels_last gives the same weights."""
    finals = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model, x = build(name, torch.float64)
        convert: Any = model.to
        convert(memory_format=memory_format)
        train(model, optimizer.make(model), x, 3)
        finals.append(list(model.state_dict().values()))
    close = all(torch.allclose(left, right, atol=1e-10) for left, right in zip(*finals, strict=True))
    expect(close, "channels_last must give the same weights to 1e-10")


def an_empty_shard_is_stepped(optimizer: Optimizer, _name: str) -> None:
    """A parameter without rows, as sharding leaves on some ranks, does not disturb the others."""
    model, x = construct(EMPTY_SHARD)
    before = loss_of(model, x).item()
    train(model, optimizer.make(model), x, 8)
    expect(all(p.isfinite().all() for p in model.parameters()), "parameters must stay finite beside an empty one")
    expect(loss_of(model, x).item() < before, "eight steps must lower the loss beside an empty parameter")


def schedulers_and_closures_work(optimizer: Optimizer, name: str) -> None:
    """``step(closure)`` returns the loss, and a learning rate of 0 changes nothing."""
    model, x = build(name)
    made = optimizer.make(model)
    scheduler = torch.optim.lr_scheduler.StepLR(made, 1, gamma=0.0)

    def closure() -> float:
        made.zero_grad()
        loss = loss_of(model, x)
        torch.autograd.backward(loss)
        return loss  # type: ignore[return-value]  # what torch documents, and not what it annotates

    loss = made.step(closure)
    expect(
        loss is not None and float(torch.as_tensor(loss).detach()) > 0,
        f"step(closure) must return the loss, got {loss!r}",
    )
    scheduler.step()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made.step(closure)
    expect(same(model.state_dict(), before), "a step with learning rate 0 must change no parameter")


OPTIMIZING = (
    Check(an_optimizer_lowers_the_loss_and_leaves_frozen_parameters_alone),
    Check(save_load_continue_equals_never_having_stopped),
    Check(the_same_seed_gives_the_same_weights),
    Check(any_float_dtype_is_trained, ("linear",)),
    Check(the_memory_format_does_not_matter, ("conv-bn",)),
    Check(schedulers_and_closures_work, ("linear",)),
    Check(an_empty_shard_is_stepped, ()),
)
