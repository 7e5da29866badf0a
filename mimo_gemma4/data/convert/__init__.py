"""Converts data sets on disk to shards: rows of a source → conversations → samples → tar files."""
