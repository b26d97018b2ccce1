"""Recipes: look-up, extends, overrides, sentences for mistakes, and a file that loads to what was written."""

from __future__ import annotations

import pytest

from ldlm_cli.errors import RecipeError
from ldlm_cli.recipe.load import dump_recipe, find_recipe, list_recipes, load_recipe, recipe_folders, validate_recipe
from ldlm_cli.recipe.schema import Recipe


@pytest.fixture
def write(tmp_path):
    def _write(text: str, name: str = "tiny.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def problem(path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- finding


def test_shipped_recipes_are_found_by_name_with_or_without_ending():
    assert find_recipe("base") == find_recipe("base.yaml")
    assert find_recipe("base.yaml").parent in recipe_folders()
    assert next(name for name, _, _ in list_recipes()) == "base.yaml"


def test_a_path_comes_before_a_name(write, monkeypatch):
    path = write("seed: 7", "base.yaml")
    monkeypatch.chdir(path.parent)
    assert load_recipe("base.yaml").seed == 7


def test_a_recipe_of_the_wheel_comes_before_the_repository(tmp_path, monkeypatch):
    package = tmp_path / "ldlm_cli"
    for folder, seed in ((package / "recipes" / "ablations", 1), (tmp_path / "recipes" / "ablations", 2)):
        folder.mkdir(parents=True)
        (folder / "x.yaml").write_text(f"seed: {seed}")
    monkeypatch.setattr("importlib.resources.files", lambda name: package)
    assert load_recipe("ablations/x").seed == 1
    (package / "recipes" / "ablations" / "x.yaml").unlink()
    assert load_recipe("ablations/x.yaml").seed == 2


def test_an_unknown_name_proposes_the_nearest():
    assert "did you mean 'base.yaml'?" in problem("bsae")
    assert "neither a file nor a shipped recipe" in problem("nothing/like/this.yaml")


# ---- reading


def test_the_name_is_the_stem_unless_given(write):
    assert load_recipe(write("seed: 1")).name == "tiny"
    assert load_recipe(write("name: other")).name == "other"
    assert load_recipe(write("seed: 1", "my recipe (2).yaml")).name == "my-recipe-2-"


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "1E-4", ".1e-3", "0.0001"])
def test_a_float_may_be_written_as_people_do(write, text):
    recipe = load_recipe(write(f"stages: {{joint: {{optimizer: {{learning_rate: {text}}}}}}}"))
    assert recipe.stages["joint"].optimizer.learning_rate == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "not valid YAML"),
        ("", "must be a mapping"),
        ("- a", "must be a mapping"),
        ("seed: 1\nseed: 2", "line 2 is not valid YAML: key 'seed' is written twice"),
        ("x: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_what_is_not_a_recipe_is_refused(write, text, words):
    assert words in problem(write(text))


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"description: \xff\xfe")
    assert "cannot be read" in problem(path)


# ---- extends


def test_mappings_are_merged_and_lists_and_plans_replaced(write):
    write(
        "name: parent\ndescription: of the parent\n"
        "stages:\n  joint: {steps: 5, losses: {diffusion: 1, hidden: 1, token: 1}, trains: [denoiser, token_decoder]}\n"
        "  other: {steps: 6}\nplans: {joint: [other, joint], lm: [other]}",
        "parent.yaml",
    )
    child = load_recipe(
        write(
            "extends: parent.yaml\nstages: {joint: {losses: {token: 2}, trains: [denoiser]}}\nplans: {joint: [joint]}"
        )
    )
    joint = child.stages["joint"]
    assert joint.steps == 5
    assert joint.losses == {"diffusion": 1, "hidden": 1, "token": 2}
    assert joint.trains == ("denoiser",)
    assert child.stages["other"].steps == 6
    assert child.plans == {"joint": ("joint",)}
    assert (child.name, child.description) == ("tiny", "")


def test_extends_looks_beside_the_file_then_among_the_shipped(write):
    write("seed: 3", "parent.yaml")
    assert load_recipe(write("extends: ../parent.yaml", "ablations/x.yaml")).seed == 3
    shipped = load_recipe("base.yaml")
    # A copy of base.yaml, and an ablation copied out of its folder, still find the shipped base.
    for text, name in (("extends: base.yaml\nseed: 5", "base.yaml"), ("extends: ../base.yaml\nseed: 5", "a/b.yaml")):
        child = load_recipe(write(text, name))
        assert child.model == shipped.model
        assert child.seed == 5
        (find_recipe(write(text, name))).unlink()


def test_a_circle_and_a_missing_parent_are_refused(write):
    write("extends: b.yaml", "a.yaml")
    assert "circle: a.yaml -> b.yaml -> a.yaml" in problem(write("extends: a.yaml", "b.yaml").with_name("a.yaml"))
    assert "extends itself" in problem(write("extends: own.yaml", "own.yaml"))
    assert "extends 'bsae.yaml' is not found; did you mean 'base.yaml'?" in problem(write("extends: bsae.yaml"))
    assert "must be the name of one recipe" in problem(write("extends: [a, b]"))


# ---- stages by reference

STAGES = """
stages:
  joint: {steps: 101, batch_tokens: 64, losses: {hidden: 2}, gate: {warmup_steps: 7}}
  first: {extends: joint, steps: {of: joint, from: 0.0, to: 0.5}, gate: {kind: one}}
  second: {extends: first, steps: {of: joint, from: 0.5, to: 1.0}, losses: {hidden: 0, token: 1}}
  third: {extends: bare, losses: {diffusion: 0}}
  bare: {batch_tokens: 32}
plans: {joint: [joint]}
"""


def test_a_stage_extends_a_stage_and_takes_a_share_of_its_steps(write, tmp_path):
    recipe = load_recipe(write(STAGES))
    first, second = recipe.stages["first"], recipe.stages["second"]
    assert first.batch_tokens == second.batch_tokens == 64
    assert (first.gate.kind, first.gate.warmup_steps) == ("one", 7)
    assert first.losses == {"hidden": 2}
    assert second.losses == {"hidden": 0, "token": 1}
    assert first.steps + second.steps == 101
    assert recipe.stages["third"].losses == {"diffusion": 0, "hidden": 1, "token": 1}  # the default's others
    dump_recipe(recipe, tmp_path / "resolved.yaml")  # plain numbers
    assert load_recipe(tmp_path / "resolved.yaml") == recipe.model_copy(update={"name": recipe.name})
    assert "extends" not in (tmp_path / "resolved.yaml").read_text()


def test_stages_by_reference_follow_overrides_and_take_their_own(write):
    path = write(STAGES)
    recipe = load_recipe(path, ["stages.joint.steps=50", "stages.joint.gate.minimum=0.5"])
    assert [recipe.stages[name].steps for name in ("first", "second")] == [25, 25]
    assert recipe.stages["second"].gate.minimum == 0.5
    recipe = load_recipe(path, ["stages.first.optimizer.beta1=0.5", "stages.second.steps=9"])
    assert recipe.stages["first"].optimizer.beta1 == recipe.stages["second"].optimizer.beta1 == 0.5
    assert recipe.stages["joint"].optimizer.beta1 == 0.9
    assert recipe.stages["second"].steps == 9
    recipe = load_recipe(path, ["stages.first.steps.to=0.3", "stages.second.steps.from=0.3"])
    assert [recipe.stages[name].steps for name in ("first", "second")] == [30, 71]


@pytest.mark.parametrize(
    ("first", "words"),
    [
        ("extends: jiont", "stages.first.extends is 'jiont', which is no stage; did you mean 'joint'?"),
        ("extends: first", "stages.first.extends goes round in a circle: first -> first"),
        ("extends: 3", "stages.first.extends is 3, which is no stage"),
        ("steps: {of: nothing, from: 0, to: 1}", "stages.first.steps.of is 'nothing', which is no stage"),
        ("steps: {of: first, from: 0, to: 1}", "stages.first.steps.of goes round in a circle"),
        ("steps: {of: joint, from: 0.5, to: 0.5}", "must be a whole number, or a share such as"),
        ("steps: {of: joint, to: 0.5}", "must be a whole number, or a share such as"),
        ("steps: {of: joint, from: 0, to: true}", "must be a whole number, or a share such as"),
        ("steps: {of: joint, from: 0.0, to: 0.001}", "stages.first.steps is 0"),
        ("extends: joint, stepz: 3", "stages.first.stepz is not a field; did you mean 'steps'?"),
    ],
)
def test_a_wrong_reference_is_one_sentence(write, first, words):
    path = write(f"stages: {{joint: {{steps: 10}}, first: {{{first}}}}}\nplans: {{joint: [joint]}}")
    assert words in problem(path)
    assert len(validate_recipe(path)) == 1


# ---- overrides


def test_overrides_are_typed_as_yaml_and_the_later_wins(write):
    path = write("seed: 1")
    recipe = load_recipe(
        path,
        ["seed=2", "seed=3", "stages.joint.optimizer.learning_rate=3e-4", "data.source=*.txt", "judge.revision=null"],
    )
    assert recipe.seed == 3
    assert recipe.stages["joint"].optimizer.learning_rate == 3e-4
    assert recipe.data.source == "*.txt"
    assert load_recipe(path, ["plans.joint=[joint, joint]"]).plans["joint"] == ("joint", "joint")


def test_an_override_changes_one_field_and_hides_no_default_beside_it(write):
    recipe = load_recipe(write("seed: 1"), ["stages.joint.losses.token=0.5"])
    assert recipe.stages["joint"].losses == {"diffusion": 1, "hidden": 1, "token": 0.5}


def test_overrides_that_are_valid_together_may_come_in_any_order(write):
    overrides = ["data.tokenizer=encoder", "token_encoder.source=gpt2"]
    assert load_recipe(write("seed: 1"), overrides) == load_recipe(write("seed: 1"), overrides[::-1])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.joint.stepz=3", "stages.joint.stepz is not a field; did you mean 'steps'?"),
        ("stages.jont.steps=3", "stages.jont is not a section; did you mean 'joint'?"),
        ("seed.x=3", "seed is a value"),
        ("seed", "write section.field=value"),
        (".seed=3", "write section.field=value"),
        ("seed=abc", "seed is 'abc' but must be a whole number"),
        ("stages.joint.steps=0", "stages.joint.steps is 0"),
    ],
)
def test_a_wrong_override_is_named(write, override, words):
    text = problem(write("seed: 1"), override)
    assert words in text
    assert f"--set {override}" in text


# ---- mistakes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages: {joint: {stepz: 3}}", "stages.joint.stepz is not a field; did you mean 'steps'?"),
        ("dta: {seed: 1}", "dta is not a field; did you mean 'data'?"),
        ("qqqq: 1", "the recipe has name, description"),
        ("stages: {joint: {steps: '5'}}", "stages.joint.steps is '5' but must be a whole number"),
        ("seed: true", "seed is true but must be a whole number"),
        ("seed: -1", "seed is -1"),
        ("data: {text_field: on}", "data.text_field is true but must be text"),
        ("data: 3", "data is 3 but must be a section"),
        ("stages: {joint: {trains: [denoizer]}}", "'denoizer' but must be one of"),
        ("stages: {joint: {trains: [denoizer]}}", "did you mean 'denoiser'?"),
        (
            "stages: {joint: {losses: {diffuzion: 1}}}",
            "stages.joint.losses.diffuzion is not a field; did you mean 'diff",
        ),
        ("stages: {joint: {losses: {token: -1}}}", "stages.joint: "),
        ("plans: {joint: [nothing]}", "plan 'joint' names stage 'nothing'"),
        ("sampling: {sampler: dimm}", "did you mean 'ddim'?"),
        ("sampling: {temperature: .nan}", "must be a finite number"),
    ],
)
def test_each_mistake_is_one_sentence(write, text, words):
    path = write(text)
    assert words in problem(path)
    assert str(path) in problem(path)


def test_all_mistakes_are_listed_and_the_first_is_raised(write):
    path = write("seed: x\nstages: {joint: {stepz: 1}}\nfoo: 1")
    found = validate_recipe(path)
    assert len(found) == 3
    assert "(2 more: `ldlm recipes validate` lists all)" in problem(path)
    assert validate_recipe(write("seed: 1")) == []
    assert len(validate_recipe("no-such-recipe")) == 1


# ---- writing


@pytest.mark.parametrize("value", ["1e-4", "null", "12:30", "on", "a: b # c", "ä\n b ", "'", "~", "1_000", "*.txt"])
def test_text_that_looks_like_something_else_comes_back_as_text(tmp_path, value):
    recipe = Recipe(description=value)
    dump_recipe(recipe, tmp_path / "deep" / "recipe.yaml")
    assert load_recipe(tmp_path / "deep" / "recipe.yaml") == recipe


@pytest.mark.parametrize("value", [1e-8, 1e-4, 0.1, 1.0, 3, 1e22, 5e-324])
def test_numbers_come_back_exactly(write, tmp_path, value):
    recipe = load_recipe(write("seed: 1"), [f"stages.joint.optimizer.eps={value}"])
    assert recipe.stages["joint"].optimizer.eps == value
    dump_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize("name", [name for name, _, _ in list_recipes()])
def test_every_shipped_recipe_is_valid_and_comes_back(tmp_path, name):
    assert validate_recipe(name) == []
    recipe = load_recipe(name)
    assert recipe.description
    dump_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_writing_replaces_whole_files_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "recipe.yaml"
    for seed in (1, 2):
        dump_recipe(Recipe(seed=seed), path)
    assert load_recipe(path).seed == 2
    assert [found.name for found in tmp_path.iterdir()] == ["recipe.yaml"]
