"""What the parts of an embedded toolstack have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xenolith.toolstack.client import Client
from xenolith.toolstack.embedded.building import Builder

if TYPE_CHECKING:
    from xenolith.hypervisor.control import Control
    from xenolith.toolstack.embedded.table import DomainTable


class Part(Client):
    """Answers some of a Client's verbs. Those of the other parts it calls as anybody does, by their names in Client."""

    def __init__(self, table: DomainTable) -> None:
        self.dom0 = table.dom0
        self._table = table
        self._builder = Builder(table)

    @property
    def _control(self) -> Control:
        """Raises Closed."""
        return self._table.control
