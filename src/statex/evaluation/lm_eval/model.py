"""lm-eval's interface to a model that is read through its state. Imported only where lm-eval is installed."""

import json
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.api.model import TemplateLM

from statex.data.tokenizer import prefix_token
from statex.errors import UserError
from statex.evaluation.reader import Reader
from statex.models.limits import require_context


class StateLM(TemplateLM):
    """Reads prompts in pieces through the model's state and never truncates one.

    Continuations of one context (the choices of a question) share its prefill.

    Raises:
        UserError: the tokenizer has no token to begin a text with.
    """

    def __init__(self, reader: Reader, tokenizer: Any, batch_size: int):
        super().__init__()
        self.reader, self.tokenizer, self.batch_size = reader, tokenizer, batch_size
        self.prefix = prefix_token(tokenizer)
        self.limit = reader.max_context()
        self.ends = reader.end_tokens(tokenizer)
        self.progress: Callable[[int, int], None] = lambda done, total: None
        self._device = reader.device

    @property
    def eot_token_id(self) -> int:
        known = self.tokenizer.eos_token_id
        return known if known is not None else self.prefix

    @property
    def prefix_token_id(self) -> int:
        return self.prefix

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        start = self.tokenizer.decode([self.prefix_token_id])
        if add_special_tokens is None and start and string.startswith(start):
            add_special_tokens = False
        more = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer(string, verbose=False, **more)["input_ids"]

    def check(self, num_tokens: int) -> None:
        require_context("prompt", num_tokens, num_tokens, self.limit)

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        places: dict[tuple, list[int]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            self.check(len(context) + len(continuation))
            places.setdefault(tuple(context), []).append(place)
        contexts = sorted(places, key=len)
        answers: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(contexts), self.batch_size):
            part = contexts[start : start + self.batch_size]
            rows = [row for row, context in enumerate(part) for _ in places[context]]
            asked = [place for context in part for place in places[context]]
            logits, state = self.reader.read(part)
            nll, greedy = self.reader.score_continuations(
                logits[rows], self.reader.copy_state(state, rows), [requests[place][2] for place in asked]
            )
            answers |= {
                place: (-float(value), bool(right)) for place, value, right in zip(asked, nll, greedy, strict=True)
            }
            self.progress(len(answers), len(requests))
        return [answers[place] for place in range(len(requests))]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        totals = []
        for (text,) in [request.args for request in requests]:
            ids = [self.prefix_token_id, *self.tok_encode(text, add_special_tokens=False)]
            self.check(len(ids))
            totals.append(-float(self.reader.next_token_nll(torch.tensor([ids])).sum()))
            self.progress(len(totals), len(requests))
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        asked = [
            (self.tok_encode(text) or [self.prefix_token_id], settings)
            for text, settings in (request.args for request in requests)
        ]
        answers: dict[int, str] = {}
        by_settings: dict[str, list[int]] = {}
        for place, (_, settings) in enumerate(asked):
            by_settings.setdefault(json.dumps(settings, sort_keys=True), []).append(place)
        for group in by_settings.values():
            group.sort(key=lambda place: len(asked[place][0]))
            for start in range(0, len(group), self.batch_size):
                part = group[start : start + self.batch_size]
                texts = self._generate([asked[place][0] for place in part], asked[part[0]][1])
                answers |= dict(zip(part, texts, strict=True))
                self.progress(len(answers), len(requests))
        return [answers[place] for place in range(len(requests))]

    def _generate(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[str]:
        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            raise UserError("generation_kwargs", settings, "asks for sampling", "use a task that decodes greedily")
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else [stop for stop in until if stop]
        count = int(settings.get("max_gen_toks", 256))
        self.check(max(map(len, prompts)) + count)

        def decode(tokens: list[int]) -> str:
            return self.tokenizer.decode(tokens, skip_special_tokens=True)

        def finished(row: int, tokens: list[int]) -> bool:
            return tokens[-1] in self.ends or any(stop in decode(tokens) for stop in until)

        texts = []
        for tokens in self.reader.generate(*self.reader.read(prompts), count, finished):
            text = decode(tokens)
            for stop in until:
                text = text.split(stop)[0]
            texts.append(text)
        return texts
