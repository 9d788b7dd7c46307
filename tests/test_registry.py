"""Registries: found by name, told by name, open to other packages."""

import sys

import pytest

from medtpp.config import BACKBONES, PRETEXTS, SOURCES, TASKS, TUNERS, MethodOptions
from medtpp.errors import ConfigError
from medtpp.registry import Registry


def package(tmp_path, monkeypatch, name, **modules):
    """A package of modules that can be imported."""
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").touch()
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for loaded in [key for key in sys.modules if key.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, loaded)


REGISTER = """
from registry_under_test import registry
@registry.register({name!r})
class Entry{number}: pass
"""


@pytest.fixture
def registry(tmp_path, monkeypatch):
    package(
        tmp_path,
        monkeypatch,
        "made_up_methods",
        first=REGISTER.format(name="first", number=1),
        second=REGISTER.format(name="second", number=2),
        _private="raise RuntimeError('private modules are not imported by the registry')",
    )
    made = Registry("thing", "made_up_methods")
    module = type(sys)("registry_under_test")
    module.registry = made
    monkeypatch.setitem(sys.modules, "registry_under_test", module)
    return made


def test_modules_of_the_package_are_found_at_the_first_look(registry):
    assert "made_up_methods.first" not in sys.modules
    assert registry.names() == ["first", "second"]
    assert registry.get("second").__name__ == "Entry2"
    assert [name for name, _ in registry.items()] == registry.names()
    assert [entry.__name__ for entry in registry.values()] == ["Entry1", "Entry2"]


def test_an_unknown_name_suggests_the_nearest(registry):
    with pytest.raises(ConfigError, match=r"no thing called 'secnd'. Did you mean 'second'\? Known: first, second\."):
        registry.get("secnd")
    with pytest.raises(ConfigError) as raised:
        registry.get("zzz")
    assert "Did you mean" not in raised.value.message


def test_two_entries_of_one_name_are_refused(registry):
    class Other:
        pass

    registry.names()
    with pytest.raises(ConfigError, match=r"Two things are called 'first'.*Rename one"):
        registry.register("first")(Other)
    assert registry.get("first").__name__ == "Entry1"


def test_entering_the_same_class_again_is_no_clash(registry):
    entry = registry.get("first")
    assert registry.register("first")(entry) is entry


def test_other_packages_register_through_entry_points(registry, tmp_path, monkeypatch):
    package(tmp_path, monkeypatch, "plugin_of_others", things=REGISTER.format(name="third", number=3))
    information = tmp_path / "plugin_of_others-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-others\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[medtpp.things]\nthird = plugin_of_others.things\n")
    assert registry.names() == ["first", "second", "third"]


@pytest.mark.parametrize("made", [TUNERS, PRETEXTS, TASKS], ids=lambda made: made.kind)
def test_every_method_owns_its_options(made):
    assert made.names()
    for name, entry in made.items():
        assert issubclass(entry.Options, MethodOptions)
        assert entry.Options().name == name
        assert entry.summary


def test_every_family_says_what_it_is():
    for made in (BACKBONES, SOURCES):
        assert made.names()
    assert all(family.summary and family.examples for family in BACKBONES.values())
