"""How often each window is drawn (draws.shares)."""

from __future__ import annotations

from collections.abc import Sequence


def check_shares(shares: Sequence[float], num_windows: int, why_not: str) -> None:
    """Raises ValueError where shares are not one a window.

    Args:
        why_not: Why windows have no shares in this recipe, in words; empty where they have.
    """
    if why_not:
        raise ValueError(f"{why_not}, so shares of windows have no meaning, got draws.shares={list(shares)}; leave the key out")
    if len(shares) != num_windows:
        raise ValueError(f"draws.shares must be one number a window, got {list(shares)} for {num_windows} windows")
