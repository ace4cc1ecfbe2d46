from __future__ import annotations

from gateway.domain.receipt import Receipt


class News:
    def tell(self, receipt: Receipt) -> None:
        """x"""
