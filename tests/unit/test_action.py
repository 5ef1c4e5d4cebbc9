"""Action keys: everything declared counts, nothing else does."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.graph.action import (
    Action,
    find_task,
    get_provenance_path,
    make_canonical_json,
    make_key,
    make_provenance,
    make_specification,
)

ACTION = Action(
    step="convert",
    name="tiny/q4/rows16",
    module="tasks.convert",
    params={"bits": 4, "group": {"size": 32}},
    inputs={"source": Path("artifacts/sources/tiny")},
    outputs={"weights": Path("artifacts/weights/tiny")},
)
KNOWN: dict[str, Any] = {
    "code": {"tasks.convert": "c0"},
    "inputs": {"source": "i0"},
    "tools": {"numpy": "2.2.6"},
    "environment": {"HOME_SWEET": None},
}


def get_key(action: Action = ACTION, **changes: Any) -> str:
    return make_key(make_specification(action, **{**KNOWN, **changes}))


def test_the_key_is_pinned() -> None:
    """A change of the format makes every stored result useless: then raise SCHEMA, and this."""
    assert get_key() == "958a5a6245b8190206ace56ab6b372bb25ccbbf8adf6cb6c5be6ada2f962db35"


@pytest.mark.parametrize(
    "action",
    [
        replace(ACTION, name="other"),
        replace(ACTION, inputs={"source": Path("/somewhere/else")}),
        replace(ACTION, outputs={"weights": Path("elsewhere")}),
        replace(ACTION, params={"group": {"size": 32}, "bits": 4}),
        replace(ACTION, after=("download:tiny",)),
    ],
)
def test_names_places_and_order_do_not_count(action: Action) -> None:
    assert get_key(action) == get_key()


@pytest.mark.parametrize(
    "key",
    [
        get_key(replace(ACTION, step="compile")),
        get_key(replace(ACTION, params={"bits": 3, "group": {"size": 32}})),
        get_key(replace(ACTION, outputs={"weights": Path("a"), "log": Path("b")})),
        get_key(code={"tasks.convert": "c1"}),
        get_key(code={"tasks.convert": "c0", "mlcbuild.weights": "w"}),
        get_key(inputs={"source": "i1"}),
        get_key(inputs={"renamed": "i0"}),
        get_key(tools={"numpy": "2.3.0"}),
        get_key(environment={"HOME_SWEET": ""}),
    ],
)
def test_everything_declared_counts(key: str) -> None:
    assert key != get_key()


def test_the_specification_holds_what_explain_needs() -> None:
    specification = make_specification(ACTION, **KNOWN)
    assert specification["params"]["group"]["size"] == 32
    assert specification["tools"] == {"numpy": "2.2.6"}
    assert specification["outputs"] == ["weights"]


def test_canonical_json_has_one_text() -> None:
    assert make_canonical_json({"b": [1, 2.5], "a": "ü"}) == '{"a":"ü","b":[1,2.5]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        make_canonical_json({"x": float("nan")})
    with pytest.raises(TypeError):
        make_canonical_json({"x": Path("a")})


def test_an_action_can_be_sent_to_a_worker() -> None:
    assert pickle.loads(pickle.dumps(ACTION)) == ACTION


def test_names() -> None:
    assert ACTION.task == "convert:tiny/q4/rows16"
    assert get_provenance_path(ACTION.task) == Path("artifacts/.graph/provenance/convert/tiny/q4/rows16.json")
    for task in ("convert:tiny/q4/rows16", "compile:llama3.2-1b/q0f32/x86-64-v3", "download:m"):
        assert find_task(get_provenance_path(task)) == task
    assert find_task(Path("artifacts/weights/tiny")) is None


def test_provenance_is_canonical_json() -> None:
    specification = make_specification(ACTION, **KNOWN)
    made = {"key": make_key(specification), "made_of": specification}
    assert make_provenance(made["key"], make_canonical_json(specification)) == make_canonical_json(made)
