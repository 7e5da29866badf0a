"""Turns data sets that lie on disk into shards: rows of a source → conversations → samples → tar files."""
