"""Structured output: texts held to a schema, an expression, a grammar, choices or tags."""
