"""Prompts of a given length: haystacks, needles inserted into them, grids of lengths and depths, and scoring."""
