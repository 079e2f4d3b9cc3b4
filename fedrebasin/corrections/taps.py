"""Sees what goes into the sites of a network, and what comes out, while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedrebasin.corrections.calls import arguments_of, attention_inside, key_of, names_of_tensors
from fedrebasin.corrections.sites import Site

#: called with a site, its input and its output
See = Callable[[Site, Tensor, Tensor], None]


@contextmanager
def tap(model: nn.Module, sites: Sequence[Site], see: See, *, by_batch: bool = False) -> Iterator[None]:
    """Inside a ``with``, call ``see`` whenever ``model`` runs through a site.

    Parameters
    ----------
    by_batch : bool
        BatchNorms normalise by the batch; their running statistics stay as they are.

    Examples
    --------
    >>> import torch
    >>> net, seen = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), []
    >>> site = Site("0", 1, 3, "0.weight", "0.bias")
    >>> with tap(net, [site], lambda site, into, output: seen.append((site.name, output.shape))):
    ...     _ = net(torch.zeros(4, 2))
    >>> seen
    [('0', torch.Size([4, 3]))]
    """

    def hook(site: Site) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: see(site, args[0], output)

    ids = {name: key for key, name in names_of_tensors(model).items()}
    with ExitStack() as stack:
        for site in sites:
            if site.by_module:
                stack.callback(model.get_submodule(site.name).register_forward_hook(hook(site)).remove)
        with _Tap({ids[site.key]: site for site in sites if not site.by_module}, see, by_batch):
            yield


class _Tap(TorchFunctionMode):
    def __init__(self, sites: dict[int, Site], see: See, by_batch: bool) -> None:
        super().__init__()
        self._sites, self._see, self._by_batch = sites, see, by_batch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and show it if it is a site's."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return attention_inside(*args, **kwargs)
        given = arguments_of(func, args, kwargs)
        if given is None:
            return func(*args, **kwargs)
        if self._by_batch and func is F.batch_norm:
            args, kwargs = (), {**given, "running_mean": None, "running_var": None, "training": True}
        result = func(*args, **kwargs)
        site = self._sites.get(id(key_of(func, given)))
        if site is not None:
            self._see(site, given["input"], result)
        return result
