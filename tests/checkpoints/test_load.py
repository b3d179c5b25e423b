"""Checkpoints of every layout into backbones and bundles."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import apt
from apt.checkpoints.export import export_model
from apt.checkpoints.layouts import FAMILIES, KeyRule, map_keys, original_layout
from apt.checkpoints.load import load_bundle, load_model
from apt.checkpoints.weights import empty_module, shapes_of
from apt.errors import CheckpointError, InputError
from apt.models.architectures import MODELS
from apt.models.create import create_model
from tests.hub.tiny_pipelines import sd3_folder, wan_folder
from tests.tiny import tiny_bundle

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan_folder(tmp_path_factory.mktemp("wan") / "pipeline")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3_folder(tmp_path_factory.mktemp("sd3") / "pipeline")


@pytest.fixture
def copy(wan: Path, tmp_path: Path) -> Path:
    """Wan's folder, to spoil."""
    return Path(shutil.copytree(wan, tmp_path / "copy"))


def state(model: object) -> dict[str, Tensor]:
    assert isinstance(model, nn.Module)
    return model.state_dict()


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_sharded_folder_of_diffusers(wan: Path) -> None:
    assert len(list((wan / "transformer").glob("*.safetensors"))) > 1
    for model in (
        load_model(wan),
        load_model(wan / "transformer"),
        load_model(wan, subfolder="transformer"),
        load_model(
            wan / "transformer" / "diffusion_pytorch_model.safetensors.index.json",
            architecture="wan2.1_t2v_1.3b",
            options=shape_options(wan),
        ),
    ):
        assert_same(state(model), stored(wan / "transformer"))
        assert isinstance(model, nn.Module) and not model.training
        assert all(p.requires_grad for p in model.parameters())


def shape_options(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "transformer" / "config.json").read_text())
    return vars(FAMILIES.create("wan").from_diffusers(config))


def test_types_are_cast_on_the_way_and_islands_stay(wan: Path) -> None:
    model = load_model(wan, dtype=torch.bfloat16)
    expected = load_model(wan)
    assert isinstance(expected, nn.Module)
    assert_same(state(model), expected.to(torch.bfloat16).state_dict())
    assert {value.dtype for value in state(model).values()} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("family", ["wan", "sd3"])
def test_original_layouts_of_one_file(
    wan: Path, sd3: Path, tmp_path: Path, family: str, prefix: str
) -> None:
    folder = {"wan": wan, "sd3": sd3}[family]
    file = export_model(folder, tmp_path / "one.safetensors", format="comfyui")
    tensors = {
        prefix + key.removeprefix("model.diffusion_model."): value
        for key, value in load_file(file).items()
    }
    if prefix:
        tensors["first_stage_model.decoder.conv.weight"] = torch.zeros(3)
    save_file(tensors, file)
    ours = load_model(folder)
    options = vars(ours.config)
    name = {"wan": "wan2.1_t2v_1.3b", "sd3": "sd3.5_medium"}[family]
    model = load_model(file, architecture=name, options=options)
    assert_same(state(model), state(ours))


def test_a_registered_size_is_recognised_by_its_tensors(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test registers the tiny size; the folder's config.json is in the authors' format."""
    export_model(wan, tmp_path / "diffusion_pytorch_model.safetensors", format="comfyui")
    (tmp_path / "config.json").write_text('{"_class_name": "WanModel", "dim": 24}')
    tiny = type(MODELS.get("wan2.1_t2v_1.3b")())(**shape_options(wan))
    monkeypatch.setitem(MODELS._builders, "wan_tiny", lambda: tiny)
    monkeypatch.setitem(MODELS._pretrained, "wan_tiny", {})
    assert_same(state(load_model(tmp_path)), stored(wan / "transformer"))


def test_a_size_that_nobody_registered_is_asked_for(wan: Path, tmp_path: Path) -> None:
    file = export_model(wan, tmp_path / "one.safetensors", format="comfyui")
    with pytest.raises(CheckpointError, match=r"looks like the wan family.*pass architecture"):
        load_model(file)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="belong to no supported family"):
        load_model(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", [n for n in MODELS.names() if MODELS.pretrained(n)])
def test_full_sizes_go_to_the_original_layout_and_back(name: str) -> None:
    """Every key of the released models, on the meta device."""
    config = MODELS.get(name)()
    family = next(
        f for f in map(FAMILIES.create, FAMILIES.names()) if type(config) is f.config_class
    )
    rules, shapes = family.rules_for(config), shapes_of(config)
    original = original_layout(shapes, rules)
    back = [ours for key in original for rule in rules for ours in rule.match(key) or ()]
    assert sorted(back) == sorted(shapes), "each key once"


def test_building_without_memory_does_not_affect_other_threads() -> None:
    elsewhere: list[nn.Module] = []

    @dataclass(frozen=True)
    class Config:
        def build(self) -> nn.Module:
            thread = threading.Thread(target=lambda: elsewhere.append(nn.Linear(2, 2)))
            thread.start()
            thread.join()
            return nn.Linear(2, 2)

    assert all(p.is_meta for p in empty_module(Config()).parameters())
    assert not any(p.is_meta for p in elsewhere[0].parameters())


def test_tables_that_no_checkpoint_holds_are_refused() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("held", torch.ones(2))
            self.register_buffer("computed", torch.ones(2), persistent=False)

    @dataclass(frozen=True)
    class Config:
        def build(self) -> nn.Module:
            return Table()

    with pytest.raises(InputError, match=r"Table has buffers .* \(computed\); register them"):
        empty_module(Config())


def test_rules_that_cannot_be_inverted() -> None:
    for theirs, ours in ((r"a\.(x|y)", "b"), (r"a.*", "b"), (r"a\.((x)|y)", r"b.\1")):
        with pytest.raises(ValueError):
            original_layout(["b"], [KeyRule(theirs=theirs, ours=(ours,))])
    with pytest.raises(ValueError, match="no rule produces 1 keys, such as 'c'"):
        original_layout(["c"], [KeyRule(theirs="a", ours=("b",))])


def test_one_tensor_twice_is_refused(tmp_path: Path) -> None:
    from apt.checkpoints.reading import read_stored

    save_file({"a.x": torch.zeros(1), "b.x": torch.zeros(1)}, tmp_path / "f.safetensors")
    rules = [KeyRule(theirs=r"(?:a|b)\.x", ours=("c",))]
    with pytest.raises(CheckpointError, match="both our 'c'"):
        map_keys(read_stored(tmp_path / "f.safetensors"), {"c"}, rules)


def test_a_pipeline_is_a_bundle(wan: Path) -> None:
    bundle = load_bundle(wan)
    assert_same(state(bundle.backbone), stored(wan / "transformer"))
    info = bundle.info
    assert info.stage == "diffusion"
    assert info.model.architecture.startswith("wan2.1")
    assert info.text_encoder.architecture == "umt5" and info.codec.architecture == "wan_vae"
    assert info.text_encoder.config["repo"] == info.codec.config["repo"] == str(wan)
    assert info.sampling.timestep_shift == 5, "the scheduler's"
    assert bundle.codec.latent_shape(9, 16, 16) == (3, 2, 2)
    assert len(bundle.own_modules()) == 1


def test_a_pipeline_trains_on_in_our_own_folders(wan: Path, tmp_path: Path) -> None:
    bundle = load_bundle(wan)
    apt.save_bundle(tmp_path, bundle, external_text_encoder=True)
    again = load_bundle(tmp_path)
    assert again.info == load_bundle(tmp_path).info
    assert_same(state(again.backbone), state(bundle.backbone))
    assert_same(state(again.codec), state(bundle.codec))


def test_published_weights_by_name_and_tag(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repository of the entry is a folder here; tests/hub has one behind HTTP."""
    import dataclasses

    two = wan_folder(tmp_path / "two", two_experts=True)
    name = "wan2.2_t2v_a14b"
    entries = {
        tag: dataclasses.replace(entry, repo=str(two))
        for tag, entry in MODELS.pretrained(name).items()
    }
    monkeypatch.setitem(MODELS._pretrained, name, entries)
    options = shape_options(two)
    high = create_model(name, pretrained=True, **options)
    low = create_model(f"{name}.low_noise", dtype=torch.float32, **options)
    assert_same(state(high), stored(two / "transformer"))
    assert_same(state(low), stored(two / "transformer_2"))
    with pytest.raises(CheckpointError, match="wrongly shaped"):
        create_model(name, pretrained=True, **{**options, "mlp_size": 24})


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("mmdit_small", True, "no weights are published for 'mmdit_small'; choose one of sd3"),
        ("wan2.2_t2v_a14b", "official", "choose from: high_noise, low_noise"),
        ("wan2.2_t2v_a14b.best", True, "has no weights 'best'"),
        ("wan2.2_t2v_a14b.low_noise", "high_noise", "name different tags"),
        ("wan2.2_t2v", True, "did you mean"),
        ("wan3.official", False, "unknown model"),
    ],
)
def test_wrong_names_and_tags(name: str, pretrained: bool | str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_model(name, pretrained=pretrained)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_a_truncated_shard(copy: Path) -> None:
    shard = sorted((copy / "transformer").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=f"{shard.name}' is truncated"):
        load_model(copy)


def test_a_missing_shard(copy: Path) -> None:
    shard = sorted((copy / "transformer").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}' is missing"):
        load_model(copy)


def test_a_shard_of_another_checkpoint(copy: Path) -> None:
    first, second = sorted((copy / "transformer").glob("*.safetensors"))[:2]
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match="and its shard"):
        load_model(copy)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {"a": "../a.safetensors"}}'])
def test_a_damaged_index(copy: Path, index: str) -> None:
    (copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"JSON|weight_map"):
        load_model(copy)


def test_a_weight_that_is_nan(copy: Path) -> None:
    shard = sorted((copy / "transformer").glob("*.safetensors"))[0]
    tensors = load_file(shard)
    key = next(iter(tensors))
    tensors[key].view(-1)[0] = float("nan")
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=f"1 of .* values of '{key}' are NaN"):
        load_model(copy)


def test_pickles_are_never_read(copy: Path) -> None:
    for file in (copy / "transformer").glob("*.safetensors*"):
        file.unlink()
    (copy / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"has pickles, but no \.safetensors file"):
        load_model(copy)


def test_another_size_and_another_family(copy: Path, sd3: Path) -> None:
    edit_config(copy, lambda config: config.update(num_layers=3))
    with pytest.raises(CheckpointError, match=r"missing: blocks\.2\.attn1"):
        load_model(copy)
    shutil.copy(sd3 / "transformer" / "config.json", copy / "transformer" / "config.json")
    with pytest.raises(CheckpointError, match="look like a checkpoint of the wan family"):
        load_model(copy)


def test_a_class_that_is_not_known(copy: Path) -> None:
    for file in (copy / "transformer").glob("*.safetensors*"):
        file.unlink()
    save_file({"x": torch.zeros(1)}, copy / "transformer" / "model.safetensors")
    edit_config(copy, lambda config: config.update(_class_name="FluxTransformer2DModel"))
    with pytest.raises(CheckpointError, match=r"'FluxTransformer2DModel'.*WanTransformer3DModel"):
        load_model(copy)


def test_a_pipeline_without_its_vae(copy: Path) -> None:
    shutil.rmtree(copy / "vae")
    with pytest.raises(CheckpointError, match=r"vae.config\.json is missing"):
        load_bundle(copy)


def test_places_that_hold_nothing(tmp_path: Path, wan: Path) -> None:
    with pytest.raises(CheckpointError, match="has no folder 'unet'"):
        load_model(wan, subfolder="unet")
    with pytest.raises(CheckpointError, match=r"has no apt\.json"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="are for a single file"):
        load_model(wan, architecture="wan2.1_t2v_1.3b")
    with pytest.raises(InputError, match="need an architecture"):
        load_model(next((wan / "vae").glob("*.safetensors")), options={"depth": 1})
    with pytest.raises(CheckpointError, match="an image or video autoencoder"):
        load_model(next((wan / "vae").glob("*.safetensors")))


def test_our_own_folder_as_a_backbone(tmp_path: Path) -> None:
    bundle = tiny_bundle()
    apt.save_bundle(tmp_path, bundle)
    assert_same(state(load_model(tmp_path)), state(bundle.backbone))


MEASURE = """
import sys, torch
from apt.checkpoints.weights import save_weights
from apt.checkpoints.weights import Checkpoint
from apt.models.architectures import MODELS
from apt.registry import replace_typed
from pathlib import Path

def memory(name):  # in bytes, of this process alone; getrusage also knows its parent
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name)]
    return int(line.split()[1]) * 1024

folder, hidden, depth, dtype = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
config = replace_typed(MODELS.get("wan2.1_t2v_1.3b")(), dict(
    hidden_size=hidden, depth=depth, num_heads=hidden // 128, mlp_size=4 * hidden
))
# What the first use of anything costs, whatever the size, is no part of it.
small = replace_typed(config, dict(hidden_size=128, num_heads=1, depth=1, mlp_size=64))
save_weights(folder.with_name("small.safetensors"), small.build())
Checkpoint(folder.with_name("small.safetensors"), "wan2.1_t2v_1.3b", small).load()
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
model = Checkpoint(folder, "wan2.1_t2v_1.3b", config).load(dtype=getattr(torch, dtype))
size = sum(p.numel() * p.element_size() for p in model.parameters())
print((memory("VmHWM") - before) / size, size)
"""


def make_checkpoint(folder: Path, hidden: int, depth: int, dtype: torch.dtype) -> Path:
    """An index of shards, one for each block and one for the rest; zeros, which cost no time."""
    config = dict(hidden_size=hidden, depth=depth, num_heads=hidden // 128, mlp_size=4 * hidden)
    shapes = shapes_of(type(MODELS.get("wan2.1_t2v_1.3b")())(**config))
    shards: dict[str, dict[str, Tensor]] = {}
    for key, shape in shapes.items():
        shards.setdefault("-".join(key.split(".")[:2]) + ".safetensors", {})[key] = torch.zeros(
            shape, dtype=dtype
        )
    weight_map = {}
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def measure(index: Path, hidden: int, depth: int, dtype: str) -> tuple[float, float]:
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(index), str(hidden), str(depth), dtype],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    ratio, size = map(float, result.stdout.split())
    return ratio, size


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_little_more_memory_than_the_model(tmp_path: Path) -> None:
    index = make_checkpoint(tmp_path, 512, 16, torch.float32)
    ratio, size = measure(index, 512, 16, "float32")
    assert size > 250e6
    assert 0.95 < ratio <= 1.2


@pytest.mark.slow
@pytest.mark.parametrize("stored_as", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_loading_a_gigabyte_takes_little_more_memory(
    tmp_path: Path, stored_as: torch.dtype, wanted: str
) -> None:
    """At least 1 GB on disk, read as it is and cast."""
    depth = 16 if stored_as is torch.float32 else 32
    index = make_checkpoint(tmp_path, 1024, depth, stored_as)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 1e9
    ratio, _ = measure(index, 1024, depth, wanted)
    assert 0.95 < ratio <= 1.2


def test_a_built_in_name_wins_over_a_file_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text("notes on digits")
    assert_same(state(load_model("digits")), state(load_bundle("digits").backbone))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_model("./digits")
