"""S-NIAH-2 of RULER (arXiv 2404.06654): a number of seven digits in text, by length and depth."""

from statex.evaluation.prompts.haystack import random_number, text_haystack
from statex.evaluation.prompts.single_needle import SingleNeedleSettings, single_needle

TASK = single_needle("niah_single_2", "number", random_number, text_haystack)
SUITE = TASK.suite(SingleNeedleSettings)
