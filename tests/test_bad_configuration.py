"""Wrong configurations and command lines: every one is answered before any work is done, with the
key or option, the value that was given, and what would be right."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.conftest import ROOT
from tests.launch import run_main
from tests.small import TUBES, small_config
from tests.untrained import write_run
from vimnas_ds.config import ConfigError, load_config, parse_config
from vimnas_ds.data.joint import open_datasets
from vimnas_ds.train.schedule import Schedule

IMAGE, VIDEO = "vimnas.data.datasets.imagenet", "vimnas.data.datasets.k400"
GONE = object()  #: the key is taken out

#: (key, value, what the answer must say besides both). Values of unknown keys need not be said.
VALUES: list[tuple[Any, ...]] = [
    # DeepSpeed's keys: unknown, refused, of the wrong type
    ("zero_optimisation", {"stage": 2}, "unknown key", 'did you mean "zero_optimization"?'),
    ("gradient_cliping", 1.0, "unknown key", 'did you mean "gradient_clipping"?'),
    ("gradient_clipping", GONE, "must be written, 0 for off", "got None"),
    ("gradient_clipping", -1, "must be written, 0 for off"),
    ("gradient_clipping", float("inf"), "must be written, 0 for off"),
    ("optimizer", {"type": "Adam"}, "refused", "vimnas.optimizer"),
    ("scheduler", {"type": "WarmupLR"}, "refused", "vimnas.schedule"),
    ("fp16", {"enabled": True}, "refused", "use bf16"),
    ("activation_checkpointing", {}, "refused", "use vimnas.model.activation_checkpointing"),
    ("tensorboard", {"enabld": True}, "refused", "vimnas.output_dir/tensorboard"),
    ("checkpoint", {"load_universal": True}, '"checkpoint" is refused'),
    ("flops_profiler", {"enabled": True}, "refused", "--dry_run"),
    ("communication_data_type", "fp99", "refused", "not proved"),
    ("train_micro_batch_size_per_gpu", 4, "refused", "give train_batch_size"),
    ("gradient_accumulation_steps", 2, "it must be 1", "supplement"),
    ("gradient_accumulation_steps", True, "it must be 1"),
    ("train_batch_size", GONE, "positive whole number", "got None"),
    ("train_batch_size", "8", "positive whole number"),
    ("train_batch_size", 8.0, "positive whole number"),
    ("train_batch_size", True, "positive whole number"),
    ("train_batch_size", 0, "positive whole number"),
    ("steps_per_print", "x", "must be a whole number"),
    ("wall_clock_breakdown", "no", "must be true or false"),
    ("zero_optimization", GONE, "stage must be 2", "got None"),
    ("zero_optimization", [2], "stage must be 2", "got [2]"),
    ("zero_optimization.stage", 1, "must be 2"),
    ("zero_optimization.stage", 3, "must be 2"),
    ("zero_optimization.stage", 2.0, "must be 2"),
    ("zero_optimization.reduce_bucket_size", 5e8, "written out (500000000, not 5e8)"),
    ("zero_optimization.reduce_bucket_size", -5, "positive whole number"),
    ("zero_optimization.allgather_bucket_size", "big", "positive whole number"),
    ("zero_optimization.overlap_comm", "no", "must be true or false"),
    ("zero_optimization.overlap_com", True, "unknown", 'did you mean "overlap_comm"?'),
    ("zero_optimization.load_from_fp32_weights", False, "unknown or unproved key"),
    ("zero_optimization.round_robin_gradients", True, "refused", "set it to false"),
    ("zero_optimization.offload_optimizer", {"device": "cpu"}, "refused", "no test proves"),
    ("bf16", None, 'bf16.enabled must be true, false or "auto"'),
    ("bf16.enabled", "yes", 'must be true, false or "auto"'),
    ("bf16.enabled", 1, 'must be true, false or "auto"'),
    ("bf16.enable", True, "unknown key", 'did you mean "enabled"?'),
    ("bf16.check_grad_overflow", False, "refused", "one NaN would reach every weight"),
    ("data_types", [], "must be an object", "got []"),
    ("data_types.grad_accum_dtype", "bf16", 'must be "fp32"'),
    ("data_types.grad_accum_dtyp", "fp32", "unknown key", 'did you mean "grad_accum_dtype"?'),
    # the file's own two
    ("about", 5, "must be a text"),
    ("vimnas", GONE, 'no "vimnas" section'),
    ("vimnas", [], "must be an object", "got []"),
    # types: nothing is taken for something else
    ("vimnas.schedule.epochs", True, "whole number"),
    ("vimnas.schedule.epochs", "500", "whole number"),
    ("vimnas.schedule.epochs", 3.0, "whole number"),
    ("vimnas.schedule.lr", "1e-3", "must be a number"),
    ("vimnas.schedule.warmup", float("nan"), "finite number"),
    ("vimnas.model.layer_scale", True, "must be a number"),
    ("vimnas.model.qk_norm", "no", "must be true or false"),
    ("vimnas.model.activation_checkpointing", 1, "must be true or false"),
    ("vimnas.model.init", 5, "must be a path, in quotes"),
    ("vimnas.alpha", [], "must be an object", "got []"),
    ("vimnas.optimizer.betas", 0.9, "must be a list"),
    ("vimnas.space", None, "must be a text", "got None"),
    # places
    ("vimnas.output_dir", GONE, "missing key"),
    ("vimnas.output_dir", "", "must name a file or folder"),
    ("vimnas.output_dir", ".", "must name a folder of the run's own"),
    ("vimnas.data.index_dir", "a\0b", "must name a file or folder"),
    (f"{VIDEO}.root", "", "must name a file or folder"),
    # misspelled and misplaced
    ("vimnas.spaces", "nano", "unknown key", 'did you mean "space"?'),
    ("vimnas.model.droppath", 0.1, "unknown key", 'did you mean "drop_path"?'),
    ("vimnas.alpha.evry", 2, "unknown key", 'did you mean "every"?'),
    (f"{VIDEO}.num_class", 5, "unknown key", 'did you mean "num_classes"?'),
    ("vimnas.data.k400", {"kind": "video"}, "unknown key", "known:", "datasets"),
    ("vimnas.tokens.tubes", [{**TUBES[0], "ofset": [0, 0, 0]}], "tubes.0.ofset", '"offset"?'),
    # ranges and choices
    ("vimnas.space", "vit_h", "none of vit_t, vit_s, vit_b, vit_l"),
    ("vimnas.seed", -1, "greater than or equal to 0"),
    ("vimnas.cpu_threads", 0, "greater than or equal to 1"),
    ("vimnas.model.drop_path", 1.0, "less than 1"),
    ("vimnas.model.layer_scale", 0, "greater than 0"),
    ("vimnas.schedule.warmup_unit", "days", "'epochs' or 'steps'"),
    ("vimnas.schedule.image_epochs", -1, "greater than or equal to 0"),
    ("vimnas.alpha.lr", 0, "greater than 0"),
    ("vimnas.alpha.betas", [0.9], "value 2 is missing", "got [0.9]"),
    ("vimnas.alpha.betas", [0.9, 1.0], "betas.1", "less than 1", "got 1.0"),
    ("vimnas.optimizer.eps", 0, "greater than 0"),
    ("vimnas.optimizer.max_skipped", 0, "greater than or equal to 1"),
    ("vimnas.log.every", 0, "greater than or equal to 1"),
    ("vimnas.checkpoint.keep", 0, "greater than or equal to 1"),
    ("vimnas.data.held_out", 0.6, "less than 0.5"),
    ("vimnas.data.held_out", 0, "greater than 0"),
    ("vimnas.data.max_bad_share", 5, "less than 1"),
    ("vimnas.data.file_timeout", 600, "less than or equal to 120"),
    ("vimnas.data.cache_mb", -1, "greater than or equal to 0"),
    ("vimnas.data.datasets", {}, "at least 1"),
    (f"{VIDEO}.kind", "audio", "'image' or 'video'"),
    (f"{VIDEO}.layout", "tfrecord", "'folders', 'csv', 'lists', 'kinetics', 'ssv2' or 'imagenet'"),
    (f"{VIDEO}.fps", 0, "greater than 0"),
    (f"{VIDEO}.num_classes", 1, "greater than or equal to 2"),
    (f"{VIDEO}.test_clips", 0, "greater than or equal to 1"),
    (f"{IMAGE}.test_crops", 2, "1 or 3"),
    (f"{IMAGE}.size", 4, "greater than or equal to 8"),
    (f"{IMAGE}.base_lr", -1, "greater than 0"),
    (f"{IMAGE}.random_erasing", 1.0, "less than 1"),
    (f"{IMAGE}.mixup", -0.1, "greater than or equal to 0"),
    (f"{IMAGE}.randaugment.m", 11, "less than or equal to 10"),
    ("vimnas.model.gelu", "relu", "'tanh' or 'erf'"),
    ("vimnas.model.norm_eps", 0, "greater than 0"),
    ("vimnas.model.norm_eps", 1.0, "less than 1"),
    ("vimnas.model.class_token", 1, "must be true or false"),
    ("vimnas.model.positions", "sincos", "'fixed' or 'learned'"),
    ("vimnas.model.relative_positions", 0, "greater than or equal to 1"),
    ("vimnas.model.relative_positions", 65, "less than or equal to 64"),
    ("vimnas.model.relative_positions", True, "must be a whole number"),
    ("vimnas.model.packed_qkv_bias", "yes", "must be true or false"),
    (f"{IMAGE}.export_interpolation", "nearest", "'bilinear' or 'bicubic'"),
    # what does not go together
    ("vimnas.model.positions", "learned", "is for images alone", "the videos of k400"),
    ("vimnas.model.relative_positions", 14, "is for images alone", "the videos of k400"),
    (f"{VIDEO}.export_interpolation", "bicubic", "for image datasets only"),
    ("vimnas.schedule.warmup", 100, "exceeds schedule.epochs 3"),
    ("vimnas.schedule.min_lr", 1.0, "not below the peak 0.01"),
    ("vimnas.schedule.image_epochs", 9, "exceeds schedule.epochs 3"),
    ("vimnas.schedule.image_dataset", "k400", "not an image dataset", "imagenet"),
    ("vimnas.model", {"init": "a", "inherit": "b"}, "init and inherit exclude each other"),
    ("vimnas.arch", {"embed_dim": 64}, 'missing key "vimnas.arch.num_heads"'),
    ("vimnas.tokens.kind", "tubelet", 'own tubes go with kind "tubes"'),
    ("vimnas.tokens.kind", "patches", "'tubes' or 'tubelet'"),
    ("vimnas.tokens.image_tube", 5, "not one of 2 tubes"),
    (f"{IMAGE}.layout", "imagenet", "needs annotations: the validation ground truth"),
    ("vimnas.tokens", {"image_tube": 1}, "image_tube goes with tubes"),
    ("vimnas.tokens.tubes", [], "one at least"),
    ("vimnas.tokens.tubes", [{**TUBES[0], "kernel": [4, 8]}], "kernel: value 3 is missing"),
    ("vimnas.tokens.tubes", [{**TUBES[0], "stride": [0, 8, 8]}], "stride must be positive"),
    ("vimnas.tokens.tubes", [{**TUBES[0], "kernel": [4, 64, 64]}], "use smaller kernels"),
    (f"{VIDEO}.frames", 2, "does not fit an input of (2, 32, 32)", "or a larger input"),
    (f"{VIDEO}.frames", GONE, "a video dataset needs frames and fps"),
    (f"{VIDEO}.layout", "kinetics", "needs annotations: the CSV"),
    (f"{VIDEO}.layout", "imagenet", "is for images"),
    (f"{VIDEO}.annotations", "a.csv", 'for the layouts "csv", "lists", "kinetics"'),
    (f"{VIDEO}.videos", "v", 'for the layouts "lists", "kinetics", "ssv2"'),
    (f"{IMAGE}.layout", "ssv2", "is for video"),
    (f"{IMAGE}.frames", 8, "for video datasets only"),
    (f"{IMAGE}.test_clips", 4, "for video datasets only"),
    (f"{IMAGE}.resize", 16, "smaller than the crop of size 32"),
    (f"{IMAGE}.crop_scale", [0.9, 0.1], "needs 0 < low <= high", "(0.9, 0.1)"),
    (f"{IMAGE}.crop_scale", [0.5, 1.5], "at most 1", "1.5"),
    (f"{IMAGE}.crop_ratio", [0, 1], "needs 0 < low <= high", "(0.0, 1.0)"),
]  # fmt: skip


def changed(path: str, value: object) -> dict[str, Any]:
    """The small configuration with one dotted key set."""
    raw = copy.deepcopy(small_config())
    node: Any = raw
    *parents, last = path.split(".")
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value
    if value is GONE:
        del node[last]
    return raw


def is_said(value: Any, message: str) -> bool:
    """Whether a plain value stands in the message; of others the rows say how they are told."""
    if value is GONE or value is None or isinstance(value, dict | list):
        return True
    forms = {repr(value), json.dumps(value)} | (
        {f"{value:g}"} if isinstance(value, float) else set()
    )
    return any(form in message for form in forms)


@pytest.mark.parametrize(
    ("path", "value", "words"), [(path, value, words) for path, value, *words in VALUES]
)
def test_a_wrong_value_is_refused_with_its_key_and_what_is_right(path, value, words):
    with pytest.raises(ConfigError) as refused:
        parse_config(changed(path, value))
    message = str(refused.value)
    assert [w for w in (path.rpartition(".")[2], *words) if w not in message] == []
    assert "unknown" in message or is_said(value, message)


#: (changes to the small configuration without its videos, what the answer must say)
PLACES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    (
        {"vimnas.data.datasets.cifar": {"size": 40}, "vimnas.schedule.image_dataset": "imagenet"},
        ("images of one size", "'cifar': 40"),
    ),
    (
        {"vimnas.tokens.tubes": [{"kernel": [1, 8, 8], "stride": [1, 4, 4]}]},
        ("neither overlap nor leave gaps", "1x8x8/1x4x4/0x0x0", "make its stride its kernel"),
    ),
    (
        {"vimnas.tokens.tubes": [{**TUBES[1], "offset": [0, 4, 4]}]},
        ("neither overlap nor leave gaps", "0x4x4"),
    ),
    ({f"{IMAGE}.size": 8 * 65}, ("65 patches along a side, 64 at most", "size")),
]


@pytest.mark.parametrize(
    "switch", [("positions", "learned", 'positions "learned"'),
               ("relative_positions", 9, "relative_positions 9")]
)  # fmt: skip
@pytest.mark.parametrize(("changes", "words"), PLACES)
def test_positions_of_one_grid_refuse_what_has_several(changes, words, switch):
    key, value, said = switch
    raw = changed(f"vimnas.model.{key}", value)
    datasets = raw["vimnas"]["data"]["datasets"]
    del datasets["k400"]
    parse_config(raw)
    for path, change in changes.items():
        *parents, last = path.split(".")
        node: Any = raw
        for part in parents:
            node = node[part]
        node[last] = {**datasets["imagenet"], **change} if isinstance(change, dict) else change
    with pytest.raises(ConfigError) as refused:
        parse_config(raw)
    assert [w for w in (f"model.{said}", *words) if w not in str(refused.value)] == []


GOOD = json.dumps(small_config())
#: (what the file holds, what the answer must say besides the file's name)
FILES: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("empty", b"", ("not valid JSON",)),
    ("a comment", b"// mine\n" + GOOD.encode(), ("not valid JSON", "line 1")),
    ("a comma too many", GOOD[:-1].encode() + b",}", ("not valid JSON", "column")),
    ("single quotes", GOOD.replace('"', "'").encode(), ("not valid JSON", "double quotes")),
    ("Python's True", GOOD.replace("true", "True").encode(), ("not valid JSON",)),
    ("Latin-1", '{"about": "\u00e9"}'.encode("latin-1"), ("not valid JSON", "utf-8")),
    ("UTF-16", GOOD.encode("utf-16"), ("not valid JSON", "utf-8")),
    ("a list", b"[1]", ("must hold a JSON object",)),
    ("null", b"null", ("must hold a JSON object",)),
    ("lists without end", b"[" * 100_000, ("nest too deeply",)),
    ("a number without end", b'{"train_batch_size": ' + b"1" * 5000 + b"}", ("4300 digits",)),
    ("YAML", b"train_batch_size: 8\n", ("not valid JSON",)),
]  # fmt: skip


@pytest.mark.parametrize(("content", "words"), [f[1:] for f in FILES], ids=[f[0] for f in FILES])
def test_a_file_that_is_no_configuration_is_named_with_what_is_wrong(content, words, tmp_path):
    file = tmp_path / "mine.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load_config(file)
    assert [w for w in (str(file), *words) if w not in str(refused.value)] == []


def test_a_key_that_stands_twice_is_refused_and_a_byte_order_mark_is_not(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"train_batch_size": 8, "train_batch_size": 4}')
    with pytest.raises(ConfigError, match='"train_batch_size" stands twice'):
        load_config(file)
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_config(file).global_batch == 8


@pytest.mark.parametrize(
    ("path", "reason"), [(".", "Is a directory"), ("none.json", "No such file or directory")]
)
def test_a_configuration_that_cannot_be_read_is_named(path, reason, tmp_path):
    with pytest.raises(ConfigError, match=f"cannot read the configuration .*{reason}"):
        load_config(tmp_path / path)


#: (--set ..., what the answer must say)
OVERRIDES: list[tuple[str, ...]] = [
    ("foo", "--set takes KEY=VALUE", "'foo'"),
    ("=3", "--set takes KEY=VALUE", "'=3'"),
    ("vimnas.nope=1", 'unknown key "vimnas.nope"', "known: alpha"),
    ("vimnas..space=nano", 'unknown key "vimnas."', "known: alpha"),
    ("vimnas.space.size=1", '"space" is not a section'),
    ("vimnas.tokens.tubes.0.kernel=[1,1,1]", '"tubes" is not a section'),
    ("vimnas.data.k500.root=/x", "no dataset k500", 'did you mean "k400"?'),
    ("vimnas.data.k400.num_clases=3", "k400.num_clases", 'did you mean "num_classes"?'),
    ("vimnas.data.datasets.k40.root=/x", 'missing key "vimnas.data.datasets.k40.kind"'),
    ("vimnas.data.k400.root=", "k400.root: must name a file or folder (got '')"),
    ("vimnas.alpha.lr=NaN", "vimnas.alpha.lr: must be a finite number (got nan)"),
    ("vimnas.alpha.lr=1e999", "vimnas.alpha.lr: must be a finite number (got inf)"),
    ("vimnas.alpha.lr=[3e-4", "vimnas.alpha.lr: must be a number (got '[3e-4')"),
    ('vimnas.alpha={"lr":1,"lr":2}', '"lr" stands twice'),
    ("vimnas.seed=__import__('os').getpid()", "vimnas.seed: must be a whole number (got \"__imp"),
    ("vimnas.seed=2**31", "vimnas.seed: must be a whole number (got '2**31')"),
    ("vimnas.space= nano", "' nano' is none of vit_t"),
    ("vimnas.arch=" + "[" * 100_000, "--set vimnas.arch: lists or objects nest too deeply"),
    ("train_batch_size=" + "1" * 5000, "--set train_batch_size:", "4300 digits"),
    ("train_batch_size=1e3", "positive whole number, got 1000.0"),
    ("vimnas=3", "vimnas must be an object, got 3"),
    ("vimnas.output_dir=2024", "vimnas.output_dir: must be a path, in quotes (got 2024)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "words"), [(o, words) for o, *words in OVERRIDES], ids=lambda v: str(v)[:40]
)
def test_an_override_that_cannot_be_is_refused(override, words, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(GOOD)
    with pytest.raises(ConfigError) as refused:
        load_config(file, [override])
    assert [w for w in words if w not in str(refused.value)] == []


#: (changes, ranks, what the answer must say)
SHARES: list[tuple[dict[str, Any], int, tuple[str, ...]]] = [
    ({}, 3, ("train_batch_size 8", "3 processes", "e.g. 9")),
    ({"vimnas.alpha.batch": 4}, 8, ("vimnas.alpha.batch 4", "8 processes", "e.g. 8")),
    (
        {"train_batch_size": 6, f"{IMAGE}.mixup": 0.8},
        2,
        ("3 samples per process is odd", "['imagenet']"),
    ),
    (
        {"train_batch_size": 2, f"{VIDEO}.cutmix": 1.0},
        2,
        ("1 samples per process is odd", "['k400']"),
    ),
]


@pytest.mark.parametrize(("changes", "ranks", "words"), SHARES)
def test_batches_that_ranks_cannot_share_are_refused(changes, ranks, words, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(GOOD)
    config = load_config(file, [f"{key}={json.dumps(value)}" for key, value in changes.items()])
    totals = {config.global_batch, config.alpha_batch}
    with pytest.raises(ConfigError) as refused:
        [config.micro_batch(ranks, total) for total in totals]
    assert [w for w in words if w not in str(refused.value)] == []


# -- command lines --------------------------------------------------------------------------------

#: what stands for what in a command line; HERE is a folder with a run and its configuration
PLACES = {
    "CONFIG": "--deepspeed_config HERE/config.json",
    "NEW": "--set vimnas.output_dir=HERE/out",
    "RUN": "--checkpoint HERE/run",
    "OUT": "--out HERE/out",
}
#: (script, its arguments, what the answer must say)
COMMANDS: list[tuple[str, ...]] = [
    ("train", "", "--deepspeed_config", "required"),
    ("train", "--deepspeed_config none.json", "none.json", "No such file"),
    ("train", "CONFIG --epochs 3", "unrecognized arguments: --epochs 3"),
    ("train", "CONFIG", "HERE/run already holds a run", "--resume", "--overwrite"),
    ("train", "CONFIG --resume --overwrite", "exclude each other"),
    ("train", "CONFIG --resume HERE/none", "no checkpoint", "HERE/none"),
    ("train", "CONFIG NEW --resume", "HERE/out holds no run to resume: leave --resume out"),
    ("train", "CONFIG NEW --arch none", "cannot read the architecture none"),
    ("train", "CONFIG NEW --arch HERE/odd.json", "HERE/odd.json", "depth 9 needs"),
    ("train", "CONFIG NEW --inherit HERE/none", "no checkpoint", "HERE/none"),
    ("train", "CONFIG NEW --set vimnas.model.init=HERE/none", "vimnas.model.init", "HERE/none"),
    ("train", "CONFIG --set vimnas.space=vit_h --dry_run", "'vit_h'", "vit_t, vit_s"),
    (
        "train",
        "CONFIG NEW --set vimnas.data.imagenet.mixup=0.5 --set train_batch_size=7",
        "7 samples per process is odd",
    ),
    ("evaluate", "--checkpoint HERE/none", "no checkpoint", "HERE/none"),
    ("evaluate", "RUN --views dense --single_view", "exclude each other"),
    ("evaluate", "RUN --views sparse", "'sparse'", "'even', 'dense'"),
    ("evaluate", "RUN --stride 1", "--stride 1", "--views dense"),
    ("evaluate", "RUN --views dense --stride nan", "--stride must be above 0", "nan"),
    ("evaluate", "RUN --split train", "'train'", "'test', 'select'"),
    ("evaluate", "RUN --out HERE/x.csv", "HERE/x.csv", "must end in .json"),
    ("evaluate", "RUN --datasets ssv2", "--datasets ssv2", "imagenet, k400"),
    ("evaluate", "RUN --datasets k400 k400", "names k400 twice"),
    ("evaluate", "RUN --arch huge", "no architecture huge: largest, smallest, or the path"),
    ("evaluate", "RUN --arch HERE/deep.json", "HERE/deep.json", "recursion depth"),
    ("evaluate", "RUN --arch HERE/list.json", "HERE/list.json", "a JSON object, got [1]"),
    ("evaluate", "RUN --set vimnas.data.held_out=0.2", "held_out is 0.05", "now 0.2"),
    ("evaluate", "RUN --set vimnas.space=vit_t", "another network", "nano", "vit_t"),
    ("evaluate", "RUN --set vimnas.data.k400.root=/none", "/none", "vimnas.data.k400.root"),
    ("perturb_select", "RUN OUT --rule drop", "'drop'", "'keep', 'eliminate'"),
    ("perturb_select", "RUN OUT --tune_steps -1", "--tune_steps", "at least 0, got -1"),
    ("perturb_select", "RUN OUT --tune_lr 0", "--tune_lr", "above 0, got 0"),
    ("perturb_select", "RUN OUT --tune_lr 0.1", "--tune_lr 0.1", "add --tune_steps"),
    ("perturb_select", "RUN OUT --keep 0", "--keep", "at least 1, got 0"),
    ("perturb_select", "RUN OUT --resume", "--resume", "add its --tune_steps"),
    ("perturb_select", "RUN OUT --prefix_mb -1", "--prefix_mb", "at least 0, got -1"),
    ("perturb_select", "RUN OUT --prefix_mb 1 --no_prefix", "not allowed with"),
    ("perturb_select", "RUN OUT --samples -3", "--samples", "at least 1, got -3"),
    ("perturb_select", "RUN --out HERE/odd.json", "--out", "HERE/odd.json is a file"),
    ("evolve", "RUN OUT --population 0", "--population", "at least 1, got 0"),
    ("evolve", "RUN OUT --mutations -1", "--mutations", "at least 0, got -1"),
    (
        "evolve",
        "RUN OUT --depth_probability 1.5",
        "--depth_probability",
        "between 0 and 1, got 1.5",
    ),
    ("evolve", "RUN OUT --params 5", "[0, 5]", "cannot be reached", "44,066 to 187,490"),
    ("evolve", "RUN OUT --params 9:5", "--params 9:5", "empty"),
    ("evolve", "RUN OUT --gflops few", "--gflops few", "HIGH or LOW:HIGH"),
    ("evolve", "RUN OUT --gflops k500=:3", "'k500'", "imagenet, k400"),
    ("evolve", "RUN OUT --latency_batch 0", "--latency_batch", "at least 1, got 0"),
    ("evolve", "RUN OUT --pareto flops", "--pareto flops", "params, gflops, latency_ms"),
    ("evolve", "RUN OUT --pareto --metric loss", "leave out --metric loss"),
    ("evolve", "RUN OUT --pick knee", "--pick knee", "add --pareto"),
    ("evolve", "RUN OUT --pareto --pick far", "--pick far", "knee, best or a budget"),
    ("evolve", "RUN OUT --datasets k400=0", "--datasets k400=0", "above 0"),
    ("evolve", "RUN OUT --cache HERE/c --no_cache", "--no_cache", "not allowed with"),
    ("compare", "RUN OUT", "has no pick", "--pick NAME=FILE"),
    ("compare", "RUN OUT --k 1", "--k", "at least 2, got 1"),
    ("compare", "RUN OUT --evaluations 1", "--evaluations", "at least 2, got 1"),
    ("compare", "RUN OUT --pick mine", "--pick takes NAME=FILE", "'mine'"),
    ("compare", "RUN OUT --pick mine=none.json", "none.json", "No such file"),
    ("ranking", "RUN OUT --count 3", "--count 3", "at least 12", "--trial"),
    ("ranking", "RUN OUT --trial --count 1", "--count 1", "at least 2"),
    ("ranking", "RUN OUT --epochs 0", "--epochs", "at least 1, got 0"),
    ("ranking", "RUN OUT --steps 1", "--steps 1", "one epoch already takes 2"),
    ("ranking", "RUN OUT --epochs 1 --steps 3", "not allowed with"),
    ("ranking", "RUN OUT --jobs 0", "--jobs", "at least 1, got 0"),
    ("ranking", "RUN OUT --datasets k400=x", "--datasets k400=x", "'x' is not a weight"),
    ("export", "RUN OUT", "--arch", "required"),
    ("export", "RUN OUT --arch HERE/odd.json", "HERE/odd.json", "depth 9 needs"),
    ("export", "RUN --arch largest --out HERE/odd.json", "--out", "is a file"),
    ("index_data", "CONFIG", "--dataset", "--update", "required"),
    ("index_data", "CONFIG --dataset k500", "--dataset k500", "has imagenet, k400"),
    ("index_data", "CONFIG --dataset k400 --root HERE/none", "HERE/none", "k400.root"),
    ("index_data", "CONFIG --dataset k400 --limit 0", "--limit", "positive, got 0"),
    ("index_data", "CONFIG --dataset k400 --timeout nan", "--timeout", "positive, got nan"),
    ("index_data", "CONFIG --dataset k400 --set split=x", "KEY=VALUE with a key of", "split=x"),
    ("index_data", "CONFIG --dataset k400 --set frames=x", "k400.frames", "whole number (got 'x')"),
    (
        "index_data",
        "CONFIG --dataset k400 --layout zip",
        "k400.layout",
        "'folders', 'csv'",
        "'zip'",
    ),
    ("index_data", "CONFIG --dataset k400 --annotations a.csv", "HERE/k400/a.csv", "--annotations"),
    ("index_data", "--update HERE/none.parquet", "--update HERE/none.parquet", "no such index"),
    ("index_data", "--update HERE/odd.json", "cannot read the index HERE/odd.json"),
    ("make_shards", "CONFIG --dataset k400", "--out", "required"),
    ("make_shards", "CONFIG OUT --dataset k500", "--dataset k500", "has imagenet, k400"),
    ("make_shards", "CONFIG OUT --dataset k400 --shard_mb 0", "--shard_mb", "positive, got 0"),
    ("make_shards", "CONFIG OUT --dataset k400 --max_bad_share 1", "from 0 to below 1, got 1.0"),
    ("make_shards", "OUT --index HERE/none", "--index HERE/none", "no such index"),
    ("make_shards", "OUT --index a --root b", "--index has the root"),
    ("make_shards", "CONFIG --dataset k400 --out HERE/k400", "holds other files", "--out"),
    ("make_shards", "CONFIG --dataset k400 --out HERE/odd.json", "--out", "is a file"),
    ("view_batch", "CONFIG --out HERE/x.jpg", "--out must end in .png", "x.jpg"),
    ("view_batch", "CONFIG --batch -1", "--batch", "at least 0, got -1"),
    ("view_batch", "CONFIG --count 0", "--count", "at least 1, got 0"),
    ("view_batch", "CONFIG --dataset k500", "--dataset k500", "has imagenet, k400"),
    ("view_batch", "CONFIG --split val", "'val'", "'train', 'alpha', 'select', 'test'"),
    ("view_batch", "CONFIG --split test --batch 99", "--batch 99", "which has 2"),
    ("make_demo_data", "OUT --train_per_class 0", "--train_per_class", "at least 1, got 0"),
    ("make_demo_data", "OUT --workers 0", "--workers", "at least 1, got 0"),
    ("make_demo_data", "OUT --seed -1", "--seed", "at least 0, got -1"),
    ("make_demo_data", "--out HERE/k400", "HERE/k400", "something other than demo data"),
    ("make_demo_data", "--out HERE/odd.json", "--out", "is a file"),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without training, its configuration and indexed data, and odd files."""
    root = tmp_path_factory.mktemp("here")
    write_run(root)
    open_datasets(load_config(root / "config.json").vimnas.data)
    odd = {"embed_dim": 64, "depth": 9, "num_heads": [1], "mlp_ratio": [4]}
    (root / "odd.json").write_text(json.dumps(odd))
    (root / "deep.json").write_text("[" * 100_000)
    (root / "list.json").write_text("[1]")
    return root


def files_in(folder: Path) -> dict[str, int]:
    found = (p for p in folder.rglob("*") if p.suffix != ".lock")
    return {str(p): p.stat().st_mtime_ns for p in found}


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [(script, arguments, words) for script, arguments, *words in COMMANDS],
    ids=[f"{script} {arguments}" for script, arguments, *_ in COMMANDS],
)
def test_a_wrong_command_line_ends_with_2_and_leaves_everything_alone(
    script, arguments, words, here, monkeypatch
):
    monkeypatch.chdir(here)
    monkeypatch.delenv("MASTER_PORT", raising=False)  # of another test's process group
    for name, text in PLACES.items():
        arguments = re.sub(rf"\b{name}\b", text, arguments)
    before = files_in(here)
    code, errors = run_main(script, arguments.replace("HERE", str(here)).split())
    assert code == 2, errors
    assert [w for w in words if w.replace("HERE", str(here)) not in errors] == []
    assert "Traceback" not in errors
    assert files_in(here) == before
    assert not dist.is_initialized()
    assert "MASTER_PORT" not in os.environ


@pytest.mark.parametrize("script", sorted({script for script, *_ in COMMANDS}))
def test_every_script_refuses_an_unknown_option_by_name(script):
    code, errors = run_main(script, ["--frobnicate", "3"])
    assert code == 2
    assert "frobnicate" in errors or "required" in errors


def test_a_warm_up_longer_than_the_run_is_refused_once_the_data_are_known(here, capsys):
    raw = load_config(
        here / "config.json", ["vimnas.schedule.warmup=99", "vimnas.schedule.warmup_unit=steps"]
    )
    sizes = open_datasets(raw.vimnas.data, check=False).sizes
    with pytest.raises(ConfigError, match="warmup 99 steps exceeds the run's 5 steps"):
        Schedule.build(raw, sizes)


@pytest.mark.slow
def test_a_user_sees_one_short_answer_and_exit_code_2(here):
    command = [sys.executable, str(ROOT / "scripts/train.py"), "--deepspeed_config"]
    command += [str(here / "config.json"), "--set", "vimnas.space=vit_h"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2:] == [
        "cannot start:",
        "vimnas: space 'vit_h' is none of vit_t, vit_s, vit_b, vit_l, nano",
    ]
