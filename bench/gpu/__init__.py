"""What is measured on one GPU: single operations (`micro`), whole steps (`step`), and each change (`ladder`).

From the repository's root, with nothing but torch, triton, transformers, pydantic and PyYAML installed:

    python -m bench gpu-micro  --json bench/results/gpu-micro.json
    python -m bench gpu-step   --json bench/results/gpu-step.json
    python -m bench gpu-ladder --json bench/results/gpu-ladder.json

Each keeps to a time budget of its own (`--minutes`), writes every row when it is measured, and names the rows it left
out. `--tiny` runs the same code at toy shapes on the CPU; its figures mean nothing. Weights are random: they change
neither time nor memory.
"""
