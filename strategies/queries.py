"""Queries of the federated corrections as Flower messages: what is in them, and how they are read on either side.

A query's content: the ConfigRecord ``query`` (``kind`` and its settings), the ArrayRecords ``merged`` and ``end`` (what
the node needs of both models; left out where that is nothing), and the ConfigRecords of the training message that the
node got in this round, under their own names, so that a node finds its data as in training. In a resumed run also the
ConfigRecord ``rebasin-privacy``: the ``releases`` that a node may have made before. A reply's: the ArrayRecord
``sums``, with the ConfigRecord ``privacy`` where they are noised; or the ConfigRecord ``refusal`` with its ``reason``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedrebasin.corrections.queries import About, Answer, Query, State
from fedrebasin.errors import RebasinError
from fedrebasin.strategies.records import DECODE_ERRORS, record_to_state, state_to_record

#: the name under which a client registers its handler: ``@app.query("rebasin")``
ACTION = "rebasin"
MESSAGE_TYPE = f"query.{ACTION}"
_QUERY, _MERGED, _END, _SUMS, _REFUSAL, _PRIVACY = "query", "merged", "end", "sums", "refusal", "privacy"
#: the ConfigRecord, of a query and of a client's state, with the number of noised vectors that were given away
SPENT = "rebasin-privacy"


class Asked(NamedTuple):
    """A query as a node reads it."""

    kind: str
    about: About
    merged: State
    end: State
    spent: int = 0


def write_query(
    query: Query, merged: ArrayRecord, end: ArrayRecord, configs: Mapping[str, ConfigRecord], spent: int = 0
) -> RecordDict:
    """The content of one node's message.

    Parameters
    ----------
    query : Query
    merged, end : ArrayRecord
        ``query.merged``, which all nodes share, and the node's own aligned model as far as it is needed.
    configs : mapping of str to ConfigRecord
        Those of the node's training message.
    spent : int
        How many noised vectors the node may have given away in runs before this one.
    """
    content = RecordDict({_QUERY: ConfigRecord({"kind": query.kind, **query.about})})
    for name, record in ((_MERGED, merged), (_END, end)):
        if record:
            content[name] = record
    if spent:
        content[SPENT] = ConfigRecord({"releases": spent})
    for name, config in configs.items():
        if name not in content:
            content[name] = config
    return content


def read_query(message: Message) -> Asked:
    """What a node is asked.

    Raises
    ------
    RebasinError
        If the message holds no query.
    """
    records = message.content.config_records
    if _QUERY not in records:
        raise RebasinError(f"message: expected a query of fedrebasin; got records {sorted(message.content)}")
    about = dict(records[_QUERY])
    arrays = message.content.array_records
    merged, end = (record_to_state(arrays[name]) if name in arrays else {} for name in (_MERGED, _END))
    spent = records[SPENT].get("releases") if SPENT in records else 0
    kind, spent = str(about.pop("kind", "")), spent if isinstance(spent, int) else 0
    return Asked(kind, about, merged, end, spent)  # type: ignore[arg-type]


def write_answer(answer: Answer, privacy: ConfigRecord | None = None) -> RecordDict:
    """The content of a reply with sums, and what has been spent of the node's privacy."""
    content = RecordDict({_SUMS: state_to_record(answer)})
    if privacy is not None:
        content[_PRIVACY] = privacy
    return content


def epsilon_of(message: Message) -> float | None:
    """The epsilon that a node states for all it has answered in this run, if its answers are noised."""
    records = message.content.config_records if message.has_content() else {}
    stated = records[_PRIVACY].get("epsilon") if _PRIVACY in records else None
    return float(stated) if isinstance(stated, int | float) else None


def write_refusal(reason: str) -> RecordDict:
    """The content of a reply that says why there are no sums.

    Examples
    --------
    >>> write_refusal("no data")["refusal"]["reason"]
    'no data'
    """
    return RecordDict({_REFUSAL: ConfigRecord({"reason": reason})})


def read_answer(message: Message) -> Answer:
    """The sums in a reply.

    Raises
    ------
    RebasinError
        If it holds none, an error or a refusal: with the reason.
    """
    if message.has_error():
        raise RebasinError(
            f"the error {message.error.reason!r} (is @app.query({ACTION!r}) registered, and no mod before it that "
            "takes training messages alone?)"
        )
    content = message.content if message.has_content() else RecordDict()
    if _REFUSAL in content.config_records:
        raise RebasinError(f"a refusal: {content.config_records[_REFUSAL].get('reason')!r}")
    if _SUMS not in content.array_records:
        raise RebasinError("no sums")
    try:
        return record_to_state(content.array_records[_SUMS])
    except DECODE_ERRORS as error:
        raise RebasinError(f"sums that cannot be decoded ({type(error).__name__}: {error})") from error


def bytes_of(message: Message) -> int:
    """Bytes of all arrays in a message, as they are serialised.

    Examples
    --------
    >>> import numpy as np
    >>> from flwr.app import Array
    >>> record = ArrayRecord({"a": Array(np.zeros(10))})
    >>> sum(len(array.data) for array in record.values())
    208
    """
    if not message.has_content():
        return 0
    return sum(len(array.data) for record in message.content.array_records.values() for array in record.values())
