"""The only access to lm-eval, an optional package that is imported when a task is run."""

from statex.evaluation.lm_eval.loading import (
    TASKS_FOLDER,
    check_task_lengths,
    import_lm_eval,
    load_tasks,
    task_manager,
)
from statex.evaluation.lm_eval.local_data import check_folder
from statex.evaluation.lm_eval.run import Measured, NotRun, run_harness

__all__ = [
    "TASKS_FOLDER",
    "Measured",
    "NotRun",
    "check_folder",
    "check_task_lengths",
    "import_lm_eval",
    "load_tasks",
    "run_harness",
    "task_manager",
]
