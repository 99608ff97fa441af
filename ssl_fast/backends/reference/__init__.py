"""The reference: every op in plain torch, on any device and in any floating dtype.

It is the definition that the other backends are tested against, and what serves where they refuse.
"""

from __future__ import annotations

__all__ = ["refuses"]


def refuses(*_: object) -> str | None:
    """None: the reference serves every call. Arguments: op, device_type, dtype, shape."""
    return None
