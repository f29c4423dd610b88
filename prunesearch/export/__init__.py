"""What leaves the tool: schedule files with their weights, and schedules with fixed counts instead of thresholds."""
