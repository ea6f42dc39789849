"""An image head as a timm `VisionTransformer`, where timm can express it.

    timm/NAME.json          arguments of timm.models.vision_transformer.VisionTransformer
    timm/NAME.safetensors   its state dict

timm's blocks are all alike and their heads share the width: num_heads * head_dim == embed_dim. The
rest has a counterpart: a class token or none, mean over the other tokens after the norm, both forms
of GELU, qk-norm, LayerScale. Fixed positions become `pos_embed`, baked in for one size; an image
that is repeated to k frames before its tube meets the sum of the kernel over time. Relative
positions have none in values (timm's are biases of the scores), and norms' eps cannot be written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vimnas_ds.model.options import NORM_EPS
from vimnas_ds.model.subnet import SubNetwork
from vimnas_ds.programs import CannotExpress, Head, Run, place
from vimnas_ds.tensor_file import save_tensors


def timm_arguments(net: SubNetwork, dataset: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """VisionTransformer's arguments. Raises CannotExpress, saying what timm does not have."""
    arch, tube = net.arch, net.geometry.tubes[net.geometry.image_tube]
    if len(shape) != 2:
        raise CannotExpress("timm's VisionTransformer takes images, this head takes clips")
    if net.options.relative_positions is not None:
        raise CannotExpress("timm's VisionTransformer has no relative positions")
    if net.options.norm_eps != NORM_EPS:
        raise CannotExpress(
            f"timm's norms have eps {NORM_EPS:g} as arguments in JSON, here it is "
            f"{net.options.norm_eps:g}"
        )
    for field in ("num_heads", "mlp_ratio"):
        values = getattr(arch, field)
        if len(set(values)) > 1:
            listed = ", ".join(f"{value:g}" for value in values)
            raise CannotExpress(f"timm's layers are all alike, here {field} is {listed}")
    head_dim = net.head_dim
    if arch.num_heads[0] * head_dim != arch.embed_dim:
        raise CannotExpress(
            f"timm's heads share embed_dim: {arch.num_heads[0]} heads of {head_dim} are not "
            f"{arch.embed_dim} channels"
        )
    if tube.kernel[1:] != tube.stride[1:] or any(tube.offset):
        raise CannotExpress(f"timm's patches neither overlap nor leave gaps, tube {tube} does")
    return {
        "img_size": list(shape),
        "patch_size": list(tube.kernel[1:]),
        "num_classes": net.heads[dataset].out_features,
        "global_pool": "avg",
        "embed_dim": arch.embed_dim,
        "depth": arch.depth,
        "num_heads": arch.num_heads[0],
        "mlp_ratio": arch.mlp_ratio[0],
        "qk_norm": net.options.qk_norm,
        "init_values": None if net.options.layer_scale is None else 1.0,
        "class_token": net.options.class_token,
        "fc_norm": False,
        "norm_layer": "layernorm",  # eps 1e-6
        "act_layer": "gelu" if net.options.gelu == "erf" else "gelu_tanh",
    }


def timm_state(net: SubNetwork, dataset: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The state dict of that VisionTransformer."""
    renamed = {
        f"tokens.tubes.{net.geometry.image_tube}": "patch_embed.proj",
        f"heads.{dataset}": "head",
    }
    state = {"pos_embed": net.positions(shape, torch.device("cpu")).detach()[None]}
    if net.tokens.class_token is not None:
        state["cls_token"] = net.tokens.class_token.weight.detach()[None]
    for name, value in net.state_dict().items():
        prefix, kind = name.rsplit(".", 1)
        if prefix in renamed:
            state[f"{renamed[prefix]}.{kind}"] = value.sum(2) if value.ndim == 5 else value
        elif prefix.split(".")[0] in ("blocks", "norm"):
            state[name] = value
    return {name: value.float().cpu().contiguous() for name, value in state.items()}


def write_timm(head: Head, folder: Path) -> Run:
    """timm/NAME.json and timm/NAME.safetensors. Raises CannotExpress."""
    given = head.net, head.dataset, head.shape
    arguments = timm_arguments(*given)
    weights = place(folder, "timm", f"{head.dataset}.safetensors")
    save_tensors(timm_state(*given), weights)
    about = weights.with_suffix(".json")
    about.write_text(json.dumps(arguments, indent=2) + "\n")
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(**json.loads(about.read_text()))
    model.load_state_dict(load_file(str(weights)))
    run: Run = model.eval().requires_grad_(False)
    return run
