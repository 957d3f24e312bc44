"""From results to a page: reads a run's recipe and results, needs no torch and no network."""
