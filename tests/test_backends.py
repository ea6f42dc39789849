"""Optional GPU packages: what is found, what is chosen, and that values do not depend on it."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vimnas_ds.model import attention as backends
from vimnas_ds.model.attention import attention, attention_backend
from vimnas_ds.ops.apex import fused_layer_norm, nvidia_apex, torch_layer_norm
from vimnas_ds.ops.layer_norm import layer_norm


@pytest.fixture(autouse=True)
def _unresolved(monkeypatch: pytest.MonkeyPatch):
    """Every test resolves for itself, and leaves nothing resolved to the next."""
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    backends._resolved.cache_clear()
    fused_layer_norm.cache_clear()
    yield
    backends._resolved.cache_clear()
    fused_layer_norm.cache_clear()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An importable folder; what is imported from it is forgotten again."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("apex", "fused_layer_norm_cuda", "flash_attn"):
            del sys.modules[name]


def write_nvidia_apex(site: Path, kernel: str = "") -> None:
    """The folders of NVIDIA's apex and one compiled module; the norm scales by 2 to be seen."""
    for folder in ("optimizers", "normalization", "multi_tensor_apply"):
        (site / "apex" / folder).mkdir(parents=True)
        (site / "apex" / folder / "__init__.py").write_text("")
    (site / "apex" / "__init__.py").write_text("")
    (site / "apex" / "normalization" / "fused_layer_norm.py").write_text(
        "from torch.nn import functional as F\n"
        "def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps):\n"
        "    return 2 * F.layer_norm(input, normalized_shape, weight, bias, eps)\n"
    )
    (site / "fused_layer_norm_cuda.py").write_text(kernel)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (8, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def heads(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, N, K), strided as the block's are."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 2, 7, 3, 5, generator=generator, dtype=dtype).transpose(2, 3)
    q, k, v = qkv.unbind(0)
    return q, k, v


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.softmax(-1) @ v


def with_gradients(function, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), leaves)]


# -- attention ----------------------------------------------------------------------------------


def test_attention_is_softmax_of_scaled_scores_and_so_are_its_gradients():
    found = with_gradients(attention, heads())
    torch.testing.assert_close(found, with_gradients(plain_attention, heads()))


def test_auto_is_sdpa_on_a_cpu_itself_not_a_wrapper_and_is_logged_once(caplog):
    caplog.set_level(logging.INFO, logger=backends.__name__)
    assert attention_backend() == attention_backend() == "sdpa"
    attention(*heads())
    assert backends._resolved().function is F.scaled_dot_product_attention
    assert [r.getMessage() for r in caplog.records] == [
        "attention: sdpa (flash-attn is not installed)"
    ]


@pytest.mark.parametrize("value", ["", "SDPA", "flash", "fa2"])
def test_an_unknown_backend_is_an_error_that_lists_the_known_ones(monkeypatch, value):
    monkeypatch.setenv(backends.VARIABLE, value)
    with pytest.raises(ValueError, match=f"VIMNAS_ATTENTION is '{value}'.*auto, sdpa, flash_attn"):
        attention(*heads())


@pytest.mark.parametrize("value", ["flash_attn", "fa3", "fa4"])
def test_a_named_backend_without_a_gpu_is_an_error_not_a_fallback(monkeypatch, value):
    monkeypatch.setenv(backends.VARIABLE, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=f"{value}: there is no CUDA device"):
        attention_backend()


@pytest.mark.parametrize(
    ("value", "message"),
    [("flash_attn", "cannot be imported"), ("fa3", "cannot activate"), ("fa4", "cannot activate")],
)
def test_a_named_backend_that_is_not_installed_is_an_error(monkeypatch, value, message):
    monkeypatch.setenv(backends.VARIABLE, value)
    pretend_gpu(monkeypatch, (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # makes any import of it fail
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with pytest.raises(RuntimeError, match=f"VIMNAS_ATTENTION={value}: .*{message}"):
        attention_backend()


def fake_flash_attn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Size, ...]]:
    """A `flash_attn` that computes plain attention in its own layout; returns the shapes seen."""
    seen: list[tuple[torch.Size, ...]] = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q.shape, k.shape, v.shape))
        scores = torch.einsum("bnhk,bmhk->bhnm", q, k) / math.sqrt(q.shape[-1])
        return torch.einsum("bhnm,bmhk->bnhk", scores.softmax(-1), v)

    module = ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    module.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return seen


@pytest.mark.parametrize("value", ["auto", "flash_attn"])
def test_flash_attn_gets_its_own_layout_and_gives_the_same_values(monkeypatch, value):
    seen = fake_flash_attn(monkeypatch)
    pretend_gpu(monkeypatch)
    monkeypatch.setenv(backends.VARIABLE, value)
    monkeypatch.setattr(backends, "_takes_flash", lambda q: True)
    assert attention_backend() == "flash_attn"
    found = with_gradients(attention, heads())
    assert seen == [((2, 7, 3, 5),) * 3]  # (B, N, H, K)
    torch.testing.assert_close(found, with_gradients(plain_attention, heads()))


def test_float32_and_cpu_inputs_never_reach_flash_attn(monkeypatch):
    seen = fake_flash_attn(monkeypatch)
    pretend_gpu(monkeypatch)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = heads(dtype)
        torch.testing.assert_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert attention_backend() == "flash_attn"
    assert seen == []


def test_an_old_gpu_keeps_sdpa_although_flash_attn_is_installed(monkeypatch):
    fake_flash_attn(monkeypatch)
    pretend_gpu(monkeypatch, (7, 5))
    assert attention_backend() == "sdpa"


# -- apex ---------------------------------------------------------------------------------------


def test_pypis_apex_is_not_taken_for_nvidias(site):
    (site / "apex").mkdir()
    (site / "apex" / "__init__.py").write_text("raise SystemExit('must not be imported')")
    (site / "apex" / "models.py").write_text("")
    assert nvidia_apex() is None


def test_nvidias_apex_is_found_with_its_compiled_parts_and_not_imported(site):
    write_nvidia_apex(site)
    (site / "apex" / "__init__.py").write_text("raise SystemExit('must not be imported')")
    assert list(nvidia_apex() or ()) == ["fused_layer_norm_cuda"]
    (site / "fused_layer_norm_cuda.py").unlink()
    sys.path_importer_cache.clear()
    assert nvidia_apex() == {}


def test_the_layer_norm_is_torchs_without_apex_and_for_cpu_tensors_with_it(site, monkeypatch):
    x, weight, bias = (torch.randn(s, generator=torch.Generator()) for s in ((2, 3, 8), 8, 8))
    expected = F.layer_norm(x, (8,), weight, bias, 1e-6)
    assert torch.equal(layer_norm(x, weight, bias, 1e-6), expected)
    assert fused_layer_norm() is torch_layer_norm
    fused_layer_norm.cache_clear()
    pretend_gpu(monkeypatch)
    write_nvidia_apex(site)
    sys.path_importer_cache.clear()
    assert fused_layer_norm() is not torch_layer_norm
    assert torch.equal(layer_norm(x, weight, bias, 1e-6), expected)


def test_cuda_tensors_go_through_nvidias_kernel(site, monkeypatch):
    class OnCuda(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    pretend_gpu(monkeypatch)
    write_nvidia_apex(site)
    x, weight, bias = torch.randn(4, 8), torch.randn(8), torch.randn(8)
    found = layer_norm(x.as_subclass(OnCuda), weight, bias, 1e-6).as_subclass(torch.Tensor)
    torch.testing.assert_close(found, 2 * F.layer_norm(x, (8,), weight, bias, 1e-6))


def test_an_apex_built_against_another_torch_is_reported_and_not_used(site, monkeypatch, caplog):
    pretend_gpu(monkeypatch)
    write_nvidia_apex(site, kernel="raise ImportError('undefined symbol')")
    assert fused_layer_norm() is torch_layer_norm
    assert "undefined symbol" in caplog.text
