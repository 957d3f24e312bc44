"""The only access to the model: reads tokens in chunks through its state, scores them, copies the state, generates.

Works with any causal language model of the Hugging Face interface whose forward takes a cache, by any of the names in
statex.models.caches. Letters: B rows, T tokens, V vocabulary.
"""

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from statex.models.caches import cache_argument, cache_of
from statex.models.limits import context_limit
from statex.models.padding import zero_padding

logger = logging.getLogger(__name__)

LOGIT_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}
"""Most bytes of fp32 logits that may exist at once; they bound the tokens of a scored piece."""
PREFILL_TOKENS = {"cpu": 4096, "cuda": 65_536}
"""Most tokens, B times T, of a piece that is read without logits."""
SHORTEST_PIECE = 64
PROBE_TOKENS = 16


@dataclass
class State:
    """What a model remembers of the tokens it has read, in B rows; reading more changes it in place.

    Args:
        cache: the model's own.
        num_tokens: number of tokens read, padding included.
        mask: (B, num_tokens), 0 at padding, None without padding or where later tokens do not need it.
    """

    cache: Any
    num_tokens: int
    mask: torch.Tensor | None = None


def text_config(model: Any) -> Any:
    """The configuration of the model's language part."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


class Reader:
    """Scores and continues token sequences with one model.

    The model is put into eval mode, and nothing is differentiated. A sequence is read in pieces, each continuing the
    state of the one before, so that memory does not grow with its length (except for attention's cache), and logits
    exist for one piece at a time.

    Args:
        model: any causal language model of the Hugging Face interface that has a cache.
        piece: tokens of a piece; default: as many as LOGIT_BYTES and PREFILL_TOKENS allow.
    """

    def __init__(self, model: torch.nn.Module, piece: int | None = None):
        self.model = model.eval()
        parameter = next(iter(model.parameters()), None)
        self.device = parameter.device if parameter is not None else torch.device("cpu")
        self.dtype = parameter.dtype if parameter is not None else torch.float32
        self.cache_name = cache_argument(model)
        accepted = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in accepted
        self.keeps_logits = "logits_to_keep" in accepted
        self.piece = piece
        self.config = text_config(model)
        self.vocab_size: int = self.config.vocab_size

    @torch.inference_mode()
    def score(
        self, ids: torch.Tensor, targets: torch.Tensor, state: State | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log-likelihood of each target, and whether it was the model's first choice.

        Args:
            ids: (B, T) tokens, the same number in each row; padding on the right needs no mask, as no target follows.
            targets: (B, T) the expected next token at each position, -100 where nothing is scored.
            state: a state to continue from, which is overwritten.

        Returns:
            (B, T) in nats and (B, T) booleans, both on the CPU; 0 and False where nothing is scored.
        """
        nll, right = torch.zeros(ids.shape), torch.zeros(ids.shape, dtype=torch.bool)
        asked = (targets != -100).any(dim=0).nonzero().flatten().tolist()
        for start, end, wanted in self._pieces(ids.shape, asked, state):
            logits, state = self._forward(ids[:, start:end], state, all_logits=wanted)
            if wanted:
                part = targets[:, start:end].to(self.device)
                here = part != -100
                chosen = logits[here].float()  # asked, V
                nll[:, start:end][here.cpu()] = torch.nn.functional.cross_entropy(
                    chosen, part[here], reduction="none"
                ).cpu()
                right[:, start:end][here.cpu()] = (chosen.argmax(dim=-1) == part[here]).cpu()
                del chosen
            del logits  # or they would still exist while the next piece is read
        return nll, right

    def next_token_nll(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T - 1) negative log-likelihood, in nats, of each token of (B, T) after the first."""
        return self.score(ids[:, :-1], ids[:, 1:])[0]

    @torch.inference_mode()
    def read(self, prompts: Sequence[Sequence[int]], state: State | None = None) -> tuple[torch.Tensor, State]:
        """Read prompts of B rows; the logits (B, V) after each one's last token, and the state there.

        Shorter prompts are padded on the left, behind a mask. That is possible only at the beginning of a sequence
        (between its parts, padding would push the last tokens out of a convolution), so prompts that continue
        `state`, which is overwritten, must have one length.
        """
        length = max(map(len, prompts))
        ids = torch.zeros((len(prompts), length), dtype=torch.long)
        mask = torch.zeros((len(prompts), length), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = torch.as_tensor(prompt)
            mask[row, length - len(prompt) :] = 1
        padded = not bool(mask.all())
        assert state is None or not padded, "prompts that continue a state must have one length"
        logits = torch.empty(0)
        for start, end, _ in self._pieces(ids.shape, [], state):
            logits, state = self._forward(
                ids[:, start:end], state, all_logits=False, mask=mask[:, start:end] if padded else None
            )
        assert state is not None
        return logits[:, -1].float(), state

    @torch.inference_mode()
    def score_continuations(
        self, logits: torch.Tensor, state: State, continuations: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log-likelihood of a continuation, and whether greedy decoding would produce it.

        Args:
            logits: (B, V) after the tokens read.
            state: the state there, which is not changed.
            continuations: one for each of the B rows, of any lengths from 1.

        Returns:
            (B,) sums over a continuation's tokens in nats, and (B,) booleans, both on the CPU.
        """
        first = torch.tensor([tokens[0] for tokens in continuations], device=logits.device)
        total = torch.nn.functional.cross_entropy(logits, first, reduction="none").cpu()
        greedy = (logits.argmax(dim=-1) == first).cpu()
        longest = max(map(len, continuations)) - 1
        if longest > 0:
            ids = torch.zeros((len(continuations), longest), dtype=torch.long)
            targets = torch.full_like(ids, -100)
            for row, tokens in enumerate(continuations):
                ids[row, : len(tokens) - 1] = torch.as_tensor(tokens[:-1])
                targets[row, : len(tokens) - 1] = torch.as_tensor(tokens[1:])
            nll, right = self.score(ids, targets, self.copy_state(state))
            total = total + nll.sum(dim=1)
            greedy &= (right | (targets == -100)).all(dim=1)
        return total, greedy

    @torch.inference_mode()
    def generate(
        self,
        logits: torch.Tensor,
        state: State,
        max_new_tokens: int,
        finished: Callable[[int, list[int]], bool] = lambda row, tokens: False,
    ) -> list[list[int]]:
        """Continue B rows greedily.

        Args:
            logits: (B, V) after the last token read.
            state: the state there, which is overwritten.
            finished: called with a row and its tokens so far; a row that is finished is not continued.
        """
        rows: list[list[int]] = [[] for _ in range(len(logits))]
        open_rows = set(range(len(rows)))
        for step in range(max_new_tokens):
            chosen = logits.argmax(dim=-1)
            for row, token in enumerate(chosen.tolist()):
                if row in open_rows:
                    rows[row].append(token)
                    if finished(row, rows[row]):
                        open_rows.remove(row)
            if not open_rows or step + 1 == max_new_tokens:
                break
            logits, state = self._forward(chosen[:, None], state, all_logits=False)
            logits = logits[:, -1].float()
        return rows

    def copy_state(self, state: State, rows: Sequence[int] | None = None) -> State:
        """A copy of a state that can be continued independently; `rows` selects its rows, with repetition."""
        cache, mask = copy.deepcopy(state.cache), state.mask
        if rows is not None:
            cache.reorder_cache(torch.tensor(rows, dtype=torch.long, device=self.device))
            mask = mask[list(rows)] if mask is not None else None
        return State(cache, state.num_tokens, mask)

    def join_states(self, states: Sequence[State]) -> State:
        """One state with the rows of several, in their order; only for a model that `can_batch_states`."""
        joined = copy.copy(states[0].cache)
        joined.layers = [copy.copy(layer) for layer in joined.layers]
        for place, layer in enumerate(joined.layers):
            for name in ("conv_states", "recurrent_states"):
                setattr(layer, name, _joined([getattr(state.cache.layers[place], name) for state in states]))
        return State(joined, states[0].num_tokens)

    @cached_property
    def supports_chunked_continuation(self) -> bool:
        """Whether several tokens that continue a state are read as they would be one by one.

        A model that is not a family of statex may silently drop the recurrent state in that case. So it is tested on
        random tokens: the logits after eight of them must be closer to those of single steps than to those from a fresh
        state.
        """
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.vocab_size, (1, PROBE_TOKENS + 8), generator=generator)
        before, behind = ids[:, :PROBE_TOKENS], ids[:, PROBE_TOKENS:]
        with torch.inference_mode():
            _, state = self._forward(before, None, all_logits=False)
            together, _ = self._forward(behind, self.copy_state(state), all_logits=False)
            fresh, _ = self._forward(behind, None, all_logits=False)
            for place in range(behind.shape[1]):
                single, state = self._forward(behind[:, place : place + 1], state, all_logits=False)
        error, effect = ((one[:, -1] - single[:, -1]).float().norm() for one in (together, fresh))
        coarsest = max(torch.finfo(dtype).eps for dtype in (single.dtype, self.dtype))
        rounding = 4 * coarsest * single[:, -1].float().norm()
        if bool(error > 0.5 * effect + rounding):
            logger.warning(
                "%s cannot continue a state with several tokens at once; it is read token by token",
                type(self.model).__name__,
            )
            return False
        return True

    def end_tokens(self, tokenizer: Any) -> set[int]:
        """The tokens that end a text, by the tokenizer and by the model's own generation settings."""
        configured = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        several = configured if isinstance(configured, list) else [configured]
        return {token for token in [*several, tokenizer.eos_token_id] if token is not None}

    @cached_property
    def has_attention(self) -> bool:
        """Whether the model caches keys and values of every token, judged by its cache after one token."""
        return any(getattr(layer, "keys", None) is not None for layer in self._cache_layers)

    @cached_property
    def can_batch_states(self) -> bool:
        """Whether states after different numbers of tokens can share a batch: true where every layer is recurrent."""
        layers = self._cache_layers
        recurrent = bool(layers) and all(hasattr(layer, "recurrent_states") for layer in layers)
        return recurrent and not self.has_attention and not self.takes_positions

    @cached_property
    def _cache_layers(self) -> Sequence[Any]:
        """The layers of the model's cache after one token; empty for a cache of another kind."""
        with torch.inference_mode():
            output = self.model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=self.device), use_cache=True)
        return getattr(cache_of(output), "layers", None) or []

    def max_context(self) -> int | None:
        """The most tokens the model can read (`context_limit`), None for a purely recurrent one."""
        return context_limit(self.model, self.has_attention)

    def _forward(
        self, ids: torch.Tensor, state: State | None, *, all_logits: bool, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, State]:
        """One forward pass over a piece (B, T) that continues `state`: all logits, or at least the last token's.

        `mask` (B, T) is 0 at padding.
        """
        B, T = ids.shape
        past = state.num_tokens if state is not None else 0
        arguments: dict[str, Any] = {"input_ids": ids.to(self.device), "use_cache": True}
        if state is not None:
            arguments[self.cache_name] = state.cache
        whole = self._mask_so_far(mask, state, B, T)
        if whole is not None:
            arguments["attention_mask"] = whole.to(self.device)
        if self.takes_positions:  # not every model counts positions from its cache
            positions = torch.arange(past, past + T).expand(B, T)
            if whole is not None and whole.shape[1] == past + T:
                positions = (whole.cumsum(dim=1) - 1).clamp_min(0)[:, past:]
            arguments["position_ids"] = positions.to(self.device)
        if self.keeps_logits and not all_logits:
            arguments["logits_to_keep"] = 1
        with zero_padding() if whole is not None else nullcontext():
            output = self.model(**arguments)
        return output.logits, State(cache_of(output), past + T, whole if self.has_attention else None)

    def _mask_so_far(self, mask: torch.Tensor | None, state: State | None, B: int, T: int) -> torch.Tensor | None:
        """The mask that a piece needs: its own (B, T) for recurrent layers, that of all tokens so far for attention."""
        if mask is not None and bool(mask.all()):
            mask = None
        before = state.mask if state is not None else None
        if (mask is None and before is None) or not self.has_attention:
            return mask
        ones = torch.ones((B, 1), dtype=torch.long)
        past = state.num_tokens if state is not None else 0
        parts = [ones.expand(-1, past) if before is None else before, ones.expand(-1, T) if mask is None else mask]
        return torch.cat(parts, dim=1)

    def _pieces(self, shape: Sequence[int], asked: list[int], state: State | None) -> Iterator[tuple[int, int, bool]]:
        """Cut (B, T) tokens into (start, end, logits needed?); a piece without logits ends where they are needed."""
        (rows, length), device = shape, self.device.type
        if not self.supports_chunked_continuation:
            step = length if state is None else 1
            yield from ((start, start + step, bool(asked)) for start in range(0, length, step))
            return
        scored = LOGIT_BYTES.get(device, LOGIT_BYTES["cuda"]) // (4 * self.vocab_size * rows)
        scored = self.piece or max(SHORTEST_PIECE, scored)
        unscored = self.piece or max(SHORTEST_PIECE, PREFILL_TOKENS.get(device, PREFILL_TOKENS["cuda"]) // rows)
        if not self.keeps_logits:
            unscored = min(scored, unscored)
        position, following = 0, 0
        while position < length:
            while following < len(asked) and asked[following] < position:
                following += 1
            next_asked = asked[following] if following < len(asked) else length
            if next_asked >= position + scored or next_asked == length:
                end, wanted = min(position + unscored, next_asked, length), False
            else:
                end, wanted = min(position + min(scored, unscored), length), True
            yield position, end, wanted
            position = end


def _joined(parts: Sequence[Any]) -> Any:
    """Tensors of several caches, or dictionaries and lists of them, concatenated along the batch."""
    first = parts[0]
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, list):
        return [_joined(group) for group in zip(*parts, strict=True)]
    return torch.cat(list(parts)) if isinstance(first, torch.Tensor) else first
