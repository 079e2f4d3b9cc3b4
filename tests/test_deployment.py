"""The README's deployment as it stands: real processes, TLS, keys; slow, run by ``pytest -m slow``."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from flower_messages import MemoryGrid
from flwr.app import Context, Message, RecordDict
from safetensors.numpy import load_file

from fedrebasin.simulations.processes import Family

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "simulations" / "deployment"
SILOS, ROUNDS = 3, 2
missing = [tool for tool in ("bash", "curl", "openssl", "ssh-keygen") if shutil.which(tool) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing), reason=f"not installed: {missing}")]


@dataclass
class Deployment:
    """What the README's commands left running."""

    folder: Path
    port: int
    environment: dict[str, str]

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
    """The README's block that begins in the app's folder."""
    found = re.search(r"```sh\ncd simulations/deployment\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
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
        yield Deployment(folder, port, {**environment, "FLWR_HOME": str(folder / "keys")})
    finally:
        family.look()
        left = family.end(patience=0)
    assert left == []


def test_the_deployed_model_is_that_of_the_same_replies_in_one_process(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(APP))
    from rebasin_deployment.client_app import train_silo
    from rebasin_deployment.server_app import first_model, make_strategy

    def node(partition: int) -> Callable[[Message], Message]:
        config = {"partition-id": partition, "num-partitions": SILOS}
        context = Context(run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config={})
        return lambda message: train_silo(message, context)

    grid = MemoryGrid({9 - partition: node(partition) for partition in range(SILOS)})  # arriving in another order
    expected = make_strategy(SILOS).start(grid=grid, initial_arrays=first_model(), num_rounds=ROUNDS)
    moved = expected.train_metrics_clientapp[1]["rebasin-moved-fraction"]
    assert isinstance(moved, float) and moved > 0.3
    found = load_file(deployment.folder / "model.safetensors")
    assert {name: value.tobytes() for name, value in found.items()} == {
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
