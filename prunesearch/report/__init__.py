"""What the terminal shows: tables of a study, and the live view of a search. Pictures are in `plot.py`."""

from prunesearch.report.live import LiveReport as LiveReport
from prunesearch.report.sensitivity_tables import predicted_table as predicted_table
from prunesearch.report.sensitivity_tables import sensitivity_table as sensitivity_table
from prunesearch.report.tables import comparison_table as comparison_table
from prunesearch.report.tables import front_csv as front_csv
from prunesearch.report.tables import front_table as front_table
from prunesearch.report.tables import short as short
from prunesearch.report.tables import status_view as status_view
