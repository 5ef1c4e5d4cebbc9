"""The package contract: what open_package accepts, and the exact text of every refusal."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import artifact
from engine.errors import PackageInvalid

REBUILD = "doit build model=tiny quantization=q4f16_1 target=x86-64-v4"
HERE = "doit build model=tiny quantization=q4f16_1 target=cpu"
FILES = {
    "lib.so": b"\x7fELF",
    "params_shard_0.bin": bytes(range(128)),
    "mlc-chat-config.json": b"{}\n",
    "tokenizer.json": b"{}\n",
}


def make_library() -> dict[str, Any]:
    return {
        "abi": 1,
        "family": "llama",
        "quantization": "q4f16_1",
        "layout": "rows16",
        "target": {"kind": "llvm"},
        "requires": ["avx2", "avx512f"],
        "tvm": "0.27.0.post1",
        "functions": ["batch_decode", "batch_prefill"],
        "params": [{"name": "lm_head.weight", "shape": [4, 8], "dtype": "float16"}],
        "limits": {"context_window": 512, "prefill_chunk": 128, "max_batch": 4},
        "vocab_size": 4,
        "kv": {"kind": "tensor", "dtype": "float16", "layers": 1, "kv_heads": 1, "page_size": 16, "head_dim": 8},
        "memory": {"batch_decode": 1024},
    }


def make_index() -> dict[str, Any]:
    records = [
        {"name": "a", "shape": [4, 4], "dtype": "float16", "format": "raw", "nbytes": 32, "byteOffset": 0},
        {"name": "b", "shape": [16], "dtype": "float32", "format": "raw", "nbytes": 64, "byteOffset": 64},
    ]
    shard = {"dataPath": "params_shard_0.bin", "format": "raw-shard", "nbytes": 128, "md5sum": "", "records": records}
    return {"metadata": {"ParamSize": 2, "ParamBytes": 96, "BitsPerParam": 24.0}, "records": [shard]}


def write_manifest(root: Path, change: Callable[[dict[str, Any]], None] = lambda data: None) -> None:
    """A manifest of the files in `root`, after `change`."""
    files = [
        {"path": p.name, "size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in sorted(root.iterdir())
        if p.name != "manifest.json"
    ]
    data = {
        "schema": 1,
        "variant": "tiny/q4f16_1/x86-64-v4",
        "random": False,
        "files": files,
        "recipes": {"model": {}, "quantization": {}, "target": {"arch": "x86_64"}},
        "source": {},
        "actions": {},
        "tools": {},
        "library": make_library(),
        "licence": "Apache-2.0",
    }
    change(data)
    (root / "manifest.json").write_text(json.dumps(data))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid package, on a machine that can run it."""
    monkeypatch.setattr(artifact, "get_machine", lambda: "x86_64")
    monkeypatch.setattr(artifact, "get_cpu_features", lambda: frozenset({"avx2", "avx512f", "fma"}))
    monkeypatch.setattr(artifact, "get_tvm_version", lambda: "0.27.0.post1")
    folder = tmp_path / "tiny-q4f16_1-x86-64-v4"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "tensor-cache.json").write_text(json.dumps(make_index()))
    write_manifest(folder)
    return folder


def check_refused(root: Path, message: str, hint: str = f"rebuild the package: {REBUILD}", **options: bool) -> None:
    """open_package(root) is refused with exactly this message (after the path) and hint."""
    with pytest.raises(PackageInvalid) as caught:
        artifact.open_package(root, **options)
    assert str(caught.value) == f"{root}: {message}\n  hint: {hint}"


def test_open_gives_paths_and_metadata(root: Path) -> None:
    package = artifact.open_package(root, verify=True)
    assert package.library_path == root / "lib.so"
    assert package.weights_index == root / "tensor-cache.json"
    assert package.tokenizer == root / "tokenizer.json"
    assert package.tokenizer_config is None
    assert package.manifest.variant == "tiny/q4f16_1/x86-64-v4"
    assert package.manifest.library.limits == artifact.LibraryLimits(512, 128, 4)
    assert package.manifest.library.params == (artifact.Param("lm_head.weight", (4, 8), "float16"),)
    assert package.manifest.library.kv.page_size == 16


def test_files_beside_the_manifest_are_allowed(root: Path) -> None:
    (root / "record.json").write_text("{}")
    assert artifact.open_package(root, verify=True).manifest.licence == "Apache-2.0"


def test_missing_folder(root: Path) -> None:
    check_refused(
        root.parent / "tiny-q0f32-x86-64-v3",
        "there is no such package",
        "build it: doit build model=tiny quantization=q0f32 target=x86-64-v3",
    )


@pytest.mark.parametrize("quantization", ["q4f16_1", "q0bf16", "q4f16_1_bf16"])
def test_the_name_of_a_folder_tells_what_to_build(tmp_path: Path, quantization: str) -> None:
    command = artifact.rebuild_command(tmp_path / f"a-b2-{quantization}-x86-64-v3", {})
    assert command == f"doit build model=a-b2 quantization={quantization} target=x86-64-v3"


def test_missing_manifest(root: Path) -> None:
    (root / "manifest.json").unlink()
    check_refused(root, "incomplete: manifest.json, which is written last, is missing")


def test_folder_of_another_name_still_gets_a_hint(root: Path) -> None:
    other = root.rename(root.parent / "renamed")
    (other / "manifest.json").unlink()
    check_refused(
        other,
        "incomplete: manifest.json, which is written last, is missing",
        "rebuild the package: doit build model=<model> quantization=<quantization> target=<target>",
    )


def test_folder_of_a_long_quantization_name(root: Path) -> None:
    moved = root.rename(root.with_name("tiny-q4f16_1_kv8-x86-64-v4"))
    (moved / "manifest.json").unlink()
    check_refused(
        moved,
        "incomplete: manifest.json, which is written last, is missing",
        "rebuild the package: doit build model=tiny quantization=q4f16_1_kv8 target=x86-64-v4",
    )


def test_damaged_manifest(root: Path) -> None:
    (root / "manifest.json").write_text('{"schema": 1,')
    with pytest.raises(PackageInvalid, match=r"manifest\.json is not JSON: ") as caught:
        artifact.open_package(root)
    assert caught.value.hint == f"rebuild the package: {REBUILD}"


def test_manifest_of_another_shape(root: Path) -> None:
    write_manifest(root, lambda data: data.update(files={}))
    check_refused(root, "'files' in its JSON should be list, not dict")


def test_missing_file(root: Path) -> None:
    (root / "params_shard_0.bin").unlink()
    check_refused(root, "params_shard_0.bin is missing")


def test_short_file(root: Path) -> None:
    (root / "params_shard_0.bin").write_bytes(bytes(100))
    check_refused(root, "params_shard_0.bin has 100 bytes instead of 128")


def test_altered_byte_is_found_by_verify_only(root: Path) -> None:
    altered = bytes([1]) + FILES["params_shard_0.bin"][1:]
    (root / "params_shard_0.bin").write_bytes(altered)
    artifact.open_package(root)
    found = hashlib.sha256(altered).hexdigest()[:12]
    wanted = hashlib.sha256(FILES["params_shard_0.bin"]).hexdigest()[:12]
    check_refused(root, f"params_shard_0.bin was altered: its SHA-256 is {found}..., not {wanted}...", verify=True)


@pytest.mark.parametrize("path", ["../lib.so", "/etc/passwd", "a/../../b", "a\\b", ""])
def test_names_that_leave_the_package(root: Path, path: str) -> None:
    write_manifest(root, lambda data: data["files"][0].update(path=path))
    check_refused(root, f"file name {path!r} leads out of the package")


def test_another_schema(root: Path) -> None:
    write_manifest(root, lambda data: data.update(schema=2))
    check_refused(root, "made with package schema 2, and this engine reads package schema 1")


def test_another_abi(root: Path) -> None:
    write_manifest(root, lambda data: data["library"].update(abi=7))
    check_refused(root, "made with library ABI 7, and this engine reads library ABI 1")


def test_another_tvm(root: Path) -> None:
    write_manifest(root, lambda data: data["library"].update(tvm="0.26.0"))
    check_refused(root, "built with TVM 0.26.0, and this machine has TVM 0.27.0.post1")
    artifact.open_package(root, here=False)


def test_no_tvm(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "get_tvm_version", lambda: None)
    check_refused(root, "apache-tvm is not installed", "pip install apache-tvm==0.27.0.post1")


def test_missing_cpu_feature(root: Path) -> None:
    write_manifest(root, lambda data: data["library"].update(requires=["avx2", "avx512_vnni", "amx_int8"]))
    check_refused(
        root,
        "needs CPU features that this processor lacks: avx512_vnni, amx_int8",
        f"build it for here: {HERE}",
    )
    artifact.open_package(root, here=False)


def test_the_best_library_of_several_is_loaded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {"v4": ["avx2", "avx512f"], "vnni": ["avx2", "avx_vnni"], "v3": ["avx2", "fma"]}
    levels = [{"file": f"lib-{name}.so", "target": name, "requires": flags} for name, flags in needs.items()]
    for level in levels:
        (root / str(level["file"])).write_bytes(b"code")
    write_manifest(root, lambda data: data["library"].update(levels=levels, requires=["avx2"]))
    names = [path.name for path in artifact.open_package(root).libraries]
    assert names == ["lib-v4.so", "lib-v3.so", "lib.so"]
    monkeypatch.setattr(artifact, "get_cpu_features", lambda: frozenset({"avx2", "avx_vnni"}))
    assert artifact.open_package(root).library_path == root / "lib-vnni.so"
    monkeypatch.setattr(artifact, "get_cpu_features", lambda: None)  # unknown: what runs everywhere
    assert artifact.open_package(root).libraries == (root / "lib.so",)
    levels.append({"file": "lib-v5.so", "target": "v5", "requires": []})
    write_manifest(root, lambda data: data["library"].update(levels=levels, requires=["avx2"]))
    check_refused(root, "manifest.json does not list lib-v5.so")


def test_needs_of_a_gpu_are_not_cpu_features(root: Path) -> None:
    write_manifest(root, lambda data: data["library"].update(requires=["compute-capability 9.0"]))
    assert artifact.open_package(root).manifest.library.requires == ("compute-capability 9.0",)


def test_another_architecture(root: Path) -> None:
    write_manifest(root, lambda data: data["recipes"]["target"].update(arch="aarch64"))
    check_refused(root, "built for aarch64, and this machine is x86_64", f"build it for here: {HERE}")


def test_random_package_is_rebuilt_as_random(root: Path) -> None:
    write_manifest(root, lambda data: data.update(variant="tiny-random/q0f32/aarch64", schema=9))
    check_refused(
        root,
        "made with package schema 9, and this engine reads package schema 1",
        "rebuild the package: doit build model=tiny quantization=q0f32 target=aarch64 source=random",
    )


def test_two_libraries(root: Path) -> None:
    (root / "lib.tar").write_bytes(b"")
    write_manifest(root)
    check_refused(root, "should hold exactly one library (lib.*), not 2")


def test_unlisted_tokenizer(root: Path) -> None:
    (root / "tokenizer.json").unlink()
    write_manifest(root)
    check_refused(root, "manifest.json does not list tokenizer.json")


def test_weights_index(root: Path) -> None:
    shard = root / "params_shard_0.bin"
    assert artifact.load_weights_index(root) == [
        artifact.TensorRecord("a", (4, 4), "float16", shard, 0, 32),
        artifact.TensorRecord("b", (16,), "float32", shard, 64, 64),
    ]


def test_weights_index_beyond_its_shard(root: Path) -> None:
    index = make_index()
    index["records"][0]["records"][1]["byteOffset"] = 65
    (root / "tensor-cache.json").write_text(json.dumps(index))
    with pytest.raises(PackageInvalid) as caught:
        artifact.load_weights_index(root)
    message = "tensor-cache.json: b ends after its shard params_shard_0.bin (128 bytes)"
    assert str(caught.value) == f"{root}: {message}\n  hint: rebuild the package: {REBUILD}"


def test_weights_index_of_another_format(root: Path) -> None:
    index = make_index()
    index["records"][0]["records"][0]["format"] = "f32-to-bf16"
    (root / "tensor-cache.json").write_text(json.dumps(index))
    with pytest.raises(PackageInvalid, match="storage format 'f32-to-bf16' is not supported, only 'raw'"):
        artifact.load_weights_index(root)


def test_this_machine_is_described() -> None:
    assert artifact.get_machine()
    features = artifact.get_cpu_features()
    assert features is None or len(features) > 5
    assert artifact.get_tvm_version()


def test_only_the_standard_library_is_imported() -> None:
    code = (
        "import sys, engine.artifact; "
        "heavy = {m.split('.')[0] for m in sys.modules} - sys.stdlib_module_names - {'engine', '__main__'}; "
        "print(sorted(m for m in heavy if m in ('numpy', 'tvm', 'pydantic', 'mlcbuild', 'torch')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
