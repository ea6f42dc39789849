"""Shared fixtures: a small supernet with everything switched on and nothing left at 0 or 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vimnas_ds.model.options import ModelOptions
from vimnas_ds.model.supernet import Supernet
from vimnas_ds.space import SPACES
from vimnas_ds.tubes import TUBELET, TokenGeometry, Tube

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
SMALL_TUBES = TokenGeometry(
    (Tube((4, 8, 8), (4, 8, 8), (0, 4, 4)), Tube((2, 4, 4), (2, 8, 8)), Tube((1, 8, 8), (4, 8, 8))),
    image_tube=2,
)


def randomise(net: torch.nn.Module, seed: int = 1) -> None:
    """Norm weights, biases and scales included: what defaults to 0 or 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Scripts that run in this process give torch all cores, and what is tested is small: on a busy
    machine threads that wait for one another take a hundred times as long as one."""
    torch.set_num_threads(1)


@pytest.fixture
def build_supernet() -> Callable[..., Supernet]:
    def build(
        options: ModelOptions | None = None, geometry: TokenGeometry = SMALL_TUBES
    ) -> Supernet:
        torch.manual_seed(0)
        options = options or ModelOptions(qk_norm=True, layer_scale=0.5)
        net = Supernet(SPACES["nano"], geometry, {"imagenet": 7, "k400": 5}, options)
        randomise(net)
        return net.eval()

    return build


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo set with its configuration."""
    from tests.runs import prepare

    return prepare(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def trained(folder: Path) -> Path:
    """A finished fp32 run on 2 ranks."""
    from tests.runs import train

    train(folder, "fp32", "--set", "bf16.enabled=false")
    return folder / "fp32"


def image_batch(seed: int = 0, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def clip_batch(seed: int = 0, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 32, 32, generator=torch.Generator().manual_seed(seed))


__all__ = ["ROOT", "SHARED_DATA", "SMALL_TUBES", "TUBELET", "clip_batch", "image_batch"]
