"""Ending a family of processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedrebasin.simulations.processes import Family

STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleeper = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"]
child = subprocess.Popen(sleeper, start_new_session=True)      # leaves group and session
start = f"import subprocess; subprocess.Popen({sleeper!r}, start_new_session=True)"
subprocess.run([sys.executable, "-c", start])                   # its child has lost its parent as well
print("ready", flush=True)
time.sleep(600)
"""


def runs(pid: int) -> bool:
    """Whether there is such a process; one that only waits for its parent to notice its end is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="orphans are found in Linux's process table only")
def test_a_stubborn_family_is_ended_whole_even_where_it_left_group_and_parent() -> None:
    environment = {**os.environ, "FAMILY_OF_THE_TEST": str(os.getpid())}
    leader = subprocess.Popen(
        [sys.executable, "-c", STUBBORN], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        assert leader.stdout is not None
        assert leader.stdout.readline() == "ready\n"
        family = Family(leader.pid, f"FAMILY_OF_THE_TEST={os.getpid()}")
        deadline = time.monotonic() + 10
        while len(family.look()) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        members = family.look()
        assert len(members) == 3
        assert stranger.pid not in members
        assert family.end(patience=0.5) == []
        for pid in set(members) - {leader.pid}:
            assert not runs(pid)
        assert leader.wait(10) == -signal.SIGKILL
        assert stranger.poll() is None
    finally:
        for process in (leader, stranger):
            process.kill()
            process.wait()
