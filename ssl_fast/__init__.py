"""Self-supervised losses for PyTorch, each one sweep over a product that is never stored."""

from ssl_fast.config import show_config
from ssl_fast.grad_cache import cached_step
from ssl_fast.losses.clip import ClipLoss, clip_loss
from ssl_fast.losses.contrastive import ContrastiveStats
from ssl_fast.losses.info_nce import InfoNCE, info_nce
from ssl_fast.losses.memory_bank import MemoryBank
from ssl_fast.losses.nt_xent import NTXentLoss, nt_xent
from ssl_fast.losses.siglip import SigLipLoss, siglip_loss
from ssl_fast.losses.sup_con import SupConLoss, SupConStats, sup_con

__all__ = [
    "ClipLoss",
    "ContrastiveStats",
    "InfoNCE",
    "MemoryBank",
    "NTXentLoss",
    "SigLipLoss",
    "SupConLoss",
    "SupConStats",
    "cached_step",
    "clip_loss",
    "info_nce",
    "nt_xent",
    "show_config",
    "siglip_loss",
    "sup_con",
]

__version__ = "0.1.0"
