"""Parameters learned block by block, by gradients through rounding.

Nothing that is learned costs anything at run time: it ends in codes, scales, norms and key offsets
that a checkpoint stores anyway. One block is in memory at a time, as everywhere in quantization.
"""
