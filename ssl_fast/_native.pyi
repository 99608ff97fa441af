from typing import Final, TypeAlias

# The address of row 0 and the distance between rows in elements.
_Rows: TypeAlias = tuple[int, int]
# An address, and the distances between matrices and between rows in elements.
_Batch: TypeAlias = tuple[int, int, int]
# Addresses of the queries' and the keys' ids, how many a row has, whether equal ones stay.
_Ids: TypeAlias = tuple[int, int, int, bool]

threading: Final[str]
# Whether the CUDA kernels were built: without them use_device and run_on_device are missing.
cuda: Final[bool]

class PairSoftmax:
    def workspace_bytes(self) -> int: ...
    def run(self, workspace: int) -> None: ...

class PairSoftmaxSymmetric:
    def workspace_bytes(self) -> int: ...
    def run(self, workspace: int) -> None: ...

class PairSigmoid:
    def workspace_bytes(self) -> int: ...
    def run(self, workspace: int) -> None: ...

class Nearest:
    def workspace_bytes(self) -> int: ...
    def run(self, workspace: int) -> None: ...

class CentroidUpdate:
    def workspace_bytes(self) -> int: ...
    def run(self, workspace: int) -> None: ...
    def device_workspace_bytes(self) -> int: ...
    def run_on_device(self, workspace: int, stream: int) -> None: ...

class TopK:
    def workspace_bytes(self) -> int: ...
    def run(self, workspace: int) -> None: ...

class PlusPlus:
    def workspace_bytes(self) -> int: ...
    def run(self, workspace: int) -> None: ...

class Mae:
    def workspace_bytes(self) -> int: ...
    def run(self, workspace: int) -> None: ...

class Reconstruction:
    def workspace_bytes(self) -> int: ...
    def run(self, workspace: int) -> None: ...
    def device_workspace_bytes(self) -> int: ...
    def run_on_device(self, workspace: int, stream: int) -> None: ...

class KlDivergence:
    def workspace_bytes(self) -> int: ...
    def run(self, workspace: int) -> None: ...

class L2Sp:
    def workspace_bytes(self) -> int: ...
    def run(self, workspace: int) -> None: ...
    def device_workspace_bytes(self) -> int: ...
    def run_on_device(self, workspace: int, stream: int) -> None: ...

class LinearReconstruction:
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
    ids: _Ids,
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
    ids: _Ids,
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
def nearest(
    dtype: int,
    b: int,
    n: int,
    k: int,
    d: int,
    columns: int,
    x: _Batch,
    centroids: _Batch,
    threads: int,
    arrays: dict[str, int],
    /,
) -> Nearest: ...
def centroid_update(
    dtype: int,
    b: int,
    n: int,
    k: int,
    d: int,
    x: _Batch,
    threads: int,
    arrays: dict[str, int],
    /,
) -> CentroidUpdate: ...
def top_k(
    dtype: int,
    b: int,
    n: int,
    m: int,
    d: int,
    k: int,
    x: _Batch,
    y: _Batch,
    threads: int,
    arrays: dict[str, int],
    /,
) -> TopK: ...
def plus_plus(
    dtype: int,
    b: int,
    n: int,
    t: int,
    d: int,
    each: int,
    room: int,
    x: _Batch,
    candidates: _Batch,
    threads: int,
    arrays: dict[str, int],
    /,
) -> PlusPlus: ...
def reconstruction(
    kind: int,
    dtype: int,
    target_dtype: int,
    n: int,
    target_line: tuple[float, float],
    parameter: float,
    mask_span: int,
    period: int,
    factors: tuple[float, float],
    threads: int,
    arrays: dict[str, int],
    /,
) -> Reconstruction: ...
def mae(
    dtype: int,
    target_dtype: int,
    b: int,
    l: int,
    p: int,
    pred: _Batch,
    target: tuple[int, ...],
    normalize: bool,
    threads: int,
    arrays: dict[str, int],
    /,
) -> Mae: ...
def kl_divergence(
    dtype: int,
    n: int,
    threads: int,
    arrays: dict[str, int],
    /,
) -> KlDivergence: ...
def l2_sp(
    dtype: int,
    count: int,
    weight: float,
    add: bool,
    threads: int,
    arrays: dict[str, int],
    /,
) -> L2Sp: ...
def linear_reconstruction(
    kind: int,
    dtype: int,
    target_element: int,
    n: int,
    h: int,
    d: int,
    input: _Rows,
    linear_weight: _Rows,
    target: _Rows,
    element_weight: _Rows | None,
    element_kept: _Rows | None,
    parameter: float,
    target_scale: float,
    target_shift: float,
    threads: int,
    arrays: dict[str, int],
    /,
) -> LinearReconstruction: ...
def compiled_isas() -> list[str]: ...
def available_isas() -> list[str]: ...
def active_isa() -> str: ...
def set_isa(name: str) -> None: ...
def use_device(device: int) -> str | None: ...
def advise_huge_pages(address: int, size: int) -> None: ...
def fma_peak(kind: str, threads: int, seconds: float) -> float: ...
def stream(a: int, b: int, to: int, n: int, threads: int) -> None: ...
