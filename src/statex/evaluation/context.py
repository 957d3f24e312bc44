"""What to measure (`Request`), and what every suite gets for it (`Context`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statex.errors import UserError
from statex.settings import Recall, TextSource
from statex.utils.environment import device_name, source_commit

if TYPE_CHECKING:
    import torch

    from statex.evaluation.reader import Reader
    from statex.recipe import Evaluation


@dataclass(frozen=True)
class Request:
    """What to measure of a model, and where to keep it.

    Args:
        evaluation: the recipe's section.
        output: a folder for the scores of every item, `items/<suite>.jsonl`, and the settings that made them,
            `evaluation.json` and `harness.json`; a second call with the same settings resumes there. None saves
            nothing.
        text: where held-out documents come from; default: `evaluation.text`, else Python's standard library.
        count_text: the text in whose training part AR-hits counts n-grams; default: `text`.
        training_length: tokens of a training sequence; values beyond it are marked.
        shared: a folder for the count table of AR-hits, which the evaluations of several models share.
        progress: called with the suite's name, the cells done and the number of cells.
        identity: fields of every Result: model, arm, seed, state_bytes.
    """

    evaluation: Evaluation
    output: Path | None = None
    text: TextSource | None = None
    count_text: TextSource | None = None
    training_length: int | None = None
    shared: Path | None = None
    progress: Callable[[str, int, int], None] = lambda suite, done, total: None
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def held_out_text(self) -> TextSource:
        return self.text or self.evaluation.text or TextSource(standard_library=True)

    def facts(self, reader: Reader) -> dict[str, Any]:
        """The fields that all of a model's results share."""
        return {"device": device_name(reader.device), "commit": source_commit()} | self.identity

    def context(self, reader: Reader, tokenizer: Any) -> Context:
        """What the suites get to measure one model."""
        text = self.held_out_text
        return Context(
            reader, tokenizer, self.evaluation, text, self.count_text or text, self.training_length,
            reader.max_context(), self.shared,
        )  # fmt: skip


@dataclass(frozen=True)
class Context:
    """What a suite gets.

    Args:
        reader: the model.
        tokenizer: the model's, None for a model without one.
        evaluation: the recipe's section.
        text: where held-out documents and haystacks come from.
        count_text: where the n-grams of AR-hits are counted, in its training part.
        training_length: tokens of a training sequence, where it is known.
        limit: the most tokens the model can read, None for a purely recurrent one.
        shared: a folder for the count table that evaluations of several models share, None not to save it.
        recall: the recall data that the model was trained on, None where there was none or it is unknown.
        model: what the recipe calls it, for errors.
    """

    reader: Reader
    tokenizer: Any
    evaluation: Evaluation
    text: TextSource
    count_text: TextSource
    training_length: int | None = None
    limit: int | None = None
    shared: Path | None = None
    recall: Recall | None = None
    model: str = ""

    def settings(self, suite: str) -> Any:
        """The settings of a suite, of the class that its file defines."""
        return self.evaluation.suite(suite)

    def score(self, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`Reader.score` for any number of rows, read in batches.

        Args:
            ids: (N, T) tokens.
            labels: (N, T), not shifted, as transformers takes them; -100 where nothing is scored.

        Returns:
            (N, T - 1) in nats and (N, T - 1) booleans, both on the CPU.
        """
        import torch

        batches = zip(ids.split(self.evaluation.batch_size), labels.split(self.evaluation.batch_size), strict=True)
        nll, right = zip(*(self.reader.score(rows[:, :-1], targets[:, 1:]) for rows, targets in batches), strict=True)
        return torch.cat(nll), torch.cat(right)

    def check_length(self, field_name: str, value: int, tokens: int | None = None) -> None:
        """Refuse a prompt longer than the model can read; prompts are never truncated.

        Args:
            field_name, value: what the recipe says.
            tokens: how many that takes, where it is not their number.

        Raises:
            UserError: they are more than `limit`.
        """
        from statex.models.limits import require_context  # imports torch, which a recipe must not wait for

        require_context(field_name, value, value if tokens is None else tokens, self.limit, self.model)

    def require_tokenizer(self, suite: str) -> Any:
        if self.tokenizer is None:
            raise UserError(
                "evaluation.suites", suite, "needs a tokenizer, and the model has none", "give one, or drop this suite"
            )
        return self.tokenizer
