"""Which labels are suspicious: the latest weight of every sample, as a table in the form of cleanlab's."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, require
from weightsmith.core.files import write_atomically

_HEADER = ("is_label_issue", "label_score", "given_label", "predicted_label", "loss", "agreement", "epoch")
_STORED = 6  # given label, suggested label, weight, loss, agreement, epoch
_FLUSH_AT = 64  # batches whose numbers stay on the device before they are fetched


@dataclass(frozen=True, slots=True)
class AuditTable:
    """One row per sample that was seen, the most suspicious first.

    The columns are those of cleanlab's tables of label issues, with three of ours behind them.

    Attributes:
        index: Identifiers of the samples.
        is_label_issue: The weight is below 0.5 and the model would give another label.
        label_score: The sample's latest weight in (0, 1); low: the label is not trusted.
        given_label: The label in the data.
        predicted_label: The label that the model gives: the suggestion.
        loss: Latest loss.
        agreement: Whether most of the latest passes agreed with the label.
        epoch: When the sample was seen last.
        class_names: Names of the labels, for the file and the plot; empty: their numbers.
    """

    index: Sequence[int]
    is_label_issue: Sequence[bool]
    label_score: Sequence[float]
    given_label: Sequence[int]
    predicted_label: Sequence[int]
    loss: Sequence[float]
    agreement: Sequence[bool]
    epoch: Sequence[int]
    class_names: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.index)

    def rows(self) -> list[dict[str, Any]]:
        """The table as a list of rows, labels by name where there are names."""
        columns = {name: getattr(self, name) for name in ("index", *_HEADER)}
        for name in ("given_label", "predicted_label"):
            columns[name] = [self._name(label) for label in columns[name]]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def issues(self) -> "AuditTable":
        """Only the samples whose label is probably wrong."""
        chosen = [at for at, issue in enumerate(self.is_label_issue) if issue]
        names = [name for name in self.__slots__ if name != "class_names"]
        return AuditTable(
            **{name: [getattr(self, name)[at] for at in chosen] for name in names}, class_names=self.class_names
        )

    def to_csv(self, file: str | Path) -> Path:
        """Write the table; the file appears whole.

        Args:
            file: Where to.

        Returns:
            The file.
        """
        path = Path(file)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["index", *_HEADER], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        write_atomically(path, text.getvalue())
        return path

    def to_pandas(self) -> Any:
        """The table as a ``DataFrame`` with the samples' identifiers as its index, as cleanlab gives it."""
        pandas: Any = require("pandas", extra="hf", purpose="a table as a DataFrame")
        return pandas.DataFrame(self.rows(), columns=["index", *_HEADER]).set_index("index")

    def plot(self, *, bins: int = 40) -> Any:
        """Draw how many samples got which weight, by whether the model agrees with their label.

        Args:
            bins: Most bars.

        Returns:
            An altair chart; ``chart.save("audit.html")`` writes it.
        """
        import altair as alt

        return (
            alt.Chart(
                alt.Data(values=self._histogram(bins)), title="Weights of the training samples", width=420, height=240
            )
            .mark_bar()
            .encode(
                x=alt.X("start:Q", bin="binned", title="weight", scale=alt.Scale(domain=[0, 1])),
                x2="end:Q",
                y=alt.Y("samples:Q", title="samples", stack=True),
                color=alt.Color("label:N", title="label"),
                tooltip=["label:N", "start:Q", "end:Q", "samples:Q"],
            )
        )

    def _histogram(self, bins: int) -> list[dict[str, Any]]:
        if bins < 1:
            raise UsageError(f"bins must be at least 1, got {bins}")
        counts: dict[tuple[int, str], int] = {}
        for score, given, predicted in zip(self.label_score, self.given_label, self.predicted_label, strict=True):
            label = "confirmed by the model" if given == predicted else "another one suggested"
            key = min(int(score * bins), bins - 1), label
            counts[key] = counts.get(key, 0) + 1
        return [
            {"start": at / bins, "end": (at + 1) / bins, "label": label, "samples": count}
            for (at, label), count in sorted(counts.items())
        ]

    def _name(self, label: int) -> int | str:
        return self.class_names[label] if self.class_names else label


class AuditLog:
    """The latest numbers of every sample, by identifier."""

    def __init__(self) -> None:
        self._slot: dict[int, int] = {}
        self._values = torch.zeros(0, _STORED, dtype=torch.float64)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, ids: Tensor, columns: Sequence[Tensor], epoch: int) -> None:
        """Take a batch.

        Args:
            ids: ``(B,)``, whole numbers.
            columns: Given label, suggested label, weight, loss and agreement, ``(B,)`` each.
            epoch: Since 0.
        """
        values = [column.detach().to(torch.float64) for column in columns]
        self._waiting.append((ids.detach(), torch.stack([*values, torch.full_like(values[0], epoch)], dim=1)))
        if len(self._waiting) >= _FLUSH_AT:
            self._flush()

    def _flush(self) -> None:
        for ids, values in self._waiting:
            slots = [self._slot.setdefault(key, len(self._slot)) for key in ids.tolist()]
            if len(self._slot) > len(self._values):
                more = torch.zeros(2 * len(self._slot), _STORED, dtype=torch.float64)
                more[: len(self._values)] = self._values
                self._values = more
            self._values[torch.tensor(slots, dtype=torch.int64)] = values.cpu()
        self._waiting.clear()

    def weights(self) -> dict[int, float]:
        """The latest weight by identifier."""
        self._flush()
        return {key: float(self._values[slot, 2]) for key, slot in self._slot.items()}

    def table(self, class_names: Sequence[str] = ()) -> AuditTable:
        """Everything, the lowest weight first.

        Raises:
            UsageError: No sample was seen with an identifier.
        """
        self._flush()
        if not self._slot:
            raise UsageError("no sample was seen with an identifier: give ids (B,) to step or loss")
        ids = torch.tensor(list(self._slot), dtype=torch.int64)
        values = self._values[: len(ids)]
        order = torch.argsort(values[:, 2], stable=True)
        given, suggested, score, loss, agreement, epoch = values[order].unbind(1)
        most = int(max(given.max(), suggested.max()))
        if class_names and len(class_names) <= most:
            raise UsageError(f"class_names must name {most + 1} classes at least, got {len(class_names)}")
        return AuditTable(
            index=ids[order].tolist(),
            is_label_issue=((score < 0.5) & (given != suggested)).tolist(),
            label_score=score.tolist(),
            given_label=given.long().tolist(),
            predicted_label=suggested.long().tolist(),
            loss=loss.tolist(),
            agreement=(agreement > 0).tolist(),
            epoch=epoch.long().tolist(),
            class_names=tuple(class_names),
        )

    def state_dict(self) -> dict[str, Any]:
        """All rows as tensors."""
        self._flush()
        return {
            "ids": torch.tensor(list(self._slot), dtype=torch.int64),
            "values": self._values[: len(self._slot)].clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._waiting.clear()
        self._slot = {key: slot for slot, key in enumerate(state["ids"].tolist())}
        self._values = state["values"].cpu().clone()
