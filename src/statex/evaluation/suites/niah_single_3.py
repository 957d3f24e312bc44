"""S-NIAH-3 of RULER (arXiv 2404.06654): a UUID in text, by length and depth."""

from statex.evaluation.prompts.haystack import random_uuid, text_haystack
from statex.evaluation.prompts.single_needle import SingleNeedleSettings, single_needle

TASK = single_needle("niah_single_3", "uuid", random_uuid, text_haystack)
SUITE = TASK.suite(SingleNeedleSettings)
