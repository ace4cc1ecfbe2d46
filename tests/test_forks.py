"""A forked command ends as the interpreter itself would end it."""

from __future__ import annotations

import subprocess
import sys

from tests.forks import ROOT
from tests.processes import ENVIRONMENT

PROGRAM = """
import atexit, sys, threading
from tests.forks import _end

ending = threading.Event()

def last():
    ending.wait()
    print("thread")

threading.Thread(target=last).start()
atexit.register(lambda: print("registered"))
threading.Timer(0.1, ending.set).start()
sys.stdout.write("main\\n")
_end(3)
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, once it has ended."""
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        check=False,
    )


def test_threads_are_waited_for_and_what_is_registered_is_done() -> None:
    done = run(PROGRAM)
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines() == ["main", "thread", "registered"]
    assert not done.stderr


def test_what_fails_at_the_end_is_said() -> None:
    done = run("from tests.forks import _end; import sys; sys.stdout.close(); _end(0)")
    assert done.returncode == 120
    assert "ValueError" in done.stderr
