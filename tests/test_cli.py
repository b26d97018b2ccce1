"""The command line: wrong use is one sentence and exit code 2; JSON is pure; help is light; exit codes pass through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ldlm_cli import __version__
from ldlm_cli.cli import app as app_module
from ldlm_cli.cli import launch
from ldlm_cli.errors import LdlmError, RecipeError, ShapeError

ROOT = Path(__file__).parents[1]
RECIPE = "data: {num_documents: 100}\nstages: {joint: {steps: 2}}\n"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test in an empty folder, without the variables that change what the commands do."""
    monkeypatch.chdir(tmp_path)
    for name in ("LDLM_DEBUG", "RANK", launch.EXIT_CODE_FILE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    (tmp_path / "tiny.yaml").write_text(RECIPE)


@pytest.fixture
def ldlm(capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            app_module.main(arguments)
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err

    return run


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ldlm_cli", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


# ---- wrong use


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train-joint --recipe bsae.yaml", "did you mean 'base.yaml'?"),
        ("train-joint --recipe tiny.yaml --set stages.joint.stepz=3", "did you mean 'steps'?"),
        ("train-joint --recipe tiny.yaml --set stages.joint.steps=many", "must be a whole number"),
        ("train-joint --recipe tiny.yaml --set nothing", "write section.field=value"),
        ("train-sequential --recipe tiny.yaml", "has no plan 'sequential'; it has joint"),
        ("train-lm --recipe tiny.yaml --seed 3", "has no plan 'lm'"),
        ("train-joint --recipe tiny.yaml --seed -1", "--seed is -1 but must be at least 0"),
        ("train-joint --recipe tiny.yaml --num-processes 0", "--num-processes is 0 but must be at least 1"),
        ("tokenize --recipe tiny.yaml --set data.source=no/such/file.txt", "no/such/file.txt"),
        ("sample --sampler dimm", "--sampler 'dimm' is unknown; did you mean 'ddim'? The choices are ddim, anc"),
        ("sample --sampler qqq", "--sampler 'qqq' is unknown; the choices are ddim"),
        ("sample --grid warpd", "did you mean 'warped'?"),
        ("sample --steps 0", "--steps is 0 but must be at least 1"),
        ("sample --length -1", "--length is -1"),
        ("sample --num 0", "--num is 0"),
        ("sample --temperature 0", "--temperature is 0 but must be a finite number above 0"),
        ("sample --temperature nan", "--temperature is nan"),
        ("sample --churn -0.5", "--churn is -0.5 but must be a finite number at least 0"),
        ("sample --guidance inf", "--guidance is inf"),
        ("sample --token-temperature -1", "--token-temperature is -1"),
        ("sample --batch-size 0", "--batch-size is 0"),
        ("sample", "train one first"),
        ("sample --run nothing", "nothing"),
        ("eval", "train one first"),
        ("evaluate --max-len 1", "--max-len is 1"),
        ("eval --num 0", "--num is 0"),
        ("recipes show bsae", "did you mean 'base.yaml'?"),
        ("recipes validate bsae", "1 problem found"),
        ("recipes copy base.yaml tiny.yaml", "exists already"),
    ],
)
def test_wrong_use_is_one_sentence_and_exit_code_2(ldlm, arguments, words):
    code, _, errors = ldlm(*arguments.split())
    assert code == 2
    lines = errors.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert words in lines[0]


def test_a_recipe_with_a_mistake_is_one_sentence(ldlm, tmp_path):
    (tmp_path / "wrong.yaml").write_text("modle: {}\n")
    code, out, errors = ldlm("train-joint", "--recipe", "wrong.yaml")
    assert (code, out) == (2, "")
    assert errors == "error: recipe wrong.yaml: modle is not a field; did you mean 'model'?\n"


@pytest.mark.parametrize(
    "arguments", ["smaple", "sample --nmu 3", "sample --steps many", "train-joint", "recipes", "recipes copy base.yaml"]
)
def test_what_typer_refuses_also_ends_with_2(arguments):
    result = CliRunner(env={"NO_COLOR": "1", "COLUMNS": "200"}).invoke(app_module.app, arguments.split())
    assert result.exit_code == 2


# ---- errors to exit codes


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RecipeError("a\n  b"), 2, "error: a b\n"),
        (LdlmError("the loss is not finite"), 1, "error: the loss is not finite\n"),
        (ShapeError("x"), 1, "error: x\n"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(143), 143, ""),
        (ValueError("odd"), 1, "error: ValueError: odd; run `ldlm --debug …` for the traceback\n"),
    ],
)
def test_an_error_becomes_a_line_and_a_code_and_a_traceback_only_with_debug(ldlm, monkeypatch, error, code, words):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("ldlm_cli.cli.doctor.examine", fail)
    found, out, errors = ldlm("doctor")
    assert (found, out) == (code, "")
    assert words in errors
    assert "Traceback" not in errors
    found, _, errors = ldlm("--debug", "doctor")
    assert found == code
    assert ("Traceback" in errors) == isinstance(error, Exception)


def test_of_several_processes_only_the_first_speaks_of_wrong_use(ldlm, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    assert ldlm("recipes", "show", "nothing")[2] == ""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(launch.EXIT_CODE_FILE, str(tmp_path / "code"))
    assert ldlm("recipes", "show", "nothing")[2].startswith("error: ")
    assert (tmp_path / "code").read_text() == "2"


# ---- results


def test_version(ldlm):
    assert ldlm("--version") == (0, f"ldlm {__version__}\n", "")


def test_json_is_one_object_and_nothing_else(ldlm, tmp_path):
    code, out, errors = ldlm("recipes", "list", "--json")
    assert (code, errors) == (0, "")
    assert "base.yaml" in {recipe["name"] for recipe in json.loads(out)["recipes"]}
    shown = json.loads(ldlm("recipes", "show", "tiny.yaml", "--set", "seed=4", "--json")[1])
    assert (shown["seed"], shown["name"]) == (4, "tiny")
    assert json.loads(ldlm("recipes", "validate", "tiny.yaml", "--json")[1]) == {
        "valid": True,
        "problems": {"tiny.yaml": []},
    }
    (tmp_path / "wrong.yaml").write_text("seed: x\nfoo: 1")
    code, out, errors = ldlm("recipes", "validate", "tiny.yaml", "wrong.yaml", "--json")
    assert code == 2
    assert len(json.loads(out)["problems"]["wrong.yaml"]) == 2
    assert errors.count("\n") == 1


def test_what_show_prints_is_a_recipe(ldlm, tmp_path):
    (tmp_path / "shown.yaml").write_text(ldlm("recipes", "show", "tiny.yaml", "--set", "seed=4")[1])
    assert ldlm("recipes", "show", "shown.yaml")[1] == ldlm("recipes", "show", "tiny.yaml", "--set", "seed=4")[1]


def test_copy_makes_folders_and_overwrites_only_by_force(ldlm, tmp_path):
    assert ldlm("recipes", "copy", "base", "new/mine.yaml")[:2] == (0, "new/mine.yaml\n")
    assert ldlm("recipes", "validate", "new/mine.yaml")[0] == 0
    assert ldlm("recipes", "copy", "tiny.yaml", "new/mine.yaml")[0] == 2
    assert ldlm("recipes", "copy", "tiny.yaml", "new/mine.yaml", "--force")[0] == 0
    assert (tmp_path / "new" / "mine.yaml").read_text() == RECIPE
    assert ldlm("recipes", "copy", "tiny.yaml", "new")[1] == "new/tiny.yaml\n"


def test_doctor_is_json_without_a_hub(ldlm, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, _ = ldlm("doctor", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["ldlm"]["version"] == __version__
    assert facts["packages"]["torch"]
    assert facts["machine"]["cores"] >= 1
    assert facts["hub"] == {"endpoint": "https://huggingface.co", "offline_by_setting": True, "reachable": None}


def test_doctor_finds_an_unreachable_hub_soon(monkeypatch):
    from ldlm_cli.cli import doctor

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert doctor._hub()["reachable"] is False


# ---- help


@pytest.mark.parametrize(
    "arguments",
    [["--help"], *([name, "--help"] for name in ("train-joint", "sample", "compare", "sweep")), ["recipes", "list"]],
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom ldlm_cli.cli.app import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as done:\n    assert not done.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'numpy', 'accelerate'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_command_is_in_the_help_and_the_alias_is_hidden(ldlm):
    _, out, _ = ldlm("--help")
    training = ("tokenize", "train-joint", "train-sequential", "train-lm", "sweep")
    for command in (*training, "sample", "eval", "compare", "recipes", "doctor"):
        assert f" {command} " in out
    assert " evaluate " not in out
    assert ldlm("evaluate", "--help")[0] == 0


# ---- several processes


def test_the_command_runs_again_under_the_launcher(tmp_path):
    command = launch.launch_command(["sample", "--num", "3"], 2)
    assert command[:3] == [sys.executable, "-m", "ldlm_cli.cli.launch"]
    assert command[3:] == ["--standalone", "--nproc-per-node", "2", "-m", "ldlm_cli", "sample", "--num", "3"]
    environment = launch.launch_environment({"OMP_NUM_THREADS": "7"}, 2, tmp_path / "code")
    assert environment["OMP_NUM_THREADS"] == "7"
    assert environment[launch.EXIT_CODE_FILE] == str(tmp_path / "code")
    assert int(launch.launch_environment({}, 10_000, tmp_path)["OMP_NUM_THREADS"]) == 1


def test_one_process_and_a_process_that_a_launcher_started_go_on(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started processes"))
    launch.run_in_processes(1)
    monkeypatch.setenv("RANK", "1")
    launch.run_in_processes(4)


@pytest.mark.parametrize(
    ("status", "recorded", "received", "code"),
    [
        (0, 0, [], 0),
        (1, 2, [], 2),
        (1, 1, [], 1),
        (1, 0, [], 1),
        (1, None, [], 1),
        (1, 143, [], 1),
        (1, 143, [15], 143),
        (1, None, [2, 2], 130),
        (0, 0, [2], 0),
    ],
)
def test_the_exit_code_is_process_0s_and_never_torchruns(status, recorded, received, code):
    assert launch.exit_code_of(status, recorded, received) == code


def test_sigterm_ends_a_command_with_143():
    code = (
        "import os, signal\nfrom ldlm_cli.cli import app, doctor\n"
        "doctor.examine = lambda: os.kill(os.getpid(), signal.SIGTERM)\napp.main(['doctor'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == 143


@pytest.mark.slow
def test_two_processes_end_with_the_code_and_the_sentence_of_the_first():
    done = start(
        *["train-joint", "--recipe", "tiny.yaml", "--num-processes", "2", "--set", "data.source=missing.txt"],
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if "missing.txt" in line] == [done.stderr.strip()]


@pytest.mark.slow
def test_two_processes_take_every_option_and_sample_the_same_texts():
    """--num is an abbreviation of an option of torchrun, which must not see it."""
    environment = {"OMP_NUM_THREADS": "1"}
    recipe = str(ROOT / "recipes" / "tiny.yaml")
    trained = start("train-joint", "--recipe", recipe, "--num-processes", "2", "--json", **environment)
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["status"] == "finished"
    options = ["sample", "--steps", "3", "--num", "3", "--batch-size", "2", "--json"]
    alone, together = start(*options, **environment), start(*options, "--num-processes", "2", **environment)
    assert together.returncode == 0, together.stderr
    texts = [[text["text"] for text in json.loads(done.stdout)["texts"]] for done in (alone, together)]
    assert texts[0] == texts[1]
    again = start("train-joint", "--recipe", recipe, **environment)
    assert (again.returncode, "already finished" in again.stdout) == (0, True)
