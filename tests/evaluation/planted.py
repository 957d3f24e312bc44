"""Models whose answers are known: one that copies perfectly, one that forgets, one that guesses.

They have the interface of a causal language model of Hugging Face, and their cache is the tokens themselves.
"""

import re
from types import SimpleNamespace

import torch

from statex.data.tokenizer import encode_prompt

SURE = 30.0  # the logit of what a model is sure of; all others are 0
LONGEST_MATCH = 64
ASKED_FOR_NEEDLE = re.compile(
    r"The special magic (?:number|uuid) for (\S+) mentioned in the provided text is(.*)$", re.S
)
ASKED_FOR_CHAIN = re.compile(r"variables are assigned the value (\d+), they are:(.*)$", re.S)


class Tokens:
    """The cache: the tokens of each row, without padding."""

    def __init__(self, rows):
        self.rows = rows

    def reorder_cache(self, index):
        self.rows = [list(self.rows[place]) for place in index.tolist()]


class PlantedModel(torch.nn.Module):
    """Says what `predict(tokens)` says after each token, of the last `memory` tokens, None for all."""

    def __init__(self, vocab_size, tokenizer=None, memory=None):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, model_type="planted")
        self.tokenizer, self.memory = tokenizer, memory

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=True, logits_to_keep=0):
        B, T = input_ids.shape
        rows = past_key_values.rows if past_key_values is not None else [[] for _ in range(B)]
        mask = attention_mask[:, -T:] if attention_mask is not None else torch.ones_like(input_ids)
        logits = torch.zeros(B, T if logits_to_keep == 0 else logits_to_keep, self.config.vocab_size)
        for row in range(B):
            for place, (token, real) in enumerate(zip(input_ids[row].tolist(), mask[row].tolist(), strict=True)):
                if real:
                    rows[row].append(token)
                kept = place - T + logits.shape[1]
                if real and kept >= 0:
                    logits[row, kept] = self.predict(rows[row])
        return SimpleNamespace(logits=logits, past_key_values=Tokens(rows))

    def predict(self, tokens):
        """(V,) logits of the next token."""
        memory = tokens[-self.memory :] if self.memory is not None else tokens
        logits = torch.zeros(self.config.vocab_size)
        said = self.read_answer(memory) if self.tokenizer is not None else None
        chosen = said if said is not None else follow(memory)
        if chosen is not None:
            logits[chosen] = SURE
        return logits

    def read_answer(self, memory):
        """The next token of the answer to a question about needles or chains, None where there is none."""
        tail = self.tokenizer.decode(memory[-120:])
        for pattern, find in ((ASKED_FOR_NEEDLE, needle_of), (ASKED_FOR_CHAIN, chain_of)):
            if asked := pattern.search(tail):
                answer = find(self.tokenizer.decode(memory), asked[1])
                if answer is None or not answer.startswith(asked[2]):
                    return None
                whole = encode_prompt(self.tokenizer, tail + answer[len(asked[2]) :])
                rest = whole[len(encode_prompt(self.tokenizer, tail)) :]
                return rest[0] if rest else None
        return None


class Guesser(PlantedModel):
    """Any token with any confidence, whatever was said."""

    def predict(self, tokens):
        generator = torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31)
        return torch.randn(self.config.vocab_size, generator=generator)


def follow(tokens):
    """What stood behind the earlier place that agrees longest with the end, the latest of those; None without any."""
    best, length = None, 0
    for place in range(len(tokens) - 2, -1, -1):
        if tokens[place] != tokens[-1]:
            continue
        matched = 1
        while matched < min(LONGEST_MATCH, place + 1) and tokens[place - matched] == tokens[-1 - matched]:
            matched += 1
        if matched > length:
            best, length = tokens[place + 1], matched
    return best


def needle_of(text, key):
    found = re.search(rf"One of the special magic (?:number|uuid)s for {re.escape(key)} is: (\S+)\.", text)
    return f" {found[1]}" if found else None


def chain_of(text, value):
    """The variables of a value, as far as the last of the texts tells."""
    text = text.rpartition("hidden in the following text.")[2]
    names = re.findall(rf"VAR (\w+) = {value}\.", text)
    for new, old in re.findall(r"VAR (\w+) = VAR (\w+)\.", text):
        if old in names:
            names.append(new)
    return " " + " ".join(names) if names else None
