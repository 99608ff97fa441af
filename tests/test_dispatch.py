"""The choice of a backend, and what show_config says of it."""

from __future__ import annotations

import types
import warnings

import pytest
import torch

import ssl_fast
from ssl_fast.backends import dispatch

SHAPE = (8, 8, 4)
CPU = ("pair_softmax", "cpu", torch.float32, SHAPE)


@pytest.fixture
def backends(monkeypatch):
    """``backends(native="reason", triton=None)``: stand-ins that refuse so, or serve."""
    monkeypatch.delenv("SSL_FAST_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_warned", set())

    def install(**reasons):
        for name, reason in reasons.items():
            stand_in = types.SimpleNamespace(refuses=lambda *_, reason=reason: reason)
            monkeypatch.setitem(dispatch._packages, name, stand_in)

    return install


def test_the_native_backend_serves_this_machine(monkeypatch):
    """Fails where the package is used without its compiled module."""
    monkeypatch.delenv("SSL_FAST_BACKEND", raising=False)
    for op in dispatch.OPS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert dispatch.resolve(op, "cpu", dtype, SHAPE) == ("native", {})


def test_priority(backends):
    backends(native=None, triton=None)
    assert dispatch.resolve(*CPU) == ("native", {})
    assert dispatch.resolve("l2_sp", "cuda", torch.float32, SHAPE) == ("native", {})
    assert dispatch.resolve("pair_softmax", "xpu", torch.float32, SHAPE) == ("reference", {})
    backends(native="no compiler")
    assert dispatch.resolve(*CPU) == ("reference", {"native": "no compiler"})
    found = dispatch.resolve("pair_softmax", "cuda", torch.float32, SHAPE)
    assert found == ("triton", {"native": "no compiler"})


def test_argument_before_environment_before_priority(backends, monkeypatch):
    backends(native=None, triton=None)
    monkeypatch.setenv("SSL_FAST_BACKEND", "triton")
    assert dispatch.resolve(*CPU).name == "triton"
    assert dispatch.resolve(*CPU, "reference").name == "reference"
    monkeypatch.setenv("SSL_FAST_BACKEND", "")
    assert dispatch.resolve(*CPU).name == "native"


def test_named_backend_serves_or_raises(backends, monkeypatch):
    backends(native="no compiler")
    with pytest.raises(RuntimeError, match=r"backend='native' can't serve pair_softmax.*no comp"):
        dispatch.resolve(*CPU, "native")
    monkeypatch.setenv("SSL_FAST_BACKEND", "native")
    with pytest.raises(RuntimeError, match="SSL_FAST_BACKEND='native' can't serve"):
        dispatch.resolve(*CPU)
    with pytest.raises(RuntimeError, match="no compiler"):
        ssl_fast.info_nce(torch.randn(3, 2), torch.randn(3, 2))
    monkeypatch.setenv("SSL_FAST_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"SSL_FAST_BACKEND must be one of.*got 'cuda'"):
        dispatch.resolve(*CPU)
    with pytest.raises(ValueError, match="backend must be one of reference, native, triton"):
        dispatch.resolve(*CPU, "fast")


def test_a_backend_that_cannot_be_imported_refuses(backends, monkeypatch):
    backends()

    def missing(name):
        raise ImportError(f"no {name} here")

    monkeypatch.setattr(dispatch, "package", missing)
    with pytest.raises(RuntimeError, match=r"can't be imported .no triton here."):
        dispatch.resolve(*CPU, "triton")


def test_fall_to_the_reference_warns_once_per_reason(backends):
    query = torch.randn(3, 2)
    backends(native="no compiler")
    with pytest.warns(RuntimeWarning, match=r"pair_softmax on cpu runs on the reference.*no comp"):
        ssl_fast.info_nce(query, query)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ssl_fast.info_nce(query, query)
        ssl_fast.nt_xent(query, query, reduction="none")
    backends(native="another reason")
    with pytest.warns(RuntimeWarning, match="another reason"):
        ssl_fast.info_nce(query, query)


def test_a_choice_by_name_and_float64_do_not_warn(backends):
    backends(native="no compiler")
    query = torch.randn(3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ssl_fast.info_nce(query, query, backend="reference")
        ssl_fast.info_nce(query.double(), query.double())
        assert dispatch.resolve(*CPU).name == "reference"


def test_resolve_is_pure(backends):
    backends(native="no compiler")
    before = set(dispatch._warned)
    assert dispatch.resolve(*CPU) == dispatch.resolve(*CPU)
    assert dispatch._warned == before


def test_every_op_is_in_the_reference_and_native_backends():
    for op in dispatch.OPS:
        functions = dispatch.load("reference", op).__all__
        named = [name for name in functions if name.startswith(op)]
        assert op in named
        for name in named:
            assert callable(getattr(dispatch.load("native", op), name)), name


def test_show_config(capsys):
    assert ssl_fast.show_config() is None
    printed = capsys.readouterr().out
    for word in ("ssl_fast", torch.__version__, "native", "cuda", "triton"):
        assert word in printed
    for op in dispatch.OPS:
        assert f"{op} on cpu" in printed


def test_public_names():
    assert set(ssl_fast.__all__) <= set(dir(ssl_fast))
    for name in ssl_fast.__all__:
        assert getattr(ssl_fast, name).__doc__
