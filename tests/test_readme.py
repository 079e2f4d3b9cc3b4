"""The code of the README and of the guides runs, and their tables are those of the committed results."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flower_messages import MemoryGrid, answer, trained_copy
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fedrebasin import check_spec, permute, permute_optimizer, trace
from fedrebasin.simulations import readme
from fedrebasin.strategies import FedRebasin, perms_from_record
from fedrebasin.strategies.records import state_to_record

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
GUIDES = (ROOT / "strategies" / "README.md", ROOT / "fedrebasin" / "README.md")
RESULTS = sorted((ROOT / "simulations" / "results").glob("*.md"))
PAGES = {"readme": README, "flower": GUIDES[0], "pytorch": GUIDES[1], **{page.stem: page for page in RESULTS}}
BLOCKS = [
    block
    for page in (README, *GUIDES)
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
]


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_the_tables_are_those_of_the_committed_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert readme.render(text) == text


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_every_picture_page_and_section_that_a_page_names_is_there(page: Path) -> None:
    links = [
        link for link in re.findall(r"\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")) if "://" not in link
    ]
    assert links
    for link in links:
        name, _, section = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        if section:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert section in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], link


def test_the_plain_pytorch_examples_run(capsys: Any) -> None:
    names: dict[str, Any] = {}
    for block in (block for block in BLOCKS if "merge_modules(" in block):
        exec(compile(block, "README.md", "exec"), names)
        assert names["middle"].keys() == names["merged"].state_dict().keys()
    assert "perms" in capsys.readouterr().out


def test_the_example_of_different_heads_gives_two_networks_one_trunk() -> None:
    names: dict[str, Any] = {"torch": torch, "nn": nn, "trace": trace}
    exec(compile(next(block for block in BLOCKS if "merge_trunks" in block), "README.md", "exec"), names)
    assert torch.equal(names["one"]["0.weight"], names["other"]["0.weight"])
    assert [net(torch.zeros(1, 20)).shape[1] for net in names["merged"]] == [3, 7]


def test_the_example_of_different_widths_gives_each_network_its_own() -> None:
    names: dict[str, Any] = {"torch": torch, "nn": nn}
    exec(compile(next(block for block in BLOCKS if "merge_widths" in block), "README.md", "exec"), names)
    assert [names[name]["0.weight"].shape[0] for name in ("one", "other", "as_wide")] == [64, 32, 64]
    assert 64 <= names["grown"].units["0"] <= 96 and names["narrower"].units == {"0": 48}


def test_the_client_example_makes_an_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, inputs = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), (torch.zeros(2, 2),)
    check_spec(net, trace(net, inputs), inputs).save(tmp_path / "spec.json")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(next(block for block in BLOCKS if "rebasin_mod" in block), "README.md", "exec"), names)
    assert callable(names["train"])


def test_the_optimizer_example_relabels_what_a_client_keeps() -> None:
    net, inputs = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), (torch.zeros(2, 2),)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    bias = net[0].bias
    optimizer.state[bias]["momentum_buffer"] = torch.tensor([0.0, 1.0, 2.0])
    content = RecordDict({"rebasin-perms": state_to_record({"0": torch.tensor([2, 0, 1])})})
    names: dict[str, Any] = {"spec": trace(net, inputs), "message": SimpleNamespace(content=content), "net": net}
    names |= {"optimizer": optimizer, "perms_from_record": perms_from_record, "permute_optimizer": permute_optimizer}
    names["permute"], before = permute, bias.detach().clone()
    exec(compile(next(block for block in BLOCKS if "perms_from_record" in block), "README.md", "exec"), names)
    assert optimizer.state[bias]["momentum_buffer"].tolist() == [2.0, 0.0, 1.0]
    assert torch.equal(net[0].bias, before[[2, 0, 1]])


def test_the_example_of_the_label_prior_changes_the_last_bias_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 10)

    net = Net()
    names: dict[str, Any] = {"net": net, "torch": torch, "labels": torch.tensor([0] * 12 + [1] * 4)}
    exec(compile(next(block for block in BLOCKS if "remove_label_prior" in block), "README.md", "exec"), names)
    change = names["state"]["fc.bias"] - net.fc.bias
    assert torch.allclose(change[0] - change[1], -torch.tensor(3.0).log())
    assert torch.equal(names["state"]["fc.weight"], net.fc.weight)


def test_the_example_of_plain_dicts_finds_a_planted_order() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 1))
    order = torch.tensor([4, 2, 0, 1, 3])
    a = net.state_dict()
    b = {**a, "0.weight": a["0.weight"][order], "0.bias": a["0.bias"][order], "1.weight": a["1.weight"][:, order]}
    names: dict[str, Any] = {"weights_a": a, "weights_b": b}
    exec(compile(next(block for block in BLOCKS if "weight_match(" in block), "README.md", "exec"), names)
    assert all(torch.equal(names["weights_b"][key], tensor) for key, tensor in a.items())


def test_the_flower_example_makes_a_strategy() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv(x).relu().mean((2, 3)))

    block = next(block for block in BLOCKS if "strategy = FedRebasin" in block)
    code, _, start = block.partition("result = ")
    names: dict[str, Any] = {"Net": Net, "torch": torch, "ArrayRecord": ArrayRecord}
    exec(compile(code, "README.md", "exec"), names)
    assert start.startswith("strategy.start(grid=grid, initial_arrays=ArrayRecord(")
    assert list(names["strategy"].spec.perm_shapes) == ["conv"]


def test_the_example_of_a_federated_correction_registers_a_handler_and_makes_a_strategy() -> None:
    block = next(block for block in BLOCKS if "answer_queries" in block)
    names: dict[str, Any] = {
        "Net": lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)),
        "inputs": (torch.randn(2, 4),),
        "my_batches": lambda context: [torch.randn(8, 4)],
    }
    exec(compile(block, "README.md", "exec"), names)
    assert "query.rebasin" in names["app"]._registered_funcs
    assert names["strategy"].correction == "federated-least-squares"


@pytest.fixture
def guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the guide's examples use, after its swap of strategies; a new folder is the current one."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

    names: dict[str, Any] = {"FedAvg": FedAvg, "FedRebasin": FedRebasin, "Net": net, "torch": torch, "net": net()}
    exec(compile(next(block for block in BLOCKS if "strategy = FedAvg(" in block), "README.md", "exec"), names)
    names["images"], names["labels"] = torch.randn(8, 3, 32, 32), torch.arange(8) % 2
    names["initial_arrays"] = ArrayRecord(net().state_dict())
    names["grid"] = MemoryGrid({node: lambda m, seed=node: _train(m, seed) for node in range(1, 5)})
    return names


def test_the_guides_swap_and_its_tensorboard_example_run(guide: dict[str, Any]) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert isinstance(guide["strategy"], FedRebasin)
    exec(compile(next(block for block in BLOCKS if "SummaryWriter" in block), "README.md", "exec"), guide)
    found = events.EventAccumulator("runs/fedrebasin").Reload()
    assert [event.step for event in found.Scalars("test/accuracy")] == [0, 1, 2, 3]
    assert [event.step for event in found.Scalars("train/rebasin-moved-fraction")] == [1, 2, 3]


def test_the_guides_example_for_weights_and_biases_keeps_every_round(guide: dict[str, Any]) -> None:
    wandb = pytest.importorskip("wandb")
    exec(compile(next(block for block in BLOCKS if "wandb.init" in block), "README.md", "exec"), guide)
    wandb.teardown()  # its own process writes the records, after the run has ended for this one
    (kept,) = Path("wandb").glob("offline-run-*/*.wandb")  # what "wandb sync" would send: records, not compressed
    assert kept.read_bytes().count(b"rebasin-moved-fraction") >= 3


def _train(message: Message, seed: int) -> Message:
    """A node that adds noise, or evaluates nothing in particular."""
    if "train" not in message.metadata.message_type:
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "loss": 0.5})}), reply_to=message)
    return answer(message, trained_copy(message.content["arrays"].to_torch_state_dict(), seed))
