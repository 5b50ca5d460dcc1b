"""The network Omega: 19 features of a sample in, the weight of its loss out.

Per class ``Linear -> BatchNorm -> ReLU -> Linear -> BatchNorm -> softmax`` over two outputs, of which the second is the
weight (arXiv 2412.12955, equation 6). The normalization has no parameters and always uses the statistics of the batch.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError, unknown
from weightsmith.reweight.signals import FEATURES

Normalize = Literal["none", "mean", "loss"]
Init = Literal["normal", "linear"]
_INIT_STD = 0.02
_EPS = 1e-5


class LossRescaler(nn.Module):
    """Weights in (0, 1) for the losses of a batch.

    Every class's network sees the whole batch, and a sample takes the output of its label's. The networks of all
    classes are one stack of matrices. A bias in front of a normalization cancels, so there is none.

    Args:
        num_classes: Number of labels C.
        n_features: Features per sample F: 19, or 2 for the reduced set.
        class_separation: A network per class; ``False``: one for all.
        binary: Weights are rounded to 0 or 1 at this threshold, with the gradient of the weight before rounding,
            clamped to [-1, 1]; ``None``: they stay as they are.
        init: First weights: ``"normal"``, N(0, 0.02^2) as in the authors' code, or ``"linear"``, those of
            ``torch.nn.Linear``. The normalization removes the scale, but a step of Adam changes small weights more.
        seed: Of the first weights.

    Attributes:
        first: ``(C or 1, F, F)``.
        second: ``(C or 1, 2, F)``.

    Raises:
        UsageError: An argument is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        n_features: int = FEATURES,
        class_separation: bool = True,
        binary: float | None = None,
        *,
        init: Init = "normal",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise UsageError(f"num_classes must be at least 2, got {num_classes}")
        if n_features < 1:
            raise UsageError(f"n_features must be at least 1, got {n_features}")
        if binary is not None and not 0 < binary < 1:
            raise UsageError(f"binary must be between 0 and 1, got {binary}")
        if init not in get_args(Init):
            raise unknown("init", str(init), get_args(Init))
        self.num_classes, self.n_features = num_classes, n_features
        self.class_separation, self.binary = class_separation, binary
        networks, bound = num_classes if class_separation else 1, n_features**-0.5
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> nn.Parameter:
            if init == "normal":
                return nn.Parameter(_INIT_STD * torch.randn(shape, generator=generator))
            return nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) * bound)

        self.first = drawn(networks, n_features, n_features)
        self.second = drawn(networks, 2, n_features)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Weigh the samples of a batch.

        Args:
            features: ``(B, F)``; no gradient flows into them.
            labels: ``(B,)``, int64, in [0, C).

        Returns:
            ``(B,)``, in the precision of the rescaler's weights.

        Raises:
            UsageError: The batch has fewer than two samples, which have no statistics, or other features.
        """
        if len(features) < 2 or features.shape[1:] != (self.n_features,):
            raise UsageError(
                f"features must be (B, {self.n_features}) with B of at least 2, got {tuple(features.shape)}"
            )
        x = features.detach().to(self.first.dtype)
        x = x - x[0]  # the normalization does not see it, and equal features become exact zeros
        hidden = _normalized(x @ self.first.mT).relu()  # (C, B, F)
        outputs = _normalized(hidden @ self.second.mT).softmax(-1)[..., 1]  # (C, B)
        row = labels if self.class_separation else torch.zeros_like(labels)
        w = outputs.gather(0, row[None]).squeeze(0)
        if self.binary is None:
            return w
        rounded: Tensor = _Rounded.apply(w, self.binary)  # type: ignore[no-untyped-call]
        return rounded


class _Rounded(torch.autograd.Function):
    """1 from a threshold on, else 0; backward as if it were the identity, clamped to [-1, 1]."""

    @staticmethod
    def forward(_: Any, w: Tensor, threshold: float) -> Tensor:
        return (w >= threshold).to(w.dtype)

    @staticmethod
    def backward(_: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.clamp(-1, 1), None


def _normalized(x: Tensor) -> Tensor:
    centered = x - x.mean(-2, keepdim=True)
    return centered * (centered.square().mean(-2, keepdim=True) + _EPS).rsqrt()


def normalizer(w: Tensor, losses: Tensor, normalize: Normalize) -> Tensor:
    """The factor on all weights of a batch, a constant: no gradient flows through it.

    ``"mean"``: ``1 / mean(w)``, which keeps the mean weight; ``"loss"``: ``sum(l) / sum(w l)``, which keeps the loss.
    With its gradient the latter would make the weighted sum independent of the weights. Where all weights are 0, as
    rounded ones can be, it is 1.

    Args:
        w: ``(B,)``.
        losses: ``(B,)``.
        normalize: ``"none"``, ``"mean"`` or ``"loss"``.
    """
    w, losses = w.detach(), losses.detach()
    tiny = torch.finfo(w.dtype).tiny
    if normalize == "mean":
        mean = w.mean()
        return torch.where(mean > tiny, 1 / mean.clamp(min=tiny), 1.0)
    if normalize == "loss":
        weighted = (w * losses).sum()
        return torch.where(weighted > tiny, losses.sum() / weighted.clamp(min=tiny), 1.0)
    return torch.ones((), dtype=w.dtype, device=w.device)
