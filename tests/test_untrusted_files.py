"""Files from others are data: none of them runs code, none leads out of its folder."""

from __future__ import annotations

import ast
import contextlib
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.conftest import ROOT
from tests.launch import run_main
from tests.media import section, touch
from tests.small import small_config
from tests.untrained import write_run
from vimnas_ds.arch_file import read_arch
from vimnas_ds.config import ConfigError, load_config, parse_config
from vimnas_ds.data.bad import BadAnnotations, BadFile
from vimnas_ds.data.catalog import scan_dataset
from vimnas_ds.data.images import read_image
from vimnas_ds.data.index_file import read_header
from vimnas_ds.data.shards import read_members, write_members
from vimnas_ds.export import ExportError, load_subnet
from vimnas_ds.manifest import MANIFEST, FileEntry, write_manifest
from vimnas_ds.search.alone import Trainings
from vimnas_ds.search.run import open_network, open_run
from vimnas_ds.train.engine import build_engine, build_supernet
from vimnas_ds.train.ranks import Ranks
from vimnas_ds.train.run_files import ALPHAS_FILE, WEIGHTS_FILE, find_checkpoint
from vimnas_ds.train.warm_start import inherit, read_weights

ONE = Ranks(0, 1, torch.device("cpu"))


class Payload:
    """Unpickled, it would make the file `ran` in the working directory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("ran", "w"))


def pickled(file: Path) -> None:
    file.write_bytes(pickle.dumps({"model": Payload()}))


def zipped(file: Path) -> None:
    torch.save({"state_dict": {"w": torch.zeros(2)}, "more": Payload()}, file)


def tarred(file: Path) -> None:
    """torch's oldest format: a tar of pickles."""
    part = file.with_suffix(".part")
    with tarfile.open(file, "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            part.write_bytes(pickle.dumps(Payload()))
            tar.add(part, name)


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("theirs"))


@pytest.fixture
def run(trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a run to tamper with; the payload would go off beside it."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / "step00000001"


def start_from(run: Path) -> None:
    config = load_config(run / "config.json")
    inherit(build_supernet(config), run, config)


def weights_of_an_export(run: Path) -> None:
    export = run / "export"
    export.mkdir()
    shutil.copyfile(checkpoint_of(run) / WEIGHTS_FILE, export / "model.safetensors")
    about = {
        "format": "vimnas_ds sub-network 1",
        "arch": {"embed_dim": 64, "depth": 1, "num_heads": [1], "mlp_ratio": [4]},
        "head_dim": 32,
        "position_dim": 64,
        "image_tube": 0,
        "tubes": [{"kernel": [1, 8, 8], "stride": [1, 8, 8], "offset": [0, 0, 0]}],
        "qk_norm": True,
        "layer_scale": True,
        "num_classes": {"imagenet": 2},
    }
    (export / "arch.json").write_text(json.dumps(about))
    load_subnet(export)


@pytest.mark.parametrize("write", [pickled, zipped, tarred])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_weights_to_start_from_are_never_unpickled(write, suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"theirs{suffix}"
    write(file)
    with pytest.raises(ConfigError, match=rf"vimnas\.model\.init: .*theirs{suffix}"):
        read_weights(file)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02.", b"\x80\x02K\x01.", b"\x80\x02u.", b"PK\x03\x04"]
)
def test_pickles_that_are_cut_are_refused_in_words(content, tmp_path):
    file = tmp_path / "cut.pth"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"vimnas\.model\.init: .*cut\.pth"):
        read_weights(file)


def test_the_payload_would_run_where_it_was_let(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickled(tmp_path / "theirs.pth")
    with contextlib.suppress(Exception):
        torch.load("theirs.pth", weights_only=False)
    assert Path("ran").exists()


@pytest.mark.parametrize("write", [pickled, zipped])
@pytest.mark.parametrize(
    ("file", "read"),
    [
        (WEIGHTS_FILE, lambda run: open_network(checkpoint_of(run), ONE)),
        (WEIGHTS_FILE, start_from),
        (WEIGHTS_FILE, weights_of_an_export),
        (ALPHAS_FILE, lambda run: open_run(run, ONE)),
    ],
    ids=["network", "inherit", "export", "alphas"],
)
def test_pickles_in_place_of_safetensors_are_refused(
    write: Callable[[Path], None], file: str, read: Callable[[Path], Any], run: Path
) -> None:
    checkpoint = checkpoint_of(run)
    write(checkpoint / file)
    files = {p.name: FileEntry.of(p) for p in checkpoint.iterdir() if p.name != MANIFEST}
    write_manifest(checkpoint, files, {})  # whoever tampers with a file can sign it
    with pytest.raises((ConfigError, ExportError), match=r"(?i)header"):
        read(run)
    assert not Path("ran").exists()


def test_latest_cannot_lead_out_of_the_run_and_hides_nothing(run, tmp_path):
    elsewhere = Path(shutil.copytree(checkpoint_of(run), tmp_path / "elsewhere"))
    latest = run / "checkpoints" / "latest"
    for text in ("../../elsewhere", str(elsewhere)):
        latest.write_text(text)
        assert find_checkpoint(run) == checkpoint_of(run)
        with pytest.raises(ConfigError, match=r"no checkpoint at .*checkpoints/elsewhere"):
            find_checkpoint(latest)


def test_deepspeed_gets_a_dict_and_never_a_file_that_it_would_parse(monkeypatch):
    import deepspeed

    seen: dict[str, Any] = {}

    def initialize(**given: Any) -> Any:
        seen.update(given)
        raise InterruptedError

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    with pytest.raises(InterruptedError):
        build_engine(parse_config(small_config()), ONE)
    assert type(seen["config"]) is dict
    assert seen.keys() == {"model", "optimizer", "config"}


# -- paths ----------------------------------------------------------------------------------------

CSV = "path,class,split\n{},a,train\nb.png,b,train\nc.png,a,val\n"
KINETICS = "label,youtube_id,time_start,time_end,split\na,{},0,10,train\na,x,0,10,val\n"


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "a/../../secret.png"])
def test_a_csv_cannot_name_files_outside_the_root(path, tmp_path):
    root = tmp_path / "data"
    touch(root, "b.png", "c.png")
    touch(tmp_path, "secret.png")
    (root / "list.csv").write_text(CSV.format(path))
    with pytest.raises(BadAnnotations, match=rf"list\.csv: '{path}' does not lie under the root"):
        scan_dataset("toy", section(root, layout="csv", annotations="list.csv"))


@pytest.mark.parametrize("path", ["../secret.mp4", "OUT/secret.mp4", "../data/../secret.mp4"])
def test_a_list_cannot_name_files_outside_the_root_but_may_write_paths_in_full(path, tmp_path):
    root = tmp_path / "data"
    touch(root, "a.mp4", "b.mp4")
    touch(tmp_path, "secret.mp4")
    recipe = {"layout": "lists", "annotations": "train.txt", "test_annotations": "val.txt"}
    (root / "val.txt").write_text("b.mp4 0\n")
    (root / "train.txt").write_text(f"{path.replace('OUT', str(tmp_path))} 0\n")
    with pytest.raises(BadAnnotations, match=r"secret\.mp4'? does not lie under the root"):
        scan_dataset("toy", section(root, "video", **recipe))
    (root / "train.txt").write_text(f"{root}/a.mp4 0\n")
    assert [s.path for s in scan_dataset("toy", section(root, "video", **recipe)).train] == [
        "a.mp4"
    ]


def test_ids_of_kinetics_and_ssv2_are_no_paths(tmp_path):
    touch(tmp_path, "x_000000_000010.mp4", "20bn-something-something-v2/1.webm")
    (tmp_path / "all.csv").write_text(KINETICS.format("../../etc/x"))
    with pytest.raises(BadAnnotations, match=r"all\.csv, row 2: '\.\./\.\./etc/x' is not a"):
        scan_dataset("toy", section(tmp_path, "video", layout="kinetics", annotations="all.csv"))
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "labels.json").write_text('{"a": "0"}')
    for split in ("train", "validation"):
        (labels / f"{split}.json").write_text('[{"id": "../../x", "template": "a"}]')
    with pytest.raises(BadAnnotations, match=r"train\.json: entry 1 has the id '\.\./\.\./x'"):
        scan_dataset("toy", section(tmp_path, "video", layout="ssv2"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of shards that scripts/make_shards.py wrote."""
    write_run(tmp_path)
    out = tmp_path / "shards"
    config = ["--deepspeed_config", str(tmp_path / "config.json")]
    code, errors = run_main("make_shards", [*config, "--dataset", "imagenet", "--out", str(out)])
    assert code == 0, errors
    return out


@pytest.mark.parametrize("path", [b"../../secret.png", b"/etc/passwd", b"a/../../b", b".."])
def test_members_of_shards_cannot_lie_outside(path, shards):
    about, table = read_members(shards)
    paths = [path, *table["path"].to_pylist()[1:]]
    write_members(shards, about, table.set_column(0, "path", pa.array(paths, pa.binary())))
    with pytest.raises(BadAnnotations, match=rf"members\.parquet names '{path.decode()}'"):
        read_members(shards)


@pytest.mark.parametrize(
    "about", [b"[1, 2]", b"null", b"[" * 100_000, b'{"format": 1, "shards": "/etc/passwd"}']
)
def test_headers_that_are_no_headers_are_refused_in_words(about, shards):
    for file, key, read in (
        (shards / "members.parquet", b"vimnas_shards", lambda: read_members(shards)),
        (shards / "index.parquet", b"vimnas_index", lambda: read_header(shards / "index.parquet")),
    ):
        pq.write_table(pq.read_table(file).replace_schema_metadata({key: about}), file)
        with pytest.raises(BadAnnotations, match=str(file)):
            read()


def test_a_finished_training_cannot_name_a_checkpoint_elsewhere(tmp_path):
    trainings = Trainings(tmp_path, [], Path("train.py"), Path("config.json"), [], {})
    (tmp_path / "00").mkdir()
    for place in ("../../elsewhere", "/etc", "../01/checkpoints/step00000001"):
        (tmp_path / "00" / "result.json").write_text(json.dumps({"checkpoint": place}))
        with pytest.raises(ConfigError, match=r"00/result\.json names .*not of that training"):
            trainings.checkpoint(0)


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "[" * 100_000, '{"arch": [1]}', '{"embed_dim": 1e999, "depth": 1, "num'
     '_heads": [1], "mlp_ratio": [4]}', '{"embed_dim": true, "depth": 1, "num_heads": [1], "mlp_'
     'ratio": [4]}', '{"embed_dim": "x", "depth": null, "num_heads": 3, "mlp_ratio": "4"}',
     '{"embed_dim": 64, "depth": 1, "num_heads": [1], "mlp_ratio": [1' + "0" * 400 + "]}"],
)  # fmt: skip
def test_an_architecture_file_is_only_ever_data(text, tmp_path):
    file = tmp_path / "arch.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=str(file)):
        read_arch(file)


def test_a_picture_that_would_unpack_to_gigabytes_is_a_broken_file(tmp_path):
    file = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(file)
    assert file.stat().st_size < 10**6
    with pytest.raises(BadFile, match="decompression bomb"):
        read_image(file, verify=True)


# -- the code itself ------------------------------------------------------------------------------


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def arguments(node: ast.Call) -> dict[str, Any]:
    return {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}


#: what turns files or texts into code
FORBIDDEN = {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "__import__"}
FORBIDDEN |= {f"{module}.{name}" for module in ("pickle", "cPickle", "dill", "joblib", "marshal")
              for name in ("load", "loads", "Unpickler")}  # fmt: skip


def breaches(source: str) -> list[str]:
    """Calls that read files as code, or could."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, given = called(node), arguments(node)
        if (
            name in FORBIDDEN
            or name.endswith(".load_checkpoint")  # DeepSpeed's unpickles
            or (name == "torch.load" and given.get("weights_only") != "True")
            or (name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False")
            or given.get("shell", "False") != "False"
            or (name.endswith((".extractall", ".extract")) and "tar" in name)
        ):  # fmt: skip
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "pickle.load(f)",
        "eval(text)",
        "engine.deepspeed.load_checkpoint(folder)",
        "subprocess.run(line, shell=True)",
        "tar.extractall(out)",
    ],
)
def test_the_guard_sees_what_it_is_to_see(source):
    assert breaches(source)


def test_no_code_of_the_project_reads_files_as_code():
    files = [p for folder in ("vimnas_ds", "scripts") for p in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = {str(p.relative_to(ROOT)): breaches(p.read_text()) for p in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_a_state_dict_of_tensors_alone_still_loads(tmp_path):
    weights = {"w": torch.arange(3.0)}
    torch.save({"state_dict": weights}, tmp_path / "ours.pth")
    save_file(weights, tmp_path / "ours.safetensors")
    for suffix in (".pth", ".safetensors"):
        torch.testing.assert_close(read_weights(tmp_path / f"ours{suffix}"), weights)
