"""Questions that a server asks its nodes about their own data, layer after layer, and how they are answered.

A federated correction is a generator: it yields a :class:`Query`, is sent what every node answered, and returns the
corrected state dict. It does not know how questions travel: :func:`drive` hands them to any function that answers,
one that calls the nodes in this process or one that sends messages, so that both compute the very same.

A node keeps nothing between questions: a query carries the part of the merged network so far, and of the node's own
aligned model, that the pass up to the layer reads.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedrebasin.batches import Batches, batches_of, split_inputs
from fedrebasin.coefficients import check_coefficients
from fedrebasin.corrections.first_uses import Uses, first_uses
from fedrebasin.corrections.moments import Moments
from fedrebasin.corrections.privacy import Privacy
from fedrebasin.corrections.solution import check_ridge
from fedrebasin.corrections.working import working_copy
from fedrebasin.errors import RebasinError

State = dict[str, Tensor]
#: what a node sends back: float64 sums, int64 counts
Answer = dict[str, Tensor]
Result = TypeVar("Result")
About = Mapping[str, str | int | float | bool | list[str]]
LARGEST = 1e30  #: sums beyond this are no activations
FACTOR, FLOOR = 1e3, 1e-2  #: an answer that is so many times as large as the others' is left out


@dataclass(frozen=True)
class FederatedOptions:
    """How federated corrections work; each reads its own.

    Parameters
    ----------
    sequential : bool
        ``"federated-repair"``: one query round a site, each behind the corrected ones; ``False``: one in all.
    max_gain : float
        ``"federated-repair"``: gains stay in ``[1 / max_gain, max_gain]``.
    ridge : float, optional
        ``"federated-least-squares"``: by default chosen layer by layer on the examples that the nodes hold out.
    label_prior : bool
        ``"federated-least-squares"``: take the logarithm of each node's own label shares off its last layer's targets;
        the batches of every node must have integer targets then.
    gram_limit : int
        ``"federated-regmean"``: bytes of one layer's Gram matrix; beyond it, a node sends a diagonal and as many
        leading directions as fit.
    off_diagonal : float
        ``"federated-regmean"``: as for :func:`fedrebasin.regmean`.

    Examples
    --------
    >>> FederatedOptions(ridge=0.01).sequential
    True
    """

    sequential: bool = True
    max_gain: float = 10.0
    ridge: float | None = None
    label_prior: bool = False
    gram_limit: int = 2**26
    off_diagonal: float = 0.9

    def __post_init__(self) -> None:
        check_ridge(self.ridge)
        if self.gram_limit < 0:
            raise RebasinError(f"gram_limit: expected a number of bytes from 0; got {self.gram_limit}")
        if not self.max_gain >= 1:
            raise RebasinError(f"max_gain: expected 1 or more; got {self.max_gain}")
        if not 0 <= self.off_diagonal <= 1:
            raise RebasinError(f"off_diagonal: expected a number in [0, 1]; got {self.off_diagonal}")


@dataclass(frozen=True)
class Query:
    """One question to every node.

    Attributes
    ----------
    kind : str
        What is asked for.
    about : mapping
        Its settings.
    merged : state dict
        What the node needs of the merged network; empty where it is not run.
    end_names : tuple of str
        What it needs of its own aligned model.
    read : callable
        Turns an answer into what the correction computes with; raises :class:`RebasinError` for one that cannot be.
    size : callable
        How large, as a root mean square, what was read says that activations are: see :func:`find_huge`.
    """

    kind: str
    about: About
    merged: State
    end_names: tuple[str, ...]
    read: Callable[[Answer], Any] = field(compare=False, repr=False)
    size: Callable[[Any], float] = field(compare=False, repr=False)


#: yields questions, takes the answers by the place of the node's end, returns the corrected state dict
Correction = Generator[Query, dict[int, Any], State]


@dataclass(frozen=True)
class Case:
    """What a server has: no data, but the merged model, its aligned ends, and an example of the inputs' shape."""

    net: nn.Module
    merged: Mapping[str, Tensor]
    ends: Sequence[Mapping[str, Tensor]]
    coefficients: Sequence[float]
    example_inputs: Any
    options: FederatedOptions = field(default_factory=FederatedOptions)
    device: torch.device | str | None = None

    def model(self) -> nn.Module:
        """A private network that holds ``merged``."""
        return working_copy(self.net, self.merged, self.device)

    def example(self) -> Batches:
        """The example as the only batch."""
        args, kwargs = split_inputs(self.example_inputs)
        where = self.device if self.device is not None else next(iter(self.merged.values())).device
        return Batches([kwargs or args], inputs=max(1, len(args)), name="example_inputs", device=where)

    def uses(self, model: nn.Module) -> Uses:
        """In which order ``model`` reads its tensors."""
        args, kwargs, _ = next(iter(self.example()))
        return first_uses(model, args, kwargs)

    def shares(self, places: Iterable[int]) -> dict[int, float]:
        """The coefficients of the nodes that answered, summing to 1."""
        found = list(places)
        weights = check_coefficients([self.coefficients[place] for place in found], len(found))
        return dict(zip(found, weights, strict=True))


@dataclass(frozen=True)
class Node:
    """What a node has when it is asked: a network of the architecture, the parts that were sent, its own batches.

    With ``privacy``, what it answers is clipped and noised, and what cannot be is refused. ``loss`` is for votes.
    """

    net: nn.Module
    merged: State
    end: State
    batches: Iterable[Any]
    device: torch.device | str | None = None
    privacy: Privacy | None = None
    loss: Callable[[Any, Any], Tensor] | None = None

    def model(self, part: State) -> nn.Module:
        """A private network with the weights of ``part``; what is missing is not read in the pass that is asked for."""
        return working_copy(self.net, {**self.net.state_dict(), **part}, self.where)

    def data(self) -> Batches:
        """The node's batches where the network runs."""
        return batches_of(self.net, self.batches, name="batches", device=self.where)

    @property
    def where(self) -> torch.device | str:
        """Where the network runs; the parts that were sent come on the CPU, wherever that is."""
        return self.device or next(iter(self.net.state_dict().values()), torch.zeros(0, device="cpu")).device


def drive(correction: Generator[Query, dict[int, Any], Result], ask: Callable[[Query], dict[int, Any]]) -> Result:
    """Run a correction to its end.

    Parameters
    ----------
    correction : generator
    ask : callable
        Gives what each node answered, read by ``query.read``, by the node's place; at least one.

    Examples
    --------
    >>> def ask_once() -> Correction:
    ...     answers = yield Query("size", {}, {}, (), lambda answer: answer, float)
    ...     return {"sum": answers[0] + answers[1]}
    >>> drive(ask_once(), lambda query: {0: torch.tensor(1), 1: torch.tensor(2)})
    {'sum': tensor(3)}
    """
    try:
        query = next(correction)
        while True:
            query = correction.send(ask(query))
    except StopIteration as done:
        result: Result = done.value
        return result


def check_tensors(answer: Answer, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse an answer that lacks a tensor, or in which one has another shape, another type or no finite values.

    Examples
    --------
    >>> check_tensors({"mean": torch.zeros(2)}, {"mean": (3,)})
    Traceback (most recent call last):
    ...
    fedrebasin.errors.RebasinError: 'mean' as (2,) of torch.float32; (3,) of torch.float64 is expected
    """
    for name, shape in shapes.items():
        if name not in answer:
            raise RebasinError(f"no {name!r}")
        tensor = answer[name]
        dtype = torch.int64 if name.endswith("count") else torch.float64
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise RebasinError(f"{name!r} as {tuple(tensor.shape)} of {tensor.dtype}; {shape} of {dtype} is expected")
        if dtype == torch.int64 and not 0 <= int(tensor) < 2**53:
            raise RebasinError(f"{name!r} = {int(tensor)}; a count from 0 is expected")
        if dtype == torch.float64 and not bool((tensor.abs() < LARGEST).all()):
            raise RebasinError(f"{name!r} with a NaN, an infinity or a number of {LARGEST:g} and more")


def find_huge(sizes: Mapping[int, float]) -> dict[int, float]:
    """Answers of more than ``FACTOR`` times the size of the lower median of all, with that median.

    The median is the lower one so that of two answers the huge one is not its own yardstick; sizes below ``FLOOR``
    are no yardstick either: units may be dead on one node's data.

    Examples
    --------
    >>> find_huge({0: 1.0, 1: 2.0, 2: 5e6}), find_huge({0: 1e-9, 1: 2.0}), find_huge({0: 5e6})
    ({2: 2.0}, {}, {})
    """
    if len(sizes) < 2:
        return {}
    median = max(FLOOR, sorted(sizes.values())[(len(sizes) - 1) // 2])
    return {place: median for place, size in sizes.items() if size > FACTOR * median}


def rms_of(moments: Iterable[Moments]) -> float:
    """The largest root mean square of a channel that moments tell of.

    >>> from fedrebasin.corrections.moments import Moments
    >>> rms_of([Moments.of(2, torch.tensor([3.0]).double(), torch.tensor([32.0]).double())])
    5.0
    """
    return max(float((one.mean.square() + one.std.square()).max().sqrt()) for one in moments)
