"""What evaluation writes and reporting reads: results, intervals, the claims these allow, and the names of suites."""

from statex.results.record import Result, merge_results, read_results, write_results

__all__ = ["Result", "merge_results", "read_results", "write_results"]
