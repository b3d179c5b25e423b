"""Read COCO's captions and images from the user's folder (Lin et al., 2014)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt.errors import DataError
from apt.untrusted import check_name, read_json_file

CAPTIONS_FILE = "captions_val2014.json"
IMAGES_FOLDER = "val2014"
_PLACES = (CAPTIONS_FILE, f"annotations/{CAPTIONS_FILE}")
_MAX_BYTES = 1 << 28
"""The real file is 31 MB."""
_ADVICE = (
    "expected COCO 2014 validation from cocodataset.org: annotations/captions_val2014.json and "
    "the images in val2014/"
)


@dataclass(frozen=True)
class CocoCaptions:
    """The first captions, and the image that each was written for.

    Attributes:
        prompts: in the order of the file; some occur more than once.
        images: one for each prompt; an image has about five captions, so most occur more than once.
    """

    prompts: tuple[str, ...]
    images: tuple[Path, ...]

    @property
    def reference(self) -> list[Path]:
        """The images without repetition."""
        return list(dict.fromkeys(self.images))


def read_coco_captions(folder: Path, number: int) -> CocoCaptions:
    """Read the first captions of COCO 2014 validation (5,000 or 10,000 in APT's Appendix A).

    Args:
        folder: contains `val2014/`, and `captions_val2014.json` itself or in `annotations/`.
        number: how many captions.

    Raises:
        DataError: the folder, its captions or their images are missing or damaged, or there are
            fewer captions than `number`.
    """
    path = next((folder / place for place in _PLACES if (folder / place).is_file()), None)
    if path is None:
        raise DataError(f"{str(folder)!r} has no {CAPTIONS_FILE}; {_ADVICE}")
    try:
        document = read_json_file(path, limit=_MAX_BYTES)
        names = {int(i["id"]): check_name(i["file_name"]) for i in _rows(document, "images")}
        rows = _rows(document, "annotations")
        chosen = [(int(a["image_id"]), str(a["caption"]).strip()) for a in rows[:number]]
        files = [folder / IMAGES_FOLDER / names[image] for image, _ in chosen]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{str(path)!r} cannot be read ({error!r}); {_ADVICE}") from error
    if len(rows) < number:
        raise DataError(f"{str(path)!r} has {len(rows)} captions, fewer than {number}; {_ADVICE}")
    empty = sum(not caption for _, caption in chosen)
    if empty:
        raise DataError(f"{str(path)!r} has {empty} empty captions; download it again")
    missing = [file.name for file in dict.fromkeys(files) if not file.is_file()]
    if missing:
        raise DataError(
            f"{str(folder / IMAGES_FOLDER)!r} lacks {len(missing)} of the images, such as "
            f"{missing[0]!r}; {_ADVICE}"
        )
    return CocoCaptions(tuple(caption for _, caption in chosen), tuple(files))


def _rows(document: Any, name: str) -> list[Any]:
    rows = document[name]
    if not isinstance(rows, list):
        raise TypeError(f"{name} is not a list")
    return rows
