"""The contrastive losses over the processes of torch.distributed.

Every tensor that a function takes is this rank's share of the global batch, and every rank gets the
loss of the whole batch. A rank's gradients are ``world_size`` times its part of the gradient of
that loss, so that the average that DistributedDataParallel and ``fully_shard`` make over ranks is
the gradient one process would find on the whole batch: features, temperature, scale and bias. With
``reduction="none"`` a rank gets the losses of its own rows, and what it weighs them by is its own
part of one sum over all ranks, with nothing multiplied.

All functions take, beside the arguments of their twins in ``ssl_fast`` and by keyword:

    group: a process group that this process is a member of; None is the default group.
    mode: "ring": keys travel from rank to rank, the next ones under way while the present ones are
        worked on, in the memory of two shares; the default, because memory is what large batches
        lack. "all_gather": every rank holds all keys, in fewer and larger messages.
    sizes: the rows of every rank of the group, 0 allowed; None means equally many, and exchanges no
        sizes. Keys that aren't part of the batch (``negative_keys``, ``ref_emb``) have as many rows
        on every rank, or any number from 1 where ``sizes`` is given; their counts are exchanged
        then.

All ranks of the group make the same calls in the same order, and run their backwards with the same
weight on the loss. First derivatives only. A rank that has gone, is later than the group's timeout
or brings other shapes raises RuntimeError, which names it. For that, each exchange between CPUs is
opened by 80 bytes to every rank; on GPUs nothing is, and a mismatch ends with NCCL's timeout.
"""

from __future__ import annotations

from ssl_fast.distributed.losses import clip_loss, info_nce, nt_xent, siglip_loss, sup_con

__all__ = ["clip_loss", "info_nce", "nt_xent", "siglip_loss", "sup_con"]
