"""Measurements of kernels and servers, written as JSON with their environment."""
