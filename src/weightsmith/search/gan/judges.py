"""What images are judged by: Inception where its weights are there, else a small classifier of the data at hand."""

import hashlib
import importlib
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightsmith.core.errors import MissingExtra, UsageError


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
    check_bytes(images)
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


def check_bytes(images: Tensor) -> None:
    """Refuse images that are not uint8, or fewer than two.

    Raises:
        UsageError: They are.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or len(images) < 2:
        raise UsageError(
            f"images must be uint8 (N, C, H, W) with N of at least 2, got {images.dtype} {tuple(images.shape)}: "
            "convert with to_bytes"
        )
