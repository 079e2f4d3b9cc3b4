"""Whatever a user brings is traced, or refused with what to do."""

from __future__ import annotations

import warnings
from typing import Any

import networks
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch_version import sets_attributes

from fedrebasin import TraceError, UnsupportedOpError, check_spec, permute, random_perms, trace
from fedrebasin.layout import Fixed, leaves
from fedrebasin.rules import RULES


class AuxiliaryHead(nn.Module):
    """A second head that only training uses, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.aux = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = torch.relu(self.trunk(x))
        return (self.head(features), self.aux(features)) if self.training else self.head(features)


class Words(nn.Module):
    """Integers and keywords in, a nested dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(10, 6), nn.Linear(6, 8), nn.Linear(8, 10)

    def forward(self, *, ids: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        hidden = torch.tanh(self.mix(self.embed(ids)))
        if mask is not None:
            hidden = hidden * mask.unsqueeze(-1)
        return {"logits": self.out(hidden), "more": {"length": ids.shape[1]}}


def test_an_auxiliary_head_moves_with_the_trunk() -> None:
    net, inputs = AuxiliaryHead(), (torch.zeros(3, 4),)
    spec = trace(net, inputs)
    assert sorted(spec.perm_shapes.values()) == [(5,), (6,)] and spec.training
    assert check_spec(net, spec, inputs).checked
    assert not any(
        isinstance(leaf, Fixed) and "not used" in leaf.reason for leaf in leaves(spec.axes["aux.0.weight"][1])
    )


def test_an_auxiliary_head_that_cannot_be_traced_is_fixed_and_said() -> None:
    net = AuxiliaryHead()
    spec = trace(net, (torch.zeros(1, 4),))  # BatchNorm1d refuses a batch of one in training mode
    assert list(spec.perm_shapes) == ["trunk"] and not spec.training
    assert (
        len(spec.notes) == 1
        and "cannot be exported in training mode (ValueError: Expected more than 1" in spec.notes[0]
    )


def test_googlenet_counts_its_auxiliary_heads() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torchvision.models.googlenet(weights=None, init_weights=False)
    heads = sum(torch.lgamma(torch.tensor(size + 1.0, dtype=torch.float64)) for size in (128, 1024, 128, 1024))
    assert trace(net, (torch.zeros(2, 3, 64, 64),)).log10_order == pytest.approx(13018 + float(heads) / 2.302585, abs=1)


@pytest.mark.parametrize(
    ("name", "order"), [("mobilenet_v2", 21116), ("vit_b_16", 140226), ("swin_t", 62662), ("convnext_tiny", 77560)]
)
def test_freedom_is_not_lost_on_the_meta_device(name: str, order: int) -> None:
    size = 224 if name == "vit_b_16" else 64
    with torch.device("meta"):
        net = getattr(torchvision.models, name)(weights=None)
    spec = trace(net, (torch.zeros(2, 3, size, size, device="meta"),))
    assert round(spec.log10_order) == order and spec.notes == ()


@pytest.mark.parametrize("with_mask", [True, False])
def test_integers_keywords_and_dicts_of_outputs(with_mask: bool) -> None:
    inputs: dict[str, Tensor] = {"ids": torch.randint(10, (2, 5))}
    if with_mask:
        inputs["mask"] = torch.ones(2, 5)
    net = Words()
    spec = check_spec(net, trace(net, inputs), inputs)
    assert sorted(spec.perm_shapes.values()) == [(6,), (8,)]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_size_of_the_batch_does_not_matter(batch: int) -> None:
    for name in ("conv", "grouped", "dense-block"):
        net, _ = networks.NETWORKS[name]()
        assert trace(net, (torch.zeros(batch, 3, 16, 16),)).axes == trace(net, (torch.zeros(3, 3, 16, 16),)).axes


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda net: net.to(torch.bfloat16)])
def test_wrapped_and_narrow_models_are_traced(wrap: Any) -> None:
    net = wrap(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    dtype = next(net.parameters()).dtype
    spec = trace(net, (torch.zeros(2, 4, dtype=dtype),))
    assert list(spec.perm_shapes.values()) == [(6,)] and set(spec.axes) == set(net.state_dict())
    moved = permute(spec, random_perms(spec, 1), net.state_dict())
    assert all(tensor.dtype == dtype for tensor in moved.values())


@pytest.mark.parametrize(
    ("net", "inputs"),
    [
        (torch.jit.script(nn.Sequential(nn.Linear(4, 2))), (torch.zeros(2, 4),)),
        (nn.Linear(4, 2), (torch.zeros(2, 5),)),
        (nn.Linear(4, 2), (torch.zeros(2, 4), torch.zeros(2, 4))),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(net: nn.Module, inputs: Any) -> None:
    with pytest.raises(TraceError, match=r"model: torch.export cannot export .* hand over a spec") as caught:
        trace(net, inputs)
    assert "\n" not in str(caught.value)


def test_an_op_without_a_rule_is_walked_as_its_decomposition() -> None:
    class Distances(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.centres = nn.Linear(3, 5), nn.Parameter(torch.rand(4, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.mse_loss(self.one(x), self.centres[:2], reduction="none").sum(-1)

    assert "mse_loss" not in RULES
    net, inputs = Distances(), (torch.zeros(2, 3),)
    spec = check_spec(net, trace(net, inputs, strict=True), inputs)
    assert list(spec.perm_shapes.values()) == [(5,)]  # the units; two centres that nothing uses stay


def test_an_op_whose_decomposition_counts_along_an_axis_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Triangle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.triu()

    monkeypatch.delitem(RULES, "triu")
    net = nn.Sequential(nn.Linear(3, 5), Triangle(), nn.Linear(5, 2))
    spec = trace(net, (torch.zeros(2, 3),))
    assert spec.notes == ("no rule for triu (first in 1): its axes stay fixed",) and not spec.perm_shapes
    with pytest.raises(UnsupportedOpError, match="triu in 1: no rule covers it"):
        trace(net, (torch.zeros(2, 3),), strict=True)


def _huggingface(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    more = {"num_key_value_heads": 2, "use_cache": False} if name == "Llama" else {}
    config = getattr(transformers, f"{name}Config")(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=24,
        vocab_size=30,
        max_position_embeddings=16,
        pad_token_id=0,
        **more,
    )
    head = {"Bert": "BertForSequenceClassification", "Llama": "LlamaForCausalLM"}[name]
    return getattr(transformers, head)(config), {"input_ids": torch.randint(1, 30, (2, 5))}


@pytest.mark.parametrize(
    ("name", "shapes"),
    [("Bert", [(4,), (4, 4), (4, 4), (16,), (16,), (24,)]), ("Llama", [(2,), (2, 2), (2, 4), (16,), (24,)])],
)
def test_models_of_the_transformers_package(name: str, shapes: list[tuple[int, ...]]) -> None:
    net, inputs = _huggingface(name)
    spec = check_spec(net, trace(net, inputs, strict=True), inputs)
    assert sorted(spec.perm_shapes.values()) == sorted(shapes)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "efficientvit_b0", "resnest14d"])
def test_models_of_the_timm_package(name: str) -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model(name, pretrained=False, num_classes=5)
    inputs = (torch.zeros(2, 3, *((224, 224) if "224" in name else (64, 64))),)
    assert check_spec(net, trace(net, inputs, strict=True), inputs).checked


class Frozen(dict[str, int]):
    """A configuration that refuses to be changed, as those of diffusers."""

    def clear(self) -> None:
        raise AttributeError("frozen")

    def update(self, *_: Any, **__: Any) -> None:
        raise AttributeError("frozen")


@sets_attributes
def test_what_a_forward_pass_leaves_in_attributes_is_put_back_and_a_frozen_one_is_left_alone() -> None:
    class Noted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 2)
            self.config, self.seen, self.last = Frozen(width=6), {"first": 1}, [0]

        def forward(self, x: Tensor) -> Tensor:
            h = self.one(x).relu()
            self.seen["second"] = self.config["width"]
            self.last[0] = h.shape[0]
            out: Tensor = self.two(h)
            return out

    net = Noted()
    assert trace(net, (torch.zeros(3, 4),)).perm_shapes == {"one": (6,)}
    assert net.config == {"width": 6} and net.seen == {"first": 1} and net.last == [0]


def test_empty_parts_and_parts_that_are_all_empty_are_concatenated() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.one(x)
            nothing = torch.cat([h[0, :0], h[1, :0]])
            out: Tensor = self.two(torch.cat([torch.cat([nothing, h.flatten()[:0]]), h.flatten()]).view(h.shape))
            return out

    inputs = (torch.zeros(3, 4),)
    net = Parts()
    assert check_spec(net, trace(net, inputs), inputs).checked
