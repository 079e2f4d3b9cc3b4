"""What can be wrong with the metrics of a reply, and which evaluation replies can be aggregated.

Flower's checks raise where one node's metrics are other than the rest, and end the run of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from logging import WARNING

from flwr.app import Message, MetricRecord
from flwr.common.logger import log

MOST_EXAMPLES = 2**53  # beyond it, sums of counts lose their meaning


def wrong_count(key: str, examples: object) -> str:
    """Say what is wrong with a number of examples; empty if nothing is.

    Examples
    --------
    >>> wrong_count("num-examples", 10), wrong_count("num-examples", 0)
    ('', "'num-examples' = 0; a positive number is expected")
    """
    fits = isinstance(examples, int | float) and not isinstance(examples, bool) and 0 < examples <= MOST_EXAMPLES
    return "" if fits else f"{key!r} = {examples}; a positive number is expected"


def form_of(metrics: Mapping[str, object]) -> dict[str, int | None]:
    """The names of metrics, and of lists how long they are: what must be alike to be averaged.

    Examples
    --------
    >>> form_of({"loss": 0.5, "curve": [1.0, 0.5]})
    {'loss': None, 'curve': 2}
    """
    return {name: len(value) if isinstance(value, list) else None for name, value in metrics.items()}


def screen_evaluation(server_round: int, replies: Iterable[Message], weighted_by_key: str) -> list[Message]:
    """Leave out the evaluation replies that cannot be averaged with most others, each with one log line.

    Replies that carry an error stay: the inner strategy counts them. ``weighted_by_key`` is empty where it aggregates
    in a way of its own: then replies need only be like most others.
    """
    messages = list(replies)
    bad: dict[int, str] = {}
    forms: dict[int, str] = {}
    for place, message in enumerate(messages):
        if message.has_error():
            continue
        records = message.content.metric_records if message.has_content() else {}
        wrong = _wrong_weight(records, weighted_by_key) if weighted_by_key else ""
        if wrong:
            bad[place] = wrong
        else:
            forms[place] = "; ".join(f"{name!r} with {_said(metrics)}" for name, metrics in sorted(records.items()))
    usual = Counter(forms.values()).most_common(1)
    bad |= {
        place: f"other metrics than most nodes, {usual[0][0]}" for place, one in forms.items() if one != usual[0][0]
    }
    for place in sorted(bad):
        node = messages[place].metadata.src_node_id
        log(WARNING, "rebasin: node %d sent %s; left out of the evaluation of round %d", node, bad[place], server_round)
    return [message for place, message in enumerate(messages) if place not in bad]


def _said(metrics: MetricRecord) -> str:
    form = sorted(form_of(metrics).items())
    return ", ".join(name if length is None else f"{name} (a list of {length})" for name, length in form)


def _wrong_weight(records: Mapping[str, MetricRecord], key: str) -> str:
    if len(records) != 1:
        return f"{len(records)} MetricRecords; one is expected"
    [metrics] = records.values()
    return wrong_count(key, metrics[key]) if key in metrics else f"no {key!r} in its MetricRecord"
