"""InfoNCE, NT-Xent, CLIP, SupCon and a queue: every backend and every peer, one group per case.

Run by ``python -m benchmarks``.
"""

from benchmarks import rows


def pytest_generate_tests(metafunc):
    rows.parametrize(metafunc, "pair_softmax")


def test_pair_softmax(benchmark, recorder, case, side):
    rows.row(benchmark, recorder, case, side)
