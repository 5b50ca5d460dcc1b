import pytest
import torch
from torch import nn


class Net(nn.Module):
    """A classifier with dropout and batch normalization, whose head is its last linear layer."""

    def __init__(self, inputs=6, classes=3, dropout=0.1, norm=True, width=16):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(inputs, width), nn.BatchNorm1d(width) if norm else nn.Identity(), nn.Tanh(), nn.Dropout(dropout)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture
def net():
    def make(**options):
        torch.manual_seed(0)
        return Net(**options)

    return make


@pytest.fixture
def data():
    """Batches of three clusters, a quarter of whose labels are wrong, with the samples' numbers."""
    generator = torch.Generator().manual_seed(1)
    centers = 3 * torch.randn(3, 6, generator=generator)

    def batch(size=12, wrong=0.25, dtype=torch.float32):
        y = torch.randint(3, (size,), generator=generator)
        x = centers[y] + torch.randn(size, 6, generator=generator)
        flip = torch.rand(size, generator=generator) < wrong
        return x.to(dtype), torch.where(flip, (y + 1) % 3, y)

    return batch
