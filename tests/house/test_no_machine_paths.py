"""No file names a place of the machine it was written on, or a host that packages come from."""

from __future__ import annotations

import re

import pytest

from tests.house.checkout import ROOT, files

# Written in pieces, so that this file does not contain what it looks for.
PLACES = ["/wo" + "rk/", "/tm" + "p/", "/ro" + "ot/", "/ho" + "me/", "/op" + "t/", r"\.py" + r"env\b"]
HOSTS = [
    "py" + "pi.org",
    "python" + "hosted",
    "download.py" + "torch",
    "registry.np" + "mjs",
    "deb.deb" + "ian",
]
PATTERN = re.compile(
    "|".join([rf"(?<![\w.}}]){place}" for place in PLACES] + [re.escape(host) for host in HOSTS])
)


def offences(text: str) -> list[str]:
    return [match.group() for match in PATTERN.finditer(text)]


def test_no_file_names_a_machine_path_or_a_package_host():
    found = []
    for file in files():
        try:
            text = (ROOT / file).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{file}: {offence}" for offence in offences(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text", ["cd " + "/wo" + "rk/x", 'open("' + "/tm" + 'p/a")', "--index-url https://" + HOSTS[0]]
)
def test_the_search_finds(text):
    assert offences(text)


@pytest.mark.parametrize("text", ["data/demo/train", "network/x", "{root}" + "/tm" + "p/x"])
def test_the_search_leaves_alone(text):
    assert not offences(text)
