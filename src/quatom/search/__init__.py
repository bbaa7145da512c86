"""Formats per layer and site under a budget of bits, from measured sensitivities."""
