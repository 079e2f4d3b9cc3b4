"""The client's side of the federated corrections: one handler that answers every query from the client's own data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from logging import WARNING
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.common.logger import log
from torch import nn

from fedrebasin.corrections.federated import Node, answer, count_releases
from fedrebasin.corrections.privacy import Privacy
from fedrebasin.corrections.queries import About
from fedrebasin.corrections.votes import KIND as LOSSES
from fedrebasin.errors import RebasinError, UsageError, first_line
from fedrebasin.modules import deep_copy
from fedrebasin.strategies.network import Model, find_device
from fedrebasin.strategies.queries import SPENT, read_query, write_answer, write_refusal
from fedrebasin.yardsticks import Loss

Handler = Callable[[Message, Context], Message]


def answer_queries(
    *,
    model: Model,
    batches: Callable[[Message, Context], Iterable[Any]],
    held_out: Callable[[Message, Context], Iterable[Any]] | None = None,
    loss: Loss | None = None,
    privacy: Privacy | None = None,
    device: torch.device | str | None = None,
) -> Handler:
    """Make the function that answers the queries of ``correction="federated-..."`` and of ``select="clients"``.

    Register it beside the training function, under the name ``"rebasin"``::

        app = ClientApp()
        app.query("rebasin")(answer_queries(model=Net, batches=load_batches))

    Nothing is kept between messages, so that it works where every message is a new process: each query brings what it
    needs of the merged model and of this client's own aligned model. For a network of ``L`` layers and ``B`` bytes,
    ``"federated-least-squares"`` sends a client ``L`` queries of up to ``2 B`` each (what later layers hold is left
    out: about ``L B`` in all), ``"federated-repair"`` half of that, ``"federated-regmean"`` one query of ``B``.

    What goes back are sums over this client's examples, never an example or a label: counts, means and sums of squares
    per channel (repair), or Gram matrices of layers' inputs and their products with pre-activations (the other two),
    which say much about few examples. With ``privacy`` all of them are clipped and noised here, before they leave, and
    a query that would take the epsilon of the run over its budget is refused; what is spent is kept in
    ``context.state``, and a run that is resumed (``checkpoint_dir``) counts on. Under a strategy that wraps
    differential privacy, whose unit is a whole client, the server does not ask at all. For ``select="clients"`` a loss
    for each candidate goes back, from ``held_out``.

    Parameters
    ----------
    model : nn.Module or function of no arguments
        The network that the client trains; its weights are not read.
    batches : function of message and context
        Gives this client's input batches, with targets if ``label_prior`` is asked for: a list or DataLoader. The
        message holds the ConfigRecords of this round's training message too.
    held_out : function of message and context, optional
        For ``select="clients"``: like ``batches``, with targets, examples that the client neither trains on nor gives
        there. With ``privacy`` it is not used: losses are not noised, and so refused.
    loss : callable, optional
        ``loss(output, target)``, a mean over the batch, for ``held_out``.
    privacy : Privacy, optional
        How much one example can change of what is sent.
    device : torch.device or str, optional
        Where the network runs.

    Returns
    -------
    function of message and context
        What it cannot answer it refuses, with the reason, which the server logs.

    Raises
    ------
    UsageError
        If ``model``, ``batches``, ``held_out`` or ``loss`` is of the wrong kind, only one of ``held_out`` and
        ``loss`` is given, or ``device`` cannot be used.

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
    if (held_out is None) != (loss is None) or not callable(held_out or batches):
        raise UsageError(
            "held_out, loss: expected a function of message and context that gives batches with targets, and a "
            "function of output and target, or neither"
        )
    if not callable(model):
        raise UsageError(
            f"model: expected an nn.Module or a function of no arguments that makes one; got {type(model).__name__}"
        )
    where = find_device(device)

    def handle(message: Message, context: Context) -> Message:
        try:
            asked = read_query(message)
            net: object = deep_copy(model) if isinstance(model, nn.Module) else model()
            if not isinstance(net, nn.Module):
                raise UsageError(f"model: expected a function that makes an nn.Module; it made a {type(net).__name__}")
            spent = None if privacy is None else spend(privacy, asked.kind, asked.about, context, asked.spent)
            source = held_out if asked.kind == LOSSES and held_out is not None else batches
            node = Node(net, asked.merged, asked.end, source(message, context), where, privacy, loss)
            found = {name: tensor.cpu() for name, tensor in answer(asked.kind, asked.about, node).items()}
            return Message(write_answer(found, spent), reply_to=message)
        except RebasinError as error:
            log(WARNING, "rebasin: a query is refused: %s", error)
            return Message(write_refusal(first_line(error)), reply_to=message)

    return handle


def spend(privacy: Privacy, kind: str, about: About, context: Context, already: int = 0) -> ConfigRecord:
    """Count the releases of one answer in the context's state, before anything is measured.

    ``already``: the most that one client was asked for in the runs before, of which this state may know nothing.

    Raises
    ------
    RebasinError
        If the epsilon of all releases so far and these would be over the budget.

    Examples
    --------
    >>> from flwr.app import RecordDict
    >>> context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    >>> spent = spend(Privacy(clip=3.0, noise=10.0), "grams", {"layers": ["1.weight", "3.weight", "5.weight"]}, context)
    >>> spent["releases"], round(spent["epsilon"], 2)
    (3, 0.62)
    """
    records = context.state.config_records
    own = int(str(records[SPENT]["releases"])) if SPENT in records else 0
    releases = max(own, already) + count_releases(kind, about)
    epsilon = privacy.epsilon(releases)
    if epsilon > privacy.budget:
        raise RebasinError(
            f"privacy: {releases} releases would be epsilon = {epsilon:.3g} at delta = {privacy.delta:g}, over the "
            f"budget of {privacy.budget:g}"
        )
    context.state[SPENT] = ConfigRecord({"releases": releases})
    return ConfigRecord({"releases": releases, "epsilon": epsilon, "delta": privacy.delta})
