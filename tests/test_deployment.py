"""The guide's deployment as it stands: real processes, TLS, keys; slow, run by ``pytest -m slow``."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from flower_messages import MemoryGrid
from flwr.app import Context, Message, RecordDict
from flwr.serverapp.strategy import Result
from safetensors.numpy import load_file

from fedrebasin.simulations.processes import Family

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "strategies" / "README.md"
APP = ROOT / "simulations" / "deployment"
SILOS, ROUNDS = 3, 2
missing = [tool for tool in ("bash", "curl", "openssl", "ssh-keygen") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"not installed: {missing}"),
    pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in Linux's process table"),
]


@dataclass
class Deployment:
    """What the guide's commands left running."""

    folder: Path
    port: int
    environment: dict[str, str]
    family: Family

    def pids(self, *words: str) -> set[int]:
        """The processes of the deployment whose command line holds all of these words."""
        found = set()
        for pid in self.family.look():
            try:
                line = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            if all(word in line for word in words):
                found.add(pid)
        return found

    def run(self, config: str, log: str) -> subprocess.Popen[bytes]:
        """Start the app once more, its output in the file ``log``."""
        call = ["flwr", "run", ".", "silos", "--stream", "--run-config", config]
        with (self.folder / log).open("wb") as file:
            return subprocess.Popen(call, cwd=self.folder, env=self.environment, stdout=file, stderr=file)

    def refusal(self, *options: str) -> str:
        """What one more SuperNode says before it ends, for it is not to be let in."""
        call = ["flower-supernode", "--superlink", f"127.0.0.1:{self.port}", "--port", str(free_ports(1))]
        call += ["--max-retries", "1", "--max-wait-time", "5", "--node-config", "partition-id=3", *options]
        said = self.folder / "refused"
        with said.open("wb") as file:  # a pipe would stay open as long as the SuperNode's children
            done = subprocess.run(
                call, cwd=self.folder, env=self.environment, stdout=file, stderr=file, timeout=120, check=False
            )
        assert done.returncode != 0
        return said.read_text(errors="replace")


def free_ports(count: int) -> int:
    """The first of ``count`` neighbouring ports that nobody listens on."""
    for port in range(20000 + os.getpid() % 20000, 60000, count):
        probes = [socket.socket() for _ in range(count)]
        try:
            for place, probe in enumerate(probes):
                probe.bind(("127.0.0.1", port + place))
            return port
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
    raise AssertionError("no free ports")


def commands() -> str:
    """The guide's block that begins in the app's folder."""
    found = re.search(r"```sh\ncd simulations/deployment\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("deployment") / "app"
    shutil.copytree(APP, folder)
    port = free_ports(1 + SILOS)
    script, replaced = re.subn(r"PORT=\d+", f"PORT={port}", commands())
    assert replaced == 1
    tools = str(Path(sys.executable).parent)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": paths}
    environment |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-ec", script], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    family = Family(process.pid, f"FLWR_HOME={folder / 'keys'}")
    try:
        status = process.wait(timeout=400)
        assert status == 0, (folder / "log").read_text(errors="replace")[-3000:]
        yield Deployment(folder, port, {**environment, "FLWR_HOME": str(folder / "keys")}, family)
    finally:
        family.look()
        left = family.end(patience=0)
    assert left == []


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def to_bytes(path: Path) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(path).items()}


def in_process(monkeypatch: pytest.MonkeyPatch, partitions: int, rounds: int) -> Result:
    """The same silos' replies, aggregated by the app's strategy in this process."""
    monkeypatch.syspath_prepend(str(APP))
    from rebasin_deployment.client_app import train_silo
    from rebasin_deployment.server_app import first_model, make_strategy

    def node(partition: int) -> Callable[[Message], Message]:
        config = {"partition-id": partition, "num-partitions": SILOS}
        context = Context(run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config={})
        return lambda message: train_silo(message, context)

    grid = MemoryGrid({9 - partition: node(partition) for partition in range(partitions)})  # arriving in another order
    return make_strategy(partitions).start(grid=grid, initial_arrays=first_model(), num_rounds=rounds)


def test_the_deployed_model_is_that_of_the_same_replies_in_one_process(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = in_process(monkeypatch, SILOS, ROUNDS)
    moved = expected.train_metrics_clientapp[1]["rebasin-moved-fraction"]
    assert isinstance(moved, float) and moved > 0.3
    assert to_bytes(deployment.folder / "model.safetensors") == {
        name: array.numpy().tobytes() for name, array in expected.arrays.items()
    }


def test_a_key_that_is_not_registered_is_refused(deployment: Deployment) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", "stranger"], cwd=deployment.folder, check=True
    )
    said = deployment.refusal("--root-certificates", "keys/ca.crt", "--auth-supernode-private-key", "stranger")
    assert "Failed to activate SuperNode" in said


def test_plaintext_is_refused(deployment: Deployment) -> None:
    said = deployment.refusal("--insecure", "--auth-supernode-private-key", "keys/node0")
    assert "Exit Code: " in said and "lifespan: shutdown" in said


def test_another_authority_is_not_trusted(deployment: Deployment) -> None:
    subprocess.run(["sh", str(APP / "make_keys.sh"), "other", "0", "1"], cwd=deployment.folder, check=True)
    said = deployment.refusal("--root-certificates", "other/ca.crt", "--auth-supernode-private-key", "keys/node0")
    assert "CERTIFICATE_VERIFY_FAILED" in said


def test_a_server_that_is_killed_between_rounds_goes_on_to_the_same_bits(deployment: Deployment) -> None:
    kept, output = deployment.folder / "kept", deployment.folder / "resumed.safetensors"
    config = f"checkpoints='{kept}' output='{output}'"
    killed = deployment.run(config, "killed")
    wait_for((kept / "round-000001").exists)
    for pid in deployment.pids("flwr-serverapp"):
        os.kill(pid, signal.SIGKILL)
    killed.kill()  # it only shows the log
    killed.wait()
    assert not (kept / "round-000002").exists() and not output.exists()
    assert deployment.run(config, "resumed").wait(timeout=240) == 0
    assert "round 1 of" in (deployment.folder / "resumed").read_text(errors="replace")
    assert to_bytes(output) == to_bytes(deployment.folder / "model.safetensors")


def test_a_node_that_is_killed_in_a_round_is_named_and_the_round_goes_on(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test: its SuperNode does not come back."""
    output, before = deployment.folder / "two.safetensors", deployment.pids("flwr-clientapp")
    running = deployment.run(f"rounds=1 output='{output}'", "dying")
    wait_for(lambda: deployment.pids("flwr-clientapp") - before)  # it takes seconds until one has trained
    for pid in deployment.pids("flower-supernode", "keys/node2"):
        os.kill(pid, signal.SIGKILL)
    assert running.wait(timeout=240) == 0
    call = ["flwr", "supernode", "list", "silos", "--format", "json"]
    done = subprocess.run(call, cwd=deployment.folder, env=deployment.environment, capture_output=True, check=True)
    dead = [node["node-id"] for node in json.loads(done.stdout)["nodes"] if node["status"] == "offline"]
    log = (deployment.folder / "dying").read_text(errors="replace")
    assert [f"the failure in round 1 is node {node}'s" in log for node in dead] == [True], (dead, log[-2000:])
    expected = in_process(monkeypatch, SILOS - 1, 1)
    assert to_bytes(output) == {name: array.numpy().tobytes() for name, array in expected.arrays.items()}
