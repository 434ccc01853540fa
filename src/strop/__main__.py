"""`python -m strop` is the command `strop`."""

from __future__ import annotations

from strop.cli import app

if __name__ == "__main__":
    app()
