"""The Inception-v3 of FID: TensorFlow's network of 2015-12-05, up to its last pooling.

It differs from torchvision's and timm's: its average pooling excludes padding, its last block uses
max pooling, and its weights come from another training (Szegedy et al., 2015; Heusel et al., 2017).
Parameters are named as in the file that pytorch-fid and torch-fidelity both publish, so it loads
unchanged. We do not use their classes, because they need torchvision, unpickle without a full
checksum, and take only integers, whereas clean-fid's resize does not round.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt.errors import CheckpointError

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
"""95.6 MB, Apache-2.0."""
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

_PATIENCE = 10.0
_CHUNK = 1 << 20

Layer = tuple[int, int | tuple[int, int]]
"""Output channels and kernel size."""
Branch = Sequence[Sequence[Layer]]
"""Positions in sequence; two layers at one position run in parallel."""


class Convolution(nn.Module):
    """Convolution, batch normalisation and ReLU. `same` pads to keep the size."""

    def __init__(
        self, in_channels: int, layer: Layer, *, stride: int = 1, same: bool = True
    ) -> None:
        super().__init__()
        channels, kernel = layer
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if same else (0, 0)
        self.conv = nn.Conv2d(
            in_channels, channels, (height, width), stride=stride, padding=padding, bias=False
        )
        self.bn = nn.BatchNorm2d(channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, channels, H', W')."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Parallel branches whose outputs are concatenated along the channels.

    Args:
        in_channels: channels of the input.
        branches: by the name of their convolutions, which get a number if there are several, and
            a letter if two run in parallel.
        pool: channels of the convolution after the pooling; 0 halves the size: the last layers have
            stride 2, and the max-pooled input is concatenated without a convolution.
        by_maximum: use max pooling in a block that keeps the size.
    """

    def __init__(
        self,
        in_channels: int,
        branches: Mapping[str, Branch],
        pool: int,
        *,
        by_maximum: bool = False,
    ) -> None:
        super().__init__()
        self._paths: list[list[list[str]]] = []
        self._halves = pool == 0
        self._by_maximum = by_maximum
        for name, branch in branches.items():
            channels = in_channels
            path = []
            for number, layers in enumerate(branch, 1):
                title = name if len(branch) == 1 else f"{name}_{number}"
                names = [title] if len(layers) == 1 else [f"{title}a", f"{title}b"]
                reduces = self._halves and number == len(branch)
                for key, layer in zip(names, layers, strict=True):
                    convolution = Convolution(
                        channels, layer, stride=2 if reduces else 1, same=not reduces
                    )
                    self.add_module(key, convolution)
                path.append(names)
                channels = sum(out for out, _ in layers)
            self._paths.append(path)
        if not self._halves:
            self.branch_pool = Convolution(in_channels, (pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        outputs = []
        for path in self._paths:
            y = x
            for names in path:
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            outputs.append(y)
        if self._halves:
            pooled = F.max_pool2d(x, 3, stride=2)
        elif self._by_maximum:
            pooled = self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))
        else:
            average = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
            pooled = self.branch_pool(average)
        return torch.cat([*outputs, pooled], dim=1)


class Inception(nn.Module):
    """Maps pictures (B, 3, 299, 299) in [0, 255] to FID's features (B, 2048). Not for training."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, (32, 3), stride=2, same=False)
        self.Conv2d_2a_3x3 = Convolution(32, (32, 3), same=False)
        self.Conv2d_2b_3x3 = Convolution(32, (64, 3))
        self.Conv2d_3b_1x1 = Convolution(64, (80, 1))
        self.Conv2d_4a_3x3 = Convolution(80, (192, 3), same=False)
        self.Mixed_5b = _of_35(192, pool=32)
        self.Mixed_5c = _of_35(256, pool=64)
        self.Mixed_5d = _of_35(288, pool=64)
        self.Mixed_6a = Mixed(
            288,
            {
                "branch3x3": [[(384, 3)]],
                "branch3x3dbl": [[(64, 1)], [(96, 3)], [(96, 3)]],
            },
            pool=0,
        )
        self.Mixed_6b = _of_17(128)
        self.Mixed_6c = _of_17(160)
        self.Mixed_6d = _of_17(160)
        self.Mixed_6e = _of_17(192)
        self.Mixed_7a = Mixed(
            768,
            {
                "branch3x3": [[(192, 1)], [(320, 3)]],
                "branch7x7x3": [[(192, 1)], [(192, (1, 7))], [(192, (7, 1))], [(192, 3)]],
            },
            pool=0,
        )
        self.Mixed_7b = _of_8(1280)
        self.Mixed_7c = _of_8(2048, by_maximum=True)
        self.requires_grad_(False)
        self.eval()

    def forward(self, pictures: Tensor) -> Tensor:
        """See the class."""
        x = (pictures - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        for block in self.children():
            if isinstance(block, Mixed):
                x = block(x)
        return x.mean(dim=(2, 3))


def _of_35(in_channels: int, pool: int) -> Mixed:
    """Return a block for 35x35 feature maps."""
    return Mixed(
        in_channels,
        {
            "branch1x1": [[(64, 1)]],
            "branch5x5": [[(48, 1)], [(64, 5)]],
            "branch3x3dbl": [[(64, 1)], [(96, 3)], [(96, 3)]],
        },
        pool,
    )


def _of_17(width: int) -> Mixed:
    """Return a block for 17x17 feature maps."""
    across, down = (1, 7), (7, 1)
    return Mixed(
        768,
        {
            "branch1x1": [[(192, 1)]],
            "branch7x7": [[(width, 1)], [(width, across)], [(192, down)]],
            "branch7x7dbl": [
                [(width, 1)],
                [(width, down)],
                [(width, across)],
                [(width, down)],
                [(192, across)],
            ],
        },
        pool=192,
    )


def _of_8(in_channels: int, *, by_maximum: bool = False) -> Mixed:
    """Return a block for 8x8 feature maps."""
    apart = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(
        in_channels,
        {
            "branch1x1": [[(320, 1)]],
            "branch3x3": [[(384, 1)], apart],
            "branch3x3dbl": [[(448, 1)], [(384, 3)], apart],
        },
        pool=192,
        by_maximum=by_maximum,
    )


def load_inception(weights: Path | None = None) -> Inception:
    """Load the network with its weights.

    Args:
        weights: their file; None uses pytorch-fid's place in torch's cache, and downloads the file
            if it is not there.

    Raises:
        CheckpointError: the file cannot be downloaded or read, or is another file.
    """
    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / Path(WEIGHTS_URL).name
    if weights is None and not path.exists():
        _fetch(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot read Inception's weights {str(path)!r}: {error.strerror or error}; "
            f"expected the file from {WEIGHTS_URL}"
        ) from error
    if hashlib.sha256(content).hexdigest() != WEIGHTS_SHA256:
        raise CheckpointError(
            f"{str(path)!r} is not Inception's weights (SHA-256 differs); expected the file from "
            f"{WEIGHTS_URL}"
        )
    # The only pickle that this package reads: these weights are published in no other format, and
    # the checksum shows that this is the published file.
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    network = Inception()
    network.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    return network


def _fetch(path: Path) -> None:
    """Download the weights to `path`, whole or not at all. Raises CheckpointError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            partial = Path(folder) / path.name
            digest = hashlib.sha256()
            request = urllib.request.urlopen(WEIGHTS_URL, timeout=_PATIENCE)
            with request as source, partial.open("wb") as target:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    target.write(chunk)
            if digest.hexdigest() != WEIGHTS_SHA256:
                raise CheckpointError(
                    f"the download of {WEIGHTS_URL} is not Inception's weights (SHA-256 differs); "
                    "a proxy may have altered it; try another network"
                )
            partial.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(
            f"cannot download Inception's weights for FID ({error}); if there is no network, "
            f"put the file from {WEIGHTS_URL} (95.6 MB) at {str(path)!r}"
        ) from error
