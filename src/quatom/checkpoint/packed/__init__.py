"""Checkpoints of other quantizers: GPTQ, AWQ and compressed-tensors, their codes as they are."""
