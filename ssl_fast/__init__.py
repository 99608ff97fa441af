"""Self-supervised losses for PyTorch, each one sweep over a product that is never stored."""

from ssl_fast.config import show_config
from ssl_fast.losses.contrastive import ContrastiveStats
from ssl_fast.losses.info_nce import InfoNCE, info_nce
from ssl_fast.losses.nt_xent import NTXentLoss, nt_xent

__all__ = [
    "ContrastiveStats",
    "InfoNCE",
    "NTXentLoss",
    "info_nce",
    "nt_xent",
    "show_config",
]

__version__ = "0.1.0"
