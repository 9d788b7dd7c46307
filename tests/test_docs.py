"""The documentation: its code runs, its commands parse, its links and names lead somewhere, its tables are current."""

import ast
import inspect
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import click
import pytest
import timm
import torch
import typer

import matrix
import medtpp
import test_matrix
from medtpp.backbones import folder as backbone_folders
from medtpp.backbones.folder import save_backbone
from medtpp.cli._app import app
from medtpp.config import SOURCES, TUNERS, experiment_schema
from medtpp.data.fingerprints import Fingerprints
from medtpp.data.phantom import generate, write_folder
from medtpp.seeds import Seeds
from medtpp.training.loop import Schedule
from medtpp.workflow.experiment import load_experiment
from medtpp.workflow.pretrain import load_job

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SIZE = 64  # of the images and the network that stand in

sys.path.insert(0, str(ROOT / "docs"))
import generate as pages  # noqa: E402
import results_tables  # noqa: E402


def named(path):
    return str(path.relative_to(ROOT))


@cache
def blocks(page, *languages):
    """Code blocks of some languages."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [code for language, code in found if language in languages]


def prose(page):
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


# Code


def network(**options):
    """timm's own tiny ViT (6 blocks of 64), the same bits each time."""
    with Seeds(0).scope("docs"):
        return timm.models.create_model("test_vit", **{"img_size": SIZE, "num_classes": 0, **options})


@pytest.fixture
def standing_in(tmp_path, monkeypatch):
    """Pages say what a reader would run; small things stand in for the large ones that they name.

    A tiny network lies where the default backbone would, another is what timm "downloads", no schedule is longer than
    three steps, and what a page registers is forgotten.
    """
    card = {"architecture": "test_vit", "image_size": SIZE, "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3}
    save_backbone(
        tmp_path / "weights" / "medtpp_vit_tiny",
        network().state_dict(),
        {},
        {**card, "objective": "mae"},
        Fingerprints(),
    )
    monkeypatch.setattr(backbone_folders, "EMBEDDED", tmp_path / "weights")

    create, init = timm.create_model, Schedule.__init__

    def create_model(name, pretrained=False, **options):
        return network(**options) if pretrained else create(name, **options)

    def short(self, steps, *rest, **options):
        init(self, min(steps, 3), *rest, **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(Schedule, "__init__", short)
    TUNERS.names()  # looks for all that there is, before a copy is made
    monkeypatch.setattr(TUNERS, "_entries", dict(TUNERS._entries))
    experiment_schema.cache_clear()
    yield
    monkeypatch.undo()
    experiment_schema.cache_clear()


@pytest.fixture
def namespace(standing_in, tmp_path, monkeypatch):
    """What pages take as given: images, some of them with labels, a loader, folders."""
    work = tmp_path / "work"
    write_folder(work / "data", 32, SIZE)
    write_folder(work / "new_images", 3, SIZE, 1, layout="folders")
    monkeypatch.chdir(work)
    phantoms = generate(24, SIZE)
    images = torch.from_numpy(phantoms.images)[:, None].float() / 255
    labels = ["lesion" if label else "normal" for label in phantoms.labels[:12]]
    normalised = [(image.expand(3, -1, -1) * 2 - 1, 0) for image in images]
    return {
        "images": images,
        "labelled_images": images[:12],
        "labels": labels,
        "train_loader": torch.utils.data.DataLoader(normalised, batch_size=8, shuffle=True),
    }


def run_blocks(page, namespace):
    """Run a page's code from top to bottom. Gives what is known in the end."""
    namespace["__name__"] = page.stem
    for number, code in enumerate(blocks(page, "python"), start=1):
        exec(compile(code, f"{named(page)}, block {number}", "exec"), namespace)
    return namespace


# Those with a test of their own below; evaluation.md and study-summary.md are run where their data are made, by
# test_evaluation.py and test_study_report.py.
APART = ("README", "python", "adapter", "extending", "evaluation", "study-summary")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python") and page.stem not in APART], ids=named
)
def test_code_runs(page, namespace):
    run_blocks(page, namespace)


def test_the_code_of_the_readme_does_what_it_says(namespace, capsys):
    found = run_blocks(ROOT / "README.md", namespace)
    assert re.search(r"loss \d\.\d+ to \d\.\d+ in \d+ steps", capsys.readouterr().out)
    assert len(found["table"].cases) == 3
    assert all("lora_" in name for name in found["record"].trained)


def test_the_readme_tells_the_size_of_its_backbones_images():
    """A network that stands in runs the code, so that a wrong size would not be seen there."""
    (told,) = re.findall(r"# \(N, C, (\d+), (\d+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert tuple(map(int, told)) == medtpp.load("medtpp_vit_tiny").spec.image_size


def test_a_script_with_peft_keeps_its_head(namespace, capsys):
    found = run_blocks(ROOT / "docs" / "python.md", namespace)
    record = found["record"]
    assert all("lora_" in name for name in record.trained)
    assert record.untouched
    assert all("head" in name for name in record.untouched)
    assert found["left"] == ("fc.weight", "fc.bias")  # of a network that medtpp does not know


def test_peft_reads_an_adapter_as_the_page_says(namespace):
    model = medtpp.attach(medtpp.load("medtpp_vit_tiny"), "lora")
    matrix.perturb(model)
    medtpp.save("adapter", model, channels=1)
    found = run_blocks(ROOT / "docs" / "adapter.md", namespace)
    torch.testing.assert_close(found["tokens"], model.encode(namespace["images"]).tokens)
    assert found["difference"] < 1e-4


EXTENDING = ROOT / "docs" / "extending.md"


def test_the_tuner_of_the_page_trains_saves_and_loads(namespace):
    found = run_blocks(EXTENDING, namespace)
    assert len(found["model"].targets) == 6
    assert set(found["record"].trained) == found["model"].targets.keys()


def contract():
    tests = inspect.getmembers(test_matrix.TestTuner, inspect.isfunction)
    return [name for name, _ in tests if name.startswith("test_")]


@pytest.mark.parametrize("test", contract())
def test_the_tuner_of_the_page_keeps_the_contract(test, standing_in, monkeypatch, tmp_path):
    exec(compile(blocks(EXTENDING, "python")[0], "docs/extending.md", "exec"), {"__name__": "mlp_scale"})
    given = {"tuner": "mlp_scale", "variant": matrix.VARIANTS[0], "images": matrix.images(), "tmp_path": tmp_path / "a"}
    method = getattr(test_matrix.TestTuner(), test)
    method(**{name: given[name] for name in inspect.signature(method).parameters})


# Commands


def commands():
    """Lines of shell blocks that call medtpp or make."""
    for page in PAGES:
        for code in blocks(page, "bash", "console"):
            for line in code.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words and words[0] in ("medtpp", "make"):
                    yield pytest.param(words, id=f"{named(page)}: {' '.join(words)}")


@pytest.mark.parametrize("words", [*commands()])
def test_commands_parse(words):
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
        return
    group = typer.main.get_command(app)
    verb = group.get_command(click.Context(group), words[1])
    assert verb is not None, f"there is no command {words[1]}"
    rest = words[2:]
    while isinstance(verb, click.Group):
        name, *rest = rest
        verb = verb.get_command(click.Context(verb), name)
        assert verb is not None, f"there is no command {name}"
    options = verb.make_context(words[1], rest).params
    settings = options.get("settings") or []
    if words[1] == "pretrain":
        load_job(options["images"], settings)
    elif settings:
        load_experiment(Path("data"), settings)


def test_every_command_is_documented():
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    assert [verb for verb in typer.main.get_command(app).commands if f"medtpp {verb}" not in text] == []


def layouts():
    """The data layouts of this package; those that another one registers are for its own pages."""
    return [name for name, source in SOURCES.items() if source.__module__.startswith("medtpp.")]


@pytest.mark.parametrize("name", layouts())
def test_every_layout_has_a_page_with_a_tree_and_a_command(name):
    page = ROOT / "docs" / "layouts" / f"{name}.md"
    assert page.is_file(), f"describe the layout in {named(page)}"
    assert re.search(r"^ +\S", "\n".join(blocks(page, "text")), re.MULTILINE), "show a tree of its files"
    assert any(code.startswith("medtpp check ") for code in blocks(page, "bash")), "give a command"
    assert f"(layouts/{page.name})" in (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


# Links and names


def anchors(page):
    """Anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def links():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if not re.match(r"https?://", target):
                yield pytest.param(page, target, id=f"{named(page)}: {target}")


@pytest.mark.parametrize(("page", "target"), [*links()])
def test_links_lead_somewhere(page, target):
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    assert file.exists()
    assert not anchor or anchor in anchors(file)


def file_names():
    """Files of the project that the text names: `training/tpp.py`, `tests/test_loop.py::test_x`, `src/medtpp`."""
    for page in PAGES:
        for name in dict.fromkeys(re.findall(r"`([\w./]+(?:::\w+)?)`", prose(page))):
            path = name.partition("::")[0]
            if path.endswith(".py") or path.startswith(("src/", "tests/", "docs/")):
                yield pytest.param(name, id=f"{named(page)}: {name}")


@pytest.mark.parametrize("name", [*file_names()])
def test_files_that_are_named_exist(name):
    path, _, test = name.partition("::")
    found = [folder / path for folder in (ROOT, ROOT / "src" / "medtpp") if (folder / path).exists()]
    assert found
    if test:
        tree = ast.walk(ast.parse(found[0].read_text(encoding="utf-8")))
        assert test in {node.name for node in tree if isinstance(node, ast.FunctionDef)}


def test_the_map_has_every_page():
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.parent.name == "docs" and f"({page.name})" not in text] == ["index.md"]


def test_the_package_map_has_every_module():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    modules = [path for path in (ROOT / "src" / "medtpp").iterdir() if path.name[0] not in "_."]
    assert [path.name for path in modules if f"`{path.name}{'/' if path.is_dir() else ''}`" not in text] == []


# Pages and tables made from the code


def test_the_page_of_the_experiment_is_current():
    assert (ROOT / "docs" / "experiment.md").read_text(encoding="utf-8") == pages.experiment_page(), (
        "run: python docs/generate.py"
    )


def test_the_tables_of_the_readme_are_current():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == pages.readme(text), "run: python docs/generate.py"


def test_every_field_has_a_meaning():
    assert re.findall(r"^\| `.*\| *\|$", pages.experiment_page(), re.MULTILINE) == []


@pytest.mark.parametrize("page", results_tables.PAGES, ids=lambda page: page.name)
def test_the_tables_of_results_are_current(page):
    text = page.read_text(encoding="utf-8")
    assert results_tables.with_tables(text) == text, "run: python docs/results_tables.py"
    assert text.count("<!-- end -->") == len(re.findall(r"<!-- \w+: ", text))
