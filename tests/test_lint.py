"""Which combinations of rewards a run refuses, which it warns of, and that what ships passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from strop.config import Config
from strop.config_load import load_config
from strop.errors import RewardError
from strop.rewards.contract import Declaration
from strop.rewards.lint import FINDINGS, Term, check_rewards, lint, terms_of

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
DEFAULTS = {"gsm8k": ("numeric",), "countdown": ("countdown",)}


def found(*funcs: str, scale: str = "none", **settings: object) -> set[str]:
    return {f.id for f in lint(terms_of(funcs, **settings), scale)}  # type: ignore[arg-type]


def refused(*funcs: str, scale: str = "none", **settings: object) -> set[str]:
    return {name for name in found(*funcs, scale=scale, **settings) if FINDINGS[name] == "refuse"}


LENGTHS = ("soft_overlong", "gr3", "lead", "kimi", "l1_max", "cosine", "get_soft_overlong_punishment")


@pytest.mark.parametrize("name", [*LENGTHS, "truncation", "get_cosine_scaled_reward"])
def test_length_needs_correctness(name: str) -> None:
    assert "length-without-correctness" in refused(name)
    assert "length-without-correctness" in refused(name, "think_format")
    assert "length-without-correctness" in refused("numeric", name, weights=(0.0, 1.0))
    assert "length-without-correctness" not in refused("numeric", name)
    assert "length-without-correctness" not in refused("numeric", name, weights=(1.0, 0.0))


def test_a_function_of_the_user_may_be_the_judge(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def right(completions, **kwargs):\n    return [1.0 for _ in completions]\n")
    entry = f"{path}:right"
    assert refused(entry, "soft_overlong") == set()
    declared = {"right": Declaration(kind="format")}
    assert refused(entry, "soft_overlong", declared=declared) == {"length-without-correctness"}


def test_kimi_alone_is_refused() -> None:
    assert "kimi-alone" in refused("kimi")
    assert "kimi-alone" in refused("numeric", "kimi", weights=(0.0, 1.0))
    assert refused("numeric", "kimi") == set()


@pytest.mark.parametrize("name", LENGTHS)
def test_length_and_the_groups_deviation_are_refused(name: str) -> None:
    assert "length-with-group-std" in refused("numeric", name, scale="group")
    assert refused("numeric", name, scale="batch") == set()
    assert refused("numeric", name, scale="none") == set()


def test_truncation_goes_with_the_groups_deviation() -> None:
    assert found("numeric", "truncation", scale="group") == set()


def test_cosine_with_its_wrong_side_needs_a_repetition_term() -> None:
    on = {"cosine": {"min_value_wrong": -1.0, "max_value_wrong": -0.5}}
    down = {"cosine": {"min_value_wrong": 0.0, "max_value_wrong": -0.5}}
    assert refused("numeric", "cosine", options=on) == {"cosine-without-repetition"}
    assert refused("numeric", "cosine", "ngram_repetition", options=on) == set()
    assert refused("numeric", "cosine", "ngram_repetition", options=on, weights=(1, 1, 0)) == {
        "cosine-without-repetition"
    }
    assert refused("numeric", "cosine", options=down) == set()
    assert refused("numeric", "get_cosine_scaled_reward") == {"cosine-without-repetition"}
    assert refused("numeric", "get_cosine_scaled_reward", "compression_ratio") == set()


def test_a_length_reward_that_outbids_correctness_is_refused() -> None:
    assert refused("numeric", "soft_overlong", weights=(1.0, 2.5)) == {"length-outbids-correctness"}
    assert refused("numeric", "soft_overlong", weights=(1.0, 1.5)) == set()
    assert refused("numeric", "soft_overlong", options={"soft_overlong": {"factor": 1.5}}) == {
        "length-outbids-correctness"
    }
    assert refused("numeric", "kimi", weights=(1.0, 2.5)) == {"length-outbids-correctness"}


def test_style_that_reaches_correctness_is_only_warned_of() -> None:
    nothing_gated: tuple[str, ...] = ()
    assert found("numeric", "think_format", gated=nothing_gated) == {"secondary-outbids-correctness"}
    assert found("numeric", "think_format", weights=(1.0, 0.2), gated=nothing_gated) == set()
    assert found("numeric", "think_format", "single_box") == set(), "gated by default"
    assert found("numeric", "think_format", "single_box", weights=(1, 0.6, 0.6), gated=nothing_gated) == {
        "secondary-outbids-correctness"
    }
    assert FINDINGS["secondary-outbids-correctness"] == "warn"


def test_refusals_come_first_and_every_finding_says_what_to_do() -> None:
    terms = terms_of(("numeric", "soft_overlong", "think_format"), (1.0, 2.5, 1.0), gated=())
    findings = lint(terms, "group")
    assert [f.severity for f in findings] == sorted((f.severity for f in findings), key=lambda s: s != "refuse")
    assert {f.id for f in findings} == {
        "length-with-group-std", "length-outbids-correctness", "secondary-outbids-correctness",
    }  # fmt: skip
    assert all(f.hint and f"[{f.id}]" in f.message for f in findings)


def test_the_lint_is_a_function_of_its_terms() -> None:
    terms = [Term("numeric", Declaration(kind="correctness")), Term("mine", Declaration(kind="length", low=-1, high=0))]
    assert [f.id for f in lint(terms, "group")] == [f.id for f in lint(terms, "group")] == [
        "length-with-group-std", "secondary-outbids-correctness",
    ]  # fmt: skip


def config(**rewards: object) -> Config:
    return Config.model_validate({"rewards": rewards})


def test_a_run_is_refused_with_a_way_to_go_on() -> None:
    with pytest.raises(RewardError, match="length-with-group-std") as error:
        check_rewards(config(funcs=["numeric", "soft_overlong"]), ())
    assert "scale_rewards" in error.value.hint
    assert "rewards.allow: [length-with-group-std]" in error.value.hint
    allowed = config(funcs=["numeric", "soft_overlong"], allow=["length-with-group-std"])
    assert check_rewards(allowed, ()) == []


def test_a_warning_is_returned_and_can_be_silenced() -> None:
    funcs = {"funcs": ["numeric", "think_format"], "gated": []}
    (warning,) = check_rewards(config(**funcs), ())
    assert "secondary-outbids-correctness" in warning
    assert check_rewards(config(**funcs, allow=["secondary-outbids-correctness"]), ()) == []


def test_a_name_that_is_no_finding_is_refused() -> None:
    with pytest.raises(RewardError, match="not a finding") as error:
        check_rewards(config(funcs=["numeric"], allow=["kimi-alon"]), ())
    assert "kimi-alone" in error.value.hint


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_pass(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_config(path)
    assert check_rewards(recipe, DEFAULTS.get(recipe.task.name, ("exact",))) == []


def test_the_defaults_pass() -> None:
    assert check_rewards(Config(), ("exact",)) == []
