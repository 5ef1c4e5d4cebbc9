"""Signs packages with an ed25519 key, and checks it: a DSSE envelope in signature.json beside the manifest.

What is signed is the package's provenance statement with the digest of manifest.json among its subjects, and so, by the
digests in there, every file. The signature is no part of what it signs: the same package signed by somebody else, or by
nobody, has the same bytes in all other files, and the same place in the store.

    openssl genpkey -algorithm ed25519 -out key.pem && openssl pkey -in key.pem -pubout -out pub.pem
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.artifact import MANIFEST, Package, PackageInvalid, compute_sha256, open_package, rebuild_command
from mlcbuild.errors import PackageError
from mlcbuild.graph.settings import SIGNATURE, SIGNING_KEY
from mlcbuild.package.provenance import PREDICATE_TYPE, PROVENANCE, STATEMENT_TYPE, add_manifest, make_subject

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAKE_KEY = "openssl genpkey -algorithm ed25519 -out key.pem && openssl pkey -in key.pem -pubout -out pub.pem"


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """The private key in a PEM file (PKCS 8, without a password). PackageError if there is none."""
    serialization = _load_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise PackageError(f"the signing key {path} cannot be read: {_explain(error)}", hint=MAKE_KEY) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise PackageError(f"the signing key {path} is not an ed25519 key", hint=MAKE_KEY)
    return key


def load_public_key(path: Path) -> Ed25519PublicKey:
    """The public key in a PEM file. PackageError if there is none."""
    serialization = _load_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    hint = "openssl pkey -in key.pem -pubout -out pub.pem"
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PackageError(f"the public key {path} cannot be read: {_explain(error)}", hint=hint) from error
    if not isinstance(key, Ed25519PublicKey):
        raise PackageError(f"the public key {path} is not an ed25519 key", hint=hint)
    return key


def _load_cryptography() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError:
        raise PackageError(
            "signatures need the package cryptography, which is not installed",
            hint="MLCBUILD_EXTRAS=sign ./doit list",
        ) from None
    return serialization


def _explain(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else f"it is no PEM file of a key ({error})"


def compute_key_id(key: Ed25519PublicKey) -> str:
    """What a key is called: the SHA-256 (hex) of its DER form."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def sign_package(folder: Path, key: Ed25519PrivateKey) -> str:
    """Sign the package in `folder`, after hashing all its files: the id of the key. PackageInvalid if one is wrong,
    PackageError where the signature cannot be written."""
    package = open_package(folder, verify=True, here=False)
    text = make_envelope(package, key)
    scratch = folder / f"{SIGNATURE}.{os.getpid()}"
    try:
        scratch.write_text(text, "utf-8")
        os.replace(scratch, folder / SIGNATURE)
    except OSError as error:
        raise PackageError(f"{folder / SIGNATURE} cannot be written: {error.strerror}") from error
    return compute_key_id(key.public_key())


def is_signed(folder: Path, key: Ed25519PrivateKey) -> bool:
    """Whether the package in `folder` has this key's signature: ed25519 gives the same one each time."""
    try:
        found = (folder / SIGNATURE).read_text("utf-8")
        return found == make_envelope(open_package(folder, here=False), key)
    except (OSError, ValueError, PackageInvalid):
        return False


def make_envelope(package: Package, key: Ed25519PrivateKey) -> str:
    """The DSSE envelope of a package as JSON."""
    statement = add_manifest(load_statement(package), compute_sha256(package.root / MANIFEST))
    payload = json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()
    signature = {"keyid": compute_key_id(key.public_key()), "sig": _encode(key.sign(make_signed_bytes(payload)))}
    envelope = {"payloadType": PAYLOAD_TYPE, "payload": _encode(payload), "signatures": [signature]}
    return json.dumps(envelope, indent=1) + "\n"


def make_signed_bytes(payload: bytes) -> bytes:
    """What DSSE signs (its pre-authentication encoding): type and payload with their lengths."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def _encode(data: bytes) -> str:
    return base64.standard_b64encode(data).decode("ascii")


def load_statement(package: Package) -> dict[str, Any]:
    """provenance.json of a package. PackageInvalid when it has none, or one that is about other files."""
    files = [file for file in package.manifest.files if file.path != PROVENANCE]
    if len(files) == len(package.manifest.files):
        raise _refuse(package, f"it has no {PROVENANCE}")
    statement = json.loads((package.root / PROVENANCE).read_text("utf-8"))
    wanted = [make_subject(file.path, file.sha256) for file in files]
    if not isinstance(statement, dict) or statement.get("_type") != STATEMENT_TYPE:
        raise _refuse(package, f"{PROVENANCE} is no in-toto statement")
    if statement.get("predicateType") != PREDICATE_TYPE or _sort(statement.get("subject")) != _sort(wanted):
        raise _refuse(package, f"{PROVENANCE} is about other files than {MANIFEST}")
    return statement


def _sort(subjects: Any) -> list[str]:
    return sorted(json.dumps(subject, sort_keys=True) for subject in subjects or ())


def load_signature(package: Package) -> tuple[bytes, list[dict[str, str]]] | None:
    """Payload and signatures ({keyid, sig}) of a package's envelope, None for a package that is not signed.

    PackageInvalid when the file is no such envelope, or was made for another package.
    """
    try:
        envelope = json.loads((package.root / SIGNATURE).read_bytes())
        if envelope["payloadType"] != PAYLOAD_TYPE:
            raise ValueError(envelope["payloadType"])
        payload = base64.b64decode(envelope["payload"], validate=True)
        signatures = [{"keyid": str(item.get("keyid", "")), "sig": str(item["sig"])} for item in envelope["signatures"]]
        statement = json.loads(payload)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refuse(package, f"{SIGNATURE} is no DSSE envelope of an in-toto statement", SIGN_AGAIN) from error
    if statement != add_manifest(load_statement(package), compute_sha256(package.root / MANIFEST)):
        raise _refuse(package, f"{SIGNATURE} was made for another package", SIGN_AGAIN)
    return payload, signatures


SIGN_AGAIN = f"whoever published it has to sign it: {SIGNING_KEY}=key.pem doit sign model=..."


def check_signature(package: Package, key: Ed25519PublicKey) -> None:
    """Raise PackageInvalid unless the package is signed with the private half of `key`."""
    from cryptography.exceptions import InvalidSignature

    found = load_signature(package)
    if found is None:
        raise _refuse(package, f"it is not signed: {SIGNATURE} is missing", SIGN_AGAIN)
    payload, signatures = found
    for signature in signatures:  # a key id is a hint that nobody vouches for: every signature is tried
        try:
            key.verify(base64.b64decode(signature["sig"]), make_signed_bytes(payload))
            return
        except (InvalidSignature, ValueError):
            continue
    names = ", ".join(signature["keyid"][:12] or "an unnamed one" for signature in signatures) or "none"
    raise _refuse(package, f"it is not signed with key {compute_key_id(key)[:12]}, but with {names}", SIGN_AGAIN)


def _refuse(package: Package, what: str, hint: str = "") -> PackageInvalid:
    rebuild = f"rebuild the package: {rebuild_command(package.root, {'variant': package.manifest.variant})}"
    return PackageInvalid(f"{package.root}: {what}", hint=hint or rebuild)
