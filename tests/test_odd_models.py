"""What users' models do that layers in a row do not: each is proved, or refused in one sentence that helps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch_version import sets_attributes

from fedrebasin import InvalidSpecError, TraceError, check_spec, merge_modules, trace
from fedrebasin.layout import Fixed
from fedrebasin.modules import deep_copy, held_tensors
from fedrebasin.proof import Proof


class Net(nn.Module):
    """Two layers with ``between`` applied to the hidden units."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.relu, after: Callable[[Tensor], Any] | None = None):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.between, self.after = between, after

    def forward(self, x: Tensor) -> Any:
        out = self.last(self.between(self.first(x)))
        return out if self.after is None else self.after(out)


X = (torch.zeros(3, 4),)


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...] = ()


torch.export.register_dataclass(Output, serialized_type_name="Output")


def test_a_dataclass_of_outputs_is_proved() -> None:
    net = Net(after=lambda out: Output(out, (out.exp(),)))
    assert check_spec(net, trace(net, X), X).perm_shapes == {"first": (6,)}


def test_units_that_random_numbers_are_added_to_stay_fixed_and_are_proved() -> None:
    net = Net(lambda h: h + torch.randn_like(h))
    spec = check_spec(net, trace(net, X), X)
    assert spec.axes["first.weight"][0] == Fixed(6, "random numbers")


def test_dropout_that_is_never_switched_off_is_proved() -> None:
    net = Net(lambda h: F.dropout(h, 0.5))
    assert check_spec(net, trace(net, X), X).perm_shapes == {"first": (6,)}


def test_a_network_that_answers_differently_each_time_is_refused() -> None:
    count = itertools.count(1)
    net = Net(lambda h: h * next(count))
    with pytest.raises(InvalidSpecError, match=r"equal outputs of two runs .* they differ by"):
        check_spec(net, trace(net, X), X)


def test_a_branch_of_torch_cond_is_fixed_by_name_and_proved() -> None:
    net = Net(lambda h: torch.cond(h.sum() > 0, torch.relu, torch.tanh, (h,)))
    spec = check_spec(net, trace(net, X), X)
    assert spec.notes == ("no rule for cond (first in the model): its axes stay fixed",)


def test_an_op_that_is_a_plain_function_is_named_without_its_address() -> None:
    net = Net(torch.vmap(torch.relu))
    assert [note for note in trace(net, X).notes if "_add_batch_dim (first" in note and " at 0x" not in note]


def test_a_data_parallel_model_is_traced_and_proved_under_its_names() -> None:
    net = nn.DataParallel(Net())
    assert check_spec(net, trace(net, X), X).perm_shapes == {"module.first": (6,)}


def test_a_compiled_model_is_proved_without_compiling() -> None:
    def never(graph: Any, inputs: Any) -> Any:
        raise AssertionError("compiled")

    net = torch.compile(Net(), backend=never)
    assert check_spec(net, trace(net, X), X).perm_shapes == {"_orig_mod.first": (6,)}


def test_a_proof_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        net = Net()
    spec = trace(net, (torch.zeros(3, 4, device="meta"),))
    with pytest.raises(InvalidSpecError, match=r"got the meta device, .*; build the model on the CPU for the proof"):
        check_spec(net, spec, X)


def test_a_tensor_without_entries_is_no_obstacle() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.AdaptiveLogSoftmaxWithLoss(8, 12, [4, 8]))
    net.forward = lambda x: net[2].log_prob(net[1](net[0](x)))  # type: ignore[assignment, operator, union-attr]
    assert net[2].tail[1][0].weight.shape == (0, 8)
    assert check_spec(net, trace(net, X), X).perm_shapes["0"] == (8,)


@sets_attributes
def test_what_a_first_call_keeps_in_the_model_is_put_back() -> None:
    class Keeps(Net):
        def __init__(self) -> None:
            super().__init__()
            self.cache: dict[str, Tensor] = {}
            self.seen: list[Tensor] = []
            self.ready = False

        def forward(self, x: Tensor) -> Tensor:
            if not self.ready:  # as transformers installs the hooks that collect hidden states
                self.first.register_forward_hook(lambda module, args, out: 2 * out)
                self.ready = True
            self.seen.append(x)
            return super().forward(x) * self.cache.setdefault("scale", torch.ones(2).to(x) + x.mean())

    net = Keeps()
    trace(net, X)
    assert (net.cache, net.seen, net.ready, len(net.first._forward_hooks)) == ({}, [], False, 0)


def test_a_model_that_holds_computed_tensors_is_traced_proved_and_merged() -> None:
    class Computed(Net):
        def __init__(self) -> None:
            super().__init__(torch.tanh)
            self.slopes = nn.Parameter(torch.ones(6))
            self.register_buffer("filters", 2 * self.slopes)
            self.kept = [{"squares": self.slopes**2}]

        def forward(self, x: Tensor) -> Any:
            return super().forward(x) + (self.filters + self.kept[0]["squares"]).sum() * self.slopes.sum()

    nets = [Computed(), Computed()]
    assert check_spec(nets[0], trace(nets[0], X), X).perm_shapes["first"] == (6,)
    merged = merge_modules(nets, X, calibration=[torch.randn(100, 4)])
    assert torch.equal(merged.filters, torch.full((6,), 2.0))


def test_a_copy_on_another_device_has_there_what_modules_hold_besides_parameters_and_ties_them_as_before() -> None:
    net = Net()
    net.scale, net.kept = torch.ones(4), [{"squares": net.first.weight**2}]
    net.again = net.first.weight
    copied = deep_copy(net, "meta")
    assert len(held_tensors(copied)) == len(held_tensors(net)) and all(one.is_meta for one in held_tensors(copied))
    assert copied.again is copied.first.weight and copied.again.requires_grad
    assert not any(one.is_meta for one in held_tensors(net))


def test_a_proof_with_inputs_that_the_model_does_not_take_is_refused_with_what_came() -> None:
    net = Net()
    with pytest.raises(InvalidSpecError, match=r"got RuntimeError: .*mat1 and mat2 .*check that model"):
        check_spec(net, trace(net, X), (torch.zeros(3, 5),))


def test_what_was_drawn_before_does_not_matter() -> None:
    net = Net(lambda h: h + torch.randn_like(h))
    spec = trace(net, X)
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        outputs += Proof(net, spec, X, seed=0).outputs
    assert torch.equal(*outputs)


def test_what_is_no_dense_tensor_is_refused_by_name_and_a_sparse_table_outside_the_state_dict_is_read() -> None:
    class Graph(nn.Module):
        def __init__(self, *, persistent: bool) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
            self.register_buffer("edges", torch.eye(3).to_sparse(), persistent=persistent)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.last(torch.sparse.mm(self.edges, self.first(x).relu()))
            return found

    class Counted(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"count": 1}

        def set_extra_state(self, state: Any) -> None:
            del state

    inputs = (torch.zeros(3, 4),)
    with pytest.raises(TraceError, match="expected dense tensors in its state dict; 'edges' is sparse"):
        trace(Graph(persistent=True), inputs)
    with pytest.raises(TraceError, match="'_extra_state' is a dict"):
        trace(Counted(4, 2), inputs)
    with pytest.raises(TraceError, match=r"'0.weight' is not initialised; run the model once before"):
        trace(nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2)), inputs)
    net = Graph(persistent=False)
    assert check_spec(net, trace(net, inputs, strict=True), inputs).perm_shapes == {"first": (8,)}


def test_a_cache_of_states_is_left_out_in_the_proof_as_in_the_trace() -> None:
    class Recurrent(Net):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(use_cache=True)

        def forward(self, x: Tensor) -> Any:
            hidden = self.first(x).relu()
            return (self.last(hidden), hidden) if self.config.use_cache else self.last(hidden)

    net = Recurrent()
    assert check_spec(net, trace(net, X), X).perm_shapes == {"first": (6,)} and net.config.use_cache


def test_a_state_dict_with_other_names_than_the_parameters_is_refused_with_both_names() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Any:
            return self.net(x)

        def state_dict(self, **options: Any) -> Any:
            return self.net.state_dict(**options)

    for model, name in ((Inside(), "net"), (checkpoint_wrapper(Net()), "_checkpoint_wrapped_module")):
        with pytest.raises(TraceError, match=rf"it has 'first.weight', and not '{name}.first.weight'; pass the model"):
            trace(model, X)


def test_ops_that_write_to_a_given_tensor_are_followed() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.last = nn.Linear(8, 6), nn.Linear(8, 5), nn.Linear(11, 2)
            self.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            joined = torch.zeros(2, 11, dtype=x.dtype)
            torch.cat([self.one(x), self.two(x)], -1, out=joined)
            found: Tensor = self.last(joined)
            return found

    net, inputs = Written(), (torch.zeros(2, 8),)
    spec = check_spec(net, trace(net, inputs, strict=True), inputs)
    assert sorted(spec.perm_shapes.values()) == [(5,), (6,)]
