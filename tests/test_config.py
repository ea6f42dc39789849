"""Configurations: the shipped ones load and say Table 10; what overrides and batches come to."""

from __future__ import annotations

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
    last = done.stdout.rpartition("\n\n")[2].splitlines()
    assert last[0] == "it would not start, with data missing:"
    assert [line.partition(":")[0] for line in last[1:]] == ["imagenet", "k400", "k600", "ssv2"]
    done = run_train("--deepspeed_config", config, "--set", here)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for name in ("imagenet", "k400", "k600", "ssv2"):
        assert f"set vimnas.data.{name}.root" in done.stderr
    assert not (tmp_path / "run").exists()
