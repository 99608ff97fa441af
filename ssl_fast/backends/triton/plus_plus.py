"""plus_plus on GPUs: the reference, whose products of candidates and rows are torch's library's.

No kernel of ours has been measured against it.
"""

from ssl_fast.backends.reference.plus_plus import plus_plus

__all__ = ["plus_plus"]
