from typing import Final, TypeAlias

# An address, or that of row 0 and the distance between rows in elements.
_Pointer: TypeAlias = int | None
_Rows: TypeAlias = tuple[int, int]

threading: Final[str]

class PairSoftmax:
    def workspace_bytes(self) -> int: ...
    def run(self, workspace: int) -> None: ...

class PairSoftmaxSymmetric:
    def workspace_bytes(self) -> int: ...
    def run(self, workspace: int) -> None: ...

class PairSigmoid:
    def workspace_bytes(self) -> int: ...
    def run(self, workspace: int) -> None: ...

def pair_softmax(
    kind: str,
    dtype: int,
    n: int,
    m: int,
    d: int,
    query: _Rows,
    key: _Rows,
    positive: _Rows | None,
    diagonals: list[int],
    query_ids: _Pointer,
    key_ids: _Pointer,
    normalize: bool,
    threads: int,
    arrays: dict[str, int],
    /,
) -> PairSoftmax: ...
def pair_softmax_symmetric(
    kind: str,
    dtype: int,
    n: int,
    d: int,
    pairs: int,
    features: _Rows,
    normalize: bool,
    threads: int,
    arrays: dict[str, int],
    /,
) -> PairSoftmaxSymmetric: ...
def pair_sigmoid(
    dtype: int,
    n: int,
    m: int,
    d: int,
    query: _Rows,
    key: _Rows,
    positive_diagonals: list[int],
    threads: int,
    arrays: dict[str, int],
    /,
) -> PairSigmoid: ...
def compiled_isas() -> list[str]: ...
def available_isas() -> list[str]: ...
def active_isa() -> str: ...
def set_isa(name: str) -> None: ...
def advise_huge_pages(address: int, size: int) -> None: ...
def fma_peak(kind: str, threads: int, seconds: float) -> float: ...
