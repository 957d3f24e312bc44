"""From results to a page: reads a run's recipe and results, without torch or network."""
