"""`python -m tests.reference`, which is `make docs`: writes the pages of ``gateway/docs`` anew."""

from __future__ import annotations

from tests.reference.pages import DOCS, PAGES

for name, page in PAGES.items():
    (DOCS / name).write_text(page())
