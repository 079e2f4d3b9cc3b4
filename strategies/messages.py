"""What is sent to the nodes: the inner strategy's messages, with the buffers put back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flwr.app import ArrayRecord, Message

from fedrebasin import PermutationSpec
from fedrebasin.strategies.pairs import from_pairs


def names_of_weights(spec: PermutationSpec, arrays: ArrayRecord) -> list[str]:
    """What the inner strategy sees: the floating and complex parameters, in the order of ``arrays``."""
    parameters = set(spec.parameters)
    return [
        name for name, array in arrays.items() if name in parameters and array.dtype.startswith(("float", "complex"))
    ]


def restore_buffers(messages: Iterable[Message], key: str, trained: ArrayRecord, sent: ArrayRecord) -> None:
    """Complete the arrays of each message, in place and in the order of ``sent``.

    Parameters
    ----------
    messages : iterable of Message
        They may share one content, as FedAvg's do.
    key : str
        The name of the ArrayRecord.
    trained : ArrayRecord
        What the inner strategy was given to send; if it sends something else, that is kept.
    sent : ArrayRecord
        The whole model.
    """
    done: set[int] = set()
    for message in messages:
        content = message.content
        record = content.get(key)
        if id(content) in done or not isinstance(record, ArrayRecord):
            continue
        done.add(id(content))
        if all(record[name] is trained[name] for name in record if name in trained) and len(record) == len(trained):
            content[key] = sent
        elif record.keys() <= sent.keys():
            full, own = ArrayRecord(), from_pairs(record, sent)
            for name, array in sent.items():
                full[name] = own.get(name, array)
            content[key] = full


def node_of_message(messages: Iterable[Message]) -> dict[str, int]:
    """To which node each message went, by the id that sending gave it."""
    return {
        message.metadata.message_id: message.metadata.dst_node_id for message in messages if message.metadata.message_id
    }


def node_of_reply(reply: Message, nodes: Mapping[str, int]) -> int:
    """Which node a reply is from, by what :func:`node_of_message` has told: Flower's own errors name another."""
    return nodes.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
