"""The one door to lm-eval, an optional package that is imported when a task is run."""

from statex.evaluation.harness.run import HARNESS_GROUPS, TASKS_FOLDER, HarnessRun, NotRun, run_harness, scores_of

__all__ = ["HARNESS_GROUPS", "TASKS_FOLDER", "HarnessRun", "NotRun", "run_harness", "scores_of"]
