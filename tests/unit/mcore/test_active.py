"""Transformer Engine counts as there only if its extension loads. The packages here are fakes for that one purpose."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from megatron_r1.errors import DeviceError
from megatron_r1.mcore import active


@pytest.fixture
def fake(monkeypatch, tmp_path: Path):
    """Puts a package of that name, whose part for torch is this code, before all others."""

    def install(code: str) -> None:
        folder = tmp_path / "transformer_engine"
        (folder / "pytorch").mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "pytorch/__init__.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()

    if importlib.util.find_spec("transformer_engine") is not None:
        pytest.skip("Transformer Engine is installed")
    active.transformer_engine_problem.cache_clear()
    yield install
    active.transformer_engine_problem.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        del sys.modules[name]


def test_none_is_no_problem(fake):
    assert active.transformer_engine_problem() is None and not active.have_transformer_engine()


def test_one_that_loads_is_there(fake):
    fake("")
    assert active.have_transformer_engine()


@pytest.mark.parametrize("code", ["raise ImportError('undefined symbol:\\n_ZN3c10')", "assert False, 'undefined symbol: _ZN3c10'"])
def test_one_that_does_not_load_is_an_error_and_not_another_kind_of_layer(fake, monkeypatch, code):
    fake(code)
    with pytest.raises(DeviceError, match="installed and does not load: undefined symbol: _ZN3c10; compile it") as raised:
        active.have_transformer_engine()
    assert "\n" not in str(raised.value)
    monkeypatch.setattr(active, "_device", "cpu")
    assert not active.on_transformer_engine()  # on the CPU nothing needs it
