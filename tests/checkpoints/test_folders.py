from __future__ import annotations

import dataclasses
import json
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from apt.checkpoints.info import INFO_FILE, TEXT_ENCODER_FILE, TRANSFORMER_FILE, read_info
from apt.checkpoints.load import component_info, load_bundle
from apt.checkpoints.reading import read_header
from apt.checkpoints.save import save_bundle
from apt.checkpoints.source import locate
from apt.checkpoints.weights import load_weights, save_weights
from apt.condition import Condition
from apt.errors import CheckpointError, InputError
from apt.models.create import create_model
from tests.tiny import tiny_bundle


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model; tests that spoil it take a copy."""
    return save_bundle(tmp_path_factory.mktemp("hub") / "model", tiny_bundle())


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in saved.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the document of apt.json."""
    document = json.loads((folder / INFO_FILE).read_text())
    change(document)
    (folder / INFO_FILE).write_text(json.dumps(document))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of the backbone's file."""
    tensors = load_file(folder / TRANSFORMER_FILE)
    change(tensors)
    save_file(tensors, folder / TRANSFORMER_FILE)


def test_a_saved_model_comes_back_exactly(saved: Path) -> None:
    original, loaded = tiny_bundle(), load_bundle(saved)
    assert {file.name for file in saved.iterdir()} == {
        INFO_FILE,
        TRANSFORMER_FILE,
        TEXT_ENCODER_FILE,
    }
    for before, after in zip(original.modules(), loaded.modules(), strict=True):
        assert not after.training
        expected, state = before.state_dict(), after.state_dict()
        assert expected.keys() == state.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert loaded.backbone.config == original.backbone.config, "tuples are tuples again"
    assert loaded.info.sample == original.info.sample
    assert loaded.info.sampling == original.info.sampling
    assert loaded.info.training == {"recipe": "none"}
    assert loaded.info.model.weights == TRANSFORMER_FILE
    with torch.no_grad():
        x, t = torch.randn(1, 768, 3, 4, 4), torch.ones(1)
        outputs = [
            b.backbone(x, t, Condition(b.text_encoder(["a red seven"]))) for b in (original, loaded)
        ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_types_are_cast_on_the_way(tmp_path: Path, stored: torch.dtype) -> None:
    save_bundle(tmp_path, tiny_bundle(), dtype=stored)
    tensors = load_file(tmp_path / TRANSFORMER_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {stored}
    for wanted in (torch.float32, torch.bfloat16):
        module = load_bundle(tmp_path, dtype=wanted).backbone
        assert isinstance(module, torch.nn.Module)
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, tensors[key].to(wanted)), key


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    save_bundle(tmp_path, tiny_bundle())
    save_bundle(tmp_path, tiny_bundle("diffusion"), external_text_encoder=True)
    assert {file.name for file in tmp_path.iterdir()} == {INFO_FILE, TRANSFORMER_FILE}
    info = read_info(tmp_path)
    assert info.stage == "diffusion"
    assert info.text_encoder.weights is None
    assert load_bundle(tmp_path).info == info


def test_files_have_the_mode_that_the_umask_asks_for(saved: Path) -> None:
    modes = {stat.S_IMODE(file.stat().st_mode) for file in saved.iterdir()}
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o666 & ~mask}, "safetensors alone would make them private"


def test_tensors_that_share_memory_are_all_stored(tmp_path: Path) -> None:
    module = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
    module[1].weight = module[0].weight
    save_weights(tmp_path / "x.safetensors", module)
    other = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
    load_weights(tmp_path / "x.safetensors", other)
    assert torch.equal(other[1].weight, module[0].weight)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_truncated_file_is_always_seen(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = (saved / TEXT_ENCODER_FILE).read_bytes()
    path = tmp_path_factory.mktemp("cut") / "x.safetensors"
    path.write_bytes(whole)
    read_header(path)
    length = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:length])
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(path)


@pytest.mark.parametrize("name", [TRANSFORMER_FILE, TEXT_ENCODER_FILE])
def test_a_truncated_model_says_which_file_and_how_much(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    message = (
        rf"{name}' is truncated: it has {len(data) - 1} bytes, its header promises {len(data)}"
    )
    with pytest.raises(CheckpointError, match=message):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff" * 64, "not a safetensors file"),
        (b"\x10" + b"\0" * 7 + b"{not json at all", "not a safetensors file"),
        (b"\x02" + b"\0" * 7 + b"[]", "not a safetensors file"),
        (pickle.dumps({"weight": [1.0]}), "is a pickle"),
        (b"PK\x03\x04" + b"\0" * 60, "is a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"", "truncated"),
    ],
)
def test_files_of_other_kinds_are_named(folder: Path, content: bytes, message: str) -> None:
    (folder / TRANSFORMER_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_bundle(folder)


@pytest.mark.parametrize("length", [0x80, 0x280, 0x4B50])
def test_a_header_length_that_looks_like_a_pickle_is_none(tmp_path: Path, length: int) -> None:
    """The first bytes of a good file are the length of its header, which can be any number."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    data = length.to_bytes(8, "little") + header.ljust(length).encode() + bytes(4)
    (tmp_path / "x.safetensors").write_bytes(data)
    read_header(tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors")["x"].item() == 0


def test_bytes_after_the_end_are_damage(folder: Path) -> None:
    with (folder / TRANSFORMER_FILE).open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_bundle(folder)


def test_a_missing_weight_file_is_named(folder: Path) -> None:
    (folder / TEXT_ENCODER_FILE).unlink()
    with pytest.raises(CheckpointError, match=rf"{TEXT_ENCODER_FILE}' is missing"):
        load_bundle(folder)


def test_missing_unexpected_and_reshaped_keys_are_all_listed(folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["patch_input.bias"] = tensors.pop("patch_in.bias")
        tensors["patch_out.bias"] = torch.zeros(7)

    rewrite(folder, spoil)
    with pytest.raises(CheckpointError) as caught:
        load_bundle(folder)
    text = str(caught.value)
    assert "1 missing: patch_in.bias" in text
    assert "1 unexpected: patch_input.bias" in text
    assert "1 wrongly shaped: patch_out.bias is 7, expected 768" in text
    assert "patch_input.bias (for patch_in.bias?)" in text


def test_a_long_list_of_keys_is_cut_and_counted(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({f"x{i}": torch.zeros(1) for i in range(12)}))
    with pytest.raises(CheckpointError, match=r"12 unexpected: x0, x1, x10, x11, x2 and 7 more"):
        load_bundle(folder)


def test_a_wrapped_checkpoint_is_recognised(folder: Path) -> None:
    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[f"module.{key}"] = tensors.pop(key)

    rewrite(folder, wrap)
    with pytest.raises(CheckpointError, match=r"fits if you remove the prefix 'module\.'"):
        load_bundle(folder)


def test_another_size_of_the_same_model_is_recognised(folder: Path, tmp_path: Path) -> None:
    wider = create_model(
        "mmdit_digits", hidden_size=36, depth=2, num_heads=2, text_dim=16, pooled_dim=16
    )
    assert isinstance(wider, torch.nn.Module)
    save_weights(folder / TRANSFORMER_FILE, wider)
    with pytest.raises(CheckpointError, match="another size of the same model"):
        load_bundle(folder)


def test_a_foreign_checkpoint_is_recognised(folder: Path) -> None:
    """A real Wan transformer, as diffusers saves it."""
    from diffusers import WanTransformer3DModel

    wan = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, ffn_dim=32, num_layers=1
    )
    save_weights(folder / TRANSFORMER_FILE, wan)
    with pytest.raises(CheckpointError, match="look like a checkpoint of the wan family"):
        load_bundle(folder)


def test_an_untouched_module_when_keys_do_not_fit(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update(extra=torch.zeros(1)))
    module = tiny_bundle().backbone
    assert isinstance(module, torch.nn.Module)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with torch.no_grad():
        for value in module.parameters():
            value.add_(1)
    with pytest.raises(CheckpointError):
        load_weights(folder / TRANSFORMER_FILE, module)
    after = module.state_dict()
    assert all(torch.equal(after[key], before[key] + 1) for key in before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(folder: Path, value: float) -> None:
    rewrite(folder, lambda tensors: tensors["patch_in.weight"][0, :3].fill_(value))
    with pytest.raises(CheckpointError, match=r"3 of \d+ values of 'patch_in.weight' are NaN"):
        load_bundle(folder)


def test_nothing_that_is_not_finite_is_saved(tmp_path: Path) -> None:
    bundle = tiny_bundle()
    save_bundle(tmp_path, bundle)
    before = (tmp_path / TRANSFORMER_FILE).read_bytes()
    assert isinstance(bundle.backbone, torch.nn.Module)
    with torch.no_grad():
        bundle.backbone.get_parameter("patch_in.bias")[0] = 70_000.0
    with pytest.raises(CheckpointError, match=r"float16; .* dtype is too small"):
        save_bundle(tmp_path, bundle, dtype=torch.float16)
    assert (tmp_path / TRANSFORMER_FILE).read_bytes() == before
    save_bundle(tmp_path, bundle, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=2), "format 2, but this version reads format 1; upgrade"),
        (lambda d: d.update(format=0), "format 0"),
        (lambda d: d.pop("format"), "no format number"),
        (lambda d: d.pop("stage"), "lacks: stage"),
        (lambda d: d.update(stage=3), "'stage' must be"),
        (lambda d: d.update(licence="x"), "unknown fields: licence"),
        (lambda d: d["sample"].update(frames="9"), "'frames' must be int, got '9'"),
        (lambda d: d["sample"].pop("fps"), "sample, lacks: fps"),
        (lambda d: d["sampling"].update(steps=2), "unknown fields: steps"),
        (lambda d: d.update(codec="patchify"), "codec, must be an object"),
        (lambda d: d["model"].update(architecture="mmdit_digit"), "did you mean 'mmdit_digits'"),
        (lambda d: d["model"]["config"].update(widht=2), "takes no option 'widht'"),
        (lambda d: d["model"]["config"].update(depth="2"), "'depth' must be int"),
        (
            lambda d: d["codec"]["config"].update(spatial=4),
            "768 latent channels, but the codec has",
        ),
        (lambda d: d["model"]["config"].update(num_heads=5), "cannot be built: hidden_size"),
    ],
)
def test_a_wrong_description_is_explained(
    folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_bundle(folder)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null"])
def test_a_damaged_description_is_explained(folder: Path, content: str) -> None:
    (folder / INFO_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"damaged|no format number"):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "diffusers or transformers"),
        ("model.ckpt", "pickles"),
        ("step_00000100", "training run"),
        ("notes.txt", "of a training run or of an export"),
    ],
)
def test_a_folder_of_something_else_is_recognised(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match=f"has no {INFO_FILE}.*{message}"):
        load_bundle(tmp_path)


def test_names_that_are_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt.checkpoints.source.ASSETS", tmp_path)
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / INFO_FILE).write_text("{}")
    assert locate("digits").folder == tmp_path / "digits"
    for name in ("digit", "digtis"):
        with pytest.raises(CheckpointError, match="did you mean 'digits'"):
            locate(name)
    with pytest.raises(
        CheckpointError, match=r"built-in name \(digits\), the folder of a training run"
    ):
        locate("/no/such/folder")
    with pytest.raises(CheckpointError, match="is a file; pass the folder"):
        locate(tmp_path / "digits" / INFO_FILE)
    # A Path is never a name.
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(CheckpointError, match="there is no model"):
        locate(Path("digits"))


def test_a_revision_of_what_has_none_and_two_of_one(tmp_path: Path) -> None:
    for name in ("digits", tmp_path):
        with pytest.raises(InputError, match="is not a Hub repository, so it has no revision"):
            locate(name, "main")
    with pytest.raises(InputError, match="name different revisions"):
        locate("owner/name@one", "two")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot save to"):
        save_bundle(tmp_path / "file" / "model", tiny_bundle())


def test_a_description_of_other_parts_is_not_saved(tmp_path: Path) -> None:
    bundle = tiny_bundle()
    other = create_model("mmdit_digits", depth=3)
    bundle.info = dataclasses.replace(bundle.info, model=component_info("mmdit_digits", other))
    with pytest.raises(CheckpointError, match=r"info\.model\.config differs"):
        save_bundle(tmp_path, bundle)


def test_a_folder_older_than_an_option_is_saved_anew_with_its_default(
    folder: Path, tmp_path: Path
) -> None:
    def forget(document: dict[str, Any]) -> None:
        del document["codec"]["config"]["lapped"]
        del document["model"]["config"]["absolute_positions"]

    full = read_info(folder)
    edit(folder, forget)
    loaded = load_bundle(folder)
    assert read_info(save_bundle(tmp_path / "again", loaded)) == full
