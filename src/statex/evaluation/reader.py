"""The one door to the model: reads tokens in pieces through its state, scores them, copies the state, continues.

Works with any causal language model of the Hugging Face interface whose forward takes a cache, as `cache_params`
(Mamba, Mamba2 and their like) or `past_key_values` (all others). Letters: B rows, T tokens, V vocabulary.
"""

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from statex.errors import UserError

LOGIT_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}
"""How many bytes of fp32 logits may exist at one time; they bound the tokens of a scored piece."""
PREFILL_TOKENS = {"cpu": 4096, "cuda": 65_536}
"""B times T of a piece that is read without logits."""
SHORTEST_PIECE = 64


def text_config(model: Any) -> Any:
    """The configuration of the model's language part."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


class Reader:
    """Scores and continues token sequences with one model.

    The model is put in eval mode and never sees a gradient. A sequence is read in pieces, each continuing the state
    of the one before, so that memory does not grow with its length (but for a model that has attention, whose cache
    does), and logits exist for one piece at a time.

    Args:
        model: any causal language model of the Hugging Face interface that has a cache.
        piece: tokens of a piece; default: what LOGIT_BYTES and PREFILL_TOKENS allow.
    """

    def __init__(self, model: torch.nn.Module, piece: int | None = None):
        self.model = model.eval()
        parameter = next(iter(model.parameters()), None)
        self.device = parameter.device if parameter is not None else torch.device("cpu")
        accepted = inspect.signature(model.forward).parameters
        cache_names = [name for name in ("cache_params", "past_key_values") if name in accepted]
        if not cache_names:
            raise UserError(
                "model",
                type(model).__name__,
                "its forward takes neither cache_params nor past_key_values",
                "evaluate a causal language model that has a cache",
            )
        self.cache_name = cache_names[0]
        self.keeps_logits = "logits_to_keep" in accepted
        self.piece = piece
        self.config = text_config(model)
        self.vocab_size: int = self.config.vocab_size

    @torch.inference_mode()
    def score(self, ids: torch.Tensor, targets: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log-likelihood of each target, and whether it was the model's first choice.

        Args:
            ids: (B, T) tokens, the same number in each row; padding on the right needs no mask, as no target follows.
            targets: (B, T) what the logits at each position should say, -100 where nothing is asked.
            state: a state to continue from, which is used up.

        Returns:
            (B, T) in nats and (B, T) booleans, both on the CPU; 0 and False where nothing is asked.
        """
        nll, right = torch.zeros(ids.shape), torch.zeros(ids.shape, dtype=torch.bool)
        asked = (targets != -100).any(dim=0).nonzero().flatten().tolist()
        for start, end, wanted in self._pieces(ids.shape[0], ids.shape[1], asked):
            logits, state = self._forward(ids[:, start:end], state, all_logits=wanted)
            if wanted:
                part = targets[:, start:end].to(self.device)
                here = part != -100
                chosen = logits[here].float()  # asked, V
                nll[:, start:end][here.cpu()] = torch.nn.functional.cross_entropy(
                    chosen, part[here], reduction="none"
                ).cpu()
                right[:, start:end][here.cpu()] = (chosen.argmax(dim=-1) == part[here]).cpu()
        return nll, right

    def next_token_nll(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T - 1) negative log-likelihood, in nats, of each token of (B, T) after the first."""
        return self.score(ids[:, :-1], ids[:, 1:])[0]

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        """Read (B, T) tokens; the logits (B, V) after the last one, and the state."""
        logits = torch.empty(0)
        for start, end, _ in self._pieces(ids.shape[0], ids.shape[1], []):
            logits, state = self._forward(ids[:, start:end], state, all_logits=False)
        return logits[:, -1].float(), state

    def copy_state(self, state: Any, rows: int | None = None) -> Any:
        """A state that can be continued without touching this one, its single row repeated `rows` times."""
        state = copy.deepcopy(state)
        if rows is not None:
            state.reorder_cache(torch.zeros(rows, dtype=torch.long, device=self.device))
        return state

    def has_attention(self) -> bool:
        """Whether the model keeps keys and values of every token, as its own cache shows after one token."""
        _, state = self.prefill(torch.zeros((1, 1), dtype=torch.long))
        layers = getattr(state, "layers", None) or []
        return any(getattr(layer, "keys", None) is not None for layer in layers)

    def real_limit(self) -> int | None:
        """The most tokens the model can read: its max_position_embeddings if it has attention, else None."""
        limit = getattr(self.config, "max_position_embeddings", None)
        return limit if limit is not None and self.has_attention() else None

    def _forward(self, ids: torch.Tensor, state: Any, *, all_logits: bool) -> tuple[torch.Tensor, Any]:
        """One forward pass over a piece that continues `state`; all its logits, or at least those of its last token."""
        arguments: dict[str, Any] = {"input_ids": ids.to(self.device), "use_cache": True, self.cache_name: state}
        if self.keeps_logits and not all_logits:
            arguments["logits_to_keep"] = 1
        output = self.model(**arguments)
        return output.logits, getattr(output, self.cache_name)

    def _pieces(self, rows: int, length: int, asked: list[int]) -> Iterator[tuple[int, int, bool]]:
        """Cut `length` tokens into (start, end, logits wanted); a piece without logits ends where one is asked."""
        device = self.device.type
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
