"""Export: schedule files with their weights, and schedules with fixed counts in place of thresholds."""

from typing import TYPE_CHECKING

from prunesearch.registry import lazily

if TYPE_CHECKING:
    from prunesearch.export.schedules import export as export
    from prunesearch.export.schedules import measure_again as measure_again

__getattr__ = lazily(
    __name__,
    {
        "export": "prunesearch.export.schedules",
        "measure_again": "prunesearch.export.schedules",
    },
)
