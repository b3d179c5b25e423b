"""A hostile file for every loader: refused or made harmless in one line, and nothing runs.

The bait is a module in the model's folder that leaves a mark when it is imported, named by each key
that has made a library import it, and pickles that leave the same mark.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import socket
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from apt.checkpoints.export import export_model
from apt.checkpoints.info import TRANSFORMER_FILE, read_info
from apt.checkpoints.load import load_bundle, load_model
from apt.checkpoints.lora import find_lora, load_lora
from apt.checkpoints.save import save_bundle
from apt.data.latents import LatentFolder, read_cache_info
from apt.data.scan import scan_folder
from apt.data.tar import write_tar
from apt.errors import CheckpointError, DataError, InputError
from apt.hub.push import push_to_hub
from apt.media import write_mp4
from apt.models import create_codec, create_text_encoder
from tests.cli.shell import invoke
from tests.hub.tiny_pipelines import wan_folder
from tests.tiny import tiny_bundle

transformers = pytest.importorskip("transformers")

BAIT = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import T5Config, T5EncoderModel, T5Tokenizer
class Evil(T5EncoderModel): pass
class EvilConfig(T5Config): pass
class EvilTokenizer(T5Tokenizer): pass
"""


class Pickled:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan_folder(tmp_path_factory.mktemp("hostile") / "wan")


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the bait would leave its mark. Nothing may leave one, nor ask whether it may."""
    path = tmp_path / "it-ran"
    asked: list[Any] = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "y")
    yield path
    assert not asked, "a library asked whether to run code"
    assert not path.exists(), "code of a model ran"


@pytest.fixture
def wan(pipeline: Path, tmp_path: Path, mark: Path) -> Path:
    """A copy of the pipeline, with the bait in every folder."""
    copy = tmp_path / "wan"
    shutil.copytree(pipeline, copy)
    for folder in (copy, *(path for path in copy.iterdir() if path.is_dir())):
        (folder / "evil.py").write_text(BAIT.format(mark=str(mark)))
    return copy


def edit(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, **changes}))


CONFIG = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.Evil"}
NAMES_CODE = "names code, or a repository of code, under"


def test_the_bait_would_work(
    wan: Path, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr("sys.path", [*sys.path])
    edit(
        wan / "tokenizer" / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.EvilTokenizer", None]},
        tokenizer_class="EvilTokenizer",
    )
    transformers.AutoTokenizer.from_pretrained(wan / "tokenizer", trust_remote_code=True)
    assert mark.exists()
    mark.unlink()


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("text_encoder/config.json", {"auto_map": CONFIG}, f"{NAMES_CODE} 'auto_map'"),
        (
            "text_encoder/config.json",
            {"_attn_implementation_internal": "evil/kernel"},
            f"{NAMES_CODE} '_attn_implementation_internal'",
        ),
        (
            "text_encoder/config.json",
            {"sub": {"experts_implementation": "evil/kernel:f"}},
            f"{NAMES_CODE} 'sub.experts_implementation'",
        ),
        ("text_encoder/config.json", {"quantization_config": {"quant_method": "x"}}, "quantised"),
        ("text_encoder/config.json", {"model_type": "evil"}, "holds a 'evil' model"),
        (
            "tokenizer/tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}},
            f"{NAMES_CODE} 'auto_map'",
        ),
        (
            "tokenizer/tokenizer_config.json",
            {"tokenizer_class": "evil.EvilTokenizer"},
            "has the tokenizer_class 'evil.EvilTokenizer'",
        ),
        (
            "tokenizer/tokenizer_config.json",
            {"tokenizer_class": ["a", "b"]},
            "has the tokenizer_class",
        ),
        ("tokenizer/tokenizer.json", {"auto_map": CONFIG}, f"{NAMES_CODE} 'auto_map'"),
        ("vae/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}, f"{NAMES_CODE} 'auto_map'"),
        ("vae/config.json", {"_class_name": ["evil", "Evil"]}, f"{NAMES_CODE} '_class_name'"),
        ("vae/config.json", {"quantization_config": {"quant_method": "x"}}, "quantised"),
        ("transformer/config.json", {"auto_map": CONFIG}, f"{NAMES_CODE} 'auto_map'"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": ["evil", "Evil"]},
            f"{NAMES_CODE} '_class_name'",
        ),
        ("model_index.json", {"_class_name": ["evil", "Evil"]}, f"{NAMES_CODE} '_class_name'"),
        ("model_index.json", {"custom_pipeline": "evil/evil"}, f"{NAMES_CODE} 'custom_pipeline'"),
        ("model_index.json", {"vae": ["evil", "Evil"]}, f"{NAMES_CODE} 'vae'"),
    ],
)
def test_a_pipeline_that_names_code(
    wan: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    edit(wan / file, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_bundle(wan)
    text = str(caught.value)
    assert str(wan) in text and "\n" not in text


def test_what_chooses_an_implementation_or_another_place_is_not_seen(
    wan: Path, pipeline: Path, tmp_path: Path
) -> None:
    """The model loads as if these were not there."""
    (secret := tmp_path / "secret").write_text("no vocabulary")
    edit(
        wan / "text_encoder" / "config.json",
        _attn_implementation="flash_attention_9",
        attn_implementation="paged",
        transformers_weights="../../elsewhere.safetensors",
        dtype="float16",
    )
    (wan / "text_encoder" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "evil/base", "peft_type": "LORA"})
    )
    (wan / "text_encoder" / "generation_config.json").write_text("{")
    edit(
        wan / "tokenizer" / "tokenizer_config.json",
        vocab_file=str(secret),
        tokenizer_file="/etc/passwd",
        chat_template="{{ evil }}",
        init_inputs=["/etc/passwd"],
    )
    edit(wan / "vae" / "config.json", attention_backend="flash")
    found, expected = load_bundle(wan), load_bundle(pipeline)
    chosen = [b.text_encoder.model.config._attn_implementation for b in (found, expected)]  # type: ignore[attr-defined]
    assert chosen[0] == chosen[1]
    with torch.no_grad():
        tokens = [bundle.text_encoder(["a red seven"]).tokens for bundle in (found, expected)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("part", ["text_encoder", "vae", "transformer"])
def test_pickles_in_the_place_of_weights(wan: Path, mark: Path, part: str) -> None:
    bin_name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    for file in (wan / part).glob("*.safetensors*"):
        file.unlink()
    torch.save(Pickled(mark), wan / part / bin_name)
    with pytest.raises(CheckpointError, match=r"pickles|no \.safetensors") as caught:
        load_bundle(wan)
    assert "save_pretrained" in str(caught.value)
    name = bin_name.replace(
        "pytorch_model.bin",
        "model.safetensors" if part == "text_encoder" else "pytorch_model.safetensors",
    )
    (wan / part / bin_name).rename(wan / part / name)
    with pytest.raises(CheckpointError, match="is a pickle"):
        load_bundle(wan)


@pytest.mark.parametrize("part", ["text_encoder", "vae", "transformer"])
def test_an_index_that_leads_elsewhere(wan: Path, part: str) -> None:
    for file in (wan / part).glob("*.safetensors*"):
        file.unlink()
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    save_file({"a": torch.zeros(1)}, wan / "outside.safetensors")
    save_file({"a": torch.zeros(1)}, wan / part / f"{stem}-00001-of-00002.safetensors")
    for name in ("../outside.safetensors", str(wan / "outside.safetensors"), "..\\x", "C:x", 7):
        index = {"metadata": {}, "weight_map": {"a": name}}
        (wan / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="names a file that is not beside it"):
            load_bundle(wan)


def test_deep_and_damaged_json(wan: Path) -> None:
    for file in (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/tokenizer.json",
    ):
        sound = (wan / file).read_text()
        (wan / file).write_text('{"a":' * 100_000)
        with pytest.raises(CheckpointError, match="nested deeper than 64 levels"):
            load_bundle(wan)
        (wan / file).write_text(sound)
    load_bundle(wan)


def test_a_tokenizer_that_its_parser_refuses(wan: Path) -> None:
    edit(wan / "tokenizer" / "tokenizer.json", normalizer={"type": "Evil"})
    with pytest.raises(CheckpointError, match=f"no usable tokenizer in {wan}") as caught:
        load_bundle(wan)
    assert "apt-" not in str(caught.value)


@pytest.mark.parametrize("name", ["DiffusionPipeline", "WanPipeline", "UNet2DModel", "utils"])
def test_a_codec_that_is_no_autoencoder(wan: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}' of diffusers is not an autoencoder"):
        create_codec("wan_vae", repo=str(wan), class_name=name)


@pytest.mark.parametrize(
    "file",
    [
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
    ],
)
def test_a_folder_named_like_a_file(wan: Path, tmp_path: Path, pipeline: Path, file: str) -> None:
    (wan / file).unlink()
    (wan / file).mkdir()
    with pytest.raises(CheckpointError, match=rf"cannot read '{wan / file}': Is a directory"):
        load_bundle(wan)
    if file.split("/")[0] in ("vae", "text_encoder"):
        with pytest.raises(CheckpointError, match=f"{wan / file}.*(Is a directory|is a folder)"):
            export_model(pipeline, tmp_path / "out", format="diffusers", base=str(wan))


def test_an_encoder_alone(wan: Path) -> None:
    edit(wan / "text_encoder" / "config.json", auto_map=CONFIG)
    with pytest.raises(CheckpointError, match=NAMES_CODE):
        create_text_encoder("umt5", repo=str(wan))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["model"].update(weights="../outside.safetensors"), "leads out of its folder"),
        (lambda d: d["model"].update(weights="/outside.safetensors"), "absolute path"),
        (lambda d: d["text_encoder"].update(weights="a\\b"), "backslash"),
        (lambda d: d["model"]["config"].update(auto_map={"a": "b"}), "auto_map"),
        (lambda d: d["training"].update(trust_remote_code=True), "training.trust_remote_code"),
        (lambda d: d["codec"].update(architecture="evil.Codec"), "evil.Codec"),
    ],
)
def test_our_own_description(
    tmp_path: Path, mark: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    folder = save_bundle(tmp_path / "model", tiny_bundle())
    document = json.loads((folder / "apt.json").read_text())
    change(document)
    (folder / "apt.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message):
        load_bundle(folder)
    (folder / "apt.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="nested deeper"):
        read_info(folder)


def test_single_files(tmp_path: Path, mark: Path) -> None:
    for name in ("model.safetensors", "model.ckpt", "model.bin", "model.pt"):
        torch.save(Pickled(mark), tmp_path / name)
        with pytest.raises(CheckpointError, match="pickle"):
            load_model(tmp_path / name)
        (tmp_path / name).write_bytes(pickle.dumps(Pickled(mark)))
        with pytest.raises(CheckpointError, match="pickle"):
            load_model(tmp_path / name)


def test_loras(tmp_path: Path, mark: Path) -> None:
    model: Any = tiny_bundle().backbone
    path = tmp_path / "pytorch_lora_weights.safetensors"
    torch.save(Pickled(mark), path)
    with pytest.raises(CheckpointError, match="pickle"):
        load_lora(find_lora(tmp_path), model)
    bomb = {"lora_adapter_metadata": "[" * 100_000}
    name = "blocks.0.streams.0.mlp_out.lora_A.weight"
    save_file({name: torch.zeros(1, 1)}, path, metadata=bomb)
    with pytest.raises(CheckpointError, match="nested deeper"):
        load_lora(path, model)


def test_latent_caches(tmp_path: Path, mark: Path) -> None:
    (tmp_path / "latents.json").write_text('{"format": ' + "[" * 100_000)
    with pytest.raises(DataError, match="nested deeper"):
        read_cache_info(tmp_path)
    info = {
        "format": 1, "codec": {}, "text_encoder": None, "channels": 4, "temporal_compression": 4,
        "spatial_compression": 8, "frames": 1, "height": 8, "width": 8, "fps": 8, "dtype": "x",
        "source": "x", "num_clips": 1, "num_prompts": 0,
    }  # fmt: skip
    (tmp_path / "latents.json").write_text(json.dumps(info))
    shard = tmp_path / "latents-00000.safetensors"
    torch.save(Pickled(mark), shard)
    with pytest.raises(DataError, match="missing or damaged"):
        LatentFolder(tmp_path)
    for clips in ("[" * 100_000, "[1]", '{"0": 1}', '{"0": {"caption": "a", "bucket": [1]}}'):
        save_file({"0": torch.zeros(1)}, shard, metadata={"clips": clips})
        with pytest.raises(DataError, match="not a file of a latent cache"):
            LatentFolder(tmp_path)


def test_shards_of_latents(tmp_path: Path, mark: Path) -> None:
    info = {
        "format": 1, "codec": {}, "text_encoder": None, "channels": 4, "temporal_compression": 4,
        "spatial_compression": 8, "frames": 1, "height": 8, "width": 8, "fps": 8, "dtype": "x",
        "source": "x", "num_clips": 1, "num_prompts": 0, "shards": "../../x",
    }  # fmt: skip
    (tmp_path / "latents.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match="another format"):
        read_cache_info(tmp_path)
    (tmp_path / "latents.json").write_text(json.dumps({**info, "shards": "tar"}))
    shard, fact = tmp_path / "latents-00000.tar", b'{"caption": "a", "bucket": [1, 8, 8]}'
    for said in (b"[" * 100_000, b"[1]", b'{"caption": "a", "bucket": [1]}'):
        write_tar(shard, {"0.safetensors": b"", "0.json": said})
        with pytest.raises(DataError, match="missing or damaged"):
            LatentFolder(tmp_path)
    with tarfile.open(shard, "w") as tar:  # a link is no member that is read
        link = tarfile.TarInfo("0.safetensors")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        said_file = tarfile.TarInfo("0.json")
        said_file.size = len(fact)
        tar.addfile(said_file, io.BytesIO(fact))
    with pytest.raises(DataError, match="missing or damaged"):
        LatentFolder(tmp_path)
    pickled = io.BytesIO()
    torch.save(Pickled(mark), pickled)
    for tensors in (
        pickled.getvalue(),
        (2**60).to_bytes(8, "little"),
        save({"other": torch.zeros(1)}),
    ):
        write_tar(shard, {"0.safetensors": tensors, "0.json": fact})
        folder = LatentFolder(tmp_path)
        with pytest.raises(DataError, match="missing or damaged"):
            folder[0]


def test_manifests_of_data(tmp_path: Path) -> None:
    (outside := tmp_path / "private.png").write_bytes(b"")
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("../private.png", str(outside), "sub/../../private.png"):
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "caption": "x"}))
        scan = scan_folder(folder)
        assert not scan.entries
        assert ["outside the folder" in problem.detail for problem in scan.problems] == [True]
    (folder / "metadata.jsonl").write_text("[" * 100_000)
    assert [problem.kind for problem in scan_folder(folder).problems] == ["bad metadata"]


def test_videos_that_are_lists_of_other_files(tmp_path: Path) -> None:
    """FFmpeg knows a playlist by its content, whatever it is called."""
    write_mp4(tmp_path / "private.mp4", torch.zeros(3, 16, 16, 3, dtype=torch.uint8), fps=8)
    folder = tmp_path / "data"
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        addresses = {
            "near": tmp_path / "private.mp4",
            "far": f"http://127.0.0.1:{server.getsockname()[1]}/a.mp4",
        }
        for name, address in addresses.items():
            hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2.0,\n{address}\n#EXT-X-ENDLIST\n"
            (folder / f"hls-{name}.mp4").write_text(hls)
            (folder / f"concat-{name}.mp4").write_text(f"ffconcat version 1.0\nfile '{address}'\n")
        for video in list(folder.iterdir()):
            video.with_suffix(".txt").write_text("a caption")
        result = invoke("data", "check", folder)
        assert result.returncode == 2 and "unreadable: 4" in result.stdout
        server.settimeout(0)
        with pytest.raises(BlockingIOError):  # nobody has called
            server.accept()


def test_an_export_copies_no_code_and_nothing_from_elsewhere(
    pipeline: Path, wan: Path, tmp_path: Path
) -> None:
    (victim := tmp_path / "victim").mkdir()
    (victim / "file").write_text("precious")
    edit(wan / "model_index.json", **{"../victim": ["diffusers", "AutoencoderKL"]})
    with pytest.raises(CheckpointError, match="not the name of a folder beside it"):
        export_model(pipeline, tmp_path / "out", format="diffusers", base=str(wan))
    assert (victim / "file").read_text() == "precious"
    shutil.copyfile(pipeline / "model_index.json", wan / "model_index.json")
    edit(wan / "vae" / "config.json", auto_map={"AutoModel": "evil.Evil"})
    with pytest.raises(CheckpointError, match=NAMES_CODE):
        export_model(pipeline, tmp_path / "out", format="diffusers", base=str(wan))
    shutil.copyfile(pipeline / "vae" / "config.json", wan / "vae" / "config.json")
    (wan / "tokenizer" / "notes.txt").symlink_to(victim / "file")
    with pytest.raises(CheckpointError, match="is a link to"):
        export_model(pipeline, tmp_path / "out", format="diffusers", base=str(wan))
    (wan / "tokenizer" / "notes.txt").unlink()
    weights = wan / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(victim / "vae.safetensors")
    weights.symlink_to(victim / "vae.safetensors")
    out = export_model(pipeline, tmp_path / "out", format="diffusers", base=str(wan))
    assert not list(out.rglob("*.py"))
    copied = load_file(out / "vae" / "diffusion_pytorch_model.safetensors")
    assert copied.keys() == load_file(victim / "vae.safetensors").keys()


def test_a_push_sends_nothing_from_elsewhere(tmp_path: Path) -> None:
    folder = save_bundle(tmp_path / "model", tiny_bundle())
    (secret := tmp_path / "id_rsa").write_text("secret")
    for name in ("README.md", "LICENSE", "vocab.txt", "more.safetensors"):
        (folder / name).symlink_to(secret)
        with pytest.raises(CheckpointError, match=r"is a link to|is truncated|not a safetensors"):
            push_to_hub(folder, "me/model")
        (folder / name).unlink()
    (folder / TRANSFORMER_FILE).unlink()
    (folder / TRANSFORMER_FILE).mkdir()
    with pytest.raises(CheckpointError, match="Is a directory"):
        push_to_hub(folder, "me/model")
