"""Networks of the goldens, and their parameters."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "fast-ibp.safetensors")


def case(name):
    """Every tensor of a case by the rest of its name."""
    return {key.removeprefix(f"{name}/"): value for key, value in GOLDEN.items() if key.startswith(f"{name}/")}


def with_parameters(model, name, part="param"):
    state = {key.removeprefix(f"{part}/"): value for key, value in case(name).items() if key.startswith(f"{part}/")}
    model = model.to(next(iter(state.values())).dtype)
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all("num_batches" in key or "running" in key for key in missing.missing_keys)
    return model


def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def fusion():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


def leaky():
    act = nn.LeakyReLU
    return nn.Sequential(nn.Linear(4, 7), act(0.1), nn.Linear(7, 6), act(0.1), nn.Linear(6, 3))


def cnn_bn(width=4, flat=64, hidden=12, outputs=4):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Flatten(), nn.Linear(flat, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv0, self.bn0 = nn.Conv2d(1, 2, 3, 1, 1), nn.BatchNorm2d(2)
        self.conv1, self.bn1 = nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, 1, 1, groups=2), nn.BatchNorm2d(4)
        self.short, self.bns = nn.Conv2d(2, 4, 1, 2), nn.BatchNorm2d(4)
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        x = torch.relu(self.bn0(self.conv0(x)))
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        out += self.bns(self.short(x))
        out = nn.functional.avg_pool2d(nn.functional.relu(out, inplace=True), 2)
        return self.fc(out.view(x.size(0), -1))


class MaxPooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(1, 2, 3, 1, 1), nn.Linear(18, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.conv(x)), 2)
        return self.fc2(torch.relu(self.fc1(torch.flatten(x, 1))))


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.t = nn.Conv2d(1, 2, 3, 1, 1), nn.ConvTranspose2d(2, 2, 2, 2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        z = torch.sigmoid(self.t(torch.tanh(self.c(x)))).mean((2, 3))
        return self.fc(torch.cat([z, -2 * z + 0.5], 1))


def cnn7(channels=1, width=2, size=6, hidden=6, classes=5):
    """The layout of CNN7."""
    layers, before = [], channels
    for out, stride in ((width, 1), (width, 1), (2 * width, 2), (2 * width, 1), (2 * width, 1)):
        layers += [nn.Conv2d(before, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU()]
        before = out
    side = (size + 1) // 2
    layers += [nn.Flatten(), nn.Linear(before * side**2, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, classes))
