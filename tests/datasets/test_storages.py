"""Storages: what a raw record is, in which order, and what is reported of a bad annotation."""

from __future__ import annotations

import datetime
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from files import coco, picture, thing, voc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ailab.datasets import (
    ClassificationImageDataset,
    CocoAnnotationDataset,
    COCODataset,
    FileAnnotationDataset,
    FolderPerClassDataset,
    ListDataset,
    Stream,
    StreamDataset,
    TableAnnotationDataset,
    VocAnnotationDataset,
)
from ailab.datasets.base import LabBaseDataset
from ailab.datasets.files.boxes import checked_box, convert_boxes
from ailab.datasets.files.paths import path_inside
from ailab.datasets.storages.shared_list import SharedList, shared_list
from ailab.errors import DataError


def raws(data: LabBaseDataset) -> list[Any]:
    return [data._get_raw(i) for i in range(len(data))]


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# One annotation file


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "x.png 1\n\n  y z.png 0 \n", ["x.png 1", "y z.png 0"]),
        ("a.json", '[{"image": "x.png", "label": 1}, 3]', [{"image": "x.png", "label": 1}, 3]),
        ("a.jsonl", '{"a": "\u2028"}\n\n{"a": [1, 2]}\n', [{"a": "\u2028"}, {"a": [1, 2]}]),
        (
            "a.csv",
            '\ufeffimage, label\nx.png,"1,5"\n\ny,2\n',
            [{"image": "x.png", "label": "1,5"}, {"image": "y", "label": "2"}],
        ),
        ("a.tsv", "image\tlabel\nx.png\t1\n", [{"image": "x.png", "label": "1"}]),
    ],
)
def test_an_annotation_file_is_read_by_its_ending(tmp_path: Path, name: str, content: str, expected: list[Any]) -> None:
    """Lines of .txt, values of .json and .jsonl, rows of .csv and .tsv come in the order of the file, blank lines aside."""
    data = FileAnnotationDataset(written(tmp_path / name, content))
    assert raws(data) == expected
    assert len(data) == len(expected)


def test_several_files_are_one_data_set(tmp_path: Path) -> None:
    """They are read in the order given; a message names the file of the record; load_fun replaces the reader."""
    files = [written(tmp_path / "b.txt", "1\n2\n"), written(tmp_path / "a.txt", "\n3\n")]
    data = FileAnnotationDataset(files)
    assert raws(data) == ["1", "2", "3"]
    assert [data.where(i) for i in (1, 2)] == [f"{files[0]}, line 2", f"{files[1]}, line 2"]
    assert raws(FileAnnotationDataset(str(files[0]), lambda path: path.read_text().split())) == ["1", "2"]


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        (
            "a.jsonl",
            '{"image": "x"}\n{"imagee": "y"}\n',
            {"columns": ["image"]},
            r"a\.jsonl, line 2: there is no 'image'.* 'imagee'",
        ),
        ("a.csv", "image,label\nx,1\ny\n", {}, r"a\.csv, line 3: 1 cells, but the header has 2 columns"),
        ("a.csv", "image,image\nx,1\n", {}, r"a\.csv, line 1: the column 'image' occurs twice"),
        ("a.csv", 'image,label\n"x,1\n', {}, r"a\.csv, line 2: no CSV"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', {}, r"a\.jsonl, line 2: no JSON"),
        ("a.json", "[1,\n 2", {}, r"a\.json, line 2: no JSON"),
        ("a.json", '{"a": 1}', {}, r"a\.json: expected a list of records, got dict"),
        ("a.json", "[NaN]", {}, r"a\.json: no JSON: it has NaN"),
        ("a.json", "[" * 200_000, {}, r"a\.json: the JSON is nested too deeply"),
        (
            "a.jsonl",
            '{"id": 1}\n{"id": 2}\n\n{"id": 1}\n',
            {"unique": "id"},
            r"line 4: id '1' is also in line 1",
        ),
        ("a.jsonl", "3\n", {"columns": ["image"]}, r"line 1: expected a record with 'image', got int 3"),
        ("a.txt", "\n \n", {}, r"a\.txt: the split is empty"),
        ("a.csv", "image,label\n", {}, r"a\.csv: the split is empty"),
        ("a.txt", b"abc\n\xff\xfe\n", {}, r"a\.txt, line 2: no UTF-8 text \(byte 0xff\)"),
        ("a.yaml", "x", {}, r"a\.yaml: unknown extension of an annotation file\. Expected \.txt"),
    ],
)
def test_a_bad_annotation_file_is_reported_by_its_line(
    tmp_path: Path, name: str, content: str | bytes, settings: Any, message: str
) -> None:
    """Each mistake is one DataError with the file, the line where there is one, and what is expected; exit code 3."""
    with pytest.raises(DataError, match=message) as error:
        FileAnnotationDataset(written(tmp_path / name, content), **settings)
    assert error.value.exit_code == 3
    assert len(str(error.value).splitlines()) <= 4


def test_a_missing_annotation_file_is_named(tmp_path: Path) -> None:
    """So is a folder in its place."""
    for path in (tmp_path / "none.txt", written(tmp_path / "d.txt" / "x", "").parent):
        with pytest.raises(DataError, match=rf"{path.name}: cannot be read"):
            FileAnnotationDataset(path)


def test_an_id_in_two_files_is_found(tmp_path: Path) -> None:
    """Files that are read as one have to have different ids over all."""
    files = [written(tmp_path / f"{i}.jsonl", '{"id": 5}\n') for i in range(2)]
    with pytest.raises(DataError, match="id '5' is also in record 0"):
        FileAnnotationDataset(files, unique="id")


@pytest.mark.parametrize("name", ["../x.png", "/etc/passwd", "a/../../x.png", "", 5, None, "a\0b"])
def test_a_path_that_leaves_the_root_is_refused(tmp_path: Path, name: Any) -> None:
    """With the file and the line; `allow_outside_root` accepts paths, but nothing that is none."""
    path = written(tmp_path / "root" / "a.jsonl", json.dumps({"image": name}) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: "):
        FileAnnotationDataset(path).file(name, 0)
    if isinstance(name, str) and name and "\0" not in name:
        assert FileAnnotationDataset(path, allow_outside_root=True).file(name, 0).endswith(name.rpartition("/")[2])


@given(st.lists(st.sampled_from(["..", ".", "a", "b", ""]), max_size=6).map("/".join))
def test_what_inside_accepts_is_inside(name: str) -> None:
    """A path of any dots and folders is refused, or begins with the root."""
    try:
        path = path_inside("/data/pictures", name, "here")
    except DataError:
        return
    assert path == "/data/pictures" or path.startswith("/data/pictures/")


# Folders


def tree(root: Path, *files: str) -> Path:
    for name in files:
        written(root / name, "")
    return root


def test_a_folder_per_class_is_sorted(tmp_path: Path) -> None:
    """Classes and files come by name, sub-folders are searched, hidden and foreign files left out."""
    root = tree(
        tmp_path, "b/2.png", "b/10.PNG", "b/sub/1.jpg", "a/x.png", "b/notes.txt", "b/.hidden.png", ".git/x.png", "readme.png"
    )
    data = FolderPerClassDataset(root)
    assert data.classes == ["a", "b"]
    assert [(str(p.relative_to(root)), c) for p, c in raws(data)] == [
        ("a/x.png", 0),
        ("b/10.PNG", 1),
        ("b/2.png", 1),
        ("b/sub/1.jpg", 1),
    ]
    assert [c for _, c in raws(FolderPerClassDataset(root, ["b", "c", "a"]))] == [2, 0, 0, 0]
    clips = FolderPerClassDataset(tree(tmp_path / "v", "run/clip2/0.png", "run/clip1/0.png"), folders=True)
    assert [p.name for p, _ in raws(clips)] == ["clip1", "clip2"]


@pytest.mark.parametrize(
    ("files", "classes", "message"),
    [
        ([], None, "the split is empty"),
        (["a/x.png", "A/y.png"], None, "the classes 'A' and 'a' differ only in case"),
        (["a/x.png", "b/y.txt"], None, "/b: the class has no file ending in .jpg"),
        (["cat/x.png"], ["cats", "dog"], "/cat: unknown class. Did you mean 'cats'"),
    ],
)
def test_bad_class_folders_are_reported(tmp_path: Path, files: list[str], classes: Any, message: str) -> None:
    """No folder, an empty one, an unknown class and two that differ in case are DataErrors that name the folder."""
    with pytest.raises(DataError, match=message):
        FolderPerClassDataset(tree(tmp_path, *files), classes)


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    """With what was expected there."""
    with pytest.raises(DataError, match=r"none: expected a folder with one folder per class: No such file"):
        FolderPerClassDataset(tmp_path / "none")


# Tables


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("image,label\nx,1\n", {"columns": ["labels"]}, r"t\.csv: there is no column 'labels'. Did you mean 'label'"),
        ("id,label\n1,a\n2,b\n1,c\n", {"unique": "id"}, r"t\.csv: record 2, column 'id': .*1.* occurs twice"),
        ("image,label\n", {}, r"t\.csv: the split is empty"),
    ],
)
def test_a_bad_table_is_reported(tmp_path: Path, text: str, settings: Any, message: str) -> None:
    """A missing column, an id twice and a table without a row, when the dataset is made."""
    with pytest.raises(DataError, match=message):
        TableAnnotationDataset(written(tmp_path / "t.csv", text), **settings)


def test_excel_without_openpyxl_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the file and the package that is missing."""
    pd = pytest.importorskip("pandas")
    pd.DataFrame({"a": [1]}).to_excel(tmp_path / "t.xlsx", index=False)
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(DataError, match=r"t\.xlsx: reading it needs a package: .*openpyxl"):
        TableAnnotationDataset(tmp_path / "t.xlsx")


def test_an_excel_file_has_records_too(tmp_path: Path) -> None:
    """The rows of an .xlsx file are dicts by column."""
    pd = pytest.importorskip("pandas")
    pd.DataFrame({"image": ["x.png", "y.png"], "label": [1, 0]}).to_excel(tmp_path / "t.xlsx", index=False)
    assert raws(FileAnnotationDataset(tmp_path / "t.xlsx")) == [{"image": "x.png", "label": 1}, {"image": "y.png", "label": 0}]


# COCO


def test_a_coco_record_is_an_image_with_its_annotations(tmp_path: Path) -> None:
    """In the order of the file; categories are numbered by their ids; a box that rounding put outside is cut."""
    path = coco(tmp_path, [thing(1, [1, 2, 3, 4], image=11), thing(2, [10, 0, 6.5, 12], category=7), thing(3, [0, 0, 1, 1])])
    data = CocoAnnotationDataset(path, tmp_path / "images")
    assert data.ids == [10, 11]
    assert data.classes == ["cat", "dog"]
    assert data.class_index == {3: 0, 7: 1}
    image_id, image, annotations = data._get_raw(0)
    assert (image_id, image["file_name"], [a["id"] for a in annotations]) == (10, "0.png", [2, 3])
    assert annotations[0]["bbox"] == [10, 0, 6, 12]
    assert data.image_file(image) == str(tmp_path / "images" / "0.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("categories"), r"coco\.json: no COCO file: .* There is no list 'categories'"),
        (lambda c: c["images"].append(dict(c["images"][0])), "the image id 10 occurs twice"),
        (lambda c: c["annotations"].append(dict(c["annotations"][0])), "the annotation id 1 occurs twice"),
        (
            lambda c: c["annotations"][0].update(category_id=4),
            "annotation id 1: unknown category id 4. Categories: 3 cat, 7 dog",
        ),
        (lambda c: c["annotations"][0].update(image_id=99), "annotation id 1: there is no image with the id 99"),
        (lambda c: c["annotations"][0].pop("image_id"), "annotation id 1: there is no 'image_id'"),
        (
            lambda c: c["annotations"][0].update(bbox=[8, 8, 20, 2]),
            r"id 1: the box \[8, 8, 20, 2\] \(xywh\) reaches outside",
        ),
        (lambda c: c["annotations"][0].update(bbox=[8, 8, 0, 2]), "annotation id 1: the box .* has no area"),
        (lambda c: c["annotations"][0].update(bbox=[8, 8, 2]), "annotation id 1: expected a box of four finite numbers"),
        (lambda c: c["annotations"][0].update(bbox=[8, 8, 2, True]), "annotation id 1: expected a box of four finite numbers"),
        (lambda c: c["images"][0].update(width=0), "image id 10: expected a positive integer as 'width', in pixels, got 0"),
        (lambda c: c["images"][0].update(file_name="../x.png"), "image id 10: '../x.png' leads out of the dataset's root"),
        (lambda c: c["images"][0].pop("file_name"), "image id 10: there is no 'file_name'"),
        (lambda c: c["images"][0].update(id="x"), "image number 0: expected an integer as id, got 'x'"),
        (lambda c: c.update(images=[], annotations=[]), "the split is empty"),
    ],
)
def test_a_bad_coco_file_is_reported(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    """Each mistake is found when the dataset is made, and named by its id."""
    path = coco(tmp_path, [thing(1, [1, 2, 3, 4])])
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        CocoAnnotationDataset(path, tmp_path / "images")


def test_boxes_outside_are_cut_or_dropped_where_that_is_asked(tmp_path: Path) -> None:
    """clip cuts at the border and drops what has no area; drop leaves both out; ids of others stay."""
    path = coco(tmp_path, [thing(1, [8, 8, 20, 2]), thing(2, [1, 1, 0, 5]), thing(3, [1, 1, 2, 2]), thing(4, [30, 1, 2, 2])])

    def boxes(policy: Any) -> dict[int, Any]:
        data = CocoAnnotationDataset(path, tmp_path / "images", box_policy=policy)
        return {a["id"]: a["bbox"] for a in data._get_raw(0)[2]}

    assert boxes("clip") == {1: [8, 8, 8, 2], 3: [1, 1, 2, 2]}
    assert boxes("drop") == {3: [1, 1, 2, 2]}


# Any damage

PLACES = st.lists(st.integers(0, 20), min_size=1, max_size=4)
ODD = st.sampled_from(
    [None, True, -1, 0, 10**400, 1.5, float("1e308"), "", "x", "..", "\\0", [], [[]], [1], {}, {"id": 1}, {"counts": 3}]
)


def replaced(value: Any, place: list[int], new: Any) -> Any:
    """The JSON value with another at some place in it."""
    if not place or not isinstance(value, (dict, list)) or not value:
        return new
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = keys[place[0] % len(keys)]
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = replaced(value[key], place[1:], new)
    return copy


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=PLACES, new=ODD)
def test_any_coco_file_is_read_or_reported(tmp_path: Path, place: list[int], new: Any) -> None:
    """Whatever value stands at whatever place, the dataset is made or a DataError says why; and then samples can be read."""
    runs = {"size": [12, 16], "counts": [0, 5, 187]}
    more = {"segmentation": runs, "keypoints": [1, 2, 2] * 3, "iscrowd": 0}
    if not (tmp_path / "coco.json").exists():
        coco(tmp_path, [thing(1, [1, 2, 3, 4], **more), thing(2, [1, 1, 2, 2], image=11, **more)])
        (tmp_path / "whole.json").write_bytes((tmp_path / "coco.json").read_bytes())
    content = json.loads((tmp_path / "whole.json").read_text())
    (tmp_path / "coco.json").write_text(json.dumps(replaced(content, place, new)))
    try:
        data = COCODataset(tmp_path / "coco.json", tmp_path / "images", tasks=("bbox", "mask", "keypoints"), ignore_crowd=False)
    except DataError as error:
        assert len(str(error).splitlines()) <= 4
        return
    for i in range(len(data)):
        try:
            data[i]
        except (DataError, ValueError) as error:  # an image that is not there, or not of the size that is written
            assert "images" in str(error)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=PLACES, new=ODD, many=st.booleans())
def test_any_list_of_images_is_read_or_reported(tmp_path: Path, place: list[int], new: Any, many: bool) -> None:
    """The same of records in a JSON file, with one label or several."""
    rows = [{"image": "0.png", "label": ["a", "b"] if many else "a"}, {"image": "1.png", "label": ["a"] if many else "b"}]
    (tmp_path / "a.json").write_text(json.dumps(replaced(rows, place, new)))
    try:
        data = ClassificationImageDataset(tmp_path / "a.json", multi_label=many)
    except DataError as error:
        assert len(str(error).splitlines()) <= 4
        return
    assert all(len(data._get_raw(i)) == 2 for i in range(len(data)))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    at=st.integers(0, 400),
    cut=st.integers(0, 30),
    new=st.sampled_from(["", "<", "&x;", "<a/>", "\0", "1e999", "</object>", "x"]),
)
def test_any_voc_file_is_read_or_reported(tmp_path: Path, at: int, cut: int, new: str) -> None:
    """The same of an XML file in which some text stands for another."""
    path = voc(tmp_path, "a", [("cat", (1, 1, 16, 12)), ("dog", (3, 4, 3, 4))])
    text = path.read_text()
    path.write_text(text[:at] + new + text[at + cut :])
    try:
        data = VocAnnotationDataset(tmp_path / "JPEGImages", tmp_path / "Annotations")
    except DataError as error:
        assert len(str(error).splitlines()) <= 4
        return
    assert all(len(o["box"]) == 4 for o in data._get_raw(0)[1]["object"])


def test_all_boxes_that_do_not_fit_are_reported_together(tmp_path: Path) -> None:
    """The first one with its numbers, and where the next ones are; in COCO and in VOC."""
    path = coco(tmp_path, [thing(i, [8, 8, 20, 2] if i % 2 else [1, 1, 2, 2]) for i in range(1, 20)])
    with pytest.raises(DataError) as error:
        CocoAnnotationDataset(path, tmp_path / "images")
    lines = str(error.value).splitlines()
    assert "annotation id 1: the box [8, 8, 20, 2] (xywh) reaches outside the image of 16x12 pixels" in lines[0]
    places = "; ".join(f"coco.json, annotation id {i}" for i in (3, 5, 7, 9, 11))
    assert lines[2] == f"  9 more do not fit: {places}; ..."
    for name in ("a", "b", "c"):
        voc(tmp_path, name, [("cat", (1, 1, 2, 2)), ("cat", (1, 1, 2, 2 if name == "b" else 40))])
    with pytest.raises(DataError, match=r"a\.xml, object 1: the box [^$]*1 more do not fit: c\.xml, object 1\."):
        VocAnnotationDataset(tmp_path / "JPEGImages", tmp_path / "Annotations")


# VOC


def test_a_voc_record_is_a_picture_and_its_objects(tmp_path: Path) -> None:
    """Names come sorted or as the split's file says; pixels are counted from 0 and the last one is included."""
    for name in ("b", "a"):
        voc(tmp_path, name, [("cat", (1, 1, 16, 12)), ("dog", (3, 4, 3, 4))])
    data = VocAnnotationDataset(tmp_path / "JPEGImages", tmp_path / "Annotations")
    assert data.names == ["a", "b"]
    path, record = data._get_raw(0)
    assert path == tmp_path / "JPEGImages" / "a.png"
    assert [(o["name"], o["box"]) for o in record["object"]] == [("cat", [0, 0, 16, 12]), ("dog", [2, 3, 3, 4])]
    split = written(tmp_path / "val.txt", "b  1\n")
    assert VocAnnotationDataset(data.img_dir, data.ann_dir, names=split).names == ["b"]
    assert VocAnnotationDataset(data.img_dir, data.ann_dir, lambda file: Path(file).name)._get_raw(1)[1] == "b.xml"


BOMB = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]>'


@pytest.mark.parametrize(
    ("objects", "settings", "xml", "message"),
    [
        ([("cat", (1, 1, 30, 4))], {}, {}, r"a\.xml, object 0: the box .* reaches outside"),
        ([("cat", (1, 1, 5, 4)), ("cow", (1, 1, 2, 2))], {"classes": ["cat"]}, {}, r"a\.xml, object 1: unknown class 'cow'"),
        ([("cat", ("one", 1, 5, 4))], {}, {}, r"a\.xml, object 0: expected a number in <bndbox><xmin>, got 'one'"),
        ([("cat", ("nan", 1, 5, 4))], {}, {}, r"object 0: expected a number in <bndbox><xmin>, got 'nan'"),
        ([("", (1, 1, 5, 4))], {}, {}, r"a\.xml, object 0: expected an <object> with a <name>"),
        ([], {}, {"size": "<size><width>16</width></size>"}, r"a\.xml: expected a number in <size><height>, got None"),
        ([], {}, {"more": BOMB}, r"a\.xml, line 1: declares a document type or entity"),
        ([], {}, {"more": '<!DOCTYPE x SYSTEM "file:///etc/passwd">'}, "declares a document type"),
        ([], {}, {"more": "<open>"}, r"a\.xml, line 1: no XML"),
        ([], {"names": ["a", "a"]}, {}, "the name 'a' occurs twice"),
        ([], {"names": []}, {}, "the split is empty"),
        ([], {"names": ["../a"]}, {}, "leads out of the dataset's root"),
        ([], {"names": ["zz"]}, {}, r"zz\.xml: cannot be read"),
    ],
)
def test_a_bad_voc_file_is_reported(tmp_path: Path, objects: Any, settings: Any, xml: Any, message: str) -> None:
    """Each mistake is found when the dataset is made, and named by its file and object; entities are never expanded."""
    voc(tmp_path, "a", objects, **xml)
    with pytest.raises(DataError, match=message):
        VocAnnotationDataset(tmp_path / "JPEGImages", tmp_path / "Annotations", **settings)


def test_deep_and_foreign_xml_is_refused(tmp_path: Path) -> None:
    """Nesting has a limit; a file without <annotation> and one without its image are reported."""
    encoded = '<?xml version="1.0" encoding="{}"?><annotation/>'
    cases = {
        "<a>" * 100: "nested deeper than 64",
        "<a/>": "no VOC file",
        encoded.format("martian"): "line 1: unknown encoding: martian. Save the file as UTF-8",
        encoded.format("utf-7"): "Save the file as UTF-8",
    }
    for content, message in cases.items():
        written(tmp_path / "Annotations" / "a.xml", content)
        picture(tmp_path / "JPEGImages" / "a.png")
        with pytest.raises(DataError, match=message):
            VocAnnotationDataset(tmp_path / "JPEGImages", tmp_path / "Annotations")
    voc(tmp_path, "a", []).with_name("a.xml")
    (tmp_path / "JPEGImages" / "a.png").unlink()
    with pytest.raises(DataError, match=r"there is no image a\.jpg"):
        VocAnnotationDataset(tmp_path / "JPEGImages", tmp_path / "Annotations")


# shared lists

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50)
@given(st.lists(JSON, max_size=6))
def test_a_packed_list_is_the_list(values: list[Any]) -> None:
    """For any JSON values: length, order, slices, negative indices, the end, and after pickling."""
    made = SharedList(values)
    assert list(made) == values == list(pickle.loads(pickle.dumps(made)))
    assert (len(made), made[1:4], made[::-1]) == (len(values), values[1:4], values[::-1])
    assert not values or made[-1] == values[-1]
    for index in (len(values), -len(values) - 1):
        with pytest.raises(IndexError, match=f"of {len(values)}"):
            made[index]


SHARED = """
import os
from ailab.datasets.storages.shared_list import SharedList, shared_list

def private():
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Private"))

rows = [[f"folder/{i:040d}.jpg", i] for i in range(200_000)]
for data in (rows, SharedList(rows)):
    if not (child := os.fork()):
        before = private()
        for i in range(len(data)):
            path = data[i][0]
        print(private() - before, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_a_worker_shares_what_is_packed() -> None:
    """A forked process that reads all of a packed list copies none of it; of a plain list it copies what it reads."""
    done = subprocess.run([sys.executable, "-c", SHARED], capture_output=True, text=True, timeout=120, check=True)
    listed, shared = map(int, done.stdout.split())  # KiB
    assert shared < 4_000 < 20_000 < listed


def test_what_is_no_json_is_kept_as_it_is() -> None:
    """A list of dates, say, stays a list."""
    values = [{"day": datetime.date(2020, 1, 1)}]
    assert shared_list(values) is values


# Boxes


@given(*[st.floats(-30, 30, width=32)] * 4, st.sampled_from(["clip", "drop"]))
def test_a_box_that_is_kept_is_inside_and_has_an_area(x: float, y: float, w: float, h: float, policy: Any) -> None:
    """For any numbers; and one that lies inside is not changed."""
    box = checked_box([x, y, w, h], (12, 16), policy, "here", form="xywh")
    if box is not None:
        assert 0 <= box[0] < box[2] <= 16
        assert 0 <= box[1] < box[3] <= 12
    if x >= 0 and y >= 0 and w > 0 and h > 0 and x < x + w <= 16 and y < y + h <= 12:
        assert box == (x, y, x + w, y + h)


@pytest.mark.parametrize("form", ["xyxy", "xywh", "cxcywh"])
def test_formats_agree_with_torchvision(form: Any) -> None:
    """Conversion equals torchvision's, fractions are of width and height, and reading back gives the box."""
    from torchvision.ops import box_convert

    boxes = torch.tensor([[1.0, 2.0, 5.0, 9.0], [0.0, 0.0, 16.0, 12.0]])
    torch.testing.assert_close(convert_boxes(boxes, form), box_convert(boxes, "xyxy", form))
    scale = torch.tensor([16.0, 12.0, 16.0, 12.0])
    torch.testing.assert_close(convert_boxes(boxes, form, (12, 16)), box_convert(boxes, "xyxy", form) / scale)
    assert checked_box(convert_boxes(boxes, form)[0].tolist(), (12, 16), "error", "here", form=form) == (1, 2, 5, 9)


# Lists and streams


def test_a_list_is_a_storage() -> None:
    """Anything with a length and an index; an empty one or an iterable is reported."""
    assert raws(ListDataset(["a", "b"])) == ["a", "b"]
    with pytest.raises(DataError, match="the split is empty"):
        ListDataset([])
    with pytest.raises(DataError, match="StreamDataset reads an iterable"):
        ListDataset(iter("ab"))  # type: ignore[arg-type]


class Numbers(StreamDataset):
    def _get_sample(self, raw: Any) -> Any:
        return {"input": torch.tensor(raw)}


class Source:
    """Gives 0 to n - 1, and counts how often it is opened."""

    def __init__(self, n: int):
        self.n, self.opened = n, 0

    def __call__(self) -> Iterator[int]:
        self.opened += 1
        return iter(range(self.n))


def test_a_stream_is_read_forward_once_an_epoch() -> None:
    """Batches are those of the list, for any number of workers and from any step; one epoch opens the source once."""
    source = Source(23)
    data = Numbers(source, size=23)
    settings: dict[str, Any] = dict(batch_size=4, shuffle=False, seed=0, pad=False)
    batches = [b["input"].tolist() for b in Stream(data, **settings).epoch(0)]
    assert batches == [list(range(i, min(i + 4, 23))) for i in range(0, 23, 4)]
    assert source.opened == 1
    for start in (0, 3):
        again = Stream(Numbers(range(23)), num_workers=2, **settings)
        assert [b["input"].tolist() for b in again.epoch(1, start)] == batches[start:]
    copy = pickle.loads(pickle.dumps(Numbers(range(5))))
    assert raws(copy) == raws(Numbers(range(5)))


def test_a_stream_of_an_iterable_dataset_counts_itself() -> None:
    """torch's IterableDataset is a source; its size is counted when it is not given."""

    class Squares(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return (i * i for i in range(4))

    assert raws(Numbers(Squares())) == [0, 1, 4, 9]


class Divided(torch.utils.data.IterableDataset[int]):
    """Gives each worker its part, as torch's documentation shows."""

    def __iter__(self) -> Iterator[int]:
        info = torch.utils.data.get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        yield from range(first, 40, step)


def test_a_source_that_divides_itself_is_read_whole_by_each_worker() -> None:
    """The keys say who makes which batch; a part of the source would give other samples under their names."""
    for workers in (0, 1, 2):
        data = Stream(Numbers(Divided()), batch_size=4, shuffle=False, seed=0, pad=False, num_workers=workers)
        assert [n for batch in data.epoch(0) for n in batch["input"].tolist()] == list(range(40))


def test_what_is_no_stream_is_reported() -> None:
    """An iterator, an empty source, one that ends early, and random order."""
    with pytest.raises(DataError, match="an iterator can be read only once"):
        Numbers(iter(range(3)))
    with pytest.raises(DataError, match="the split is empty"):
        Numbers([])
    with pytest.raises(DataError, match="the source ended before its item 5"):
        raws(Numbers(range(3), size=5))
    data = Numbers(range(1000), buffer_size=4)
    with pytest.raises(DataError, match="Set shuffle=False"):
        for i in torch.randperm(1000, generator=torch.Generator().manual_seed(0)).tolist():
            data._get_raw(i)
