"""Warm start from a timm checkpoint: heads keep their roles, foreign code never runs."""

from __future__ import annotations

import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

from vimnas_ds.config import ConfigError
from vimnas_ds.model.supernet import Supernet
from vimnas_ds.space import SPACES, Arch
from vimnas_ds.train.warm_start import warm_start
from vimnas_ds.tubes import TUBEVIT


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_subnetwork_of_timms_size_holds_timms_weights(tmp_path, suffix):
    source = timm.create_model("deit_tiny_patch16_224")
    with torch.no_grad():
        for p in source.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    file = tmp_path / f"deit{suffix}"
    state = source.state_dict()
    save_file(state, file) if suffix == ".safetensors" else torch.save({"model": state}, file)
    net = Supernet(SPACES["vit_t"], TUBEVIT, {"imagenet": 10})
    untouched = net.heads["imagenet"].weight.clone()
    report = "\n".join(warm_start(net, file))
    sub = net.extract(Arch.uniform(192, 12, 3, 4))
    for name, value in sub.blocks.state_dict().items():
        assert torch.equal(value, state[f"blocks.{name}"]), name
    assert torch.equal(sub.norm.weight, state["norm.weight"])
    patch = sub.tokens.tubes[3].weight
    assert torch.equal(patch[:, :, 0], state["patch_embed.proj.weight"])
    assert torch.equal(net.heads["imagenet"].weight, untouched)
    assert "cls_token" in report
    assert "0 parameters filled, " in report  # every choice of vit_t exceeds 192: all in part


class Bomb:
    def __reduce__(self):
        return (open, ("bomb-went-off", "w"))


def test_a_file_with_code_in_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "evil.pth"
    file.write_bytes(pickle.dumps({"model": Bomb()}))
    net = Supernet(SPACES["nano"], TUBEVIT, {"imagenet": 10})
    with pytest.raises(ConfigError, match=r"vimnas\.model\.init"):
        warm_start(net, file)
    assert not (tmp_path / "bomb-went-off").exists()


def test_a_file_in_which_nothing_fits_is_an_error(tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({"layer1.weight": torch.zeros(2)}, file)
    with pytest.raises(ConfigError, match=r"nothing in .* fits.*layer1.weight"):
        warm_start(Supernet(SPACES["nano"], TUBEVIT, {"imagenet": 10}), file)
    with pytest.raises(ConfigError, match="there is no file"):
        warm_start(Supernet(SPACES["nano"], TUBEVIT, {"imagenet": 10}), tmp_path / "none.pth")
