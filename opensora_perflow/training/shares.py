"""How often each window is drawn (draws.shares)."""

from __future__ import annotations

from collections.abc import Sequence

LEAST = 1e-5
"""Of a share, in parts of all: draws.fill_evenly cuts [0, 1] by shares, and edges need a distance."""


def check_shares(shares: Sequence[float], num_windows: int, why_not: str) -> None:
    """Raises ValueError where shares are not one a window, or a window has next to none.

    Args:
        why_not: Why windows have no shares in this recipe, in words; empty where they have.
    """
    if why_not:
        raise ValueError(f"{why_not}, so shares of windows have no meaning, got draws.shares={list(shares)}; leave the key out")
    if len(shares) != num_windows:
        raise ValueError(f"draws.shares must be one number a window, got {list(shares)} for {num_windows} windows")
    if min(shares) < LEAST * sum(shares):
        raise ValueError(
            f"draws.shares must each be at least {LEAST:g} of their sum, got {list(shares)}; give the window that is drawn "
            "least a larger share"
        )
