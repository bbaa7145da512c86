"""Folders of tensors: names, bytes and atomic writes; knows no network."""
