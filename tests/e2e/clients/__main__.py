"""`python -m tests.e2e.clients [half | NAME ...]`, which is `make clients`.

Installs what is missing, tries the clients one after the other, prints the table, and keeps all of
it as JSON in ``.tools/clients/results.json``. When every client was tried, the page
``gateway/docs/clients.md`` is written anew. Ends with 1 where anything failed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.e2e.clients.install import install
from tests.e2e.clients.matrix import CLIENTS, TOOLS, chosen
from tests.e2e.clients.page import PAGE, page, table
from tests.e2e.clients.run import Outcome, run


def main(names: list[str]) -> int:
    clients = chosen(names)
    for name, seconds in install(clients).items():
        print(f"installed {name} in {seconds:.1f} s", flush=True)
    outcomes: list[Outcome] = []
    for client in clients:
        with tempfile.TemporaryDirectory(prefix="client-") as folder:
            outcome = run(client, Path(folder) / "run")
        outcomes.append(outcome)
        print(f"{'ok    ' if outcome.ok else 'FAILED'} {client.name} ({outcome.seconds:.1f} s)")
        for result in outcome.results:
            if not result.ok:
                print(f"       {result.feature}: {result.detail}", flush=True)
    print()
    print(table(outcomes))
    results = [outcome.as_json() for outcome in outcomes]
    (TOOLS / "results.json").write_text(json.dumps(results, indent=1))
    if len(clients) == len(CLIENTS):
        PAGE.write_text(page(outcomes))
    failed = sum(not outcome.ok for outcome in outcomes)
    print(f"\n{len(outcomes) - failed} passed, {failed} failed")
    return 1 if failed else 0


sys.exit(main(sys.argv[1:]))
