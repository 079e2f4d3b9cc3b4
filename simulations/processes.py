"""The processes of one run: found whatever their parent or group, and ended without a trace."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """One line of the process table; ``born`` tells two processes apart that had the same pid."""

    pid: int
    parent: int
    group: int
    session: int
    born: str


class Family:
    """All processes that descend from ``root``, a child that leads a session of its own.

    Ray's daemons leave their parent, and a worker that renames itself loses its environment, so a process
    belongs if its parent, group or session does, or if its environment carries ``marker``. Look often: a
    child is known by its parent only while the parent lives.

    Parameters
    ----------
    root : int
        Pid of the session's leader.
    marker : str
        An environment entry ``NAME=value`` that only this family inherits.
    """

    def __init__(self, root: int, marker: str) -> None:
        self.root = root
        self.marker = marker.encode()
        self.known: dict[int, Process] = {}
        self.look()

    def look(self) -> list[int]:
        """Take in new members and return the pids of those alive."""
        table = _table()
        self.known = {pid: seen for pid, seen in self.known.items() if table.get(pid, _NOBODY).born == seen.born}
        grew = True
        while grew:
            grew = False
            for pid, process in table.items():
                if pid not in self.known and pid != os.getpid() and self._belongs(process):
                    self.known[pid] = process
                    grew = True
        return sorted(self.known)

    def _belongs(self, process: Process) -> bool:
        if self.root in (process.pid, process.group, process.session) or process.parent in self.known:
            return True
        try:
            return self.marker in (PROC / str(process.pid) / "environ").read_bytes().split(b"\0")
        except OSError:
            return False

    def end(self, *, patience: float, hurry: Callable[[], bool] = lambda: False) -> list[int]:
        """Ask the root to end, wait up to ``patience`` seconds for all of them, then kill what is left.

        Returns
        -------
        list of int
            The pids that outlived even that; empty unless the system is in trouble.
        """
        self._signal([self.root], signal.SIGTERM)
        if self._gone(patience, hurry):
            return []
        deadline = time.monotonic() + 15
        while (alive := self.look()) and time.monotonic() < deadline:
            self._signal(alive, signal.SIGKILL)  # again and again: a dying parent may have had one more child
            time.sleep(0.2)
        return alive

    def _gone(self, patience: float, hurry: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + patience
        while self.look():
            if time.monotonic() > deadline or hurry():
                return False
            time.sleep(0.2)
        return True

    def _signal(self, pids: list[int], number: signal.Signals) -> None:
        for pid in pids:
            if pid in self.known:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue


_NOBODY = Process(0, 0, 0, 0, "")


def _table() -> dict[int, Process]:
    """The process table without zombies, which have ended and only wait for their parent."""
    if PROC.joinpath("self", "stat").exists():
        found = [_from_proc(path) for path in PROC.iterdir() if path.name.isdigit()]
        return {process.pid: process for process in found if process is not None}
    listing = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,pgid=,sess=,stat=,lstart="], capture_output=True, text=True, check=True
    ).stdout
    table = {}
    for line in listing.splitlines():
        pid, parent, group, _, state, *born = line.split()
        if not state.startswith("Z"):
            table[int(pid)] = Process(int(pid), int(parent), int(group), 0, " ".join(born))
    return table


def _from_proc(path: Path) -> Process | None:
    try:
        # the command's name stands in brackets and may hold anything
        state, *numbers = (path / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    if state in "ZX":
        return None
    parent, group, session = (int(number) for number in numbers[:3])
    return Process(int(path.name), parent, group, session, numbers[18])
