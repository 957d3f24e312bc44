"""The one door to lm-eval, an optional package that is imported when a task is run."""

from statex.evaluation.lm_eval.run import (
    TASKS_FOLDER,
    Measured,
    NotRun,
    import_lm_eval,
    load_tasks,
    run_harness,
    scores_of,
    task_manager,
)

__all__ = [
    "TASKS_FOLDER",
    "Measured",
    "NotRun",
    "import_lm_eval",
    "load_tasks",
    "run_harness",
    "scores_of",
    "task_manager",
]
