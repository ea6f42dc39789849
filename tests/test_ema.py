"""The moving average of the weights, where scripts read it (its updates: tests/test_zero.py)."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from scripts.ranking import check, parse
from tests.small import small_config
from vimnas_ds.config import ConfigError, parse_config
from vimnas_ds.manifest import FileEntry, write_manifest
from vimnas_ds.ops.ema import ema_share
from vimnas_ds.search.run import open_network
from vimnas_ds.train.engine import build_supernet
from vimnas_ds.train.ranks import Ranks
from vimnas_ds.train.run_files import EMA_FILE, WEIGHTS_FILE, CheckpointError

CPU = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def checkpoint(tmp_path):
    raw = small_config(tmp_path)
    net = build_supernet(parse_config(raw))
    folder = tmp_path / "checkpoints" / "step00000001"
    folder.mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    save_file(weights, folder / WEIGHTS_FILE)
    save_file({name: w + 1 for name, w in weights.items()}, folder / EMA_FILE)
    write_manifest(folder, {p.name: FileEntry.of(p) for p in folder.iterdir()}, {})
    return folder


def test_ema_opens_the_average_under_a_digest_of_its_own(checkpoint):
    plain, average = (open_network(checkpoint, CPU, ema=ema) for ema in (False, True))
    for p, q in zip(plain.net.parameters(), average.net.parameters(), strict=True):
        assert torch.equal(q, p + 1)
    assert plain.weights != average.weights  # searches keep their evaluations by it
    assert (plain.ema, average.ema) == (False, True)


def test_a_run_without_an_average_says_how_to_get_one(checkpoint):
    (checkpoint / EMA_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"no moving average.*--set vimnas\.ema=\{\}"):
        open_network(checkpoint, CPU, ema=True)
    with pytest.raises(ConfigError, match="leave out --ema"):
        check(parse(["--ema", "--from", "inherited"]))


def test_a_young_average_follows_faster():
    assert ema_share(1, 0.9999) == pytest.approx(9 / 11)
    assert ema_share(90, 0.9999) == pytest.approx(9 / 100)
    assert ema_share(10**6, 0.9999) == pytest.approx(1e-4)
    assert ema_share(1, 0.1) == pytest.approx(0.9)
