"""rebasin_mod in Flower's legacy message flow, and under SecAgg+, where the server sees no model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flower_messages import State, small_net, trained_copy
from flwr.client.mod import LocalDpMod, fixedclipping_mod, secaggplus_mod
from legacy_clients import Arrays, SecureRound, app_of, fit_message, fit_once, listed
from test_strategies_exact import spec_of

from fedrebasin import merge, permute, random_perms
from fedrebasin.errors import UsageError
from fedrebasin.strategies import rebasin_mod

SENT: State = small_net().state_dict()
PLAIN: State = small_net(norm=False).state_dict()


def shuffled(state: State, seed: int, norm: bool = True) -> State:
    spec = spec_of(norm)
    return permute(spec, random_perms(spec, seed), state)


def same(found: Arrays, expected: Arrays) -> bool:
    return len(found) == len(expected) and all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_list_of_arrays_is_taken_as_the_state_dict_and_aligned_bit_for_bit() -> None:
    trained = trained_copy(SENT, 1)
    app = app_of(lambda received: listed(shuffled(trained, 1)), [rebasin_mod(spec=spec_of())])
    assert same(fit_once(app, listed(SENT)), listed(trained))


def test_a_list_without_the_statistics_is_taken_as_the_parameters() -> None:
    """The norm's statistics stay at home, so that its units are fixed and the next layer's are not."""
    names = spec_of().parameters
    part = spec_of().only(names)
    trained = {name: trained_copy(SENT, 1)[name] for name in names}
    moved = permute(part, random_perms(part, 1), trained)
    app = app_of(lambda received: listed(moved), [rebasin_mod(spec=spec_of())])
    assert same(fit_once(app, [SENT[name].numpy() for name in names]), listed(trained))


def test_a_list_in_another_order_needs_the_names() -> None:
    trained = trained_copy(PLAIN, 1)
    names = list(reversed(PLAIN))
    turned = listed({name: shuffled(trained, 1, norm=False)[name] for name in names})
    app = app_of(lambda received: turned, [rebasin_mod(spec=spec_of(False), names=names)])
    found = fit_once(app, [PLAIN[name].numpy() for name in names])
    assert same(found, [trained[name].numpy() for name in names])
    with pytest.raises(UsageError, match=r"the received model: expected '0\.weight"):
        fit_once(app_of(lambda received: turned, [rebasin_mod(spec=spec_of(False))]), turned)
    with pytest.raises(UsageError, match=r"expected 11 or 8, one for each .* got a list of 6 arrays .*give names="):
        fit_once(app_of(lambda received: turned, [rebasin_mod(spec=spec_of())]), turned)


@pytest.mark.parametrize("mod", [fixedclipping_mod, LocalDpMod(0.2, 0.0, 1.0, 0.1)], ids=["fixed", "local"])
def test_in_front_of_the_legacy_clipping_mods_a_permuted_model_is_clipped_as_the_unpermuted(mod: Any) -> None:
    trained = {**trained_copy(SENT, 1), "1.num_batches_tracked": torch.tensor(100)}
    mods = [mod, rebasin_mod(spec=spec_of())]
    expected = fit_once(app_of(lambda received: listed(trained), mods), listed(SENT), clipping_norm=0.2)
    found = fit_once(app_of(lambda received: listed(shuffled(trained, 1)), mods), listed(SENT), clipping_norm=0.2)
    assert same(found, expected)
    updates = [a - b for a, b in zip(found, listed(SENT), strict=True)]
    assert sum(float(np.square(update).sum()) for update in updates) ** 0.5 == pytest.approx(0.2, rel=1e-4)


def secure(trained: list[State], mods: list[object]) -> SecureRound:
    def fit_of(state: State) -> object:
        return lambda received: listed(state)

    return SecureRound({node: app_of(fit_of(state), mods, node) for node, state in enumerate(trained, 1)})  # type: ignore[arg-type]


def test_under_secure_aggregation_the_result_is_the_average_of_models_aligned_to_the_broadcast_one() -> None:
    """To the precision of its quantisation: 4,194,304 steps over (-8, 8), at a tenth of the largest weight."""
    trained = [trained_copy(PLAIN, seed) for seed in range(4)]
    mixed = [shuffled(state, seed, norm=False) for seed, state in enumerate(trained)]
    mod = rebasin_mod(spec=spec_of(False))
    found = secure(mixed, [secaggplus_mod, mod]).run(listed(PLAIN))
    expected = merge(trained, coefficients=[0.1, 0.2, 0.3, 0.4])
    assert max(np.abs(a - b.numpy()).max() for a, b in zip(found, expected.values(), strict=True)) < 1e-4
    without = secure(mixed, [secaggplus_mod]).run(listed(PLAIN))
    assert max(np.abs(a - b.numpy()).max() for a, b in zip(without, expected.values(), strict=True)) > 0.1


def test_under_secure_aggregation_no_model_reaches_the_server() -> None:
    trained = [shuffled(trained_copy(PLAIN, seed), seed, norm=False) for seed in range(3)]
    run = secure(trained, [secaggplus_mod, rebasin_mod(spec=spec_of(False))])
    run.run(listed(PLAIN))
    assert len(run.received) == 4 * 3  # four stages
    for message in run.received:
        assert all(not record for record in message.content.array_records.values())
    open_run = secure(trained, [rebasin_mod(spec=spec_of(False))])  # and without it every model does
    for node, app in open_run.grid.nodes.items():
        assert app(fit_message(listed(PLAIN), node)).content.array_records["fitres.parameters"]


def test_a_second_secure_round_aligns_to_the_float64_model_of_the_first() -> None:
    trained = [trained_copy(PLAIN, seed) for seed in range(3)]
    mod = rebasin_mod(spec=spec_of(False))
    first = secure(trained, [secaggplus_mod, mod]).run(listed(PLAIN))
    assert first[0].dtype == np.float64
    mixed = [shuffled(state, seed, norm=False) for seed, state in enumerate(trained)]
    second = secure(mixed, [secaggplus_mod, mod]).run(first)
    assert max(np.abs(a - b).max() for a, b in zip(first, second, strict=True)) < 1e-4


def test_a_client_that_the_mod_refuses_drops_out_and_the_secure_round_goes_on() -> None:
    trained = [trained_copy(PLAIN, seed) for seed in range(4)]
    trained[1] = {name: torch.full_like(tensor, torch.nan) for name, tensor in PLAIN.items()}
    run = secure(trained, [secaggplus_mod, rebasin_mod(spec=spec_of(False))])
    found = run.run(listed(PLAIN))
    expected = merge([trained[0], trained[2], trained[3]], coefficients=[1, 3, 4])
    assert max(np.abs(a - b.numpy()).max() for a, b in zip(found, expected.values(), strict=True)) < 1e-4
    assert [message.error.reason for message in run.received if message.has_error()] == [
        "rebasin_mod: the trained model does not fit the one that was received: "
        "arrays: '0.weight' holds a NaN or an infinity"
    ]
