"""How far selectors, and layers under one selector, choose the same patches: `python -m evals.agreement`."""
