"""Modules that the language model feeds: one file each, found by `registry`."""
