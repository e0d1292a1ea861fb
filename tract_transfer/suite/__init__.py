"""Methods x tasks x seeds: planning and running them, statistics, and the report."""
