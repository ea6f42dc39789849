"""Configurations: the shipped ones load and say Table 10; every wrong one is refused in words."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.small import small_config
from vimnas_ds.config import ConfigError, RunConfig, Section, load_config, parse_config
from vimnas_ds.train.run_files import config_object

CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
REFERENCE = {"vitl": "vit_l", "vitb": "vit_b", "vits": "vit_s", "vitt": "vit_t"}


def changed(path: str, value: object) -> dict:
    """The small configuration with one dotted key set."""
    raw = copy.deepcopy(small_config())
    node = raw
    *parents, last = path.split(".")
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value
    return raw


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_configuration_loads_and_says_what_it_is(path):
    config = load_config(path)
    assert next(iter(json.loads(path.read_text()))) == "about"
    assert "Command: " in config.about
    assert "gradient_clipping" in config.deepspeed


@pytest.mark.parametrize(("stem", "space"), REFERENCE.items())
def test_reference_configurations_are_table_10(stem, space):
    config = load_config(ROOT / "ds_configs" / f"{stem}.json")
    vimnas, data = config.vimnas, config.vimnas.data.datasets
    big = space in ("vit_b", "vit_l")
    assert vimnas.space == space
    assert (config.global_batch, vimnas.schedule.epochs, vimnas.image_epochs) == (256, 500, 166)
    assert (vimnas.schedule.warmup, vimnas.schedule.warmup_unit) == (20, "epochs")
    assert vimnas.peak_lr == data["imagenet"].base_lr == (1e-5 if big else 1e-3)
    kinetics_lr = {"vit_l": 2e-5, "vit_b": 5e-5}.get(space, 1e-4)
    for name in ("k400", "k600"):
        assert data[name].base_lr == kinetics_lr
        assert data[name].weight_decay == (1e-5 if big else 1e-3)
        assert (data[name].frames, data[name].fps) == (64, 15)
        assert (data[name].mixup, data[name].cutmix, data[name].label_smoothing) == (0, 0, 0)
        assert data[name].flip
    ssv2 = data["ssv2"]
    assert (ssv2.base_lr, ssv2.weight_decay, ssv2.frames, ssv2.fps) == (2e-5, 1e-5, 32, 24)
    assert (ssv2.mixup, ssv2.cutmix, ssv2.label_smoothing, ssv2.flip) == (0.3, 0, 0.3, False)
    image = data["imagenet"]
    assert (image.weight_decay, image.mixup, image.cutmix) == (0.05, 0.8, 1.0)
    assert image.label_smoothing == 0.1
    assert vimnas.model.drop_path == 0.1
    assert [d.num_classes for d in data.values()] == [1000, 400, 600, 174]
    assert all(d.randaugment and d.random_erasing for d in data.values())


def test_the_written_configuration_loads_back_as_it_ran(tmp_path):
    config = parse_config(small_config())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_object(config)))
    assert load_config(file) == config


def test_overrides_reach_a_dataset_by_its_name_alone(tmp_path):
    file = tmp_path / "c.json"
    file.write_text(json.dumps(small_config()))
    config = load_config(
        file, ["vimnas.data.k400.root=/data/k400", "vimnas.space=vit_t", "train_batch_size=4"]
    )
    assert str(config.vimnas.data.datasets["k400"].root) == "/data/k400"
    assert config.vimnas.space == "vit_t"
    assert config.global_batch == 4


def test_batch_arithmetic_and_precision():
    config = parse_config(small_config(bf16={"enabled": "auto"}))
    assert config.micro_batch(2) == 4
    settings = config.deepspeed_dict(2, has_gpu=True)
    assert settings["bf16"]["enabled"] is True
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert config.deepspeed_dict(2, has_gpu=False)["bf16"]["enabled"] is False
    assert settings["gradient_clipping"] == 0.0
    with pytest.raises(ConfigError, match=r"train_batch_size 8 cannot .* 3 processes.* e.g. 9"):
        config.micro_batch(3)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("zero_optimisation", {"stage": 2}, 'unknown key "zero_optimisation".*zero_optimization'),
        ("gradient_cliping", 1.0, 'unknown key "gradient_cliping".*gradient_clipping'),
        ("gradient_clipping", None, "gradient_clipping must be written"),
        ("gradient_clipping", -1, "gradient_clipping must be written"),
        ("optimizer", {"type": "Adam"}, '"optimizer" is refused.*silently ignore'),
        ("scheduler", {"type": "WarmupLR"}, '"scheduler" is refused'),
        ("fp16", {"enabled": True}, '"fp16" is refused'),
        ("gradient_accumulation_steps", 2, "accumulation_steps 2 is refused.*supplement"),
        ("train_micro_batch_size_per_gpu", 4, "derived from the number of processes"),
        ("train_batch_size", "8", "positive whole number"),
        ("train_batch_size", 0, "positive whole number"),
        ("zero_optimization.stage", 3, "stage must be 2, got 3"),
        ("zero_optimization.stage", 2.0, "stage must be 2, got 2.0"),
        ("zero_optimization.reduce_bucket_size", "big", "must be a positive whole number"),
        ("zero_optimization.reduce_bucket_size", -5, "must be a positive whole number"),
        ("zero_optimization.overlap_comm", "no", "must be true or false"),
        ("zero_optimization.load_from_fp32_weights", False, "unknown or unproved key"),
        ("gradient_clipping", float("nan"), "gradient_clipping must be written"),
        ("gradient_accumulation_steps", True, "it must be 1"),
        ("steps_per_print", "x", "steps_per_print must be a whole number"),
        ("wall_clock_breakdown", "no", "wall_clock_breakdown must be true or false"),
        ("tensorboard", {"enabld": True}, '"tensorboard" is refused'),
        ("checkpoint", {"load_universal": True}, '"checkpoint" is refused'),
        ("flops_profiler", {"enabled": True}, '"flops_profiler" is refused'),
        ("communication_data_type", "fp99", '"communication_data_type" is refused'),
        ("data_types", {"grad_accum_dtype": "bf16"}, 'must be "fp32"'),
        ("vimnas.output_dir", "", "output_dir must name a folder"),
        ("vimnas.schedule.warmup", 100, "warmup 100 exceeds schedule.epochs 3"),
        ("vimnas.schedule.min_lr", 1.0, "min_lr 1 is not below the peak 0.01"),
        ("vimnas.tokens.kind", "tubelet", "own tubes go with kind"),
        ("vimnas.data.datasets.k400.annotations", "a.csv", "annotations is for the layouts"),
        ("vimnas.data.datasets.k400.videos", "v", "videos is for the layout"),
        ("zero_optimization.stage", 1, "stage must be 2, got 1"),
        ("zero_optimization", None, "stage must be 2, got None"),
        ("zero_optimization.round_robin_gradients", True, "round_robin_gradients is refused"),
        ("zero_optimization.offload_optimizer", {"device": "cpu"}, "offload_optimizer is refused"),
        ("zero_optimization.overlap_com", True, "overlap_com.*overlap_comm"),
        ("bf16.enabled", "yes", "bf16.enabled must be"),
        ("bf16.enable", True, 'unknown key "bf16.enable".*enabled'),
        ("bf16.check_grad_overflow", False, "one NaN would reach every weight"),
        ("data_types", {"grad_accum_dtyp": "fp32"}, "grad_accum_dtyp.*grad_accum_dtype"),
        ("vimnas.spaces", "nano", 'unknown key "vimnas.spaces".*"space"'),
        ("vimnas.space", "vit_h", "space 'vit_h' is none of vit_t"),
        ("vimnas.seed", -1, "vimnas.seed: .*got -1"),
        ("vimnas.model.droppath", 0.1, 'vimnas.model.droppath".*"drop_path"'),
        ("vimnas.model.drop_path", 1.0, "vimnas.model.drop_path.*got 1.0"),
        ("vimnas.alpha.evry", 2, 'vimnas.alpha.evry".*"every"'),
        ("vimnas.schedule.warmup_unit", "days", "warmup_unit.*'epochs' or 'steps'"),
        ("vimnas.schedule.image_epochs", 9, "image_epochs exceeds schedule.epochs"),
        ("vimnas.schedule.image_dataset", "k400", "'k400' is not an image dataset"),
        ("vimnas.data.held_out", 0.6, "vimnas.data.held_out.*got 0.6"),
        ("vimnas.data.datasets.k400.fps", None, "a video dataset needs frames and fps"),
        ("vimnas.data.datasets.imagenet.frames", 8, "for video datasets only"),
        ("vimnas.data.datasets.k400.num_class", 5, 'k400.num_class".*"num_classes"'),
        ("vimnas.data.datasets.k400.crop_scale", [0.9, 0.1], "crop_scale needs 0 < low <= high"),
        ("vimnas.data.datasets.k400.resize", 16, "resize 16 is smaller than the crop of size 32"),
        ("vimnas.data.datasets.k400.frames", 2, "datasets.k400: tube .* does not fit"),
        ("vimnas.tokens.kind", "patches", "'tubes' or 'tubelet'"),
        ("vimnas.tokens.image_tube", 5, "image_tube 5 is not one of 2 tubes"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_refused_by_key_and_reason(path, value, words):
    with pytest.raises(ConfigError, match=rf"(?s){words}"):
        parse_config(changed(path, value))


def test_a_duplicate_key_is_refused(tmp_path):
    file = tmp_path / "c.json"
    file.write_text('{"train_batch_size": 8, "train_batch_size": 4}')
    with pytest.raises(ConfigError, match='"train_batch_size" stands twice'):
        load_config(file)


def test_odd_micro_batches_with_mixup_are_refused():
    raw = changed("vimnas.data.datasets.imagenet.mixup", 0.8)
    raw["train_batch_size"] = 6
    with pytest.raises(ConfigError, match=r"3 samples per process is odd .*\['imagenet'\]"):
        parse_config(raw).micro_batch(2)


def sections() -> list[type[Section]]:
    found, queue = [], [Section]
    while queue:
        queue += (subclasses := queue.pop().__subclasses__())
        found += subclasses
    return found


@pytest.mark.parametrize("section", sections(), ids=lambda s: s.__name__)
def test_every_field_is_described(section):
    assert section.__doc__
    if section is not RunConfig:
        assert [n for n, f in section.model_fields.items() if not f.description] == []


def run_train(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_dry_run_says_what_would_run_and_missing_data_ends_a_run_with_code_2(tmp_path):
    config = str(ROOT / "ds_configs" / "vitl.json")
    here = f"vimnas.output_dir={tmp_path / 'run'}"
    done = run_train("--deepspeed_config", config, "--dry_run")
    assert done.returncode == 0
    for words in (
        "2.42e+23",
        "308,255,720",
        "1176",
        "8 processes: 32 samples each",
        "166 epochs x 4,755 steps",
        "334 epochs x 7,632 steps",
        "vimnas.data.ssv2.root",
    ):
        assert words in done.stdout
    done = run_train("--deepspeed_config", config, "--set", here)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for name in ("imagenet", "k400", "k600", "ssv2"):
        assert f"set vimnas.data.{name}.root" in done.stderr
    assert not (tmp_path / "run").exists()
