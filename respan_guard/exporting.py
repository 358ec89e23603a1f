"""The guard's methods on where records go and who is told of budgets."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from typing import TYPE_CHECKING, cast

from respan_guard.notifications import BudgetNotifier
from respan_guard.outbox import ExporterStatus, Outbox

if TYPE_CHECKING:
    from respan_guard.exporters.base import Exporter
    from respan_guard.guard import Guard
    from respan_guard.notifications import BudgetTarget

__all__ = ["Exporting"]


class Exporting:
    """The half of `Guard` that stands on the ledger's log.

    Attributes:
        outbox: What runs the exporters.
    """

    def __init__(self) -> None:
        self.outbox = Outbox(cast("Guard", self))

    def add_exporter(self, exporter: Exporter) -> None:
        """Have an exporter take all usage records, while the guard is open; see `respan_guard.exporters`.

        Raises:
            ConfigurationError: It is no exporter, or there is one of that name.
        """
        self.outbox.add(exporter)

    def on_budget(
        self, target: BudgetTarget, *, thresholds: Iterable[Decimal | int | float] = (80,), name: str = "budgets"
    ) -> None:
        """Tell `target` once a period when a customer has used so many percent of a budget, and when all of it.

        Args:
            target: A function, async or not, that takes a `BudgetEvent`, or a `BudgetWebhook`.
            thresholds: Shares in percent, above 0 and below 100; that it is used up is always told.
            name: Names its place in the log; each target has its own.

        Raises:
            ConfigurationError: A threshold or the name can't work, or the name is taken.
        """
        self.outbox.add(BudgetNotifier(cast("Guard", self), target, thresholds, name))

    async def exporters(self) -> list[ExporterStatus]:
        """Where each exporter stands, those of other processes of the store too."""
        return await self.outbox.statuses()
