"""Atom's arithmetic on plain tensors: no modules, no files, no devices assumed."""
