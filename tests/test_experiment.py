import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtpp.config import TUNERS, experiment_schema
from medtpp.errors import ConfigError
from medtpp.workflow.experiment import load_experiment, validate, write_experiment
from medtpp.workflow.pretrain import load_job
from runs import backbone_folder

GIVEN = {"data": {"path": "somewhere"}}


def load(text, tmp_path, *chosen):
    file = tmp_path / "experiment.yaml"
    file.write_text(text, encoding="utf-8")
    return load_experiment(file, chosen)


def mistakes(text, tmp_path, *chosen):
    with pytest.raises(ConfigError) as caught:
        load(text, tmp_path, *chosen)
    return str(caught.value)


# What YAML could take for something else: truth values, numbers, comments, separators, quotes, other alphabets.
hostile = st.one_of(
    st.sampled_from(["no", "null", "~", "1e3", "007", "0x1f", "1:30", "a: b", "# x", " x ", "'", '"', "*a", "&a", "-"]),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1),
)
auto_or = lambda values: st.one_of(st.just("auto"), values)  # noqa: E731
tuners = st.one_of(
    st.builds(
        lambda rank, alpha, roles: {"name": "lora", "rank": rank, "alpha": alpha, "roles": roles},
        st.integers(1, 64),
        st.floats(0.01, 1e6),
        st.lists(st.sampled_from(["attention.qkv", "mlp.in", "mlp.out"]), min_size=1, unique=True),
    ),
    st.just({"name": "ssf"}),
    st.just({"name": "linear"}),
    st.builds(lambda prompts: {"name": "vpt_deep", "prompts": prompts}, st.integers(1, 50)),
)
experiments = st.fixed_dictionaries(
    {"data": st.fixed_dictionaries({"path": st.just("/data")}, optional={
        "exclude": st.lists(hostile),
        "label_separator": hostile,
        "columns": st.fixed_dictionaries({}, optional={"image": hostile, "patient": hostile}),
        "modality": st.sampled_from(["xray", "ct", "unknown"]),
        "labels": st.one_of(st.just("all"), st.integers(1, 1000)),
        "val_fraction": st.floats(0.01, 0.99),
        "augment": st.fixed_dictionaries({}, optional={"flip_vertical": auto_or(st.booleans())}),
    })},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "tuner": tuners,
        "backbone": st.fixed_dictionaries({}, optional={"name": hostile, "revision": st.none() | hostile}),
        "tpp": st.fixed_dictionaries({}, optional={
            "steps": auto_or(st.integers(1, 10**6)),
            "learning_rate": auto_or(st.floats(1e-9, 1)),
            "enabled": st.booleans(),
        }),
        "hardware": st.fixed_dictionaries({}, optional={"precision": st.sampled_from(["auto", "32", "bf16", "16"])}),
    },
)  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(experiments)
def test_what_is_written_is_read_again(tmp_path_factory, values):
    experiment = experiment_schema().model_validate(values)
    file = tmp_path_factory.getbasetemp() / "experiment.yaml"
    write_experiment(file, experiment)
    assert load_experiment(file) == experiment
    first = file.read_bytes()
    write_experiment(file, load_experiment(file))
    assert file.read_bytes() == first


def test_written_experiments_explain_their_fields(tmp_path):
    file = tmp_path / "experiment.yaml"
    write_experiment(file, experiment_schema().model_validate(GIVEN))
    lines = file.read_text().splitlines()
    assert any(line.strip().startswith("rank: 8 # ") for line in lines)
    assert f"  path: {Path('somewhere').resolve()} # " in file.read_text()  # no longer relative to where one stood


def test_settings_override_nested_fields_and_lists(tmp_path):
    chosen = ("tpp.steps=7", "tuner.roles=[mlp.in, mlp.out]", "data.augment.crop_min=0.3", "data.exclude=['*.png']")
    experiment = load("data:\n  path: somewhere\ntpp:\n  steps: 5\n  clip: 2.0\n", tmp_path, *chosen)
    assert (experiment.tpp.steps, experiment.tpp.clip) == (7, 2.0)
    assert experiment.tuner.roles == ("mlp.in", "mlp.out")
    assert experiment.data.augment.crop_min == 0.3
    assert experiment.data.exclude == ["*.png"]


@pytest.mark.parametrize(
    ("text", "chosen", "expected"),
    [
        ("", ["tuner=ssf"], {"name": "ssf"}),
        ("", ["tuner.name=ssf"], {"name": "ssf"}),
        ("tuner: ssf\n", [], {"name": "ssf"}),
        ("tuner:\n  rank: 4\n", ["tuner=ssf"], {"name": "ssf"}),
        ("tuner:\n  name: lora\n  rank: 4\n", ["tuner.name=ssf"], {"name": "ssf"}),  # LoRA's rank goes with LoRA
        ("tuner: ssf\n", ["tuner.name=vpt_deep", "tuner.prompts=3"], {"name": "vpt_deep", "prompts": 3}),
        ("tuner:\n  name: vpt_deep\n  prompts: 3\n", ["tuner.name=vpt_deep"], {"name": "vpt_deep", "prompts": 3}),
    ],
)
def test_methods_are_switched(tmp_path, text, chosen, expected):
    tuner = load(f"data:\n  path: somewhere\n{text}", tmp_path, *chosen).tuner
    assert tuner == TUNERS.get(expected["name"]).Options(**expected)


def test_options_of_the_default_method_need_no_name(tmp_path):
    tuner = load("data: {path: x}\ntuner: {rank: 4}\n", tmp_path).tuner
    assert (tuner.name, tuner.rank) == ("lora", 4)


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("hardware.precision=32", lambda e: e.hardware.precision == "32"),  # a number to YAML
        ("hardware.precision='32'", lambda e: e.hardware.precision == "32"),
        ("data.columns.patient=2020", lambda e: e.data.columns.patient == "2020"),
        ("data.exclude=[1, 2]", lambda e: e.data.exclude == ["1", "2"]),
        ("data.path=2020", lambda e: e.data.path == Path("2020")),
        ("data.label_separator=|", lambda e: e.data.label_separator == "|"),  # a block scalar to YAML
        ("data.label_separator=,", lambda e: e.data.label_separator == ","),
        ("tpp.learning_rate=1e-4", lambda e: e.tpp.learning_rate == 1e-4),
        ("tpp.steps=auto", lambda e: e.tpp.steps == "auto"),
        ("backbone.revision=", lambda e: e.backbone.revision == ""),
    ],
)
def test_values_are_read_as_they_are_meant(tmp_path, setting, read):
    assert read(load("data:\n  path: somewhere\n", tmp_path, setting))


def test_sections_of_nothing_but_comments_are_defaults(tmp_path):
    experiment = load("data:\n  path: x\n  unlabelled: []\ntpp:\n  # steps: 5\ntuner:\n", tmp_path)
    assert experiment == load("data:\n  path: x\n", tmp_path)


def test_all_mistakes_of_a_file_come_at_once_with_their_lines(tmp_path):
    text = (
        "data:\n  path: somewhere\n  modality: xry\ntpp:\n  stepz: 20\nfinetune:\n  steps: ten\n"
        "tuner:\n  name: ssf\n  rank: 4\nhardwear:\n  devices: 2\n"
    )
    said = mistakes(text, tmp_path)
    assert [line.split(":")[0] for line in said.splitlines()[1:]] == [
        "  - line 3, data.modality",
        "  - line 5, tpp.stepz",
        "  - line 7, finetune.steps",
        "  - line 10, tuner.rank",
        "  - line 11, hardwear",
    ]
    assert "should be 'unknown', 'xray'" in said
    assert "did you mean steps?" in said
    assert "should be a whole number or 'auto', not 'ten'" in said
    assert re.search(r"ssf has no such option; .*\blora\b.* have", said)
    assert "did you mean hardware?" in said


def test_a_setting_is_not_blamed_on_a_line_of_the_file(tmp_path):
    said = mistakes("data:\n  path: somewhere\ntpp:\n  steps: 5\n", tmp_path, "tpp.steps=x", "tpp.clip=-1")
    assert "- tpp.steps: should be a whole number" in said
    assert "- tpp.clip: should be greater than or equal to 0, not -1" in said
    assert "line" not in said.split(":", 1)[1]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (["tuner.name=sff"], ["no tuner called 'sff'", "Did you mean 'ssf'?", "Known: "]),
        (["tuner=sff"], ["no tuner called 'sff'"]),
        (["pretext=mea"], ["no pretext called 'mea'", "'mae'"]),
        (["task.name=segmentatoin"], ["no task called 'segmentatoin'"]),
        (["tuner.rnk=3"], ["tuner.rnk", "did you mean rank?"]),
        (["tuner.prompts=3"], ["lora has no such option; vpt_deep, vpt_shallow have"]),
        (["tuner.roles=[attention.qk]"], ["tuner.roles.0", "'attention.qkv'", "not 'attention.qk'"]),
        (["tuner.roles=[]"], ["tuner.roles", "at least 1"]),
        (["tpp=5"], ["tpp: should be a section"]),
        (["tuner=[1]"], ["tuner: should be a section"]),
        (["data.exclude=a.png"], ["should be a list such as [a, b], not 'a.png'"]),
        (["data.multilabel=maybe"], ["data.multilabel: should be true or false"]),
        (["finetune.weight_decay=much"], ["should be a number, not 'much'"]),
        (["data.val_fraction=1"], ["should be less than 1"]),
        (["tuner"], ["'tuner' is not of the form field.field=value"]),
        (["=3", "a..b=1"], ["'=3'", "'a..b=1'"]),  # both
        (["data.exclude=*.png"], ["not valid YAML", "quotes"]),
    ],
)
def test_mistakes_in_settings_say_what_is_meant(tmp_path, chosen, words):
    said = mistakes("data:\n  path: somewhere\n", tmp_path, *chosen)
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["holds no experiment"]),
        (b"- a\n- b\n", ["holds no experiment"]),
        (b"seed: 1\n", ["data: is missing"]),
        (b"data: {path: x\nseed: 1\n", ["not valid YAML", "line 2"]),
        (b"data:\n  path: x\n\tseed: 1\n", ["not valid YAML", "line 3", "\\t"]),
        (b"data:\n  path: x\ndata:\n  path: y\n", ["line 3", 'duplicate key "data"']),
        (b"data: folder\n", ["line 1, data: should be a section"]),
        (b"\xff\xfed\x00", ["UTF-8"]),
    ],
)
def test_broken_files_say_what_is_wrong(tmp_path, content, words):
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_experiment(file, unlabelled=[Path("more")])
    assert [word for word in ["broken.yaml", *words] if word not in str(caught.value)] == [], caught.value


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(ConfigError, match=r"medtpp init DATA -o none\.yaml"):
        load_experiment(tmp_path / "none.yaml")


def test_a_file_by_windows_notepad(tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_bytes("\ufeffseed: 3\r\ndata:\r\n  path: x\r\n".encode())
    assert load_experiment(file).seed == 3


def test_paths_are_looked_for_beside_the_file(tmp_path, monkeypatch):
    (tmp_path / "there" / "images").mkdir(parents=True)
    (tmp_path / "there" / "more").mkdir()
    text = "data:\n  path: images\n  unlabelled: [more, /elsewhere]\n"
    experiment = load(text, tmp_path / "there")
    assert experiment.data.path.resolve() == tmp_path / "there" / "images"
    assert experiment.data.unlabelled == [tmp_path / "there" / "more", Path("/elsewhere")]
    monkeypatch.chdir(tmp_path / "there")
    assert load(text, tmp_path / "there").data.path == Path("images")


def test_a_backbone_folder_is_remembered_by_its_whole_path(monkeypatch):
    monkeypatch.chdir(backbone_folder().parent)
    experiment = load_experiment(Path("data"), ["backbone.name=backbone"])
    assert experiment.backbone.name == str(backbone_folder())
    assert load_experiment(Path("data"), ["backbone.name=medtpp_vit_tiny"]).backbone.name == "medtpp_vit_tiny"


def test_so_is_a_folder_of_transformers(tmp_path, monkeypatch):
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for name, remembered in (("vit", tmp_path / "vit"), ("owkin/phikon", "owkin/phikon")):
        experiment = load_experiment(Path("data"), [f"backbone.name=transformers:{name}"])
        assert experiment.backbone.name == f"transformers:{remembered}"


def test_unlabelled_folders_add_up(tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text("data:\n  path: x\n  unlabelled: [a]\n")
    experiment = load_experiment(file, ["data.unlabelled=[b]"], [Path("c")])
    assert experiment.data.unlabelled == [Path("b"), Path("c")]


def test_pretraining_has_settings_of_the_same_kind():
    said = ""
    try:
        load_job([Path("images")], ["stepz=4", "pretext.mask_ratio=2", "channels=2"], image_size=32)
    except ConfigError as error:
        said = str(error)
    assert "did you mean steps?" in said
    assert "channels: should be 'auto', 1 or 3, not 2" in said
    with pytest.raises(ConfigError, match="mask_ratio: should be less than 1, not 2"):
        load_job([Path("images")], ["pretext.mask_ratio=2"]).pretext_options()
    with pytest.raises(ConfigError, match="no pretext called 'mea'"):
        load_job([Path("images")], ["pretext.name=mea"]).pretext_options()


def test_validate_names_the_source():
    with pytest.raises(ConfigError, match="mistakes in my file:"):
        validate(experiment_schema(), {}, "my file")


def test_a_setting_adds_to_a_section_that_another_gave():
    made = load_experiment(Path("data"), ["tpp={steps: 9, batch_size: 3}", "tpp.clip=2"])
    assert (made.tpp.steps, made.tpp.batch_size, made.tpp.clip) == (9, 3, 2)
