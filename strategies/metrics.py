"""What can be wrong with the metrics of a reply, and which evaluation replies can be aggregated.

Flower's checks raise where one node's metrics are other than the rest, and end the run of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from logging import WARNING

from flwr.app import Message
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

    Replies that carry an error stay: the inner strategy counts them.
    """
    messages = list(replies)
    bad: dict[int, str] = {}
    forms: dict[int, tuple[str, frozenset[tuple[str, int | None]]]] = {}
    for place, message in enumerate(messages):
        if message.has_error():
            continue
        records = message.content.metric_records if message.has_content() else {}
        if len(records) != 1:
            bad[place] = f"{len(records)} MetricRecords; one is expected"
            continue
        [(name, metrics)] = records.items()
        if weighted_by_key not in metrics:
            bad[place] = f"no {weighted_by_key!r} in its MetricRecord"
        elif wrong := wrong_count(weighted_by_key, metrics[weighted_by_key]):
            bad[place] = wrong
        else:
            forms[place] = name, frozenset(form_of(metrics).items())
    if forms:
        usual = Counter(forms.values()).most_common(1)[0][0]
        expected = f"{usual[0]!r} with {', '.join(sorted(name for name, _ in usual[1]))}"
        bad |= {place: f"other metrics than most nodes, {expected}" for place, form in forms.items() if form != usual}
    for place in sorted(bad):
        node = messages[place].metadata.src_node_id
        log(WARNING, "rebasin: node %d sent %s; left out of the evaluation of round %d", node, bad[place], server_round)
    return [message for place, message in enumerate(messages) if place not in bad]
