"""The loss of quantization-aware training under a teacher, which is the full-precision model itself.

    L = CE(student, label) + CE(student, softmax(teacher))

A student with a class head and a distillation head has the label act on the first and the teacher on the second.

Source: "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023, arXiv 2302.02210, nbasyl/OFQ.
"""

from torch import Tensor
from torch.nn import functional as F


def distillation_loss(
    student: Tensor | tuple[Tensor, Tensor], teacher: Tensor, labels: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy with the labels plus cross-entropy with the teacher's probabilities, at temperature 1.

    Args:
        student: Logits ``(B, classes)``, or those of the class head and of the distillation head.
        teacher: Logits of the teacher's class head, ``(B, classes)``; no gradient reaches them.
        labels: ``(B,)`` class numbers, or ``(B, classes)`` probabilities as mixup makes them.
        label_smoothing: Probability spread over all classes.

    Returns:
        A scalar.
    """
    of_labels, of_teacher = student if isinstance(student, tuple) else (student, student)
    return F.cross_entropy(of_labels, labels, label_smoothing=label_smoothing) + teacher_loss(of_teacher, teacher)


def teacher_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of the student's probabilities with the teacher's, averaged over the batch.

    Args:
        student: Logits ``(B, classes)``.
        teacher: Likewise; no gradient reaches them.

    Returns:
        A scalar.
    """
    return F.cross_entropy(student, teacher.detach().softmax(-1))
