"""Generators of EAGAN's search space, the super-network and single ones; arXiv 2111.15097, section 3.1 and figure 2."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightsmith.core.errors import UsageError
from weightsmith.search.gan.genotypes import CELLS, GENERATOR_SPACE, generator_genotype
from weightsmith.search.gan.operations import Conv, initialize_convolutions_, normal, up
from weightsmith.search.space import Cell, Genotype
from weightsmith.search.supernet import Choice, SuperNet

_SKIP_MODES = ("nearest", "bilinear", "nearest")
_UPS = 2


class GeneratorCell(nn.Module):
    """Two up-sampled nodes, two more at the new size, and skips from the cells before.

    Args:
        channels: Channels everywhere.
        index: Which cell it is: how many skips come in, and how they are interpolated.
        only: The genes whose candidates are built; ``None``: all candidates.
    """

    def __init__(self, channels: int, index: int, only: Cell | None) -> None:
        super().__init__()
        for gene, choice in enumerate(GENERATOR_SPACE.genes):
            indices = choice.values if only is None else [only[gene]]
            self.add_module(f"e{gene}", Choice((up if gene < _UPS else normal)(channels, indices)))
        for before in range(index):
            self.add_module(f"skip{before}", Conv(channels, channels, 1, relu=False))
        self.mode = _SKIP_MODES[index]

    def forward(self, x: Tensor, cell: Cell, skips: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute a cell.

        Args:
            x: ``(B, C, H, W)``.
            cell: The genes.
            skips: Second nodes of the cells before, of smaller sides.

        Returns:
            The second node with the skips, for later cells, and the last node, both ``(B, C, 2H, 2W)``.
        """
        n0, n1 = self.get_submodule("e0")(x, cell[0]), self.get_submodule("e1")(x, cell[1])
        # never in place: with a skip operation n2 would be n0 or n1 itself
        n2 = _sum(self._edge(2, cell, n0), self._edge(3, cell, n1))
        for before, skip in enumerate(skips):
            n2 = n2 + self.get_submodule(f"skip{before}")(F.interpolate(skip, size=n2.shape[-2:], mode=self.mode))
        return n2, _sum(self._edge(4, cell, n0), self._edge(5, cell, n1), self._edge(6, cell, n2))

    def _edge(self, gene: int, cell: Cell, x: Tensor) -> Tensor | None:
        return self.get_submodule(f"e{gene}")(x, cell[gene]) if cell[gene] else None


class Generator(SuperNet):
    """Latents to images: three cells, each of which doubles the side.

    Without ``genotype`` it is the super-network, which holds every candidate and is called as ``model(z, genotype)``;
    with one it is the stand-alone network and is called as ``model(z)``.

    Args:
        genotype: A genotype, the name of a published one such as ``"G*"``, or ``None``.
        channels: Channels everywhere (paper: 256).
        bottom: Side of the first feature map; images have ``8 * bottom`` (paper: 4 for 32x32, 6 for 48x48).
        latent: Length of ``z``, divisible by three (paper: 120).
        image_channels: 3 for color, 1 for gray.
        cell_gain: Factor on the first convolution weights within the cells. The paper has 1; up to three branches are
            summed without normalization, and with 0.5 short trainings of arbitrary genotypes do not collapse.

    Shape:
        ``z``: ``(B, latent)``; images: ``(B, image_channels, 8 bottom, 8 bottom)`` in [-1, 1].

    Raises:
        UsageError: A size is out of range, or the genotype invalid.

    Example:
        >>> generator = Generator("G*", channels=8)
        >>> generator(torch.randn(2, 120)).shape
        torch.Size([2, 3, 32, 32])
    """

    space = GENERATOR_SPACE

    def __init__(
        self,
        genotype: Any = None,
        *,
        channels: int = 256,
        bottom: int = 4,
        latent: int = 120,
        image_channels: int = 3,
        cell_gain: float = 1.0,
    ) -> None:
        super().__init__()
        check_sizes(channels=channels, bottom=bottom, latent=latent, image_channels=image_channels)
        if latent % CELLS:
            raise UsageError(f"latent must be divisible by {CELLS}, got {latent}")
        self.genotype = only = _genotype(genotype)
        self.channels, self.bottom, self.latent, self.cell_gain = channels, bottom, latent, cell_gain
        for index in range(CELLS):
            side = bottom * 2**index
            self.add_module(f"fc{index}", nn.Linear(latent // CELLS, channels * side * side))
            self.add_module(f"cell{index}", GeneratorCell(channels, index, only[index] if only else None))
        self.bn = nn.BatchNorm2d(channels)
        self.rgb = Conv(channels, image_channels, 3, relu=False)
        self._draw_()

    def forward(self, z: Tensor, genotype: Any = None) -> Tensor:
        """Make images, see the class."""
        chosen = self.chosen(genotype)
        parts = z.chunk(CELLS, dim=1)
        skips: list[Tensor] = []
        h = self._entry(0, parts[0])
        for index in range(CELLS):
            x = h + self._entry(index, parts[index]) if index else h
            skip, h = self.get_submodule(f"cell{index}")(x, chosen[index], skips)
            skips.append(skip)
        return torch.tanh(self.rgb(F.relu(self.bn(h))))

    def choices(self) -> Iterator[tuple[int, int, Choice]]:
        """Yield ``(cell, gene, choice)``."""
        yield from cell_choices(self)

    def initialize_(self) -> "Generator":
        """Draw new weights: Xavier-uniform convolutions, BatchNorm weights around 1."""
        super().initialize_()
        self._draw_()
        return self

    def _draw_(self) -> None:
        initialize_convolutions_(self)
        nn.init.normal_(self.bn.weight, 1.0, 0.02)
        with torch.no_grad():
            for index in range(CELLS):
                for module in self.get_submodule(f"cell{index}").modules():
                    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                        module.weight.mul_(self.cell_gain)

    def _entry(self, index: int, z: Tensor) -> Tensor:
        side = self.bottom * 2**index
        entered: Tensor = self.get_submodule(f"fc{index}")(z)
        return entered.view(-1, self.channels, side, side)


def check_sizes(**sizes: int) -> None:
    """Refuse sizes below 1.

    Raises:
        UsageError: Names the argument.
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise UsageError(f"{name} must be a whole number of at least 1, got {size!r}")


def cell_choices(model: nn.Module) -> Iterator[tuple[int, int, Choice]]:
    """Yield ``(cell, gene, choice)`` of a network with modules ``cell0.e0`` ..."""
    for index in range(CELLS):
        for gene in range(len(GENERATOR_SPACE.genes)):
            choice = model.get_submodule(f"cell{index}.e{gene}")
            assert isinstance(choice, Choice)
            yield index, gene, choice


def _genotype(genotype: Any) -> Genotype | None:
    if genotype is None:
        return None
    return generator_genotype(genotype) if isinstance(genotype, str) else GENERATOR_SPACE.check(genotype)


def _sum(*terms: Tensor | None) -> Tensor:
    there = [term for term in terms if term is not None]
    total = there[0]
    for term in there[1:]:
        total = total + term
    return total
