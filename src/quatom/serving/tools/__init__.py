"""Tool calls: one module per format, each with its parser and its constraint."""
