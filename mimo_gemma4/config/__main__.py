"""Rewrite `docs/config.md`, the reference of all keys, from `options.py`.

Run in a checkout with:  python -m mimo_gemma4.config
"""

from pathlib import Path

from mimo_gemma4.config.options import Config
from mimo_gemma4.config.structured import reference

if __name__ == "__main__":
    Path("docs/config.md").write_text(reference(Config), encoding="utf-8")
