"""Where a package comes from, as others read it: provenance.json (in-toto, SLSA) and sbom.json (CycloneDX).

Both are made from the records of the actions that made the package, and name no time, path or host: equal inputs give
equal bytes. Who built it, and so whether to believe it, is for a signature to say (signature.py).
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from engine.artifact import MANIFEST
from mlcbuild.graph.versions import PROGRAM

PROVENANCE = "provenance.json"
SBOM = "sbom.json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:mlcbuild:package:v1"  # externalParameters: variant, recipes; internalParameters: actions
BUILDER = "urn:mlcbuild:local"  # one's own machine: nothing is promised that the signer does not promise
PACKAGE_REF, SOURCE_REF = "package", "source"


def make_statement(manifest: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The in-toto Statement v1 with SLSA Provenance v1 of a package, whose `files` are {path, size, sha256}.

    `manifest` is the content of manifest.json, with or without its files.
    """
    source = manifest["source"]
    return {
        "_type": STATEMENT_TYPE,
        "subject": [make_subject(file["path"], file["sha256"]) for file in files],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"variant": manifest["variant"], "recipes": manifest["recipes"]},
                "internalParameters": {"actions": manifest["actions"]},
                "resolvedDependencies": [*list_sources(source), *list_tools(manifest["tools"])],
            },
            "runDetails": {"builder": {"id": BUILDER}},
        },
    }


def make_subject(name: str, sha256: str) -> dict[str, Any]:
    """A file as in-toto's ResourceDescriptor."""
    return {"name": name, "digest": {"sha256": sha256}}


def add_manifest(statement: Mapping[str, Any], sha256: str) -> dict[str, Any]:
    """The statement with the manifest, which has this digest and lists the statement itself, as one more subject."""
    return {**statement, "subject": [*statement["subject"], make_subject(MANIFEST, sha256)]}


def list_sources(source: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The checkpoint: its repository at a commit, then its files. `source` is source.json."""
    repo, revision = source.get("repo"), source.get("revision")
    if repo:
        yield {"uri": get_source_purl(source), "digest": {"gitCommit": revision}}
    for name, file in sorted(source["files"].items()):
        at = {"uri": f"https://huggingface.co/{repo}/resolve/{revision}/{quote(name)}"} if repo else {}
        yield {**make_subject(name, file["sha256"]), **at}


def list_tools(tools: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The Python distributions that took part; programs, which have no address, are among the actions."""
    for name, version in sorted(tools.items()):
        if not name.startswith(PROGRAM):
            yield {"name": name, "uri": get_tool_purl(name, version)}


def get_source_purl(source: Mapping[str, Any]) -> str | None:
    """The package URL of a hub repository at a commit, None for any other source."""
    return f"pkg:huggingface/{source['repo']}@{source['revision']}" if source.get("repo") else None


def get_tool_purl(name: str, version: str) -> str:
    """The package URL of a Python distribution."""
    return f"pkg:pypi/{name.lower().replace('_', '-')}@{quote(version)}"


def make_sbom(
    manifest: Mapping[str, Any], files: Sequence[Mapping[str, Any]], makers: Mapping[str, str]
) -> dict[str, Any]:
    """The CycloneDX 1.6 bill of materials of a package: its files, the checkpoint and the tools.

    `makers` says which step, of those in the manifest's actions or none of them, has made a file.
    """
    source = make_source_component(manifest)
    tools = [make_tool_component(name, version) for name, version in sorted(manifest["tools"].items())]
    refs = {tool["name"]: tool["bom-ref"] for tool in tools}
    depends = {PACKAGE_REF: [*(get_file_ref(file["path"]) for file in files), SOURCE_REF]}
    for file in files:
        action = manifest["actions"].get(makers.get(file["path"]))
        used = action["made_of"].get("tools", {}) if action else {}
        depends[get_file_ref(file["path"])] = sorted(refs[name.removeprefix(PROGRAM)] for name in used)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": make_serial_number(manifest, files),
        "version": 1,
        "metadata": {"component": {**make_model(manifest, manifest["variant"]), "bom-ref": PACKAGE_REF}},
        "components": [source, *map(make_file_component, files), *tools],
        "dependencies": [{"ref": ref, "dependsOn": others} for ref, others in depends.items()],
    }


def make_serial_number(manifest: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> str:
    """A UUID that is the same for equal packages, and differs for others."""
    text = "".join([manifest["variant"], *(f"\n{file['sha256']} {file['path']}" for file in files)])
    return f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, text)}"


def make_model(manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What CycloneDX shows of a model."""
    return {"type": "machine-learning-model", "name": name, "licenses": [{"license": {"name": manifest["licence"]}}]}


def make_source_component(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint with its files."""
    source = manifest["source"]
    component = make_model(manifest, source.get("repo") or manifest["recipes"]["model"]["name"])
    if source.get("repo"):
        component |= {"version": source["revision"], "purl": get_source_purl(source)}
    files = [
        {"type": "file", "name": name, "hashes": make_hashes(file["sha256"])}
        for name, file in sorted(source["files"].items())
    ]
    return {**component, "bom-ref": SOURCE_REF, "components": files}


def make_file_component(file: Mapping[str, Any]) -> dict[str, Any]:
    """A file of the package."""
    name = file["path"]
    return {"type": "file", "bom-ref": get_file_ref(name), "name": name, "hashes": make_hashes(file["sha256"])}


def get_file_ref(name: str) -> str:
    """How the dependencies call a file of the package."""
    return f"file:{name}"


def make_hashes(sha256: str) -> list[dict[str, str]]:
    """CycloneDX's way to write a digest."""
    return [{"alg": "SHA-256", "content": sha256}]


def make_tool_component(name: str, version: str) -> dict[str, Any]:
    """A Python distribution or a program that took part."""
    if name.startswith(PROGRAM):
        program = name.removeprefix(PROGRAM)
        return {"type": "application", "bom-ref": f"program:{program}", "name": program, "version": version}
    purl = get_tool_purl(name, version)
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
