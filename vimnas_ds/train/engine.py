"""The supernet inside DeepSpeed: model from configuration, ZeRO-2 engine, sampled-only AdamW."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vimnas_ds.config import RunConfig
from vimnas_ds.layout import ParamGrids
from vimnas_ds.model.options import ModelOptions
from vimnas_ds.model.supernet import Supernet
from vimnas_ds.seeds import derive_seed
from vimnas_ds.train.optimizer import SampledAdamW
from vimnas_ds.train.ranks import Ranks
from vimnas_ds.train.warm_start import inherit, warm_start


def model_options(config: RunConfig) -> ModelOptions:
    """The configured network's switches."""
    model = config.vimnas.model
    return ModelOptions(
        qk_norm=model.qk_norm,
        layer_scale=model.layer_scale,
        drop_path=model.drop_path,
        activation_checkpointing=model.activation_checkpointing,
        gelu=model.gelu,
        norm_eps=model.norm_eps,
        class_token=model.class_token,
        positions=model.positions,
        relative_positions=model.relative_positions,
        packed_qkv_bias=model.packed_qkv_bias,
        side=config.vimnas.side,
    )


def build_supernet(config: RunConfig) -> Supernet:
    """The configured supernet in float32 on the CPU; its weights depend on the seed alone."""
    section = config.vimnas
    classes = {name: data.num_classes for name, data in section.data.datasets.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("weights", section.seed) % 2**63)
        return Supernet(
            section.search_space,
            section.tokens.geometry(),
            classes,
            model_options(config),
            section.position_dim,
        )


COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")


@dataclass
class Engine:
    """DeepSpeed's engine with the two parts of ours that it drives."""

    deepspeed: Any
    net: Supernet  #: `deepspeed.module`, cast and moved by DeepSpeed
    optimizer: SampledAdamW
    dtype: torch.dtype

    @property
    def was_applied(self) -> bool:
        """Whether the last step changed weights (false: non-finite gradients, all ranks agree)."""
        return bool(self.deepspeed.was_step_applied())

    def weights(self, keep: bool) -> dict[str, torch.Tensor]:
        """The fp32 masters on the CPU, gathered parameter by parameter from their owners; nothing
        on ranks that do not `keep` them. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        found = {}
        for name, parameter in self.net.named_parameters():
            full = safe_get_full_fp32_param(parameter)
            if keep:
                found[name] = full.detach().float().cpu().contiguous()
        return found

    def ema_weights(self, keep: bool) -> dict[str, torch.Tensor]:
        """The moving average, as `weights` gives the masters. Collective. Raises KeyError where
        none is kept (vimnas.ema is null)."""
        wholes = self.optimizer.whole("ema")
        return {name: full.cpu() for name, full in wholes if keep}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the network computes with its moving average; after it, with its own weights, to
        the bit. Masters are not touched. Collective; needs room for the weights once more."""
        parameters, own = dict(self.net.named_parameters()), {}
        try:
            with torch.no_grad():
                for name, full in self.optimizer.whole("ema"):
                    own[name] = parameters[name].clone()
                    parameters[name].copy_(full)
            yield
        finally:
            with torch.no_grad():
                for name, weights in own.items():
                    parameters[name].copy_(weights)

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Masters and network, from what `weights` gave (on every rank)."""
        for name, parameter in self.net.named_parameters():
            parameter.copy_(weights[name])
        for flat, fragments in self.optimizer.fragments.items():
            for f in fragments:
                full = weights[f.name].reshape(-1)[f.param_start : f.param_start + f.numel]
                flat.detach()[f.flat_start : f.flat_start + f.numel] = full.to(flat)

    def counters(self) -> dict[str, int]:
        """DeepSpeed's own counts of steps and samples."""
        return {name: int(getattr(self.deepspeed, name)) for name in COUNTERS}

    def set_counters(self, counters: Mapping[str, int]) -> None:
        for name in COUNTERS:
            setattr(self.deepspeed, name, counters[name])

    def weight_step(self, loss: torch.Tensor) -> None:
        """Backward and update; `optimizer.activate` must have been called."""
        self.deepspeed.backward(loss)
        self.deepspeed.step()
        self.optimizer.deactivate()


def start_weights(net: Supernet, config: RunConfig) -> list[str]:
    """Fill `net` as vimnas.model.init or .inherit say; returns a report, line by line."""
    model = config.vimnas.model
    if model.init is not None:
        return warm_start(net, model.init)
    return inherit(net, model.inherit, config) if model.inherit is not None else []


def build_engine(config: RunConfig, ranks: Ranks, net: Supernet | None = None) -> Engine:
    """The engine around `net`, or around a newly built supernet."""
    import deepspeed

    net = net or build_supernet(config)
    grids = ParamGrids(net.layouts(), net.space)
    section = config.vimnas.optimizer
    optimizer = SampledAdamW(net.named_parameters(), grids, section.betas, section.eps)
    has_gpu = ranks.device.type == "cuda"
    settings = config.deepspeed_dict(ranks.world_size, has_gpu)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=settings)
    optimizer.bind_zero(engine)
    dtype = torch.bfloat16 if config.bf16(has_gpu) else torch.float32
    return Engine(engine, engine.module, optimizer, dtype)
