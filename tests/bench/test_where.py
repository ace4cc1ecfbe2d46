"""Samples of a profile by room: arithmetic on stacks that were made up."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from dataclasses import astuple
from pathlib import Path

from tests.bench.cases import CASES
from tests.bench.processes import kernel_seconds
from tests.bench.variants import STARTS, mount, site_folder
from tests.bench.where import (
    LOOP,
    SHOWN,
    FileCost,
    Look,
    digest_us,
    file_cost,
    rooms,
    table,
    text,
)

RAW = """\
serve (gateway/cli/serve.py:98);run (uvloop/loop.pyx:5);answer (gateway/relay/pipeline.py:7) 3
serve (gateway/cli/serve.py:98);run (uvloop/loop.pyx:5);handle (gateway/api/relayed.py:1);dumps (json/__init__.py:2) 5
serve (gateway/cli/serve.py:98);run (uvloop/loop.pyx:5) 1
thread (12): "ledger-writer";work (gateway/stores/sqlite_file.py:9);answer (gateway/relay/pipeline.py:9) 1
take (gateway/protocol.py:1) 2
"""  # noqa: E501


def test_a_sample_is_of_the_room_of_the_innermost_line_of_ours() -> None:
    assert rooms(RAW) == {"relay/pipeline": 4, "api/relayed": 5, LOOP: 1, "protocol": 2}


def test_small_rooms_are_told_together() -> None:
    found = rooms("a (gateway/relay/plan.py:1) 995\nb (gateway/relay/read.py:1) 5")
    assert table(found).splitlines()[2:] == ["| `relay/plan` | 99.5 % |", "| all others | 0.5 % |"]


def test_a_look_says_what_a_request_takes_beside_what_it_is_compared_with() -> None:
    case = next(case for case in CASES if case.name == "upload_20mb_c4")
    look = Look(case, "gateway", 40_000, 9_000, 12_000, "nginx", 12_000, Counter({LOOP: 1}))
    said = text([look], 10_282, FileCost(3_300, 600)).splitlines()
    assert (
        "| `upload_20mb_c4` | gateway | 40,000 | 9,000 | 12,000 | nginx, unbuffered | 12,000 |"
        in said
    )
    assert any("SHA-256 of 20 MB alone takes 10,282 us" in line for line in said)
    assert any("a file of 2.7 MB 3,300 us to write, or 600 where" in line for line in said)
    assert "### `upload_20mb_c4`: edit of a picture of 20 MB, 4 at once; gateway" in said
    assert f"| {LOOP} | 100.0 % |" in said


def test_every_case_that_is_looked_into_and_each_target_is_there() -> None:
    assert {case for case, *_ in SHOWN} <= {case.name for case in CASES}
    assert {name for _, *names in SHOWN for name in names} <= STARTS.keys()


def test_the_kernels_share_is_counted_and_a_digest_and_a_file_are_timed(tmp_path: Path) -> None:
    before, file = kernel_seconds(os.getpid()), tmp_path / "file"
    while kernel_seconds(os.getpid()) == before:
        file.write_bytes(bytes(1_000_000))
    assert digest_us(1) > 0
    assert min(astuple(file_cost(tmp_path, files=2))) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "new-0", "new-1"]


def test_a_runs_folder_is_spread_over_the_disk_where_that_can_be_and_gone_afterwards() -> None:
    with site_folder() as name:
        outer = Path(name).parent
        said = subprocess.run(["lsattr", "-d", outer], capture_output=True, text=True, check=False)
        if mount(outer) == "ext4" and said.returncode == 0:
            assert "T" in said.stdout.split()[0]
    assert not outer.exists()
