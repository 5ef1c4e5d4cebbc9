"""provenance.json and sbom.json are what their standards say, as judged by the standards' own libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
from in_toto_attestation.v1.statement import Statement
from small_parts import ACTIONS, SOURCE, VARIANT, Parts, make_recipes

from mlcbuild.package.provenance import make_sbom, make_statement

RANDOM = {"random": True, "seed": 0, "files": {}}


@pytest.fixture(params=["hub", "random"])
def package(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    source = RANDOM if request.param == "random" else SOURCE
    Parts(tmp_path).package(tmp_path / "package", source)
    return tmp_path / "package"


def load(package: Path, name: str) -> Any:
    return json.loads((package / name).read_text("utf-8"))


def test_the_statement_is_one(package: Path) -> None:
    """Both parsers refuse unknown fields."""
    text = (package / "provenance.json").read_text("utf-8")
    Statement.copy_from_pb(json_format.Parse(text, statement_pb2.Statement())).validate()
    provenance = json_format.ParseDict(json.loads(text)["predicate"], provenance_pb2.Provenance())
    assert provenance.build_definition.build_type == "urn:mlcbuild:package:v1"
    assert provenance.run_details.builder.id == "urn:mlcbuild:local"
    for dependency in provenance.build_definition.resolved_dependencies:
        ResourceDescriptor.copy_from_pb(dependency).validate()


def test_the_statement_is_about_every_other_file(package: Path) -> None:
    manifest, statement = load(package, "manifest.json"), load(package, "provenance.json")
    listed = {file["path"]: file["sha256"] for file in manifest["files"]}
    del listed["provenance.json"]
    assert {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]} == listed
    definition = statement["predicate"]["buildDefinition"]
    assert definition["externalParameters"] == {"variant": VARIANT, "recipes": make_recipes()}
    assert definition["internalParameters"] == {"actions": ACTIONS}


def test_dependencies_of_a_hub_model(tmp_path: Path) -> None:
    Parts(tmp_path).package(tmp_path / "package")
    base = f"https://huggingface.co/someone/tiny/resolve/{'a' * 40}"
    assert load(tmp_path / "package", "provenance.json")["predicate"]["buildDefinition"]["resolvedDependencies"] == [
        {"uri": f"pkg:huggingface/someone/tiny@{'a' * 40}", "digest": {"gitCommit": "a" * 40}},
        {"name": "config.json", "digest": {"sha256": "b" * 64}, "uri": f"{base}/config.json"},
        {"name": "my model.safetensors", "digest": {"sha256": "c" * 64}, "uri": f"{base}/my%20model.safetensors"},
        {"name": "apache-tvm", "uri": "pkg:pypi/apache-tvm@0.27.0.post1"},
        {"name": "ml_dtypes", "uri": "pkg:pypi/ml-dtypes@0.6.0"},
    ]


def test_the_sbom_is_one(package: Path) -> None:
    text = (package / "sbom.json").read_text("utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    broken = json.loads(text) | {"specVersion": "1.6", "serialNumber": "7"}
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(broken)) is not None


def test_the_sbom_says_what_each_file_depends_on(package: Path) -> None:
    sbom, manifest = load(package, "sbom.json"), load(package, "manifest.json")
    depends = {item["ref"]: item["dependsOn"] for item in sbom["dependencies"]}
    assert depends["file:lib.so"] == ["pkg:pypi/apache-tvm@0.27.0.post1", "program:cc"]
    assert depends["file:params_shard_0.bin"] == depends["file:tensor-cache.json"] == ["pkg:pypi/ml-dtypes@0.6.0"]
    assert depends["file:tokenizer.json"] == depends["file:README.md"] == []
    files = {file["path"] for file in manifest["files"]} - {"sbom.json", "provenance.json"}
    assert set(depends["package"]) == {"source", *(f"file:{name}" for name in files)}
    refs = {component["bom-ref"] for component in sbom["components"]}
    assert {ref for refs in depends.values() for ref in refs} <= refs
    assert "timestamp" not in sbom["metadata"]


def test_a_serial_number_names_the_contents() -> None:
    manifest = {
        "variant": VARIANT,
        "recipes": make_recipes(),
        "source": RANDOM,
        "actions": {},
        "tools": {},
        "licence": "MIT",
    }
    one, other = ([{"path": "lib.so", "size": 1, "sha256": digit * 64}] for digit in "01")
    assert make_sbom(manifest, one, {}) == make_sbom(manifest, one, {})
    assert make_sbom(manifest, one, {})["serialNumber"] != make_sbom(manifest, other, {})["serialNumber"]
    assert make_statement(manifest, one)["predicate"] == make_statement(manifest, other)["predicate"]
