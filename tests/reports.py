"""Pages of reports, taken apart, and runs that are spoilt on purpose."""

import shutil
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from comparisons import write_comparison
from medtpp.evaluation import Predictions, choose_thresholds, evaluate, read_predictions, write_predictions
from medtpp.files import write_json
from medtpp.report import write_report
from runs import run_folder
from studies import write_study

NASTY = ('<script>alert("x")</script>', "Läsion, \"groß\" & 'klein' $x_2$ {{ 7 * 7 }}")
_HOLD = TemporaryDirectory(prefix="medtpp-reports-")
VOID = {"meta", "link", "img", "br", "input"}


class Page(HTMLParser):
    """The elements of a page and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self.open = [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], "elements that are not closed"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    @property
    def ids(self):
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


@cache
def pages():
    """A page of each kind, with names that try to break out of it."""
    root = Path(_HOLD.name)
    nasty = Path(shutil.copytree(run_folder(), root / "nasty"))
    rename_classes(nasty, NASTY)
    several = Path(shutil.copytree(run_folder(), root / "several"))
    make_multilabel(several)
    large = {"tuners": ("lora", "ssf", "vpt_deep"), "extras": ("longer", "linear"), "labels": (30, 150, "all")}
    return {
        "run": page(Path(shutil.copytree(run_folder(), root / "run"))),
        "nasty": page(nasty),
        "several labels": page(several),
        "small comparison": page(write_comparison(root / "small", seeds=1)),
        "large comparison": page(write_comparison(root / "large", **large, data=NASTY[0])),
        "study": page(write_study(root / "study")),
    }


def reevaluate(folder, predictions):
    """Write predictions and their evaluation into a run."""
    write_predictions(folder / "evaluation" / "predictions.csv", predictions)
    evaluate(predictions, thresholds=choose_thresholds(predictions), seed=0, resamples=50).save(folder / "evaluation")


def changed(predictions, **fields):
    names = ("cases", "split", "patients", "sites", "labels", "classes", "probabilities", "multilabel")
    return Predictions(**{name: getattr(predictions, name) for name in names} | fields)


def rename_classes(folder, names):
    before = read_predictions(folder / "evaluation" / "predictions.csv")
    new = dict(zip(before.classes, names, strict=True))
    labels = tuple((new[label[0]],) for label in before.labels)
    cases = (f"{NASTY[0]}.png", *before.cases[1:])
    reevaluate(folder, changed(before, classes=names, labels=labels, cases=cases))
    table = (folder / "split.csv").read_text()
    for old, name in new.items():
        table = table.replace(f",{old},", ',"' + name.replace('"', '""') + '",')
    (folder / "split.csv").write_text(table)
    write_mistake(folder, case=NASTY[1], label=names[0], predicted=names[1])


def make_multilabel(folder):
    before = read_predictions(folder / "evaluation" / "predictions.csv")
    kinds = ((), before.classes[:1], before.classes)
    labels = tuple(kinds[row % 3] for row in range(len(before)))
    reevaluate(folder, changed(before, labels=labels, multilabel=True))


def write_mistake(folder, image="00.png", **fields):
    mistakes = folder / "evaluation" / "mistakes"
    shutil.rmtree(mistakes, ignore_errors=True)
    mistakes.mkdir()
    Image.fromarray(np.full((32, 32), 90, np.uint8)).save(mistakes / "00.png")
    entry = {"case": "a.png", "label": "lesion", "predicted": "normal", "probability": 0.97, "image": image} | fields
    write_json(mistakes / "mistakes.json", [entry])
