"""The table of the fault matrix is true: it has every row, and all that it names is there."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.e2e.test_fault_matrix import FAULTS
from tests.rows import CASES, ROWS

TESTS = Path(__file__).parent


@cache
def names_in(file: str) -> frozenset[str]:
    """The names of a file's tests."""
    tree = ast.parse((TESTS / file).read_text())
    found = (ast.AsyncFunctionDef, ast.FunctionDef)
    return frozenset(one.name for one in tree.body if isinstance(one, found))


def test_every_row_has_its_proof() -> None:
    assert set(ROWS) == {*range(31, 63), *range(75, 81), 92}
    assert all(ROWS.values())


@pytest.mark.parametrize("row", ROWS)
def test_every_test_that_is_named_is_there(row: int) -> None:
    for name in ROWS[row]:
        file, _, test = name.partition("::")
        assert (TESTS / file).is_file(), f"row {row}: no {file}"
        assert names_in(file), f"row {row}: no test in {file}"
        assert not test or test in names_in(file), f"row {row}: no {name}"
    assert len(set(ROWS[row])) == len(ROWS[row])


def test_every_case_of_the_table_of_faults_is_of_a_row_that_names_it() -> None:
    counted = Counter(fault.row for fault in FAULTS)
    assert counted.keys() == CASES
    assert counted[41] == 8, "eight places of a body"
    named = "e2e/test_fault_matrix.py::"
    assert {row for row, tests in ROWS.items() if any(one.startswith(named) for one in tests)} == (
        CASES
    )
