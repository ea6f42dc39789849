"""The forms in which people have Kinetics, lists of files and ImageNet."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

import pytest

from tests.media import section, touch
from vimnas_ds.config import DataSection
from vimnas_ds.data.bad import BadAnnotations, DataMissing
from vimnas_ds.data.catalog import Catalog, Sample, scan_dataset
from vimnas_ds.data.joint import open_datasets
from vimnas_ds.data.recognise import recognise_layout
from vimnas_ds.data.splits import drop_overlap, split_catalog

HEADER = "label,youtube_id,time_start,time_end,split\n"


def ids(count: int, letter: str = "v") -> list[str]:
    return [f"{letter}-_{i:08d}" for i in range(count)]


def kinetics(root: Path, **changes: object) -> Catalog:
    options = {"layout": "kinetics", "annotations": "train.csv"} | changes
    return scan_dataset("k400", section(root, "video", **options))


@pytest.mark.parametrize(
    "place",
    [
        "train/{label}/{id}_000001_000011.mp4",
        "train/{id}_000001_000011.webm",
        "{id}_000001_000011.MKV",
        "videos/train/{label}/{id}.mp4",
    ],
)
def test_kinetics_csv_finds_its_files_wherever_they_lie(tmp_path: Path, place: str) -> None:
    labels = ["a, b", "c"]
    names = [place.format(label=labels[i % 2], id=name) for i, name in enumerate(ids(3))]
    touch(tmp_path, *names[:2], "val/other.mp4", f"val/{ids(9)[8]}_000000_000010.mp4")
    rows = "".join(f'"{labels[i % 2]}",{name},1,11.0,train\n' for i, name in enumerate(ids(3)))
    (tmp_path / "train.csv").write_text(HEADER + rows)
    (tmp_path / "val.csv").write_text(HEADER + f"c,{ids(9)[8]},0,10,validate\nd,x,0,1,test\n")
    found = kinetics(tmp_path, test_annotations="val.csv")
    assert found.class_names == ("a, b", "c")
    assert sorted(s.path for s in found.train) == sorted(names[:2])
    assert {s.path: s.label for s in found.train} == {names[0]: 0, names[1]: 1}
    assert found.test == (Sample(f"val/{ids(9)[8]}_000000_000010.mp4", 1),)
    assert found.missing_names == (f"{ids(3)[2]}_000001_000011.mp4",)


def test_a_clip_that_lies_in_two_places_is_taken_from_its_own_split(tmp_path: Path) -> None:
    train, val = ids(2)
    both = [f"{split}/{train}_000001_000011.mp4" for split in ("extra", "train")]
    touch(tmp_path, *both, f"val/{val}_000001_000011.mp4")
    (tmp_path / "train.csv").write_text(
        HEADER + f"a,{train},1,11,train\na,{val},1,11,val\na,{train},1,11,train\n"
    )
    assert kinetics(tmp_path).train == (Sample(both[1], 0),)  # the repeated row counts once


def test_ids_of_the_csv_keep_training_apart_from_validation_lists(tmp_path: Path) -> None:
    """Also where the file's name does not show the id, or the validation file is not there."""
    shared, unseen = ids(2, "s")
    own = ids(30)
    k600, k400 = tmp_path / "k600", tmp_path / "k400"
    touch(
        k600, *(f"train/{name}.mp4" for name in [shared, unseen, *own]), f"val/{ids(1, 'x')[0]}.mp4"
    )
    rows = "".join(f"a,{name},5,15,train\n" for name in [shared, unseen, *own])
    (k600 / "train.csv").write_text(HEADER + rows + f"a,{ids(1, 'x')[0]},5,15,val\n")
    touch(k400, *(f"train/a/{name}_000001_000011.mp4" for name in ids(30, "k")))
    touch(k400, f"val/a/{shared}_000001_000011.mp4")
    rows = "".join(f"a,{name},1,11,train\n" for name in ids(30, "k"))
    (k400 / "train.csv").write_text(HEADER + rows + f"a,{shared},1,11,val\na,{unseen},1,11,val\n")
    catalogs = {"k400": kinetics(k400), "k600": kinetics(k600)}
    splits = {name: split_catalog(catalog, 0.2) for name, catalog in catalogs.items()}
    kept, dropped = drop_overlap(splits, catalogs)
    left = {s.path for part in ("train", "alpha", "select") for s in kept["k600"][part]}
    assert left == {f"train/{name}.mp4" for name in own}
    assert dropped == {"k400": 0, "k600": 2}


def bare_ids(count: int) -> list[str]:
    """As YouTube gives them: 64 random bits."""
    draw = random.Random(0)
    codes = [base64.urlsafe_b64encode(draw.randbytes(8)) for _ in range(count)]
    return [code.decode().rstrip("=") for code in codes]


NAMES = bare_ids(90)


@pytest.mark.parametrize(
    ("names", "kind", "dropped"),
    [
        (NAMES, "video", 5),
        (NAMES, "image", 0),
        ([n if i % 2 else f"{n}_000001_000011" for i, n in enumerate(NAMES)], "video", 5),
        ([n if i % 20 else f"clip {i}" for i, n in enumerate(NAMES, 1)], "video", 5),
        ([n if i % 5 else f"clip {i}" for i, n in enumerate(NAMES, 1)], "video", 0),
        ([f"video_{i:05}" for i in range(90)], "video", 0),
        ([f"{i:011}" for i in range(90)], "video", 0),
        ([str(100_000 + i) for i in range(90)], "video", 0),
    ],
    ids="ids images both 95% 80% counters digits ssv2".split(),
)
def test_bare_ids_keep_videos_apart_where_nearly_all_files_are_named_by_ids(
    tmp_path: Path, names: list[str], kind: str, dropped: int
) -> None:
    """One dataset trains on the first 40 videos, another tests on the first 5 of them."""
    suffix = "png" if kind == "image" else "mp4"
    parts = {"one": (names[:40], names[80:85]), "two": (names[40:80], names[:5])}
    for name, (train, test) in parts.items():
        touch(tmp_path / name, *(f"train/a/{n}.{suffix}" for n in train))
        touch(tmp_path / name, *(f"val/a/{n[:11]}.{suffix}" for n in test))
    datasets = {name: section(tmp_path / name, kind) for name in parts}
    data = open_datasets(DataSection(datasets=datasets, index_dir=tmp_path / "none"), build=False)
    assert data.dropped == {"one": dropped, "two": 0}


@pytest.mark.parametrize("separator", [" ", ",", ", ", "\t", ";"])
def test_lists_without_a_header_are_read_with_any_separator(tmp_path: Path, separator: str) -> None:
    names = ["a b.mp4", "c, d.mp4", "-e.mp4", 'q"q.mp4', "2 3.mp4"]
    touch(tmp_path, *(f"videos/{name}" for name in names))
    lines = [f"{name}{separator}{i % 3}" for i, name in enumerate(names[:4])]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n\n")
    absolute = tmp_path / "videos" / names[4]
    (tmp_path / "val.txt").write_text(f'{absolute}{separator}1\n"gone ""x"".mp4"{separator}2\n')
    recipe = {"layout": "lists", "annotations": "train.txt", "test_annotations": "val.txt"}
    found = scan_dataset("toy", section(tmp_path, "video", videos="videos", **recipe))
    assert {s.path: s.label for s in found.train} == {
        f"videos/{name}": i % 3 for i, name in enumerate(names[:4])
    }
    assert found.test == (Sample(f"videos/{names[4]}", 1),)
    assert found.absent_test == (Sample('videos/gone "x".mp4', 2),)
    assert found.class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        ("1.mp4 3\n", "2.mp4 0\n", r"train\.txt, line 1: the label 3 is outside the head.*0 to 2"),
        ("1.mp4 -1\n", "2.mp4 0\n", "the label -1 is outside the head"),
        ("1.mp4\n", "2.mp4 0\n", "line 1: '1.mp4' is not `path label`"),
        (
            "1.mp4 0\n1.mp4 1\n",
            "2.mp4 0\n",
            "1.mp4 stands there twice: as training file of class 0",
        ),
        ("1.mp4 0\n", "1.mp4 0\n", "1.mp4 stands there twice.*as test file"),
        ("/elsewhere/1.mp4 0\n", "2.mp4 0\n", "does not lie under the root"),
        ("", "2.mp4 0\n", 'no usable file in the split "train"'),
        ("9.mp4 0\n", "2.mp4 0\n", r"1 annotated files are missing: 9\.mp4"),
        ("\xff", "2.mp4 0\n", "cannot read"),
    ],
)
def test_lists_that_cannot_be_meant_are_refused_in_words(
    tmp_path: Path, train: str, val: str, words: str
) -> None:
    touch(tmp_path, "1.mp4", "2.mp4")
    (tmp_path / "train.txt").write_text(train, encoding="latin-1")
    (tmp_path / "val.txt").write_text(val)
    recipe = {"layout": "lists", "annotations": "train.txt", "test_annotations": "val.txt"}
    with pytest.raises((BadAnnotations, DataMissing), match=words):
        scan_dataset("toy", section(tmp_path, "video", **recipe))


def test_csv_and_ssv2_duplicates_and_labels_outside_the_head_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "1.mp4", "20bn-something-something-v2/7.webm")
    recipe = {"layout": "csv", "annotations": "list.csv"}
    for rows, words in (
        ("1.mp4,7,train\n", "row 2: the label 7 is outside the head"),
        ("1.mp4,a,train\n1.mp4,b,train\n", "1.mp4 stands there twice"),
        ("1.mp4,,train\n", "row 2: path, class or split is empty"),
    ):
        (tmp_path / "list.csv").write_text("path,class,split\n" + rows)
        with pytest.raises(BadAnnotations, match=words):
            scan_dataset("toy", section(tmp_path, "video", **recipe))
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "labels.json").write_text('{"Bending it": "0"}')
    entry = [{"id": "7", "template": "Bending [it]"}]
    for name in ("train.json", "validation.json"):
        (labels / name).write_text(json.dumps(entry))
    with pytest.raises(BadAnnotations, match=r"v2/7\.webm stands there twice"):
        scan_dataset("ssv2", section(tmp_path, "video", layout="ssv2"))
    (labels / "train.json").write_text(json.dumps([{**entry[0], "id": "../../7"}]))
    with pytest.raises(BadAnnotations, match=r"entry 1 has the id '\.\./\.\./7'"):
        scan_dataset("ssv2", section(tmp_path, "video", layout="ssv2"))
    (labels / "train.json").write_text('{"id": 1}')
    with pytest.raises(BadAnnotations, match=r"train\.json does not hold a list"):
        scan_dataset("ssv2", section(tmp_path, "video", layout="ssv2"))


WNIDS = ["n00000003", "n00000001", "n00000002"]  # the devkit's order is not the sorted one
TRUTHS = {
    "LOC_val_solution.csv": "ImageId,PredictionString\n"
    "ILSVRC2012_val_00000002,n00000001 1 2 3 4 n00000001 5 6 7 8\n"
    "ILSVRC2012_val_00000001,n00000003 1 2 3 4\nILSVRC2012_val_00000003,n00000002 1 1 1 1\n",
    "val.txt": "ILSVRC2012_val_00000001.JPEG 2\nILSVRC2012_val_00000002.JPEG 0\n"
    "ILSVRC2012_val_00000003.JPEG 1\n",
    "ILSVRC2012_validation_ground_truth.txt": "1\n2\n3\n",
}
SYNSETS = {
    "map_clsloc.txt": "n00000001 2 cat\nn00000002 3 dog\nn00000003 1 owl\n",
    "order.txt": "n00000003 owl\nn00000001\nn00000002\n",
}


@pytest.mark.parametrize(
    ("truth", "synsets"),
    [(name, None) for name in list(TRUTHS)[:2]] + [(list(TRUTHS)[2], name) for name in SYNSETS],
)
def test_imagenets_flat_validation_folder_is_read_with_every_ground_truth(
    tmp_path: Path, truth: str, synsets: str | None
) -> None:
    touch(tmp_path, *(f"train/{wnid}/{wnid}_1.JPEG" for wnid in WNIDS))
    touch(tmp_path, *(f"val/ILSVRC2012_val_0000000{i}.JPEG" for i in (1, 2)))
    for name, text in (TRUTHS | SYNSETS).items():
        (tmp_path / name).write_text(text)
    assert recognise_layout(tmp_path / truth) == "imagenet"
    recipe = {"layout": "imagenet", "annotations": truth, "synsets": synsets}
    found = scan_dataset("imagenet", section(tmp_path, **recipe))
    assert found.class_names == tuple(sorted(WNIDS))
    assert [s.label for s in found.train] == [0, 1, 2]
    assert found.test == (
        Sample("val/ILSVRC2012_val_00000001.JPEG", 2),
        Sample("val/ILSVRC2012_val_00000002.JPEG", 0),
    )
    assert found.absent_test == (Sample("val/ILSVRC2012_val_00000003.JPEG", 1),)


def test_the_devkits_numbers_alone_say_what_else_is_needed(tmp_path: Path) -> None:
    touch(tmp_path, "train/n00000001/1.JPEG", "val/ILSVRC2012_val_00000001.JPEG")
    (tmp_path / "truth.txt").write_text("1\n")
    recipe = {"layout": "imagenet", "annotations": "truth.txt"}
    with pytest.raises(DataMissing, match=r"imagenet\.synsets to the devkit's map_clsloc\.txt"):
        scan_dataset("imagenet", section(tmp_path, **recipe))
    (tmp_path / "truth.txt").write_text("what is this\n")
    with pytest.raises(BadAnnotations, match=r"entry 1, 'what is this'.*LOC_val_solution"):
        scan_dataset("imagenet", section(tmp_path, **recipe))


def test_annotations_are_recognised_by_their_content(tmp_path: Path) -> None:
    cases = {
        "kinetics": HEADER + "a,b,1,2,train\n",
        "csv": "path,class,split\n1.mp4,a,train\n",
        "lists": "train/a b.mp4 3\n",
    }
    for layout, text in cases.items():
        (tmp_path / "some.file").write_text(text)
        assert recognise_layout(tmp_path / "some.file") == layout
    (tmp_path / "ssv2").mkdir()
    (tmp_path / "ssv2/labels.json").write_text("{}")
    assert recognise_layout(tmp_path / "ssv2") == "ssv2"
    (tmp_path / "nothing.csv").write_text("\n")
    with pytest.raises(DataMissing, match="is empty"):
        recognise_layout(tmp_path / "nothing.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataMissing, match="neither SSV2's"):
        recognise_layout(tmp_path / "empty")
