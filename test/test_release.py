"""Which SGLang releases are served, and what an older one has in another way."""

from __future__ import annotations

import inspect
import pkgutil
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from margingate.config import GateError
from margingate.runtime.compat import release

ROOT = Path(__file__).parent.parent


@pytest.fixture
def accepted(monkeypatch) -> SpecifierSet:
    """The SGLang that pip takes with this package, by what `setup.py` hands over."""
    said: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", said.update)
    runpy.run_path(str(ROOT / "setup.py"))
    pins = {pin.name: pin.specifier for pin in map(Requirement, said["install_requires"])}
    return pins["sglang"]


def test_pip_takes_what_the_start_serves(accepted):
    assert all(accepted.contains(version) for version in release.SERVED)


def test_pip_takes_nothing_that_the_start_refuses(accepted, monkeypatch):
    """Of released versions: the neighbours, and editions of what is served."""
    editions = [f"{served}.post{n}" for served in release.SERVED for n in range(1, 10)]
    for version in ("0.5.21", "0.5.21.post1", "0.5.24", "0.6.0", *editions):
        monkeypatch.setattr(release, "installed", lambda version=version: version)
        with pytest.raises(GateError, match=f"but SGLang is {version}: pip install sglang=="):
            release.check_version()
        assert not accepted.contains(version), version


def test_ci_tests_the_older_release():
    assert re.findall(r"\brelease=([\d.]+)", (ROOT / ".ci/older").read_text()) == [*release.OLDER]


def test_the_newest_is_what_the_code_is_written_for():
    assert release.SERVED[0] == release.NEWEST not in release.OLDER
    assert sorted(release.SERVED, reverse=True) == list(release.SERVED)


@pytest.mark.parametrize("name", release.OLDER.values())
def test_an_older_release_has_only_differences_in_targets_of_hooks(name):
    from margingate.runtime.start.startup_hooks import ALL_HOOKS

    written = {hook.target: hook.parameters for hook in ALL_HOOKS}
    older = pkgutil.resolve_name(name)
    for target, parameters in older.PARAMETERS.items():
        assert written[target] not in (None, parameters), target


@pytest.mark.parametrize("name", release.OLDER.values())
def test_every_function_of_an_older_release_is_asked_for(name):
    older = pkgutil.resolve_name(name)
    sources = "".join(
        path.read_text() for path in (ROOT / "python/margingate/runtime").rglob("*.py")
    )
    own = [
        each
        for each, value in vars(older).items()
        if inspect.isfunction(value) and value.__module__ == name
    ]
    for each in own:
        assert f'of_release("{each}"' in sources, each


def test_an_older_release_replaces_the_newests_parameters(monkeypatch):
    older = pkgutil.resolve_name(release.OLDER["0.5.22"])
    target = next(iter(older.PARAMETERS))
    monkeypatch.setattr(release, "_DIFFERENT", older)
    assert release.parameters(target, "of the newest") == older.PARAMETERS[target]
    assert release.parameters("another", "of the newest") == "of the newest"
    assert release.of_release("absent", 1) == 1
    monkeypatch.setattr(release, "_DIFFERENT", None)
    assert release.parameters(target, "of the newest") == "of the newest"


def test_nothing_else_asks_for_the_version():
    """What a release has in another way is in its module: no `if` on a version elsewhere."""
    asked = re.compile(r"sglang\.__version__|\bOLDER\b|\bif\b.*(SGLANG_VERSION|\binstalled\()")
    for path in (ROOT / "python/margingate").rglob("*.py"):
        if path.name != "release.py":
            assert not asked.search(path.read_text()), path
