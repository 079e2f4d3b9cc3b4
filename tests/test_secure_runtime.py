"""SecAgg+ in Flower's real simulation runtime: clients in processes of their own, aligned to a trained model."""

from __future__ import annotations

import pytest
from flwr.client.mod import secaggplus_mod

from fedrebasin import align, merge
from fedrebasin.simulations.secure import Settings, broadcast, checked_spec, secure_rounds, trained
from fedrebasin.strategies import rebasin_mod

SETTINGS = Settings(width=32, epochs=3)


@pytest.mark.slow
def test_a_secure_round_gives_the_average_of_models_aligned_to_the_trained_one_that_was_broadcast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    spec = checked_spec(SETTINGS)
    (found,), seen = secure_rounds(SETTINGS, [(0, "trained")], [secaggplus_mod, rebasin_mod(spec=spec)])
    ends = [trained(SETTINGS, 0, node) for node in range(SETTINGS.nodes)]
    coefficients = [examples for _, examples in ends]
    sent = broadcast(SETTINGS, 0, "trained")
    expected = merge([align(spec, sent, state) for state, _ in ends], coefficients=coefficients)
    plain = merge([state for state, _ in ends], coefficients=coefficients)
    assert seen == 0
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-4
    assert max(float((found[name] - plain[name]).abs().max()) for name in plain) > 1e-2
