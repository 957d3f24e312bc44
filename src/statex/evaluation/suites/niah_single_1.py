"""S-NIAH-1 of RULER (arXiv 2404.06654): a number of seven digits in repeated noise, by length and depth."""

from statex.evaluation.prompts.haystack import noise_haystack, random_number
from statex.evaluation.prompts.single_needle import SingleNeedleSettings, single_needle

TASK = single_needle("niah_single_1", "number", random_number, noise_haystack)
SUITE = TASK.suite(SingleNeedleSettings)
