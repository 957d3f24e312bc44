"""lm-eval's HFLM takes an expanded model as it is (needs the extra `eval`)."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common import VOCABULARY, Case

pytest.importorskip("lm_eval")

CASES = [Case("gla", "everything", "inherit"), Case("mamba2", "2-groups", "preserve", factor=3)]


@pytest.fixture
def tokenizer():
    words = {"<end>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hflm_scores_and_generates(case, tokenizer):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = case.expanded(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    pairs = [("w1 w2 w3", " w4 w5"), ("w7", " w9")]
    scores = harness.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    for (score, _), ids, first in zip(scores, ([1, 2, 3, 4, 5], [7, 9]), (3, 1)):
        with torch.no_grad():
            log_probs = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        wanted = sum(float(log_probs[t - 1, ids[t]]) for t in range(first, len(ids)))
        assert abs(score - wanted) < 1e-4

    options = {"until": ["w0"], "max_gen_toks": 6, "do_sample": False}
    prompts = ["w1 w2 w3", "w7"]  # a batch with left padding
    texts = harness.generate_until([Instance("generate_until", {}, (p, options), i) for i, p in enumerate(prompts)])
    for prompt, text in zip(prompts, texts):
        ids = tokenizer(prompt, return_tensors="pt")
        alone = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert text.split() == tokenizer.decode(alone, skip_special_tokens=True).split()
