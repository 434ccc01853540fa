"""What the documentation says exists: files, commands, options, settings, metrics, messages, and code that runs."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
from commands import strop_here

from strop.cli import app
from strop.config import Config
from strop.config_load import NOT_OURS, TRL_NAMES, load_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
FOLDERS = (
    "src",
    "docs",
    "scripts",
    "examples",
    "recipes",
    "tests",
    "bench",
    "trainer",
    "engine",
    "policy",
    "objective",
)


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [body for language, body in found if language in languages]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def spans(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def shell_lines(page: Path) -> Iterator[list[str]]:
    for block in blocks(page, "sh"):
        for line in block.splitlines():
            for command in re.split(r"&&|;", line):
                words = shlex.split(command, comments=True)
                if words:
                    yield words


def strop_calls(page: Path) -> Iterator[list[str]]:
    """Every call of `strop` in a shell block or in the text, without the leading name."""
    yield from (words[1:] for words in shell_lines(page) if words[0] == "strop")
    for span in spans(page):
        words = span.split()
        if words[0] == "strop" and len(words) > 1 and "COMMAND" not in words:
            yield words[1:]


def script(name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@cache
def source_strings() -> tuple[str, ...]:
    """Every text in the source, with neighbouring literals joined as Python joins them."""
    texts: list[str] = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return tuple(texts)


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower().strip()).replace(" ", "-")


def test_the_reference_is_what_its_script_makes() -> None:
    make_reference = script("make_reference")
    text = make_reference.REFERENCE.read_text(encoding="utf-8")
    assert make_reference.make(text) == text, "run: python scripts/make_reference.py"
    with pytest.raises(ValueError, match="begin commands"):
        make_reference.make(text.replace("<!-- begin commands -->", ""))


def test_the_reference_has_every_setting_and_command() -> None:
    text = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    for section, values in Config().model_dump().items():
        for key in values:
            assert f"| `{section}.{key}` |" in text
    group: Any = typer.main.get_command(app)
    for name in group.commands:
        assert f"### `strop {name}" in text


def test_what_is_looked_for_is_found() -> None:
    """The checks below pass on an empty list; so the lists must not be empty."""
    readme, guide = ROOT / "README.md", ROOT / "docs/guide.md"
    assert ["train", "mine.yaml", "--resume"] in list(strop_calls(readme))
    assert ["eval", "runs/mine"] in list(strop_calls(guide))
    assert ["make", "demo"] in list(shell_lines(readme))
    assert "rollout.num_prompts" in spans(guide)
    assert len(blocks(guide, "yaml")) > 2
    assert slug("Data sets of reasoning-gym") == "data-sets-of-reasoning-gym"


@PAGE
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: {target}"


@PAGE
def test_named_files_exist(page: Path) -> None:
    named = [re.match(r"[\w./-]+", span) for span in spans(page)]
    paths = {match.group() for match in named if match and match.group().split("/")[0] in FOLDERS and "/" in match[0]}
    missing = [path for path in paths if not any((base / path).exists() for base in (ROOT, ROOT / "src/strop"))]
    assert missing == []


@PAGE
def test_named_tests_exist(page: Path) -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").glob("test_*.py")))
    defined = set(re.findall(r"^def (test_\w+)", code, re.MULTILINE))
    assert {span for span in spans(page) if re.fullmatch(r"test_\w+", span)} <= defined


@PAGE
def test_commands_and_options_exist(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    for words in strop_calls(page):
        if words == ["--help"]:
            continue
        assert words[0] in group.commands, f"{page.name}: strop {' '.join(words)}"
        command = group.commands[words[0]]
        if hasattr(command, "commands"):
            assert words[1] in command.commands, f"{page.name}: strop {' '.join(words)}"
            command = command.commands[words[1]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words[1:] if word.startswith("--")} <= known, f"{page.name}: {words}"
        load_config(None, [words[i + 1] for i, word in enumerate(words) if word == "--set"])


@PAGE
def test_make_targets_and_scripts_exist(page: Path) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    calls = [*shell_lines(page), *(span.split() for span in spans(page))]
    for words in calls:
        names = [word for word in words if "=" not in word]
        if len(names) > 1 and names[0] == "make":
            assert names[1] in targets, f"{page.name}: {words}"
        if len(names) > 1 and names[0] == "python" and names[1].endswith(".py"):
            assert (ROOT / names[1]).is_file(), f"{page.name}: {words}"


@PAGE
def test_yaml_blocks_are_configs(page: Path, tmp_path: Path) -> None:
    for i, block in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"block-{i}.yaml"
        path.write_text(block, encoding="utf-8")
        assert load_config(path) != Config()


@PAGE
def test_named_settings_exist(page: Path) -> None:
    known = {f"{section}.{key}" for section, values in Config().model_dump().items() for key in values}
    sections = "|".join(Config.model_fields)
    for span in spans(page):
        for name in re.findall(rf"(?<![\w./-])(?:{sections})\.[a-z_]\w*", span):
            assert name in known or name.endswith(".py"), f"{page.name}: {span}"


@PAGE
def test_python_blocks_compile(page: Path) -> None:
    for block in blocks(page, "python"):
        assert compile(block, page.name, "exec").co_filename == page.name


def test_names_from_trl_are_taken_and_refused_as_the_readme_says() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, section = text.partition("## Coming from TRL or Unsloth")
    section, _, _ = section.partition("\n## ")
    taken, _, table = section.partition("| in TRL or Unsloth |")
    values = {"grpo", "dr_grpo", "dapo"}
    assert set(re.findall(r"`(\w+)`", taken)) - values <= set(TRL_NAMES)
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    left = [name for row in rows for name in re.findall(r"`(\w+)`", row[1])]
    assert len(left) > 8
    neutral = {"top_p", "top_k", "min_p", "repetition_penalty"}
    assert set(left) - neutral <= set(NOT_OURS)
    assert neutral <= set(TRL_NAMES)


def guide_table(header: str) -> list[str]:
    """The first column of the guide's table that begins with `header`."""
    _, _, rest = (ROOT / "docs/guide.md").read_text(encoding="utf-8").partition(f"\n| {header} |")
    rows = rest.partition("\n\n")[0].splitlines()[2:]
    return [row.split(" | ")[0].removeprefix("| ") for row in rows]


def test_the_guide_names_every_metric_and_no_other() -> None:
    documented = {name for cell in guide_table("metric") for name in re.findall(r"`([^`]+)`", cell)}
    shapes = r"(?:completions|clip_ratio|sampling|tokens|memory)/\w+(?:/\w+)?"
    in_source = {text for text in source_strings() if re.fullmatch(shapes, text)}
    assert len(in_source) > 15
    assert in_source <= documented
    # Phases of a step become times; parts of names that are put together are not found as one text.
    trainer = "\n".join((ROOT / f"src/strop/trainer/{name}.py").read_text() for name in ("loop", "session"))
    phases = {*re.findall(r"(?:session|self)\.phase\(\"(\w+)\"", trainer)}
    assert phases >= {"generate", "train", "evaluate"}
    assert {f"time/{phase}_s" for phase in phases} <= documented
    composed = {f"time/{phase}_s" for phase in phases} | {"rewards/NAME/mean", "rewards/NAME/std", "eval_pass@k"}
    composed |= {"monitor/NAME"}
    assert {name for name in documented - composed if name not in source_strings()} == set()


def test_messages_in_the_guide_are_messages_of_the_code() -> None:
    messages = [cell.strip("`") for cell in guide_table("message contains")]
    assert len(messages) > 10
    foreign = {"operator torchvision::nms does not exist"}
    parts = {message: message.split(": ") for message in messages if message not in foreign}
    missing = [m for m, ps in parts.items() if not all(any(p in text for text in source_strings()) for p in ps)]
    assert missing == []


def test_the_changelog_has_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_picture_is_drawn_from_the_run_folder(tmp_path: Path) -> None:
    rows = [
        {"step": i, "reward": i / 10, "accuracy": i / 10, "completions/mean_length": 20.0, "step_time": 0.5,
         "completions/clipped_ratio": 0.0, "num_tokens": 1000, "tokens/generated_per_s": 4000.0}
        for i in range(10)
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = {"pass@1": 0.25, "pass@k": 0.5, "k": 4, "problems": 30}
    summary = {"steps": 10, "eval_before": result, "eval_after": result | {"pass@1": 0.75}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    picture = script("picture_of_run").draw(tmp_path, "strop demo")
    tree = ElementTree.fromstring(picture)
    texts = [node.text for node in tree.iter() if node.tag.endswith("text")]
    assert "step  1/10  reward 0.000  accuracy 0.0%  length 20  truncated 0%  4,000 tok/s  0.5 s  ETA 4.5 s" in texts
    assert {"$ strop demo", "held out before: 25.0%", "held out after: 75.0%"} <= set(texts)
    ends = [node for node in tree.iter() if node.tag.endswith("circle") and node.get("r") == "6"]
    assert [float(node.get("cx", 0)) for node in ends] == [62.0, 806.0]
    assert [float(node.get("cy", 0)) for node in ends] == [196.0, 96.0]
    ElementTree.parse(ROOT / "docs/images/demo.svg")


@pytest.mark.slow
def test_the_files_of_the_readme_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its data, reward function and config, written down as they stand and run for two steps."""
    monkeypatch.chdir(tmp_path)
    make_data, reward, library = blocks(ROOT / "README.md", "python")
    (config,) = blocks(ROOT / "README.md", "yaml")
    assert "sums.jsonl" in make_data
    assert "def correct" in reward
    assert "strop.train(" in library
    (tmp_path / "rewards.py").write_text(reward)
    (tmp_path / "mine.yaml").write_text(config)
    subprocess.run([sys.executable, "-c", make_data], cwd=tmp_path, check=True)
    settings = ["--set", "run.max_steps=2", "--set", "run.eval_num_problems=4"]
    assert strop_here("train", "mine.yaml", *settings) == 0
    rows = [json.loads(line) for line in (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()]
    assert [row["optimizer_steps"] for row in rows] == [1, 1]
    assert all(0.1 < row["rewards/correct/mean"] < 0.8 and row["frac_unscored"] == 0 for row in rows)
