"""Against clean-fid itself, installed beside the rest: `pytest -m network FILE`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from apt.evaluate.features import Features
from apt.evaluate.image_measures import Fid
from apt.evaluate.inception import Inception
from apt.evaluate.pictures import clean_resize, read_picture
from apt.metrics import frechet_distance, gaussian_statistics

PROGRAM = """
import json, sys, types
from pathlib import Path

import numpy as np
from PIL import Image

# torchvision would replace a CPU build of torch by one for CUDA, and is not needed for this.
for name in ("torchvision", "requests", "cleanfid.inception_pytorch"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["cleanfid.inception_pytorch"].InceptionV3 = None

from cleanfid.fid import frechet_distance
from cleanfid.resize import build_resizer

folder = Path(sys.argv[1])
resize = build_resizer("clean")
for path in sorted(folder.glob("picture*")):
    np.save(folder / (path.name + ".npy"), resize(np.array(Image.open(path).convert("RGB"))))
features = {name: np.load(folder / f"{name}.npy") for name in ("real", "fake")}
moments = [
    part for x in features.values() for part in (x.mean(axis=0), np.cov(x, rowvar=False))
]
print(json.dumps(float(frechet_distance(*moments))))
"""


@pytest.mark.network
def test_resizer_and_distance(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages,
         "clean-fid==0.1.35"],
        check=True,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(299, 299), (480, 640), (123, 77), (1024, 1024)]):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"picture{number}.png")
        Image.fromarray(pixels).save(tmp_path / f"picture{number}.jpg")
        Image.fromarray(pixels[..., 0]).save(tmp_path / f"picture{number}-grey.png")
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(32, 32, generator=generator)
    features = {
        name: torch.randn(number, 32, generator=generator).double() @ mixing.double() + number / 100
        for name, number in (("real", 200), ("fake", 150))
    }
    for name, values in features.items():
        np.save(tmp_path / f"{name}.npy", values.numpy())
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path],
        env={"PYTHONPATH": str(packages)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    pictures = [p for p in sorted(tmp_path.glob("picture*")) if p.suffix != ".npy"]
    assert len(pictures) == 12
    for path in pictures:
        theirs = np.load(tmp_path / f"{path.name}.npy")
        np.testing.assert_array_equal(clean_resize(read_picture(path), (299, 299)), theirs)
    distance = json.loads(answer.stdout.splitlines()[-1])
    ours = frechet_distance(*map(gaussian_statistics, features.values()))
    assert ours == pytest.approx(distance, rel=1e-8)


PEER = """
import importlib, sys, types

import numpy as np
import torch

# Its own __init__ needs torchvision.
package = types.ModuleType("torch_fidelity")
package.__path__ = [sys.argv[2] + "/torch_fidelity"]
sys.modules["torch_fidelity"] = package
peer = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
network = peer.FeatureExtractorInceptionV3(
    "peer", ["2048"], feature_extractor_weights_path=sys.argv[1] + "/weights.pth"
)
pictures = torch.from_numpy(np.load(sys.argv[1] + "/pictures.npy"))
np.save(sys.argv[1] + "/features.npy", network(pictures.permute(0, 3, 1, 2))[0].numpy())
"""


@pytest.mark.network
def test_inception_is_torch_fidelitys(tmp_path: Path) -> None:
    """With weights drawn at random: the real ones are a download."""
    packages = tmp_path / "packages"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages,
         "torch-fidelity==0.4.0"],
        check=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    network = Inception()
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith((".bias", "running_mean")):
            value.normal_(0, 0.2, generator=generator)
    spare = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save({**network.state_dict(), **spare}, tmp_path / "weights.pth")
    pictures = torch.randint(0, 256, (2, 299, 299, 3), dtype=torch.uint8, generator=generator)
    np.save(tmp_path / "pictures.npy", pictures.numpy())
    subprocess.run([sys.executable, "-c", PEER, tmp_path, packages], check=True)
    theirs = torch.from_numpy(np.load(tmp_path / "features.npy"))
    ours = network(pictures.float().permute(0, 3, 1, 2))
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_fid_runs_through_inception(tmp_path: Path) -> None:
    """Random weights; the network is the real one."""
    network = Inception()
    features = Features("inception", lambda x: network(x.float().permute(0, 3, 1, 2)), 299)
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for number, path in enumerate(files):
        Image.fromarray(np.full((40, 30, 3), 90 * number, np.uint8)).save(path)
    statistics = Fid(files, features).statistics(files)
    assert statistics.mean.shape == (2048,) and statistics.mean.isfinite().all()
