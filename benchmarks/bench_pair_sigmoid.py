"""SigLIP: every backend and every peer, one group per case.

Run by ``python -m benchmarks``.
"""

from benchmarks import rows


def pytest_generate_tests(metafunc):
    rows.parametrize(metafunc, "pair_sigmoid")


def test_pair_sigmoid(benchmark, recorder, case, side):
    rows.row(benchmark, recorder, case, side)
