"""Many models, each matched to the same reference."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedrebasin.allocator import return_freed_memory
from fedrebasin.errors import RebasinError
from fedrebasin.matching.certificate import IdentityCertificate
from fedrebasin.matching.plan import plan_of
from fedrebasin.matching.result import Matching, inner_product
from fedrebasin.matching.weight import weight_matching
from fedrebasin.perms import identity_perms
from fedrebasin.spec import PermutationSpec


def match_each(
    spec: PermutationSpec,
    reference: Mapping[str, Tensor],
    models: Sequence[Mapping[str, Tensor]],
    *,
    seed: int = 0,
    inits: Sequence[Mapping[str, Tensor] | None] | None = None,
    device: torch.device | str | None = None,
) -> list[Matching]:
    """Match every model to one reference by weights: what ``weight_matching`` finds for each, in less time.

    Models near the reference are certified to stay as they are in time linear in the parameters (``certificate.py``).

    Parameters
    ----------
    spec : PermutationSpec
    reference : dict of str to Tensor
    models : sequence of dict of str to Tensor
    seed, device
        As for :func:`weight_matching`.
    inits : sequence of perms or None, optional
        For each model the permutations to start from, as those of the last round.

    Returns
    -------
    list of Matching
        In the order of ``models``; ``seconds`` is each one's own time.

    Raises
    ------
    RebasinError
        If there are not as many ``inits`` as models.
    SpecMismatchError
        If a state dict or one of ``inits`` does not fit the spec, or a tied parameter holds a NaN or an infinity.

    Examples
    --------
    >>> from fedrebasin import trace
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> spec, state = trace(net, (torch.randn(2, 4),)), net.state_dict()
    >>> near = [{key: tensor * (1 + 1e-4 * k) for key, tensor in state.items()} for k in range(3)]
    >>> [matching.moved_fraction for matching in match_each(spec, state, near)]
    [0.0, 0.0, 0.0]
    """
    if inits is not None and len(inits) != len(models):
        raise RebasinError(f"inits: expected one for each of the {len(models)} models; got {len(inits)}")
    spec.check_state(reference, "reference")
    certificate = IdentityCertificate(spec, reference, device=device)
    size = sum(reference[name].nbytes for name in plan_of(spec).names)
    found: list[Matching] = []
    for index, model in enumerate(models):
        started = time.perf_counter()
        init = None if inits is None else inits[index]
        if init is None:
            spec.check_state(model, "model")
            if certificate.holds(model):
                objective = inner_product(spec, reference, model)
                seconds = time.perf_counter() - started
                found.append(Matching(identity_perms(spec), objective, objective, (objective,), seconds))
                continue
        found.append(weight_matching(spec, reference, model, seed=seed, init=init, device=device))
        return_freed_memory(size)
    return found
