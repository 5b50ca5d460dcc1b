"""Two tasks with verifiable rewards for a small policy: write an arithmetic expression that hits a target.

Expressions are evaluated from left to right. Many prompts have several right answers, so a policy that has collapsed to
one of them can be told from one that has not.
"""

from dataclasses import dataclass
from itertools import permutations, product

import torch
from torch import Tensor

PLUS, MINUS, TIMES, EQUALS, COLON, END = 10, 11, 12, 13, 14, 15
_OPS = (PLUS, MINUS, TIMES)
_LARGEST = 99


def evaluate(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate ``digit op digit op digit ...`` from left to right.

    Args:
        tokens: ``(N, 2 m + 1)``.

    Returns:
        Values ``(N,)``, and which rows are well-formed.
    """
    digits, ops = tokens[:, ::2], tokens[:, 1::2]
    formed = (digits < PLUS).all(1) & ((ops >= PLUS) & (ops <= TIMES)).all(1)
    value = digits[:, 0]
    for index in range(ops.shape[1]):
        digit, op = digits[:, index + 1], ops[:, index]
        value = torch.where(op == PLUS, value + digit, torch.where(op == MINUS, value - digit, value * digit))
    return value, formed


@dataclass(frozen=True)
class ThreeDigits:
    """Use three given digits once each to hit a target: ``3 5 7 = 1 5 :`` is answered by ``3 + 5 + 7``.

    One reward: 1 for a right answer, else 0.
    """

    vocabulary: int = 15
    prompt_length: int = 7
    new_tokens: int = 5
    end: int | None = None

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw prompts that have an answer, and one of their answers at random."""
        digits = torch.randint(1, 10, (n, 3), generator=generator)
        found = _all_answers(digits)
        values = evaluate(found.flatten(0, 1))[0].view(n, -1)
        inside = (values >= 0) & (values <= _LARGEST)  # adding all three always is
        answer = torch.multinomial(inside.double(), 1, generator=generator)
        target = values.gather(1, answer)
        # of all expressions that hit the target, any with equal chance
        hits = values == target
        chosen = torch.multinomial(hits.double(), 1, generator=generator)
        answers = found.gather(1, chosen[..., None].expand(n, 1, 5))[:, 0]
        marks = torch.tensor([EQUALS, COLON]).expand(n, 2)
        return torch.cat([digits, marks[:, :1], target // 10, target % 10, marks[:, 1:]], 1), answers

    def rewards(self, prompts: Tensor, answers: Tensor, mask: Tensor) -> Tensor:
        """Give 1 to expressions that use every digit once and hit the target."""
        value, formed = evaluate(answers)
        used = (answers[:, ::2].sort(1).values == prompts[:, :3].sort(1).values).all(1)
        right = formed & used & (value == 10 * prompts[:, 4] + prompts[:, 5]) & mask.all(1)
        return right.float()[:, None]


@dataclass(frozen=True)
class AnyDigits:
    """Hit a target from 0 to 99 by an expression of two or three digits: ``1 2 :`` is answered by ``3 * 4`` and an end.

    Two rewards per answer, correct and well-formed with digits that do not fall; a third, shortness, is relative to
    other answers and therefore not the task's.
    """

    vocabulary: int = 16
    prompt_length: int = 3
    new_tokens: int = 6
    end: int | None = END

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw expressions, and ask for their values."""
        kept = torch.zeros(0, 6, dtype=torch.long)
        targets = torch.zeros(0, dtype=torch.long)
        while len(kept) < n:
            tokens = torch.randint(0, 10, (2 * n, 5), generator=generator)
            tokens[:, 1::2] = PLUS + torch.randint(3, (2 * n, 2), generator=generator)
            short = torch.rand(2 * n, generator=generator) < 0.3
            value = torch.where(short, evaluate(tokens[:, :3])[0], evaluate(tokens)[0])
            answers = torch.cat([tokens, torch.full((2 * n, 1), END)], 1)
            answers[short, 3:] = END
            inside = (value >= 0) & (value <= _LARGEST)
            kept, targets = torch.cat([kept, answers[inside]]), torch.cat([targets, value[inside]])
        kept, targets = kept[:n], targets[:n]
        return torch.stack([targets // 10, targets % 10, torch.full((n,), COLON)], 1), kept

    def rewards(self, prompts: Tensor, answers: Tensor, mask: Tensor) -> Tensor:
        """Give ``(N, 2)``: correct, and well-formed with digits that do not fall."""
        target, length = 10 * prompts[:, 0] + prompts[:, 1], mask.sum(1)
        right, clear = (torch.zeros(len(answers), device=answers.device) for _ in range(2))
        for size in (3, 5):
            value, formed = evaluate(answers[:, :size])
            ended = (length == size + 1) & (answers[:, size] == END)
            rising = (answers[:, :size:2].diff(dim=1) >= 0).all(1)
            right = torch.where(ended & formed & (value == target), 1.0, right)
            clear = torch.where(ended & formed & rising, 1.0, clear)
        return torch.stack([right, clear], 1)


def _all_answers(digits: Tensor) -> Tensor:
    """``(n, 3)`` digits to ``(n, 54, 5)`` expressions: every order and every pair of operators."""
    orders = torch.tensor(list(permutations(range(3))))
    ops = torch.tensor(list(product(_OPS, repeat=2)))
    ordered = digits[:, orders]
    n = len(digits)
    answers = torch.empty(n, len(orders), len(ops), 5, dtype=torch.long)
    answers[..., ::2] = ordered[:, :, None]
    answers[..., 1::2] = ops
    return answers.flatten(1, 2)
