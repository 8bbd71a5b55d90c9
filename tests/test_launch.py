"""`python launch.py` as a user starts it: with tiny packages and no network, but with real processes, a real venv and a real pip."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import launch
from tests.support.launch_project import ROOT_DIR, Project, make_project, write_wheel

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project after its first start; tests share it and must not break it."""
    project = make_project(tmp_path_factory.mktemp("launch"))
    first = project.run("--port", "17860")
    assert first.code == 0, first.output
    (project.root / "first.txt").write_text(first.output)
    return project


@pytest.fixture
def fresh(tmp_path: Path) -> Project:
    """A project that was never started. Its own venv would take seconds, so tests using it fail before one is created."""
    return make_project(tmp_path)


@pytest.fixture
def changed(started: Project) -> Iterator[Project]:
    """The started project, for changes: requirements, stamp and extensions are restored afterwards."""
    stamp, requirements = started.venv / "webui-installed.json", started.root / "requirements_versions.txt"
    kept = {path: path.read_bytes() for path in (stamp, requirements)}
    yield started
    for path, content in kept.items():
        path.write_bytes(content)
    shutil.rmtree(started.root / "extensions", ignore_errors=True)


def test_the_first_start_makes_a_venv_installs_torch_first_and_runs_the_program(started: Project) -> None:
    output = (started.root / "first.txt").read_text()
    steps = ["Creating a virtual environment", "Installing torch (1 of 2): pip install torch==2.13.0", "Successfully installed torch-2.13.0"]
    steps += ["Installing packages (2 of 2): requirements_versions.txt", "Successfully installed tiny-1.0", "Packages installed in", "PROGRAM 17860"]
    positions = [output.find(step) for step in steps]
    assert -1 not in positions
    assert positions == sorted(positions)
    assert f"PROGRAM 17860 {started.venv}" in output


def test_the_second_start_installs_nothing_and_says_so(started: Project) -> None:
    result = started.run("--port", "17860")
    assert (result.code, len(result.output.splitlines())) == (0, 2), result.output
    assert result.output.startswith("Packages match requirements_versions.txt; nothing to install (0.0")
    assert result.lines("PROGRAM")


def test_the_program_decides_the_exit_code(started: Project) -> None:
    assert started.run("--port", "17860", PROGRAM_CODE="3").code == 3


def test_exit_stops_after_the_set_up(started: Project) -> None:
    result = started.run("--exit")
    assert (result.code, result.lines("PROGRAM")) == (0, [])


def test_commandline_args_are_honoured(started: Project) -> None:
    result = started.run(COMMANDLINE_ARGS="--port 17870 --cuda-malloc")
    assert result.lines("PROGRAM 17870")[0].endswith("backend:cudaMallocAsync")


def test_skip_prepare_environment_goes_on_in_this_python(started: Project) -> None:
    result = started.run("--skip-prepare-environment", "--port", "17860")
    assert result.code == 0
    assert str(started.venv) not in result.lines("PROGRAM")[0]
    assert "Packages" not in result.output


def test_a_flag_without_effect_is_named(started: Project) -> None:
    assert len(started.run("--exit", "--opt-channelslast").lines("WARNING: --opt-channelslast has no effect")) == 1


def test_a_changed_list_is_installed_and_torch_stays(changed: Project) -> None:
    write_wheel(changed.wheels, "tiny", "1.1", requires=["torch>=1"])
    write_wheel(changed.wheels, "torch", "9.0")
    changed.write_requirements("torch==2.13.0", "tiny==1.1")
    result = changed.run("--exit")
    assert result.code == 0
    assert "Successfully installed tiny-1.1" in result.output
    assert "Installing torch" not in result.output
    assert "nothing to install" in changed.run("--exit").output


def test_a_package_that_would_replace_torch_is_refused(changed: Project) -> None:
    write_wheel(changed.wheels, "torch", "9.0")
    write_wheel(changed.wheels, "greedy", "1.0", requires=["torch>=9"])
    changed.write_requirements("torch==2.13.0", "greedy==1.0")
    result = changed.run("--exit")
    assert result.code == 1
    assert "incompatible versions" in result.lines("ERROR: Installing")[-1]


def test_a_package_that_is_not_there_is_named(changed: Project) -> None:
    changed.write_requirements("torch==2.13.0", "nowhere==1.0")
    result = changed.run("--exit")
    assert result.code == 1
    assert "the index has no nowhere==1.0 for Python 3." in result.lines("ERROR: Installing")[-1]
    assert "Traceback" not in result.output


def test_no_network_is_said_as_such(changed: Project) -> None:
    changed.write_requirements("torch==2.13.0", "nowhere==1.0")
    with socket.socket() as nobody:  # a port that nothing listens on
        nobody.bind(("127.0.0.1", 0))
        result = changed.run("--exit", INDEX_URL=f"http://127.0.0.1:{nobody.getsockname()[1]}/simple", PIP_NO_INDEX="", PIP_FIND_LINKS="")
    assert result.code == 1
    assert "the package index cannot be reached" in result.lines("ERROR: Installing")[-1]
    assert "INDEX_URL" in result.output


def test_skip_install_never_installs(changed: Project) -> None:
    changed.write_requirements("torch==2.13.0", "nowhere==1.0")
    result = changed.run("--skip-install", "--port", "17860")
    assert result.code == 0
    assert result.lines("WARNING: --skip-install")
    assert "pip" not in result.output


def test_a_list_that_is_missing_is_named(started: Project) -> None:
    result = started.run("--exit", REQS_FILE="no_such_list.txt")
    assert result.code == 1
    assert "no_such_list.txt cannot be read" in result.output


def test_torch_command_is_run_once_and_its_torch_stays(changed: Project) -> None:
    mine = write_wheel(changed.wheels, "torch", "2.13.0+mine")
    command = "pip install torch==2.13.0+mine"
    result = changed.run("--exit", TORCH_COMMAND=command)
    assert "Successfully installed torch-2.13.0+mine" in result.output, result.output
    assert "nothing to install" in changed.run("--exit", TORCH_COMMAND=command).output
    assert "nothing to install" in changed.run("--exit").output
    mine.unlink()
    again = changed.run("--exit", "--reinstall-torch", TORCH_COMMAND="pip install torch==2.13.0")
    assert "Successfully uninstalled torch-2.13.0+mine" in again.output
    assert "Successfully installed torch-2.13.0" in again.output


def test_a_torch_command_that_is_none_is_refused(changed: Project) -> None:
    result = changed.run("--exit", TORCH_COMMAND="rm -rf x")
    assert result.code == 1
    assert "is not a pip command" in result.output
    assert "Uninstalling" not in result.output


def test_a_set_up_that_was_cut_short_is_done_again(changed: Project) -> None:
    """torch is removed before the other build turns out to be missing; the next start must not trust the old stamp."""
    assert changed.run("--exit", TORCH_COMMAND="pip install torch==7.7.7").code == 1
    assert "Successfully installed torch-2.13.0" in changed.run("--exit").output


def test_xformers_is_installed_without_its_dependencies_and_torch_stays(changed: Project) -> None:
    write_wheel(changed.wheels, "xformers", "0.0.35", requires=["torch>=99"])
    result = changed.run("--exit", "--xformers")
    assert (result.code, "Successfully installed xformers-0.0.35" in result.output) == (0, True), result.output
    assert "Installing" not in changed.run("--exit", "--xformers").output


def test_xformers_that_does_not_install_costs_no_start(changed: Project) -> None:
    result = changed.run("--xformers", "--port", "17860", XFORMERS_PACKAGE="xformers==7.7")
    assert result.code == 0
    assert len(result.lines("WARNING: Installing xformers failed")) == 1
    assert result.lines("PROGRAM")


INSTALLER = """
import os, launch
print("INSTALLER", launch.is_installed("tiny"), launch.is_installed("nowhere"), launch.args.skip_install, os.getcwd())
launch.run_pip("install addon==1.0", "addon for a test")
"""


def test_an_extensions_installer_runs_once(changed: Project) -> None:
    write_wheel(changed.wheels, "addon", "1.0")
    folder = changed.root / "extensions" / "painter"
    folder.mkdir(parents=True)
    (folder / "install.py").write_text(INSTALLER)
    first = changed.run("--exit")
    assert first.lines("INSTALLER") == [f"INSTALLER True False False {changed.root}"]
    assert changed.run("--exit").lines("INSTALLER") == []
    (folder / "install.py").write_text(INSTALLER + "raise SystemExit(2)\n")
    failing = changed.run("--exit")
    assert (failing.code, len(failing.lines("WARNING: The installer of painter failed with code 2"))) == (0, 1)
    assert changed.run("--exit", "--disable-extra-extensions").lines("INSTALLER") == []


GREEDY_INSTALLER = """
import launch, pathlib, subprocess, sys
launch.run_pip("install 'tiny<1' addon==1.0", "what the extension needs")
launch.run_pip(f'install -r "{pathlib.Path(__file__).with_name("requirements.txt")}"', "its list")
code = subprocess.run([sys.executable, "-m", "pip", "install", "wanting"]).returncode
print("RAW PIP ENDED WITH", code)
"""


def test_an_installer_may_not_replace_a_package_of_the_program(changed: Project) -> None:
    for version in ("0.9", "2.0"):
        write_wheel(changed.wheels, "tiny", version)
    write_wheel(changed.wheels, "addon", "1.0")
    write_wheel(changed.wheels, "other", "1.0")
    write_wheel(changed.wheels, "wanting", "3.0", requires=["tiny>=2"])
    folder = changed.root / "extensions" / "greedy"
    folder.mkdir(parents=True)
    (folder / "install.py").write_text(GREEDY_INSTALLER)
    (folder / "requirements.txt").write_text("other\ntiny==2.0\n")
    result = changed.run("--exit")
    refused = [
        line.removeprefix("WARNING: The installer of greedy was refused: ") for line in result.lines("WARNING: The installer of greedy was refused")
    ]
    end = ". The program runs with tiny 1.0 and keeps it."
    assert refused == [f"tiny<1{end}", f"tiny==2.0{end}", f"wanting 3.0, which needs tiny>=2{end}"], result.output
    assert result.lines("RAW PIP") == ["RAW PIP ENDED WITH 1"]
    assert sorted(path.name for path in changed.venv.glob("lib/*/site-packages/*-*.dist-info") if path.name[0] in "aotw") == [
        "addon-1.0.dist-info",
        "other-1.0.dist-info",
        "tiny-1.0.dist-info",
        "torch-2.13.0.dist-info",
    ]


BREAKING_INSTALLER = """
import os, subprocess, sys
free = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
subprocess.run([sys.executable, "-m", "pip", "install", "-q", "tiny==2.0", "torchvision==0.20.0"], env=free, check=True)
"""


def test_what_an_installer_replaced_all_the_same_is_put_back(changed: Project) -> None:
    write_wheel(changed.wheels, "tiny", "2.0")
    write_wheel(changed.wheels, "torchvision", "0.20.0")
    folder = changed.root / "extensions" / "breaking"
    folder.mkdir(parents=True)
    (folder / "install.py").write_text(BREAKING_INSTALLER)
    result = changed.run("--exit", "--port", "17860")
    assert result.code == 0
    begin = "WARNING: The installer of breaking"
    assert result.lines(f"{begin} changed") == [f"{begin} changed packages, which are put back: tiny is 2.0, the program runs with 1.0."]
    assert result.lines(f"{begin} brought") == [f"{begin} brought torchvision 0.20.0, made for another torch; it is taken off again."]
    assert not list(changed.venv.glob("lib/*/site-packages/torchvision*"))
    assert "nothing to install" in changed.run("--exit").output


def test_a_package_that_was_changed_between_starts_is_put_back(changed: Project) -> None:
    write_wheel(changed.wheels, "tiny", "2.0")
    python = changed.venv / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-index", "--find-links", str(changed.wheels), "tiny==2.0"], check=True)
    skipped = changed.run("--exit", "--skip-install")
    assert "tiny is 2.0" in skipped.lines("WARNING: --skip-install")[0]
    result = changed.run("--exit")
    assert result.lines("WARNING: Packages were changed") == [
        "WARNING: Packages were changed since the last start and are put back: tiny is 2.0, the program runs with 1.0"
    ]
    assert "Successfully installed tiny-1.0" in result.output
    assert "nothing to install" in changed.run("--exit").output


def test_installers_are_not_run_when_told_so(changed: Project) -> None:
    folder = changed.root / "extensions" / "painter"
    folder.mkdir(parents=True)
    (folder / "install.py").write_text("print('INSTALLER')\n")
    assert changed.run("--exit", "--no-install-extensions").lines("INSTALLER") == []
    assert changed.run("--exit").lines("INSTALLER") == ["INSTALLER"]


def test_a_missing_package_is_told_from_a_fault(started: Project) -> None:
    missing = started.run("--port", "17860", WEBUI_IMPORTS="nowhere")
    assert missing.code == 1
    assert "The package nowhere is missing" in missing.output
    assert "Traceback" not in missing.output
    fault = started.run("--port", "17860", PROGRAM_IMPORTS="nowhere")
    assert fault.code == 1
    assert "Traceback" in fault.output


def test_a_port_in_use_is_said_before_anything_is_installed(changed: Project) -> None:
    changed.write_requirements("torch==2.13.0", "nowhere==1.0")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = changed.run("--port", str(port))
    assert result.code == 1
    assert result.output.startswith(f"ERROR: Port {port} is in use by another program")
    assert "--port" in result.output.partition("or ")[2]


def test_a_mistake_in_the_flags_ends_it_before_a_venv_is_made(fresh: Project) -> None:
    result = fresh.run("--lsten")
    assert (result.code, result.output.count("\n")) == (2, 1)
    assert "did you mean --listen?" in result.output
    assert not fresh.venv.exists()


def test_a_venv_that_does_not_work_is_named(fresh: Project) -> None:
    python = fresh.venv / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/nowhere\n")
    python.chmod(0o755)
    result = fresh.run("--exit")
    assert result.code == 1
    assert "Delete that folder and run this again" in result.output


def test_sysinfo_is_written_without_secrets(started: Project) -> None:
    result = started.run("--dump-sysinfo", "--api-auth", "ann:hush", COMMANDLINE_ARGS="--gradio-auth bob:hush")
    assert result.code == 0, result.output
    path = Path(result.output.split("Written: ")[1].strip())
    text = path.read_text()
    path.unlink()
    assert "hush" not in text
    assert "tiny==1.0" in json.loads(text)["packages"] or "tiny==1.1" in json.loads(text)["packages"]
    assert json.loads(text)["torch"].startswith("(does not load: AttributeError")
    assert json.loads(text)["flags"]["api_auth"] == "(not shown)"


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.9"])
def test_an_old_python_is_told_so(version: str) -> None:
    """With the Pythons installed on this machine."""
    candidates = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    python = next((str(path) for path in candidates if path and _is_version(str(path), version)), None)
    if python is None:
        pytest.skip(f"Python {version} is not on this machine")
    result = subprocess.run([python, "launch.py"], cwd=ROOT_DIR, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout.startswith(f"ERROR: Python {version} is too old for this program. Install Python 3.10 to 3.13")
    assert result.stderr == ""


def _is_version(python: str, version: str) -> bool:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.strip() == version


@pytest.mark.parametrize(
    ("version", "bits", "words", "says"),
    [
        ((3, 9, 1), 64, [], "too old"),
        ((3, 9, 1), 64, ["--skip-python-version-check"], "too old"),
        ((3, 14, 0), 64, [], "newer than this program supports"),
        ((3, 14, 0), 64, ["--skip-python-version-check"], None),
        ((3, 10, 0), 64, [], None),
        ((3, 13, 9), 64, [], None),
        ((3, 11, 0), 32, [], "32-bit"),
    ],
)
def test_which_pythons_will_do(version: tuple[int, int, int], bits: int, words: list[str], says: str | None) -> None:
    problem = launch.python_problem(version, bits, words)
    assert (problem is None) == (says is None)
    assert says is None or says in problem


def test_installers_find_what_they_import_from_here() -> None:
    assert all(callable(getattr(launch, name)) for name in ("is_installed", "run_pip", "run", "git_clone", "git_tag"))
    with pytest.raises(AttributeError):
        _ = launch.no_such_name
