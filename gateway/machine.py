"""What this process uses of its machine, and what is left of its disks."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

STATM = Path("/proc/self/statm")
LOOK_SECONDS = 2.0


def memory_bytes() -> int:
    """Resident memory; where the system does not say, the most that it ever was."""
    try:
        return int(STATM.read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        # In bytes on macOS, in kilobytes elsewhere.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cpu_seconds() -> float:
    """Processor time of all threads since this process began, the system's on its behalf too."""
    spent = os.times()
    return spent.user + spent.system


class Disks:
    """What is free where ``folders`` are: name -> folder."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = dict(folders)
        self._look: asyncio.Future[dict[str, int]] | None = None

    async def free(self) -> Mapping[str, int]:
        """Bytes that this user may still write; without a folder that cannot be asked, and empty
        where a disk does not answer: a thread that hangs there is waited for, never doubled."""
        if self._look is None or self._look.done():
            self._look = asyncio.ensure_future(asyncio.to_thread(_free, self._folders))
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                return await asyncio.shield(self._look)
        except TimeoutError:
            return {}


def _free(folders: Mapping[str, Path]) -> dict[str, int]:
    found = {}
    for name, folder in folders.items():
        try:
            found[name] = shutil.disk_usage(folder).free
        except OSError:
            continue
    return found
