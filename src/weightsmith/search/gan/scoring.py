"""Scores of generators, each with the fingerprint without which it means nothing.

With Inception's features scores are called IS, FID and KID; with any other network's CS, FCD and KCD. Scores are
compared only where network, resize filter, number of samples and precision agree.
"""

import hashlib
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightsmith.core.errors import MissingExtra, UsageError
from weightsmith.search.gan.metrics import Moments, frechet_distance, inception_score, kernel_distance, moments

_BATCH, _RECALIBRATION_BATCHES = 100, 4
_FAILED_DISTANCE, _FAILED_SCORE = 1e9, 1.0


class NotFinite(ArithmeticError):
    """A generator is broken: its images cannot be scored."""


class FeatureNetwork(Protocol):
    """What images are judged by.

    Attributes:
        name: Of the network.
        inception: Whether scores may be called IS, FID and KID.
        digest: SHA-256 of its weights.
        resize: How it resizes images.
        dtype: Precision of its forward pass.
    """

    name: str
    inception: bool
    digest: str
    resize: str
    dtype: str

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images ``(B, C, H, W)`` to features ``(B, D)`` and probabilities ``(B, K)``."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a score depends on beside the generator."""

    network: str
    weights: str
    resize: str
    samples: int
    real_samples: int
    dtype: str

    def check(self, other: "Fingerprint") -> None:
        """Refuse a comparison of scores that are not of one measure.

        Raises:
            UsageError: Names what differs.
        """
        for entry in fields(self):
            mine, its = getattr(self, entry.name), getattr(other, entry.name)
            if mine != its:
                raise UsageError(f"scores with different {entry.name} cannot be compared: {mine} and {its}")


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one generator.

    Attributes:
        inception: IS or CS: higher is better.
        inception_std: Its standard deviation over splits.
        distance: FID or FCD: lower is better.
        kernel: KID or KCD where it was asked for.
        failed: An image or a score was not finite; the scores are then the worst ones.
        names: What the first, third and fourth are called.
        fingerprint: What they depend on.
    """

    inception: float
    inception_std: float
    distance: float
    kernel: float | None
    failed: bool
    names: tuple[str, str, str]
    fingerprint: Fingerprint

    def better_than(self, other: "Scores") -> bool:
        """Whether the distance is smaller.

        Raises:
            UsageError: The fingerprints differ.
        """
        self.fingerprint.check(other.fingerprint)
        return self.distance < other.distance


@dataclass(frozen=True, slots=True)
class Reference:
    """Features of real images: computed once, then compared with."""

    network: FeatureNetwork
    moments: Moments
    features: Tensor

    @classmethod
    def of(cls, images: Tensor, network: FeatureNetwork) -> "Reference":
        """Take the features of real images, uint8 ``(N, C, H, W)``: the training split."""
        _check_bytes(images)
        features, _ = _judged(images, network)
        return cls(network, moments(features), features)


def score(images: Tensor, reference: Reference, *, splits: int = 10, kernel: bool = False) -> Scores:
    """Score generated images.

    Args:
        images: uint8 ``(N, C, H, W)``.
        reference: The real ones.
        splits: Of the Inception Score.
        kernel: Also compute the kernel distance.

    Raises:
        UsageError: There are fewer than two images, or they are no bytes.
    """
    _check_bytes(images)
    network = reference.network
    features, probabilities = _judged(images, network)
    mean, std = inception_score(probabilities, splits=min(splits, len(images)))
    distance = frechet_distance(moments(features), reference.moments)
    size = min(1000, len(features), len(reference.features))
    found = kernel_distance(features, reference.features, subset_size=size)[0] if kernel else None
    failed = not (math.isfinite(mean) and math.isfinite(distance))
    return Scores(
        mean if not failed else _FAILED_SCORE, std, distance if not failed else _FAILED_DISTANCE, found, failed,
        ("IS", "FID", "KID") if network.inception else ("CS", "FCD", "KCD"),
        Fingerprint(
            network.name, network.digest, network.resize, len(images), reference.moments.samples, network.dtype
        ),
    )  # fmt: skip


@torch.no_grad()
def generate(
    generator: Callable[[Tensor], Tensor], number: int, latent: int, *, seed: int, device: str = "cpu"
) -> Tensor:
    """Make exactly ``number`` images as bytes: ``clamp(127.5 x + 127.5, 0, 255)``, cut off behind the point.

    Args:
        generator: ``(B, latent) -> (B, C, H, W)`` in [-1, 1], in evaluation mode.
        number: How many, at least 2.
        latent: Length of ``z``.
        seed: Of the latents: the same seed gives every generator the same ones.
        device: Where the generator is.

    Returns:
        uint8 ``(number, C, H, W)`` on the CPU.

    Raises:
        NotFinite: The generator made a value that is not finite.
    """
    if number < 2:
        raise UsageError(f"number must be at least 2, since a covariance needs two images, got {number}")
    source = torch.Generator().manual_seed(seed % 2**63)
    made = []
    for begin in range(0, number, _BATCH):
        z = torch.randn(min(_BATCH, number - begin), latent, generator=source).to(device)
        images = generator(z)
        if not torch.isfinite(images).all():
            raise NotFinite("the generator made values that are not finite")
        made.append(to_bytes(images).cpu())
    return torch.cat(made)


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, by truncation."""
    return images.float().mul(127.5).add(127.5).clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def recalibrate_(generator: nn.Module, latent: int, *, seed: int) -> nn.Module:
    """Give the BatchNorm layers of a stand-alone generator the statistics of its own activations.

    Running statistics of a super-network mix all sub-networks; scores with them can be several times too high. The
    statistics are reset and averaged over 4 batches of 100 latents.

    Returns:
        The generator, in evaluation mode.
    """
    norms = [module for module in generator.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [module.momentum for module in norms]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # a cumulative average
    source = torch.Generator().manual_seed(seed % 2**63)
    parameter = next(generator.parameters())
    generator.train()
    for _ in range(_RECALIBRATION_BATCHES):
        generator(torch.randn(_BATCH, latent, generator=source).to(parameter))
    for module, momentum in zip(norms, before, strict=True):
        module.momentum = momentum
    return generator.eval()


class StandIn(nn.Module):
    """A small classifier of the data at hand, for when Inception's weights are unavailable.

    Two strided convolutions of 16 and 32 channels, a layer of 64 features, a layer of logits. Its scores are comparable
    only among runs with the same classifier, which the fingerprint's digest shows.

    Args:
        image_channels: 1 or 3.
        side: Of the images, divisible by 4.
        classes: Number of labels.
    """

    name, inception, resize, dtype = "stand-in classifier", False, "none", "float32"

    def __init__(self, image_channels: int, side: int, classes: int) -> None:
        super().__init__()
        if side % 4 or side < 4:
            raise UsageError(f"side must be divisible by 4, got {side}")
        self.body = nn.Sequential(
            nn.Conv2d(image_channels, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(),
            nn.Linear(32 * (side // 4) ** 2, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, classes)

    @property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        found = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            found.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images to features and probabilities."""
        features = self.body(images.float() / 127.5 - 1)
        return features, F.softmax(self.head(features), dim=1)


def train_stand_in(images: Tensor, labels: Tensor, *, epochs: int = 2, seed: int = 0) -> StandIn:
    """Train the stand-in classifier: Adam 1e-3, batches of 128, cross-entropy.

    Args:
        images: uint8 ``(N, C, H, W)``, the whole training split.
        labels: ``(N,)``, from 0.
        epochs: Passes.
        seed: Of first weights and order; the global generator is left as it was.

    Returns:
        The classifier, frozen.
    """
    _check_bytes(images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = StandIn(images.shape[1], images.shape[-1], int(labels.max()) + 1)
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).split(128):
                logits = network.head(network.body(images[rows].float() / 127.5 - 1))
                optimizer.zero_grad()
                F.cross_entropy(logits, labels[rows]).backward()
                optimizer.step()
    return network.eval().requires_grad_(False)


class Inception:
    """The Inception graph of 2015-12-05 in torch, from a file with its weights; nothing is downloaded.

    Args:
        weights: The file of torch-fidelity or pytorch-fid, ``weights-inception-2015-12-05-6726825d.pth``.
        device: Where to compute.

    Raises:
        UsageError: There is no such file.
        MissingExtra: torch-fidelity is not installed.
    """

    name, inception, resize, dtype = "Inception 2015-12-05", True, "TensorFlow 1 bilinear to 299", "float32"

    def __init__(self, weights: Path | str, *, device: str = "cpu") -> None:
        file = Path(weights)
        if not file.is_file():
            raise UsageError(f"weights must be the file with Inception's weights, got {file}, which is not a file")
        try:
            module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        except ImportError as error:  # no extra has it, since it brings torchvision along
            raise MissingExtra("torch_fidelity is needed for Inception features: pip install torch-fidelity") from error
        # its softmax layer without bias is what the Inception Score was defined with
        self._network = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)
        ).to(device)
        self._device = device
        self.digest = hashlib.sha256(file.read_bytes()).hexdigest()

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images, gray ones repeated in three channels, to features and probabilities."""
        colored = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        features, logits = self._network(colored.to(self._device))
        return features, F.softmax(logits.double(), dim=1)


@torch.no_grad()
def _judged(images: Tensor, network: FeatureNetwork) -> tuple[Tensor, Tensor]:
    found = [network(part) for part in images.split(_BATCH)]
    features, probabilities = zip(*found, strict=True)
    return torch.cat(features), torch.cat(probabilities)


def _check_bytes(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or len(images) < 2:
        raise UsageError(
            f"images must be uint8 (N, C, H, W) with N of at least 2, got {images.dtype} {tuple(images.shape)}: "
            "convert with to_bytes"
        )
