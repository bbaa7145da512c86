"""Perplexity, zero-shot tasks and the reports made of them."""
