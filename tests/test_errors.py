"""Errors are caught by their base class and by Python's own; real parts raise them."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("av")

import numpy as np
from PIL import Image

import apt
import apt.errors
from apt.checkpoints.info import INFO_FILE
from apt.checkpoints.load import ModelBundle, component_info, load_bundle
from apt.checkpoints.save import save_bundle
from apt.data.decode import read_image
from apt.data.doom import DoomClips
from apt.kernels import attention_backend, kernel_backend
from apt.train.adapters import add_adapters
from apt.train.config import LoRAConfig
from apt.train.trainer import run
from tests.data.heic import write_heic
from tests.hub.processes import QUICK, run_python
from tests.hub.server import HubServer
from tests.tiny import tiny_bundle
from tests.train.small_runs import config


def test_numbers_agree_with_their_nouns() -> None:
    counted = apt.errors.counted
    assert [counted(n, "clip") for n in (0, 1, 2, 1200)] == [
        "0 clips",
        "1 clip",
        "2 clips",
        "1,200 clips",
    ]
    assert (counted(1, "entry", "entries"), counted(3, "entry", "entries")) == (
        "1 entry",
        "3 entries",
    )


def load_with_umt5(folder: Path) -> None:
    """Load a model with a text encoder of another library, which only that library refuses."""
    save_bundle(folder, tiny_bundle())
    document = json.loads((folder / INFO_FILE).read_text())
    document["text_encoder"] = {
        "architecture": "umt5",
        "config": {"repo": str(folder)},
        "weights": None,
    }
    (folder / INFO_FILE).write_text(json.dumps(document))
    load_bundle(folder)


def read_heic(folder: Path) -> None:
    read_image(write_heic(folder / "a.heic", np.zeros((64, 64, 3), np.uint8)))


def use_kernels(_: Path) -> None:
    with kernel_backend("triton"):
        pass


def use_attention(_: Path) -> None:
    with attention_backend("flash"):
        pass


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("transformers", lambda _: apt.create_text_encoder("t5")),
        ("transformers", load_with_umt5),
        ("diffusers", lambda _: apt.create_codec("wan_vae")),
        ("peft", lambda _: add_adapters(tiny_bundle().backbone, LoRAConfig(rank=2), seed=0)),
        ("vizdoom", lambda _: DoomClips()),
        ("pi_heif", read_heic),
        ("triton", use_kernels),
        ("flash_attn", use_attention),
    ],
)
def test_a_missing_package_is_an_import_error(
    package: str, use: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    # Plugins that an earlier test registered with Pillow would still be found. All are registered
    # first: later ones would be lost with the patch, and Pillow would not look for them again.
    Image.init()
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    with pytest.raises(ImportError, match="pip install") as caught:
        use(tmp_path)
    assert isinstance(caught.value, apt.AptError)
    assert isinstance(caught.value, ValueError), "as in earlier versions"


UNREACHABLE = (
    QUICK
    + """
import dataclasses, sys
from pathlib import Path
import apt
from apt.train.trainer import run
from tests.train.small_runs import config

folder = Path(sys.argv[1])
distill = config(folder, "distill", "run")
distill = dataclasses.replace(
    distill, stage=dataclasses.replace(distill.stage, teacher="owner/model")
)
for use in (
    lambda: apt.OneStepPipeline.from_pretrained("owner/model"),
    lambda: run(distill),
    lambda: apt.export_model(
        folder / "wan", folder / "out", format="diffusers", base="owner/model"
    ),
):
    try:
        use()
    except OSError as error:
        assert isinstance(error, apt.AptError) and isinstance(error, ValueError)
        print(error)
"""
)


def test_an_unreachable_hub_is_an_os_error(tmp_path: Path) -> None:
    """It stays one on its way through code that reports a full disk."""
    save_wan(tmp_path / "wan")
    with HubServer() as hub:
        environment = {"HF_ENDPOINT": hub.endpoint}
    result = run_python(hub, tmp_path / "home", UNREACHABLE, tmp_path, **environment)
    lines = result.stdout.splitlines()
    assert len(lines) == 3, result
    for line in lines:
        assert "cannot download 'owner/model'" in line and "cannot be reached" in line


def save_wan(folder: Path) -> None:
    """A tiny model of a public family, whose other parts come from nowhere."""
    tiny = tiny_bundle()
    size = {"hidden_size": 48, "depth": 1, "num_heads": 2, "mlp_size": 48, "text_dim": 16}
    backbone = apt.create_model("wan2.1_t2v_1.3b", in_channels=tiny.codec.channels, **size)
    part = component_info("wan2.1_t2v_1.3b", backbone)
    info = dataclasses.replace(tiny.info, model=part, codec=component_info("patchify", tiny.codec))
    save_bundle(folder, ModelBundle(backbone, tiny.text_encoder, tiny.codec, info))


def test_divergence_is_a_runtime_error(tmp_path: Path) -> None:
    usual = config(tmp_path, "pretrain", "run", sample_every=0, batch_size=1)
    fast = dataclasses.replace(usual.optimizer, learning_rate=1e30, warmup_updates=0)
    with pytest.raises(RuntimeError, match="NaN or infinite") as caught:
        run(dataclasses.replace(usual, optimizer=fast))
    assert isinstance(caught.value, apt.AptError)


def test_all_errors_have_the_root() -> None:
    kinds = [
        kind
        for _, kind in inspect.getmembers(apt.errors, inspect.isclass)
        if kind.__module__ == "apt.errors"
    ]
    assert len(kinds) > 5 and all(issubclass(kind, apt.AptError) for kind in kinds)
