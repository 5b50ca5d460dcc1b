"""Discriminators of EAGAN's search space, the super-network and single ones; arXiv 2111.15097, section 3.1."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from weightsmith.core.errors import UsageError
from weightsmith.search.gan.generator import cell_choices, check_sizes
from weightsmith.search.gan.genotypes import CELLS, DISCRIMINATOR_SPACE, discriminator_genotype
from weightsmith.search.gan.operations import (
    FIRST_ITERATIONS,
    Conv,
    down,
    initialize_convolutions_,
    normal,
    spectral_norm_,
    stored_weight,
)
from weightsmith.search.space import Cell, Genotype
from weightsmith.search.supernet import Choice, SuperNet

_PLAIN, _FIRST_DOWN = 4, 5  # the gene whose convolution has no activation in front, the first down-sampling gene


class DiscriminatorCell(nn.Module):
    """Four nodes; the sum of the last two comes out, at half the side where the cell down-samples.

    Args:
        channels: Channels everywhere.
        only: The genes whose candidates are built; ``None``: all candidates.
    """

    def __init__(self, channels: int, only: Cell | None) -> None:
        super().__init__()
        for gene, choice in enumerate(DISCRIMINATOR_SPACE.genes):
            indices = choice.values if only is None else [only[gene]]
            if gene >= _FIRST_DOWN:
                self.add_module(f"e{gene}", Choice(down(channels, indices)))
            else:
                self.add_module(f"e{gene}", Choice(normal(channels, indices, relu=gene != _PLAIN)))

    def forward(self, x: Tensor, cell: Cell) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, H, W)`` or, with down-sampling genes, ``(B, C, H / 2, W / 2)``."""
        n1 = self.get_submodule("e0")(x, cell[0])
        n2 = _sum(self._edge(1, cell, x), self._edge(2, cell, n1))
        n3 = _sum(self._edge(3, cell, n1), self._edge(4, cell, x))
        if cell[5] < 0:
            return n2 + n3
        halved: Tensor = self.get_submodule("e5")(n2, cell[5]) + self.get_submodule("e6")(n3, cell[6])
        return halved

    def _edge(self, gene: int, cell: Cell, x: Tensor) -> Tensor | None:
        return self.get_submodule(f"e{gene}")(x, cell[gene]) if cell[gene] else None


class Stem(nn.Module):
    """Two convolutions and a shortcut, at half the side; no activation on the image itself."""

    def __init__(self, image_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv(image_channels, channels, 3, relu=False)
        self.conv2 = Conv(channels, channels, 3)
        self.shortcut = Conv(image_channels, channels, 1, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, image_channels, H, W)`` to ``(B, C, H / 2, W / 2)``."""
        deep: Tensor = F.avg_pool2d(self.conv2(self.conv1(x)), 2)
        out: Tensor = deep + self.shortcut(F.avg_pool2d(x, 2))
        return out


class Discriminator(SuperNet):
    """Images to scores, every convolution and the last layer under spectral normalization.

    Without ``genotype`` it is the super-network, which holds every candidate and is called as ``model(x, genotype)``;
    with one it is the stand-alone network and is called as ``model(x)``.

    Args:
        genotype: A genotype, the name of a published one (``"D_C"``, ``"D_S"``, ``"D_autogan"``), or ``None``.
        channels: Channels everywhere (paper: 128).
        image_channels: 3 for color, 1 for gray.

    Shape:
        Images: ``(B, image_channels, H, W)``; scores: ``(B, 1)``. ``H / 2`` and ``W / 2`` must be divisible by two to
        the number of down-sampling cells.

    Raises:
        UsageError: A size is out of range, the genotype invalid or, in ``forward``, the image too small.

    Example:
        >>> discriminator = Discriminator("D_C", channels=8)
        >>> discriminator(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 1])
    """

    space = DISCRIMINATOR_SPACE

    def __init__(self, genotype: Any = None, *, channels: int = 128, image_channels: int = 3) -> None:
        super().__init__()
        check_sizes(channels=channels, image_channels=image_channels)
        self.genotype = only = _genotype(genotype)
        self.stem = Stem(image_channels, channels)
        for index in range(CELLS):
            self.add_module(f"cell{index}", DiscriminatorCell(channels, only[index] if only else None))
        self.fc = nn.Linear(channels, 1, bias=False)
        initialize_convolutions_(self)  # before the weights are normalized, so that it reaches the stored ones
        for module in list(self.modules()):
            if isinstance(module, nn.Conv2d | nn.Linear):
                spectral_norm_(module)

    def forward(self, x: Tensor, genotype: Any = None) -> Tensor:
        """Score images, see the class."""
        chosen = self.chosen(genotype)
        check_side(chosen, x.shape[-2:])
        h = self.stem(x)
        for index in range(CELLS):
            h = self.get_submodule(f"cell{index}")(h, chosen[index])
        scores: Tensor = self.fc(F.relu(h).sum((2, 3)))
        return scores

    def choices(self) -> Iterator[tuple[int, int, Choice]]:
        """Yield ``(cell, gene, choice)``."""
        yield from cell_choices(self)

    def initialize_(self) -> "Discriminator":
        """Draw new weights: Xavier-uniform convolutions, and spectral norms measured anew."""
        for module in self.modules():  # their own reset would change the normalized weight, which is computed
            if isinstance(module, nn.Conv2d | nn.Linear):
                weight, norm = stored_weight(module)
                nn.init.kaiming_uniform_(weight, a=5**0.5)
                bound = weight[0].numel() ** -0.5
                if module.bias is not None:
                    nn.init.uniform_(module.bias, -bound, bound)
                norm.iterate_(weight, FIRST_ITERATIONS)
        initialize_convolutions_(self)
        return self


class SimpleDiscriminator(nn.Module):
    """The small network of the released script's first stage ("GD2" in the paper); it needs a side of at least 32.

    Five strided 4x4 convolutions, the odd ones followed by BatchNorm and LeakyReLU, the even ones by nothing; a sum
    over positions, and a last layer under spectral normalization.

    Args:
        image_channels: 3 for color, 1 for gray.

    Shape:
        Images ``(B, image_channels, H, W)``; scores ``(B, 1)``.
    """

    def __init__(self, image_channels: int = 3) -> None:
        super().__init__()
        check_sizes(image_channels=image_channels)
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(pairwise((image_channels, 64, 128, 128, 128, 128))):
            layers.append(nn.Conv2d(inputs, outputs, 4, 2, 1))
            if index % 2 == 0:
                layers += [nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers)
        initialize_convolutions_(self)
        self.fc = spectral_norm_(nn.Linear(128, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Score images, see the class."""
        if min(x.shape[-2:]) < 32:
            raise UsageError(f"the simple discriminator needs images of at least 32x32, got {tuple(x.shape[-2:])}")
        scores: Tensor = self.fc(self.body(x).sum((2, 3)))
        return scores


def check_side(genotype: Genotype, sides: tuple[int, ...]) -> None:
    """Make sure that every down-sampling sees an even side.

    Raises:
        UsageError: It would not; pooling rounds down there and a strided convolution up.
    """
    halvings = 1 + sum(cell[5] >= 0 for cell in genotype)
    if any(side < 2**halvings or side % 2**halvings for side in sides):
        raise UsageError(
            f"this discriminator halves the image {halvings} times, so its sides must be divisible by {2**halvings}, "
            f"got {tuple(sides)}: pad the images, or choose a genotype with less down-sampling"
        )


def _genotype(genotype: Any) -> Genotype | None:
    if genotype is None:
        return None
    return discriminator_genotype(genotype) if isinstance(genotype, str) else DISCRIMINATOR_SPACE.check(genotype)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor:
    if one is None or other is None:
        only = one if one is not None else other
        assert only is not None
        return only
    return one + other
