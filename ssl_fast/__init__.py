"""Self-supervised losses and clustering, each one sweep over a product that is never stored."""

from typing import TYPE_CHECKING, Any

from ssl_fast.cluster import KMeansResult, batched_kmeans, kmeans_assign, kmeans_update, knn
from ssl_fast.config import show_config
from ssl_fast.grad_cache import cached_step
from ssl_fast.losses.clip import ClipLoss, clip_loss
from ssl_fast.losses.contrastive import ContrastiveStats
from ssl_fast.losses.info_nce import InfoNCE, info_nce
from ssl_fast.losses.l2_sp import l2_sp
from ssl_fast.losses.linear_reconstruction import (
    LinearReconstructionLoss,
    linear_reconstruction_loss,
)
from ssl_fast.losses.mae import MAELoss, mae_loss
from ssl_fast.losses.memory_bank import MemoryBank
from ssl_fast.losses.nt_xent import NTXentLoss, nt_xent
from ssl_fast.losses.reconstruction import ReconstructionLoss, reconstruction_loss
from ssl_fast.losses.siglip import SigLipLoss, siglip_loss
from ssl_fast.losses.sup_con import SupConLoss, SupConStats, sup_con
from ssl_fast.losses.vae import VAELoss, VAETerms, vae_loss

if TYPE_CHECKING:
    from ssl_fast.cluster import KMeans, MiniBatchKMeans

__all__ = [
    "ClipLoss",
    "ContrastiveStats",
    "InfoNCE",
    "KMeans",
    "KMeansResult",
    "LinearReconstructionLoss",
    "MAELoss",
    "MemoryBank",
    "MiniBatchKMeans",
    "NTXentLoss",
    "ReconstructionLoss",
    "SigLipLoss",
    "SupConLoss",
    "SupConStats",
    "VAELoss",
    "VAETerms",
    "batched_kmeans",
    "cached_step",
    "clip_loss",
    "info_nce",
    "kmeans_assign",
    "kmeans_update",
    "knn",
    "l2_sp",
    "linear_reconstruction_loss",
    "mae_loss",
    "nt_xent",
    "reconstruction_loss",
    "show_config",
    "siglip_loss",
    "sup_con",
    "vae_loss",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The estimators import scikit-learn, which is an extra.
    if name not in ("KMeans", "MiniBatchKMeans"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ssl_fast import cluster

    return getattr(cluster, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
