"""Prompts of a given length: haystacks, needles put into them, the grids they are asked on, and their scoring."""
