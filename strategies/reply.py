"""One reply that takes part: what is read of it, and the one form that all of a round are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from logging import WARNING

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from torch import Tensor

from fedrebasin.strategies.metrics import form_of
from fedrebasin.strategies.records import RecordView, record_to_state


@dataclass
class Reply:
    """One reply that takes part; its message holds one ArrayRecord, in the sent order, and one MetricRecord."""

    message: Message
    node: int
    examples: float
    arrays: ArrayRecord
    metrics: MetricRecord
    names: tuple[str, str]  # of these two records
    further: dict[str, ArrayRecord | MetricRecord] = field(default_factory=dict)  # put aside for the inner strategy

    def state(self) -> dict[str, Tensor]:
        """Decode the arrays; each call makes new tensors, so that not all replies need be decoded at once."""
        return record_to_state(self.arrays)

    def tensors(self) -> Mapping[str, Tensor]:
        """The same for reading: no tensor is copied."""
        return RecordView(self.arrays)

    def rewrite(self, names: tuple[str, str], *, whole: bool) -> None:
        """Leave one ArrayRecord and one MetricRecord: Flower's strategies refuse more, and pair them by ``names``.

        ``whole``: further ones are put aside for an inner strategy that may read them.
        """
        content = RecordDict({names[0]: self.arrays, names[1]: self.metrics})
        for name, record in self.message.content.items():
            if name in (*self.names, *names):  # another reply's name for its metrics: this one's would be gone
                continue
            if isinstance(record, ConfigRecord):
                content[name] = record
            elif whole:
                self.further[name] = record
        self.message.content, self.names = content, names

    def give_back(self) -> None:
        """Put what was put aside into the message again."""
        for name, record in self.further.items():
            self.message.content[name] = record


def in_order(replies: list[Reply]) -> list[Reply]:
    """By partition, if all say theirs: node ids and arrival differ from run to run, and sums with their order."""
    partitions = [reply.metrics.get("partition-id") for reply in replies]
    numbers = [float(partition) for partition in partitions if isinstance(partition, int | float)]
    if len(numbers) < len(replies):
        return replies
    return [replies[place] for place in sorted(range(len(replies)), key=numbers.__getitem__)]


def keep_common_metrics(kept: Sequence[Reply]) -> None:
    """Reduce the metrics to those that all replies have, in one form: Flower raises where they differ."""
    if not kept:
        return
    forms = [form_of(reply.metrics) for reply in kept]
    common = {name for name, form in forms[0].items() if all(other.get(name, -1) == form for other in forms)}
    dropped = sorted({name for names in forms for name in names} - common)
    if dropped:
        log(WARNING, "rebasin: metrics that not all replies have are not aggregated: %s", ", ".join(dropped))
    for reply in kept:
        reply.metrics = MetricRecord({name: value for name, value in reply.metrics.items() if name in common})
