"""rebasin_mod: align the trained model to the received one on the client, before it is sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, Context, Message
from flwr.common.logger import log
from torch import Tensor

from fedrebasin import PermutationSpec, identity_perms, match_each
from fedrebasin.errors import RebasinError, UsageError
from fedrebasin.finite import first_not_finite
from fedrebasin.permute import permute_tensor
from fedrebasin.strategies.beside import PERMS, Perms, check_beside, check_record, permute_record
from fedrebasin.strategies.mod_order import PRIVACY, SECURE, flowers_mods_before, mods_behind
from fedrebasin.strategies.network import Model, build_network, find_device
from fedrebasin.strategies.part import check_home, part_of
from fedrebasin.strategies.records import state_to_record, tensor_to_array
from fedrebasin.strategies.wire import EMPTY, decode, find_arrays, keys_of_tensors

CallNext = Callable[[Message, Context], Message]
BUFFERS = ("auto", "aligned", "received")


def rebasin_mod(
    *,
    spec: PermutationSpec | str | Path | None = None,
    model: Model | None = None,
    example_inputs: Any = None,
    arrayrecord_key: str = "arrays",
    names: Sequence[str] | None = None,
    beside: Sequence[str] = (),
    buffers: str = "auto",
    keep_perms: bool = False,
    home: str = "fixed",
    seed: int = 0,
    device: torch.device | str | None = None,
) -> RebasinMod:
    """Make a mod that aligns what a client trained to the model that it received.

    It gives what ``Rebasin(..., reference="global")`` gives on the server, bit for bit; but that server remembers a
    node that keeps an order of its own over the rounds, and may find a better one for it. Here the server runs any
    strategy at its own cost, and under secure aggregation sees no model. The mod stands **last** in the list, so that
    clipping and noise see the aligned update. Flower's own privacy and secure aggregation mods behind it are seen
    and refused; others are not seen, and it is for you to put them before it.

    Parameters
    ----------
    spec : PermutationSpec or path, optional
        A checked spec; shipped with the app, it saves every client process the trace. A relative path is looked up in
        the process's working directory: ``Path(__file__).with_name("spec.json")`` is beside the app.
    model, example_inputs : optional
        The model instead of ``spec``: traced and checked when the mod is made.
    arrayrecord_key : str
        The record of the weights, if a message holds several.
    names : sequence of str, optional
        For clients of the legacy API, which send lists: what the arrays are, in the order in which they are sent. By
        default the whole state dict, or the parameters alone, by their number.
    beside : sequence of str
        Further ArrayRecords of the reply that are permuted with the weights (control variates, moments, an EMA).
        Flower's privacy mods refuse a reply with more than one.
    buffers : {"auto", "aligned", "received"}
        Running statistics go to the server ``"aligned"``, or as they were ``"received"``. ``"auto"`` is received
        in front of Flower's clipping and noise mods, whose norm they would swamp (a counter that grew by 100 shrinks
        a clipped update to nothing), and aligned otherwise. Received ones never learn: the server recomputes them.
    keep_perms : bool
        Leave the permutations of this upload in ``context.state["rebasin-perms"]``, for
        :func:`perms_from_record` in the next round.
    home : {"fixed", "relabelled"}
        As in :class:`Rebasin`, with ``keep_perms=True``.
    seed, device
        As in :class:`Rebasin`.

    Returns
    -------
    RebasinMod
        For ``@app.train(mods=[...])`` or ``ClientApp(mods=[...])``; messages that do not train pass through.

    Raises
    ------
    RebasinError
        When the mod is made: a missing or unchecked spec, an option that does not fit.

    Notes
    -----
    In a round the mod raises, so that the client answers with an error and the server leaves it out, if the order of
    mods is wrong, if the model that it received is not the spec's (both before it trains), or if the trained model has
    other tensors or shapes than the received one, or a NaN: sent as it is, any of these would spoil the
    average of all. If the matching itself fails (a received model of NaN, a device out of memory), the reply goes as it
    was trained, with a warning. Clients that trained apart need a trained model to align to: a random one has no
    order to offer, and costs them many points (``simulations/results/server.md``).

    Examples
    --------
    >>> from torch import nn
    >>> from flwr.clientapp import ClientApp
    >>> from flwr.clientapp.mod import fixedclipping_mod
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> mod = rebasin_mod(model=net, example_inputs=(torch.randn(2, 4),))
    >>> app = ClientApp(mods=[fixedclipping_mod, mod])
    """
    _, checked = build_network(model, example_inputs, spec, seed)
    if buffers not in BUFFERS:
        raise UsageError(f"buffers: expected one of {', '.join(map(repr, BUFFERS))}; got {buffers!r}")
    unknown = next((name for name in names or () if name not in checked.axes), None)
    if unknown is not None:
        raise UsageError(f"names: expected names of the spec's tensors; got {unknown!r}")
    return RebasinMod(
        checked,
        arrayrecord_key,
        names=None if names is None else tuple(names),
        beside=check_beside(beside, arrayrecord_key),
        buffers=buffers,
        keep_perms=keep_perms,
        home=check_home(home, perms=keep_perms, how="keep_perms=True"),
        seed=seed,
        device=find_device(device),
    )


class RebasinMod:
    """The mod that :func:`rebasin_mod` makes."""

    def __init__(
        self,
        spec: PermutationSpec,
        arrayrecord_key: str,
        *,
        names: tuple[str, ...] | None,
        beside: tuple[str, ...],
        buffers: str,
        keep_perms: bool,
        home: str,
        seed: int,
        device: torch.device | None,
    ) -> None:
        self.spec = spec
        self.arrayrecord_key = arrayrecord_key
        self.names = names
        self.beside = beside
        self.buffers = buffers
        self.keep_perms = keep_perms
        self.home = home
        self.seed = seed
        self.device = device
        self._parts: dict[frozenset[str], PermutationSpec] = {}

    def __call__(self, msg: Message, ctxt: Context, call_next: CallNext) -> Message:
        """Train, and align what comes out of it."""
        if msg.metadata.message_type.partition(".")[0] != "train":
            return call_next(msg, ctxt)
        behind = [name for name in mods_behind(call_next) if name in (*PRIVACY, *SECURE)]
        if behind:
            raise UsageError(
                f"rebasin_mod: {behind[0]} is behind rebasin_mod in the list of mods and would work on the update "
                f"before it is aligned; put rebasin_mod last: mods=[{', '.join(behind)}, rebasin_mod(...)]",
            )
        record = find_arrays(msg.content, self.arrayrecord_key)
        if record is None:
            log(WARNING, "rebasin_mod: a message without a model; there is nothing to align to")
            return call_next(msg, ctxt)
        received = dict(record)  # the client may empty the record
        try:
            keys = keys_of_tensors(self.spec, received, self.names)
            names = frozenset(keys)  # by name: other messages may be handled while this one's client trains
            part = self._parts[names] = self._parts.get(names) or part_of(self.spec, names, self.home)
            part.check_state(decode(received, keys), "the received model")
        except RebasinError as error:
            raise UsageError(f"rebasin_mod: {error}") from error
        reply = call_next(msg, ctxt)
        if reply.has_error() or not reply.has_content():
            return reply
        try:
            return self._align(part, reply, received, keys, ctxt)
        except RebasinError as error:
            raise UsageError(
                f"rebasin_mod: the trained model does not fit the one that was received: {error}"
            ) from error

    def _align(
        self,
        spec: PermutationSpec,
        reply: Message,
        received: Mapping[str, Array],
        keys: Mapping[str, str],
        ctxt: Context,
    ) -> Message:
        record = find_arrays(reply.content, self.arrayrecord_key)
        if record is None or {*record} - {EMPTY} != set(keys.values()):
            got = "no ArrayRecord" if record is None else f"{len(record)} arrays"
            raise UsageError(f"arrays: expected the {len(keys)} that were received; got {got}")
        trained = decode(record, keys)
        spec.check_state(trained, "the trained model")
        sent = decode(received, keys)
        bad = first_not_finite(trained, sent)
        if bad is not None:
            raise UsageError(f"arrays: {bad!r} holds a NaN or an infinity")
        perms = self._match(spec, sent, trained)
        if perms is not None:
            for name in keys:
                tensor = trained.pop(name)
                moved = permute_tensor(spec.axes[name], perms, tensor)
                if not torch.equal(moved, tensor):
                    record[keys[name]] = tensor_to_array(moved)
        before = flowers_mods_before()
        if self.buffers == "received" or (self.buffers == "auto" and set(before) & set(PRIVACY)):
            for name in set(spec.buffers) & set(keys):
                record[keys[name]] = received[keys[name]]
        for name in self.beside:
            _align_beside(spec, reply, name, identity_perms(spec) if perms is None else perms)
        if self.keep_perms:
            ctxt.state.pop(PERMS, None)
            if perms is not None:
                ctxt.state[PERMS] = state_to_record(perms)
        return reply

    def _match(
        self, spec: PermutationSpec, received: Mapping[str, Tensor], trained: Mapping[str, Tensor]
    ) -> Perms | None:
        """Match as the server does; the received model may be of another precision (secure aggregation's)."""
        try:
            (found,) = match_each(spec, received, [trained], seed=self.seed, device=self.device)
        except (ValueError, RuntimeError) as error:
            log(
                *(WARNING, "rebasin_mod: alignment failed (%s: %s); the reply goes as it was trained"),
                *(type(error).__name__, error),
            )
            return None
        log(INFO, "rebasin_mod: %.1f%% of the units moved", 100 * found.moved_fraction)
        return found.perms


def _align_beside(spec: PermutationSpec, reply: Message, name: str, perms: Perms) -> None:
    record = reply.content.array_records.get(name)
    if record is None:
        log(WARNING, "rebasin_mod: beside: the reply has no ArrayRecord %r", name)
        return
    try:
        check_record(spec, record)
    except RebasinError as error:
        log(WARNING, "rebasin_mod: beside: %r holds %s; it is not sent", name, error)
        del reply.content[name]
    else:
        permute_record(spec, perms, record)
