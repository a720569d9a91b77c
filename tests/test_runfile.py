"""YAML reads as a run file means it, writes back to the same values, and unknown keys are found wherever they
are.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_m1 import runfile


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5E3", 1500),
        ("7.2e12", 7_200_000_000_000),
        ("3.0", 3.0),
        (".5", 0.5),
        ("-2", -2),
        ("1_000", 1000),
        ("010", 10),
        ("true", True),
        ("off", "off"),
        ("yes", "yes"),
        ("null", None),
        ("", None),
        ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
        ("[1, 2e-1]", [1, 0.2]),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_a_scalar_reads_as_yaml_1_2(text, value):
    read = runfile.parse(text, source="test")
    assert read == value
    assert type(read) is type(value)


def test_a_whole_number_in_exponent_form_is_a_count_and_with_a_point_is_not():
    assert type(runfile.parse("1e3", source="test")) is int
    assert type(runfile.parse("1000.0", source="test")) is float


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
TRICKY = st.sampled_from(
    ["1e5", "on", "null", "~", "1_000", "0x1f", ".5", "true", "- a", "#", "a: b", "", "1.", "=", "<<"]
)
VALUES = st.recursive(
    SCALARS | TRICKY,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.from_regex(r"[a-z]{1,6}", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z]{1,6}", fullmatch=True), VALUES, max_size=4))
def test_what_is_dumped_reads_back_the_same(values):
    assert normal(runfile.parse(runfile.dump(values), source="test") or {}) == normal(values)


def normal(value):
    """Values with their types, so that 1, 1.0 and True differ; a whole float may come back as the same
    integer.
    """
    if isinstance(value, dict):
        return {key: normal(part) for key, part in value.items()}
    if isinstance(value, list):
        return [normal(part) for part in value]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return type(value).__name__, value


def test_a_key_that_stands_twice_is_refused():
    with pytest.raises(ValueError, match="key 'tp' stands twice"):
        runfile.parse("layout:\n  tp: 1\n  tp: 2\n", source="file run.yaml")


def test_text_that_is_not_yaml_is_refused_with_its_place():
    with pytest.raises(ValueError, match=r"(?s)file run.yaml is not YAML.*line 1"):
        runfile.parse("a: [1, 2", source="file run.yaml")


def test_yaml_cannot_build_objects():
    with pytest.raises(ValueError, match="not YAML"):
        runfile.parse("!!python/object/apply:os.getcwd []", source="file run.yaml")


@pytest.mark.parametrize("text", ["layout.tp", "=3", ".tp=3", "layout.=3", "layout..tp=3"])
def test_an_override_without_path_or_value_is_refused(text):
    with pytest.raises(ValueError, match=r"section\.field=value"):
        runfile.parse_override(text)


def test_an_override_keeps_equals_signs_of_its_value():
    assert runfile.parse_override("tracking.uri=sqlite:///a=b.db") == ("tracking.uri", "sqlite:///a=b.db")


def test_sections_merge_and_lists_are_replaced():
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    assert runfile.merge(base, {"a": {"y": [3]}, "c": 2}) == {"a": {"x": 1, "y": [3]}, "b": 1, "c": 2}
    assert base == {"a": {"x": 1, "y": [1, 2]}, "b": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    parts: tuple[Part, ...] = ()
    maybe: Part | None = None
    tags: dict[str, str] | None = None
    direct: Part = Part()


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"partz": []}, "partz"),
        ({"parts": [{"weight": 1.0}, {"weigth": 2.0}]}, "parts.1.weigth"),
        ({"maybe": {"w": 1}}, "maybe.w"),
        ({"direct": {"weights": 1}}, "direct.weights"),
    ],
)
def test_an_unknown_key_is_refused_wherever_it_is(values, path):
    with pytest.raises(ValueError, match=f"unknown key '{path}'"):
        runfile.refuse_unknown_keys(Section, values, source="test")


def test_the_nearest_name_is_offered_with_its_whole_path():
    with pytest.raises(ValueError, match=r"did you mean 'direct\.weight'"):
        runfile.refuse_unknown_keys(Section, {"direct": {"weigth": 1}}, source="test")


@pytest.mark.parametrize("values", [{"direct": 3}, {"direct": None}, {"maybe": [1]}, [1]])
def test_a_value_where_a_section_belongs_is_refused(values):
    with pytest.raises(ValueError, match="it is a section"):
        runfile.refuse_unknown_keys(Section, values, source="test")


def test_free_keys_and_empty_options_are_allowed():
    allowed = {"tags": {"any": "thing"}, "maybe": None}
    runfile.refuse_unknown_keys(Section, allowed, source="test")
    with pytest.raises(ValueError, match="unknown key 'any'"):
        runfile.refuse_unknown_keys(Section, allowed | {"any": "thing"}, source="test")
