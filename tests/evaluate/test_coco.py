from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apt.errors import DataError
from apt.evaluate.coco import read_coco_captions


def coco(folder: Path, document: Any = None) -> Path:
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2014").mkdir()
    images = [{"id": 40 + n, "file_name": f"COCO_val2014_{n}.jpg"} for n in range(3)]
    for image in images[:2]:
        (folder / "val2014" / str(image["file_name"])).write_bytes(b"")
    captions = [(41, " A cat. "), (40, "A dog."), (41, "A cat."), (42, "Not there.")]
    annotations = [{"image_id": image, "caption": text} for image, text in captions]
    written = {"images": images, "annotations": annotations} if document is None else document
    (folder / "annotations/captions_val2014.json").write_text(json.dumps(written))
    return folder


def test_first_captions_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = read_coco_captions(coco(tmp_path), 3)
    assert found.prompts == ("A cat.", "A dog.", "A cat.")
    cat, dog = tmp_path / "val2014/COCO_val2014_1.jpg", tmp_path / "val2014/COCO_val2014_0.jpg"
    assert found.images == (cat, dog, cat)
    assert found.reference == [cat, dog]


def test_captions_may_lie_beside_the_images(tmp_path: Path) -> None:
    coco(tmp_path)
    (tmp_path / "annotations/captions_val2014.json").rename(tmp_path / "captions_val2014.json")
    assert len(read_coco_captions(tmp_path, 2).prompts) == 2


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no captions_val2014\.json; expected COCO 2014"):
        read_coco_captions(tmp_path, 5000)
    coco(tmp_path)
    with pytest.raises(DataError, match="has 4 captions, fewer than 5000"):
        read_coco_captions(tmp_path, 5000)
    with pytest.raises(DataError, match=r"lacks 1 of the images, such as 'COCO_val2014_2\.jpg'"):
        read_coco_captions(tmp_path, 4)


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"images": {}, "annotations": []},
        {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "x"}]},
        {
            "images": [{"id": 1, "file_name": "../secret.jpg"}],
            "annotations": [{"image_id": 1, "caption": "x"}],
        },
        {
            "images": [{"id": 1, "file_name": "a.jpg"}],
            "annotations": [{"image_id": 2, "caption": "x"}],
        },
    ],
)
def test_damaged_files(tmp_path: Path, document: Any) -> None:
    with pytest.raises(DataError, match=r"captions_val2014\.json' cannot be read"):
        read_coco_captions(coco(tmp_path, document), 1)
