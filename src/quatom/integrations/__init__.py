"""Quatom checkpoints in other tools: nothing here is imported unless that tool is used."""
