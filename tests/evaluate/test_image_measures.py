from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torchmetrics")

import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from apt.errors import DataError, InputError
from apt.evaluate.clip_score import Similarity
from apt.evaluate.features import Features
from apt.evaluate.image_measures import (
    Fid,
    FrechetRatio,
    PatchFid,
    clip_score,
    feature_statistics,
    patch,
    patch_of_generated,
    whole,
)
from apt.evaluate.pictures import Picture, clean_resize, crop_square
from apt.metrics import frechet_distance

SIZE = 16


class Net(nn.Module):
    """Features that torchmetrics takes too: (B, 3, SIZE, SIZE) in [0, 255] to (B, 8)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.num_features = 8
        weights = torch.randn(3 * SIZE * SIZE, 8, generator=torch.Generator().manual_seed(seed))
        self.weights = nn.Parameter(weights / 100)

    def forward(self, pictures: Tensor) -> Tensor:
        return (pictures.float().flatten(1) @ self.weights).tanh()


def features(name: str = "net", seed: int = 0, size: int = SIZE) -> Features:
    net = Net(seed)
    return Features(name, lambda pictures: net(pictures.permute(0, 3, 1, 2)), size)


def write(folder: Path, pictures: Sequence[np.ndarray], suffix: str = ".png") -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{number:03}{suffix}" for number in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    return paths


def noises(number: int, seed: int, *, dim: int = 0, side: int = SIZE) -> list[np.ndarray]:
    drawn = np.random.default_rng(seed).integers(0, 256 - dim, (number, side, side, 3))
    return list(drawn.astype(np.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    root = tmp_path_factory.mktemp("pictures")
    return {
        "real": write(root / "real", noises(24, 1)),
        "fake": write(root / "fake", noises(20, 2, dim=120)),
        "good": write(root / "good", noises(20, 3)),
    }


def test_fid_is_that_of_torchmetrics(folders: dict[str, list[Path]]) -> None:
    theirs = FrechetInceptionDistance(feature=Net(), input_img_size=(3, SIZE, SIZE))
    for name in ("real", "fake"):
        pictures = torch.stack([torch.from_numpy(np.array(Image.open(p))) for p in folders[name]])
        theirs.update(pictures.permute(0, 3, 1, 2), real=name == "real")
    ours = Fid(folders["real"], features())(folders["fake"])
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-4)
    assert ours > 0.1


def test_what_fid_saw_serves_for_the_ratio(folders: dict[str, list[Path]]) -> None:
    seen: list[int] = []
    network = features()

    def counted(pictures: Tensor) -> Tensor:
        seen.append(len(pictures))
        return network.network(pictures)

    nets = [Features("counted", counted, SIZE)]
    fid, ratio = Fid(folders["real"], nets[0]), FrechetRatio(folders["real"], nets)
    expected = ratio(folders["fake"])
    seen.clear()
    statistics = fid.statistics(folders["fake"])
    assert ratio(folders["fake"], {"counted": statistics}) == expected
    assert sum(seen) == len(folders["fake"])


@pytest.mark.parametrize("batch_size", [1, 7])
def test_figures_do_not_depend_on_batches(folders: dict[str, list[Path]], batch_size: int) -> None:
    done: list[int] = []
    fid = Fid(folders["real"], features(), batch_size=batch_size, advance=done.append)
    assert sum(done) == len(folders["real"]) and max(done) <= batch_size
    expected = Fid(folders["real"], features())(folders["fake"])
    assert fid(folders["fake"]) == pytest.approx(expected, rel=1e-6)
    assert fid(folders["real"]) == pytest.approx(0, abs=1e-6)


def test_odd_pictures_are_cropped_and_resized_without_rounding(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [
        rng.integers(0, 256, (20 + n % 7, 31 - n % 11, 3), dtype=np.uint8) for n in range(12)
    ]
    pictures += [picture[..., 0] for picture in pictures]
    files = write(tmp_path / "odd", pictures)
    coloured = [p if p.ndim == 3 else np.repeat(p[..., None], 3, axis=2) for p in pictures]
    seen = torch.from_numpy(np.stack([clean_resize(crop_square(p), (SIZE,) * 2) for p in coloured]))
    statistics = feature_statistics(files, features(), batch_size=5)
    expected = features()(seen).double()
    torch.testing.assert_close(statistics.mean, expected.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(statistics.covariance, expected.T.cov(), rtol=0, atol=1e-6)


class TestPatches:
    def test_patches_see_the_detail_that_resizing_hides(self, tmp_path: Path) -> None:
        """Alternating rows of light and dark are grey at half of their size."""

        def contrast(pictures: Tensor) -> Tensor:
            return pictures.double().diff(dim=1).abs().mean(dim=(2, 3))

        stripes = np.zeros((2 * SIZE, 2 * SIZE, 3), np.uint8)
        stripes[::2] = 200
        sharp = write(tmp_path / "sharp", [stripes] * 2)
        grey = write(tmp_path / "grey", [np.full_like(stripes, 100)] * 2)
        net = Features("contrast", contrast, SIZE)

        def distance(prepare: Callable[[Path, int], Picture]) -> float:
            of_sharp, of_grey = (feature_statistics(f, net, prepare) for f in (sharp, grey))
            return frechet_distance(of_sharp, of_grey)

        assert distance(patch) == pytest.approx((SIZE - 1) * 200**2)
        assert distance(whole) < 0.01 * distance(patch)

    def test_real_and_generated_are_cut_alike_above_512_pixels(self, tmp_path: Path) -> None:
        files = write(tmp_path / "large", [np.zeros((520, 600, 3), np.uint8)] * 2)
        Image.fromarray(noises(1, 0, side=600)[0]).save(files[0])
        assert PatchFid(files, features())(files) == pytest.approx(0, abs=1e-6)
        assert PatchFid(files, features()).left_out == 0

    def test_small_generated_pictures_are_enlarged(self, tmp_path: Path) -> None:
        grey = [np.full((512, 512, 3), 9, np.uint8), np.full((640, 600, 3), 9, np.uint8)]
        grey[0][255:257, 255:257] = 200
        grey[1][320, 300] = 200
        small, large = write(tmp_path / "a", grey)
        assert (patch_of_generated(small, 299) == 200).all(axis=2).sum() == 4
        assert (patch_of_generated(small, 299) != 9).all(axis=2).sum() == 16 + 20
        assert patch_of_generated(large, 299).shape == (299, 299, 3)
        assert (patch_of_generated(large, 299) == 200).all(axis=2).sum() == 1

    def test_real_pictures_that_are_too_small_are_left_out(self, tmp_path: Path) -> None:
        files = write(tmp_path / "a", [*noises(3, 1), *noises(2, 1, side=SIZE - 1)])
        assert PatchFid(files, features()).left_out == 2
        with pytest.raises(DataError, match="none of the 2 real images has at least 16 pixels"):
            PatchFid(files[3:], features())


class TestRatios:
    def test_mean_of_ratios_to_heldout_images(self, folders: dict[str, list[Path]]) -> None:
        nets = [features("a", 0), features("b", 1)]
        measure = FrechetRatio(folders["real"], nets, heldout=folders["good"])
        found = measure(folders["fake"])
        for net in nets:
            fid = Fid(folders["real"], net)
            assert found.distances[net.name] == fid(folders["fake"])
            assert found.ratios[net.name] == fid(folders["fake"]) / fid(folders["good"])
        assert found.mean == pytest.approx(sum(found.ratios.values()) / 2)
        assert measure(folders["good"]).mean == pytest.approx(1)

    def test_half_of_the_reference_is_held_out(self, folders: dict[str, list[Path]]) -> None:
        real = folders["real"]
        expected = FrechetRatio(real[::2], [features()], heldout=real[1::2])
        found = FrechetRatio(real, [features()])
        assert found(folders["fake"]) == expected(folders["fake"])

    def test_bad_input(self, folders: dict[str, list[Path]]) -> None:
        with pytest.raises(InputError, match="different names"):
            FrechetRatio(folders["real"], [features(), features()])
        with pytest.raises(InputError, match="different names"):
            FrechetRatio(folders["real"], [])
        constant = Features("constant", lambda x: torch.ones(len(x), 3), SIZE)
        with pytest.raises(InputError, match="equal the reference in constant"):
            FrechetRatio(folders["real"], [constant])


def test_clip_score_is_a_mean_over_pairs(folders: dict[str, list[Path]]) -> None:
    prompts = [str(number) for number in range(len(folders["real"]))]

    def cosines(pictures: Tensor, texts: Sequence[str]) -> Tensor:
        assert pictures.shape[1:] == (SIZE, SIZE, 3)
        return pictures.float().mean(dim=(1, 2, 3)) / 1000 + torch.tensor([*map(float, texts)])

    means = [np.array(Image.open(path)).mean() for path in folders["real"]]
    expected = 100 * (np.mean(means) / 1000 + np.mean(range(len(prompts))))
    similarity = Similarity("mine", cosines, SIZE)
    found = clip_score(folders["real"], prompts, similarity, batch_size=7)
    assert found == pytest.approx(expected, rel=1e-6)
    with pytest.raises(InputError, match="24 images and 23 prompts"):
        clip_score(folders["real"], prompts[1:], similarity)
    wrong = Similarity("wrong", lambda pictures, texts: torch.zeros(1, 1), SIZE)
    with pytest.raises(InputError, match="'wrong'"):
        clip_score(folders["real"], prompts, wrong)


def test_a_broken_file_is_named(tmp_path: Path, folders: dict[str, list[Path]]) -> None:
    (tmp_path / "broken.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"broken\.png"):
        Fid([*folders["real"], tmp_path / "broken.png"], features())


@pytest.mark.parametrize(
    "network",
    [lambda x: x.float(), lambda x: torch.zeros(len(x), 2).long(), lambda x: torch.zeros(1, 2)],
)
def test_features_of_another_shape(network: object, folders: dict[str, list[Path]]) -> None:
    with pytest.raises(InputError, match="the features 'mine' returned"):
        Fid(folders["real"], Features("mine", network, SIZE))  # type: ignore[arg-type]
