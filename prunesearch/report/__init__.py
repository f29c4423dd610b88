"""Reports of a study: tables and the live view in the terminal, and plots."""

from typing import TYPE_CHECKING

from prunesearch.registry import lazily

if TYPE_CHECKING:
    from prunesearch.report.live import LiveReport as LiveReport
    from prunesearch.report.sensitivity_tables import predicted_table as predicted_table
    from prunesearch.report.sensitivity_tables import sensitivity_table as sensitivity_table
    from prunesearch.report.tables import comparison_table as comparison_table
    from prunesearch.report.tables import front_csv as front_csv
    from prunesearch.report.tables import front_table as front_table
    from prunesearch.report.tables import short as short
    from prunesearch.report.tables import siblings_table as siblings_table
    from prunesearch.report.tables import status_view as status_view

__getattr__ = lazily(
    __name__,
    {
        "LiveReport": "prunesearch.report.live",
        "predicted_table": "prunesearch.report.sensitivity_tables",
        "sensitivity_table": "prunesearch.report.sensitivity_tables",
        **dict.fromkeys(
            ("comparison_table", "front_csv", "front_table", "short", "siblings_table", "status_view"),
            "prunesearch.report.tables",
        ),
    },
)
