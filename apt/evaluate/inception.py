"""The Inception-v3 of FID: TensorFlow's network of 2015-12-05, up to its last pooling.

It is not torchvision's nor timm's: its average pooling leaves out padding, its last block pools by
maximum, and its weights come from another training (Szegedy et al., 2015; Heusel et al., 2017).
Parameters are named as in the file that pytorch-fid and torch-fidelity both publish, so it loads as
it is. Their classes are not used because they need torchvision, unpickle without a full checksum,
and take whole numbers alone, whereas clean-fid's resize is not rounded.
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
"""Output channels and kernel."""
Branch = Sequence[Sequence[Layer]]
"""Layers one behind another; two in one place lie side by side."""


class Convolution(nn.Module):
    """Convolution, batch normalisation and ReLU. `same` pads, so that the size stays."""

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
        """(B, C, H, W) to (B, channels, H', W')."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side, their outputs one behind another in the channels.

    Args:
        in_channels: of the input.
        branches: by the name of their convolutions, which get a number if there are several, and
            a letter if two lie side by side.
        pool: channels of the convolution behind the pooling; 0 halves the size: the last layers
            have stride 2, and what is pooled, by maximum, goes on as it is.
        by_maximum: pool by maximum where the size stays.
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
        """(B, C, H, W) to (B, C', H', W')."""
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
    """Pictures (B, 3, 299, 299) in [0, 255] to FID's features (B, 2048). Not for training."""

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
    """A block at 35x35 places."""
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
    """A block at 17x17 places."""
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
    """A block at 8x8 places."""
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
    """The network with its weights.

    Args:
        weights: their file; None is where pytorch-fid keeps it, in torch's cache, and fetches it if
            it is not there.

    Raises:
        CheckpointError: it cannot be fetched or read, or is another file.
    """
    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / Path(WEIGHTS_URL).name
    if weights is None and not path.exists():
        _fetch(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot read Inception's weights {str(path)!r}: {error.strerror or error}; "
            f"expected the file of {WEIGHTS_URL}"
        ) from error
    if hashlib.sha256(content).hexdigest() != WEIGHTS_SHA256:
        raise CheckpointError(
            f"{str(path)!r} is not Inception's weights (SHA-256); expected the file of "
            f"{WEIGHTS_URL}"
        )
    # The one pickle that is read anywhere here: nobody publishes these weights otherwise, and by
    # its checksum it is this very file.
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    network = Inception()
    network.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    return network


def _fetch(path: Path) -> None:
    """Download the weights to `path`, which appears whole. Raises CheckpointError."""
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
                    f"what came from {WEIGHTS_URL} is not Inception's weights (SHA-256); a proxy "
                    "on the way may alter it, try another network"
                )
            partial.replace(path)
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(
            f"cannot download Inception's weights for FID ({error}); where there is no network, "
            f"put the file of {WEIGHTS_URL} (95.6 MB) at {str(path)!r}"
        ) from error
