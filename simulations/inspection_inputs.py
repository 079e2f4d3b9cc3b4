"""The example inputs that ``fedrebasin inspect`` and ``merge`` are given on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.errors import UsageError
from fedrebasin.signatures import positional_of

_NAMES = "float32 float64 float16 bfloat16 complex64 complex128 int64 int32 int16 int8 uint8 bool"
DTYPES = {name: getattr(torch, name) for name in _NAMES.split()}
_INPUT = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)=)?(?:(?P<before>[a-z]+\d*):)?(?P<shape>\d+(?:[xX]\d+)*)(?::(?P<after>[a-z]+\d*))?"
)


@dataclass(frozen=True)
class Input:
    """One ``--input``: a shape, a dtype, and the keyword that it is passed as ("" for a positional input)."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    keyword: str = ""


def parse_input(text: str) -> Input:
    """Read ``[KEYWORD=]SHAPE[:DTYPE]`` or ``[KEYWORD=]DTYPE:SHAPE``.

    Raises
    ------
    UsageError
        If ``text`` is neither, or names a dtype that is not known.

    Examples
    --------
    >>> parse_input("1x3x32x32").shape, parse_input("mask=int64:1x16").keyword, parse_input("1x16:int64").dtype
    ((1, 3, 32, 32), 'mask', torch.int64)
    """
    match = _INPUT.fullmatch(text)
    if match is None or (match["before"] and match["after"]):
        raise UsageError(f"--input: expected a shape such as 1x3x32x32, 1x16:int64 or tokens=1x16:int64; got {text!r}")
    dtype = match["before"] or match["after"] or "float32"
    if dtype not in DTYPES:
        raise UsageError(f"--input: expected a dtype among {', '.join(DTYPES)}; got {dtype!r} in {text!r}")
    shape = tuple(int(size) for size in match["shape"].lower().split("x"))
    if 0 in shape:
        raise UsageError(f"--input: expected sizes of 1 or more; got {text!r}")
    return Input(shape, DTYPES[dtype], match["name"] or "")


def parse_inputs(texts: Sequence[str]) -> tuple[Input, ...]:
    """Read all ``--input``; a keyword may occur once, and positional inputs come first.

    >>> [one.keyword for one in parse_inputs(["1x4", "mask=1x4"])]
    ['', 'mask']
    """
    inputs = tuple(parse_input(text) for text in texts)
    if not inputs:
        raise UsageError("--input: expected at least one, for example --input 1x3x32x32")
    keywords = [one.keyword for one in inputs]
    named = [keyword for keyword in keywords if keyword]
    if "" in keywords[len(keywords) - len(named) :]:
        raise UsageError("--input: expected inputs without a keyword first; got one after a keyword")
    if len(set(named)) < len(named):
        raise UsageError("--input: expected every keyword once")
    return inputs


def example_inputs(model: nn.Module, inputs: Sequence[Input], *, vocab: int | None = None, seed: int = 0) -> Any:
    """Draw what the model is called with: normal floats, random integers, all-true booleans.

    Parameters
    ----------
    model : nn.Module
        Tells the range of integers and the names of positional inputs where keywords stand beside them.
    inputs : sequence of Input
    vocab : int, optional
        Integers are drawn from ``[0, vocab)``; default: the rows of the model's smallest embedding, else 2.
    seed : int

    Returns
    -------
    tuple or dict
        Positional inputs, or keywords.

    Examples
    --------
    >>> [tuple(one.shape) for one in example_inputs(nn.Linear(4, 2), parse_inputs(["3x4"]))]
    [(3, 4)]
    """
    generator = torch.Generator().manual_seed(seed)
    tables = [one.num_embeddings for one in model.modules() if isinstance(one, nn.Embedding | nn.EmbeddingBag)]
    if vocab is not None and not any(_is_integer(one.dtype) for one in inputs):
        raise UsageError("--vocab: needs an --input of integers, as 1x16:int64; leave it out")
    bound = vocab or min(tables, default=2)
    tensors = [_draw(one, bound, generator) for one in inputs]
    positional = sum(not one.keyword for one in inputs)
    if positional == len(inputs):
        return tuple(tensors)
    keywords = [*_positional_names(model, positional), *(one.keyword for one in inputs[positional:])]
    if len(set(keywords)) < len(keywords):
        raise UsageError("--input: a keyword names an input that is also given without one")
    return dict(zip(keywords, tensors, strict=True))


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def _draw(one: Input, bound: int, generator: torch.Generator) -> Tensor:
    if one.dtype is torch.bool:
        return torch.ones(one.shape, dtype=torch.bool)
    if one.dtype.is_complex:
        return torch.randn(one.shape, generator=generator, dtype=one.dtype)
    if one.dtype.is_floating_point:
        return torch.randn(one.shape, generator=generator).to(one.dtype)
    return torch.randint(min(bound, torch.iinfo(one.dtype).max), one.shape, generator=generator, dtype=one.dtype)


def _positional_names(model: nn.Module, count: int) -> list[str]:
    names = [one.name for one in positional_of(model.forward)]
    if len(names) < count:
        raise UsageError(f"--input: {type(model).__name__}.forward takes {len(names)} positional inputs; got {count}")
    return names[:count]


def text_of(one: Input) -> str:
    """An input as a text for people.

    >>> text_of(parse_input("tokens=int64:1x16"))
    'tokens=1x16:int64'
    """
    shape = "x".join(str(size) for size in one.shape)
    kind = "" if one.dtype is torch.float32 else f":{str(one.dtype).removeprefix('torch.')}"
    return f"{one.keyword}={shape}{kind}" if one.keyword else f"{shape}{kind}"
