"""Runs a Flower App in Flower's simulation runtime, on a SuperLink of its own, and leaves nothing behind."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedrebasin.simulations.events import Event, Follower
from fedrebasin.simulations.interrupts import on_signals, signals_raise
from fedrebasin.simulations.processes import Family
from fedrebasin.simulations.site import Site, environment_of, find_tool, folder_for_ray

#: seconds between two looks at the progress file and the process table, and between two questions to the SuperLink
LOOK, ASK = 0.5, 15.0
#: seconds that the run's processes get to end by themselves
PATIENCE = 10.0


class RunError(RuntimeError):
    """The run did not end well; the message says why and where its log is."""


def run_app(
    app: Path,
    site: Site,
    *,
    run_config: Mapping[str, str | int | float],
    nodes: int,
    federation: Mapping[str, int | float],
    on_event: Callable[[Event], None],
) -> None:
    """Run ``app`` to its end.

    Parameters
    ----------
    app : Path
        The app's folder.
    site : Site
        An empty folder for this run. Afterwards it still holds the log.
    run_config : mapping
        Overrides of the app's config.
    federation : mapping
        Overrides of the federation's config besides ``num-supernodes``.
    on_event : callable
        Called with each event of the progress file, as it comes.

    Raises
    ------
    RunError
        If the SuperLink does not start, refuses the run or ends, if any round lacks a reply or has a failure, if
        the app never says ``done`` or if the run's status is not ``finished:completed``.
    Interrupted
        If a signal asked to stop. In every case no process of the run is left.
    """
    for name in ("home", "cwd"):
        (site.folder / name).mkdir()
    with signals_raise(), folder_for_ray(site) as ray_folder, _superlink(site, ray_folder) as link:
        run_id = _submit(link, app, run_config, {"num-supernodes": nodes, **federation})
        _follow(link, run_id, on_event)


@dataclass
class _Link:
    site: Site
    process: subprocess.Popen[bytes]
    family: Family
    environment: dict[str, str]

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """Ask Flower's command line for JSON."""
        call = [find_tool("flwr"), *arguments, "--format", "json"]
        cwd = self.site.folder / "cwd"
        done = subprocess.run(
            call, cwd=cwd, env=self.environment, capture_output=True, text=True, check=False, start_new_session=True
        )
        # warnings may stand before the JSON object
        start = done.stdout.find("{")
        try:
            answer: dict[str, Any] = json.loads(done.stdout[start:])
        except ValueError:
            raise self.error(f"flwr {arguments[0]} said: {(done.stderr or done.stdout).strip()[-300:]}") from None
        if not answer.get("success", False):
            raise self.error(f"flwr {arguments[0]} failed: {answer.get('error-message', answer)}")
        return answer

    def error(self, reason: str) -> RunError:
        return RunError(f"{reason}; the log is {self.site.log}")


@contextmanager
def _superlink(site: Site, ray_folder: str) -> Iterator[_Link]:
    port = _free_port()
    environment = {**environment_of(site), "RAY_TMPDIR": ray_folder}
    (site.home / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    call = [find_tool("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess"]
    call += ["--host", "127.0.0.1", "--port", str(port), "--database", str(site.folder / "state.db")]
    with site.log.open("wb") as log:
        process = subprocess.Popen(
            call,
            cwd=site.folder / "cwd",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in a terminal then reaches this process alone, which ends the others
        )
    family = Family(process.pid, f"FLWR_HOME={site.home}")
    link = _Link(site, process, family, environment)
    try:
        _await_health(link, port)
        yield link
    finally:
        _end(link)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_health(link: _Link, port: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if link.process.poll() is not None:
            raise link.error(f"the SuperLink ended with status {link.process.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise link.error("the SuperLink did not answer within 120 s")


def _submit(
    link: _Link, app: Path, run_config: Mapping[str, str | int | float], federation: Mapping[str, int | float]
) -> str:
    overrides = link.site.folder / "run-config.toml"
    overrides.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in run_config.items()))
    resources = " ".join(f"{key}={value}" for key, value in federation.items())
    answer = link.flwr("run", str(app), "own", "--run-config", str(overrides), "--federation-config", resources)
    return str(answer["run-id"])


def _follow(link: _Link, run_id: str, on_event: Callable[[Event], None]) -> None:
    follower = Follower(link.site.progress)
    done = False
    asked = time.monotonic()
    status = ""
    while True:
        link.family.look()
        for event in follower.new():
            if event["event"] == "round" and event["round"] > 0:
                _check_round(link, event)
            done = done or event["event"] == "done"
            on_event(event)
        # judged after the events, which may have come while the SuperLink was being asked
        if status.startswith("finished"):
            break
        if link.process.poll() is not None:
            raise link.error(f"the SuperLink ended in mid-run with status {link.process.returncode}")
        if done or time.monotonic() - asked > ASK:
            status = _status(link, run_id)
            asked = time.monotonic()
        else:
            time.sleep(LOOK)
    if status != "finished:completed":
        raise link.error(f"the run's status is {status}")
    if not done:
        raise link.error("the run is finished, but the app did not come to its end")


def _check_round(link: _Link, event: Event) -> None:
    where = f"round {event['round']} of {event['strategy']}, seed {event['seed']}"
    if event["failures"]:
        raise link.error(f"{where}: a client failed: {event['failures'][0].strip().splitlines()[-1]}")
    if event["replies"] != event["expected"]:
        raise link.error(f"{where}: {event['replies']} replies came where {event['expected']} were expected")


def _status(link: _Link, run_id: str) -> str:
    runs = link.flwr("list", "--run-id", run_id)["runs"]
    return str(runs[0]["status"])


def _end(link: _Link) -> None:
    """End all processes; a second signal meanwhile means at once."""
    hurried: list[int] = []
    with on_signals(lambda number, frame: hurried.append(number)):
        reaper = threading.Thread(target=link.process.wait, daemon=True)
        reaper.start()
        left = link.family.end(patience=PATIENCE, hurry=lambda: bool(hurried))
    if left:
        raise link.error(f"these processes of the run could not be ended: {left}")
