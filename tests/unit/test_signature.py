"""Signatures: made by one key, checked with its other half, and worth nothing for any other package or key."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from small_parts import Parts
from test_bundle import take_digests

from engine.artifact import PackageInvalid, open_package
from mlcbuild.errors import PackageError
from mlcbuild.package.provenance import add_manifest
from mlcbuild.package.signature import (
    MAKE_KEY,
    check_signature,
    compute_key_id,
    is_signed,
    load_public_key,
    load_signature,
    load_signing_key,
    make_signed_bytes,
    sign_package,
)

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))
AGAIN = "whoever published it has to sign it: MLCBUILD_SIGNING_KEY=key.pem doit sign model=..."


@pytest.fixture
def package(tmp_path: Path) -> Path:
    Parts(tmp_path).package(tmp_path / "package")
    return tmp_path / "package"


def check(folder: Path, key: Ed25519PrivateKey = KEY) -> None:
    check_signature(open_package(folder, here=False), key.public_key())


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_signature_is_checked_with_the_public_key(package: Path) -> None:
    before = take_digests(package)
    assert sign_package(package, KEY) == compute_key_id(KEY.public_key())
    check(package)
    assert is_signed(package, KEY)
    after = take_digests(package)
    assert {**after, **before} == after
    assert {*after} - {*before} == {"signature.json"}
    sign_package(package, KEY)
    assert take_digests(package) == after


def test_the_envelope_is_dsse(package: Path) -> None:
    sign_package(package, KEY)
    envelope = json.loads((package / "signature.json").read_text())
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    payload = base64.b64decode(envelope["payload"])
    statement = json.loads((package / "provenance.json").read_text())
    assert json.loads(payload) == add_manifest(statement, take_digests(package)["manifest.json"])
    signed = b"DSSEv1 28 application/vnd.in-toto+json " + str(len(payload)).encode() + b" " + payload
    assert make_signed_bytes(payload) == signed
    KEY.public_key().verify(base64.b64decode(envelope["signatures"][0]["sig"]), signed)


def test_an_unsigned_package(package: Path) -> None:
    assert not is_signed(package, KEY)
    assert load_signature(open_package(package, here=False)) is None
    with pytest.raises(PackageInvalid) as caught:
        check(package)
    assert str(caught.value) == f"{package}: it is not signed: signature.json is missing\n  hint: {AGAIN}"


def test_the_wrong_key(package: Path) -> None:
    sign_package(package, OTHER)
    ours, theirs = (compute_key_id(key.public_key())[:12] for key in (KEY, OTHER))
    assert not is_signed(package, KEY)
    with pytest.raises(PackageInvalid) as caught:
        check(package)
    assert str(caught.value) == f"{package}: it is not signed with key {ours}, but with {theirs}\n  hint: {AGAIN}"


def test_a_key_id_that_lies_changes_nothing(package: Path) -> None:
    sign_package(package, OTHER)
    path = package / "signature.json"
    (signature,) = json.loads(path.read_text())["signatures"]
    edit(path, signatures=[{**signature, "keyid": compute_key_id(KEY.public_key())}])
    with pytest.raises(PackageInvalid, match="it is not signed with key"):
        check(package)
    edit(path, signatures=[{"sig": "AAAA"}, {**signature, "keyid": ""}])
    check(package, OTHER)


def test_an_altered_package(package: Path) -> None:
    sign_package(package, KEY)
    path = package / "README.md"
    path.write_bytes(path.read_bytes().replace(b"tiny", b"TINY"))
    with pytest.raises(PackageInvalid, match=r"README\.md was altered"):
        open_package(package, verify=True, here=False)
    with pytest.raises(PackageInvalid, match=r"README\.md was altered"):
        sign_package(package, KEY)


def test_an_altered_manifest(package: Path) -> None:
    sign_package(package, KEY)
    edit(package / "manifest.json", licence="proprietary")
    with pytest.raises(PackageInvalid) as caught:
        check(package)
    assert str(caught.value) == f"{package}: signature.json was made for another package\n  hint: {AGAIN}"


def test_an_altered_provenance(package: Path) -> None:
    statement = json.loads((package / "provenance.json").read_text())
    edit(package / "provenance.json", subject=statement["subject"][1:])
    with pytest.raises(PackageInvalid) as caught:
        sign_package(package, KEY)
    assert str(caught.value).startswith(f"{package}: provenance.json has ")


def test_a_package_of_older_times(package: Path) -> None:
    manifest = json.loads((package / "manifest.json").read_text())
    files = [file for file in manifest["files"] if file["path"] != "provenance.json"]
    edit(package / "manifest.json", files=files)
    with pytest.raises(PackageInvalid) as caught:
        sign_package(package, KEY)
    assert str(caught.value) == (
        f"{package}: it has no provenance.json\n"
        "  hint: rebuild the package: doit build model=tiny quantization=q0f16 target=x86-64-v3"
    )


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"payloadType": "x", "payload": "", "signatures": []}'])
def test_what_is_no_envelope(package: Path, text: str) -> None:
    (package / "signature.json").write_text(text)
    with pytest.raises(PackageInvalid) as caught:
        check(package)
    what = f"{package}: signature.json is no DSSE envelope of an in-toto statement"
    assert str(caught.value) == f"{what}\n  hint: {AGAIN}"


def test_keys_are_pem_files(tmp_path: Path) -> None:
    private, public = tmp_path / "key.pem", tmp_path / "pub.pem"
    private.write_bytes(KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    assert load_public_key(public) == load_signing_key(private).public_key() == KEY.public_key()
    with pytest.raises(PackageError, match="is no PEM file of a key") as caught:
        load_signing_key(public)
    assert caught.value.hint == MAKE_KEY
    with pytest.raises(PackageError) as caught:
        load_public_key(tmp_path / "none")
    assert caught.value.message == f"the public key {tmp_path / 'none'} cannot be read: No such file or directory"
    other = ec.generate_private_key(ec.SECP256R1())
    private.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(PackageError) as caught:
        load_signing_key(private)
    assert caught.value.message == f"the signing key {private} is not an ed25519 key"
