"""The client's side of the federated corrections: one handler that answers every query from the client's own data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from logging import WARNING
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.common.logger import log
from torch import nn

from fedrebasin.corrections.federated import Node, answer
from fedrebasin.errors import RebasinError, UsageError, first_line
from fedrebasin.strategies.network import Model, find_device
from fedrebasin.strategies.queries import read_query, write_answer, write_refusal

Handler = Callable[[Message, Context], Message]


def answer_queries(
    *,
    model: Model,
    batches: Callable[[Message, Context], Iterable[Any]],
    device: torch.device | str | None = None,
) -> Handler:
    """Make the function that answers the queries of ``correction="federated-..."``.

    Register it beside the training function, under the name ``"rebasin"``::

        app = ClientApp()
        app.query("rebasin")(answer_queries(model=Net, batches=load_batches))

    Nothing is kept between messages, so that it works where every message is a new process: each query brings what it
    needs of the merged model and of this client's own aligned model. For a network of ``L`` layers and ``B`` bytes,
    ``"federated-least-squares"`` sends a client ``L`` queries of up to ``2 B`` each (what later layers hold is left
    out: about ``L B`` in all), ``"federated-repair"`` half of that, ``"federated-regmean"`` one query of ``B``.

    What goes back are sums over this client's examples, never an example or a label: counts, means and sums of squares
    per channel (repair), or Gram matrices of layers' inputs and their products with pre-activations (the other two),
    which say much about few examples. There is no noise in them and no clipping; a server whose strategy wraps
    differential privacy does not ask.

    Parameters
    ----------
    model : nn.Module or function of no arguments
        The network that the client trains; its weights are not read.
    batches : function of message and context
        Gives this client's input batches, with targets if ``label_prior`` is asked for: a list or DataLoader. The
        message holds the ConfigRecords of this round's training message too.
    device : torch.device or str, optional
        Where the network runs.

    Returns
    -------
    function of message and context
        What it cannot answer it refuses, with the reason, which the server logs.

    Raises
    ------
    UsageError
        If ``model`` or ``batches`` is of the wrong kind.

    Examples
    --------
    >>> from flwr.clientapp import ClientApp
    >>> app = ClientApp()
    >>> handler = answer_queries(model=lambda: nn.Linear(2, 1), batches=lambda message, context: [torch.randn(8, 2)])
    >>> app.query("rebasin")(handler) is handler
    True
    """
    if not callable(batches):
        raise UsageError(
            "batches: expected a function of message and context that gives input batches; "
            f"got {type(batches).__name__}"
        )
    if not callable(model):
        raise UsageError(
            f"model: expected an nn.Module or a function of no arguments that makes one; got {type(model).__name__}"
        )
    where = find_device(device)

    def handle(message: Message, context: Context) -> Message:
        try:
            asked = read_query(message)
            net: object = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
            if not isinstance(net, nn.Module):
                raise UsageError(f"model: expected a function that makes an nn.Module; it made a {type(net).__name__}")
            node = Node(net, asked.merged, asked.end, batches(message, context), where)
            found = {name: tensor.cpu() for name, tensor in answer(asked.kind, asked.about, node).items()}
            return Message(write_answer(found), reply_to=message)
        except RebasinError as error:
            log(WARNING, "rebasin: a query is refused: %s", error)
            return Message(write_refusal(first_line(error)), reply_to=message)

    return handle
