"""`python -m fastdit` is the command `fastdit`."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
