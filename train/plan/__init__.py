"""What a run costs before anything is loaded: sizes, arithmetic, memory, and the settings that fit; imports no torch.

`shapes` reads the sizes, `flops` and `memory` are pure functions of them, `fit` chooses what the config leaves open,
`table` prints. MFU in the log (`train.observe.mfu`) is the same arithmetic.
"""
