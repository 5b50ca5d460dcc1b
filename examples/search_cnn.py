"""Search a small convnet: accuracy against parameters, on shared weights. Nothing in it is about GANs.

python examples/search_cnn.py                                # bundled digits
python examples/search_cnn.py --data fashion_mnist           # WEIGHTSMITH_DATA names the folder that holds it
python examples/search_cnn.py --workers 2 --folder runs/cnn  # in two processes; goes on from there after a kill
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightsmith.lab.data.image_sets import load_images
from weightsmith.search import (
    Choice,
    EvolveOptions,
    Gene,
    Individual,
    SearchResult,
    SearchSpace,
    SuperNet,
    Trainer,
    count_parameters,
    evolve,
)

WIDTH, LAYERS = 16, 3
KERNELS = ((3, 1), (5, 1), (3, WIDTH), (5, WIDTH))
"""Kernel size and groups of the convolutions that a layer may be; index 4 is to leave it out."""


class ConvNet(SuperNet):
    """A stem, three layers of which each has five candidates, pooling, a classifier."""

    space = SearchSpace((Gene("layer", 0, len(KERNELS)),), cells=LAYERS)

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, WIDTH, 3, padding=1)
        self.layers = nn.ModuleList(Choice(self._candidates()) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, classes)

    def choices(self) -> Iterator[tuple[int, int, Choice]]:
        """Cell ``i`` has one gene, which says what layer ``i`` is."""
        for cell, layer in enumerate(self.layers):
            assert isinstance(layer, Choice)
            yield cell, 0, layer

    def forward(self, x: Tensor, genotype: Any = None) -> Tensor:
        """``(B, C, H, W)`` to logits."""
        x = self.stem(x)
        for layer, (kind,) in zip(self.layers, self.chosen(genotype), strict=True):
            x = layer(x, kind)
        logits: Tensor = self.head(F.relu(x).mean((2, 3)))
        return logits

    @staticmethod
    def _candidates() -> dict[int, nn.Module]:
        made: dict[int, nn.Module] = {
            index: nn.Sequential(
                nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, kernel, padding=kernel // 2, groups=groups), nn.GroupNorm(4, WIDTH)
            )
            for index, (kernel, groups) in enumerate(KERNELS)
        }
        return {**made, len(KERNELS): nn.Identity()}


class TrainConvNet(Trainer):
    """A random individual in every step."""

    def __init__(self, images: Tensor, labels: Tensor, steps: int) -> None:
        self.images, self.labels, self.steps = images, labels, steps
        self.optimizer: torch.optim.Adam | None = None
        self.loaded: Any = None

    def train(self, model: Any, population: Sequence[Any], seed: int) -> None:
        """One generation."""
        if self.optimizer is None:
            self.optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        if self.loaded is not None:
            self.optimizer.load_state_dict(self.loaded)
            self.loaded = None
        rng = np.random.default_rng(seed)
        for _ in range(self.steps):
            rows = torch.randint(len(self.images), (64,))
            genotype = population[int(rng.integers(len(population)))]
            self.optimizer.zero_grad()
            F.cross_entropy(model(self.images[rows], genotype), self.labels[rows]).backward()
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's."""
        return {"optimizer": None if self.optimizer is None else self.optimizer.state_dict()}

    def load_state_dict(self, state: Any) -> None:
        """Take it back at the next generation."""
        self.loaded = state["optimizer"]


class Evaluate:
    """Accuracy on held-out images, and the size of the stand-alone network."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __call__(self, model: Any, individual: Individual) -> dict[str, float]:
        """Evaluate a sub-network with the weights that it inherits."""
        alone = model.subnet(individual.genotype)
        with torch.no_grad():
            correct = torch.cat([alone(part).argmax(1) for part in self.images.split(500)]) == self.labels
        return {"accuracy": correct.double().mean().item(), "parameters": count_parameters(alone)}


def search(
    data: str = "digits", *, generations: int = 6, steps: int = 60, rows: int | None = 5000, **more: Any
) -> SearchResult:
    """Search, and return what was found; further arguments go to ``evolve``."""
    images = load_images(data, train_examples=rows, validation_fraction=0.3)
    train, held_out = (split.__getitems__(range(len(split))) for split in (images.train, images.validation))
    torch.manual_seed(0)
    return evolve(
        ConvNet.space,
        Evaluate(held_out.inputs, held_out.targets),
        {"accuracy": "max", "parameters": "min"},
        model=ConvNet(images.channels, images.classes),
        trainer=TrainConvNet(train.inputs, train.targets, steps),
        options=EvolveOptions(population=12, generations=generations),
        **more,
    )


def main() -> None:
    """Print the front."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--engine", default="local")
    parser.add_argument("--folder")
    arguments = parser.parse_args()
    found = search(arguments.data, workers=arguments.workers, engine=arguments.engine, folder=arguments.folder)
    for one in found.front:
        layers = ConvNet.space.to_text(one.genotype)
        sys.stdout.write(f"{one.values['accuracy']:.3f}  {one.values['parameters']:6.0f} parameters  {layers}\n")


if __name__ == "__main__":
    main()
