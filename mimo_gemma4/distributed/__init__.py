"""Placement of modules on ranks, process groups, and messages between ranks."""
