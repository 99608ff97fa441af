"""Whether pair_softmax's gradient is fused or goes by strips: a frozen table, like tuning.py's.

Fused, each side's sums cost the logits again, and no weight passes through memory. By strips, both
sides' products share one making of the weights, which are written once and read twice. So one
side's sums are always worth fusing where their tile fits registers; both sides' by their size.
A loss that makes its gradient in the forward pass has one side's alone to make: the queries' come
from the sweep for the statistics (pair_softmax_flash.py), 4 products in all, as by strips.

The rows below are from a model; those that ``python -m benchmarks.tune`` measured on a card stand
in measured.json and go before them.
"""

from dataclasses import dataclass

import torch

from ssl_fast.backends.triton import measured
from ssl_fast.backends.triton.tuning import ANY_DEPTH, DEPTH_BUCKETS

# The sums of one side; of both sides, from weights of the row's softmax; and from those of both
# the row's and the column's.
KINDS = ("one_side", "both_sides", "both_sides_and_softmaxes")


@dataclass(frozen=True)
class Choice:
    """Up to how many pairs N M the sums are fused; where the table has no row, none are."""

    most_pairs: int
    source: str = "from the roofline model, not yet measured on a card"
    date: str = "2026-11-26"


Table = dict[measured.Key, Choice]

EVERY_SIZE = Choice(2**63 - 1)
NO_SIZE = Choice(-1)
# Three launches fewer, at 5 us each, are worth a product more up to 2^24 pairs of 128 in 16 bits
# at 300 TFLOP/s, and up to 2^22 (9 us) of 64 in fp32, three times TF32 at 60.
SMALL = Choice(2**24)
SMALL_IN_FULL_PRECISION = Choice(2**22)


def _rows(place: tuple[str, int, str], *choices: Choice) -> Table:
    """A row for each kind, in their order."""
    return {(kind, *place): choice for kind, choice in zip(KINDS, choices, strict=True)}


def _table() -> Table:
    table: Table = {}
    for dtype in ("bfloat16", "float16"):
        for architecture in ("sm_80", "sm_90", "sm_100"):
            # of 32768² pairs with D = 128 on sm_90, in ms, with the sweep before: one softmax's 2.1
            # to 3.3 fused and 2.0 to 2.5 by strips, of which 1.5 are 6.4 GB of memory that don't
            # shrink with D as the products' 0.4 each do; both softmaxes' 2.4 to 4.3 and 2.4 to 3.2,
            # for fused they take each exponential twice
            table |= _rows((dtype, 64, architecture), EVERY_SIZE, EVERY_SIZE, SMALL)
            table |= _rows((dtype, 128, architecture), EVERY_SIZE, SMALL, SMALL)
        for bucket in (64, 128):
            # tiles of 64 by 16, the largest that AMD's card holds without spills, read 2 to 4 times
            # as much on chip as the others
            table |= _rows((dtype, bucket, "generic"), EVERY_SIZE, SMALL, SMALL)
    # deeper, or without tensor cores that take fp32, the tiles spill
    for architecture in ("sm_80", "sm_90", "sm_100"):
        small = SMALL_IN_FULL_PRECISION
        table |= _rows(("float32", 64, architecture), EVERY_SIZE, small, small)
    return table


def from_text(text: str) -> Table:
    """The rows of this table in a text like measured.json's."""
    return {key: Choice(**fields) for key, fields in measured.from_text(text, "kind").items()}


TABLE: Table = _table() | from_text(measured.PATH.read_text())
# The interpreter has no speed: it fuses whatever one chunk holds.
INTERPRETED_DEPTH = 128


def is_fused(kind: str, dtype: torch.dtype, shape: tuple[int, int, int], architecture: str) -> bool:
    """Whether sums of a kind are fused, over the pairs of N queries and M keys, D deep."""
    n, m, depth = shape
    if architecture == "interpreter":
        return depth <= INTERPRETED_DEPTH
    bucket = next((bound for bound in DEPTH_BUCKETS if depth <= bound), ANY_DEPTH)
    choice = TABLE.get((kind, str(dtype).removeprefix("torch."), bucket, architecture))
    return choice is not None and n * m <= choice.most_pairs
