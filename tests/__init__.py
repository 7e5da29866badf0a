"""Tests: `unit` needs no ranks, `dist` runs real ranks, `e2e` whole runs, `gpu` GPUs; folders follow the packages."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
