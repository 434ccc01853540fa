"""Evaluation: which problems, which draws, which temperature, what counts as right, and where the numbers end up."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from engines import tiny_model
from records import rollout

from strop import load_config, train
from strop.errors import RewardError, StropError
from strop.monitor.metrics import read_metrics
from strop.monitor.summary import EvalSummary
from strop.objective.packing import pack
from strop.policy.policy import Policy
from strop.rewards.combine import Outcome, combine, make_rules
from strop.rewards.contract import Declaration
from strop.seeding import derive_seed
from strop.trainer.evaluate import evaluate, in_order, summarise
from strop.trainer.evaluate_run import evaluate_target
from strop.trainer.parts import Parts, build, make_pool, prepare
from strop.types import Problem, Request, Rollout, Sample, ScoredRollout

SPY = """
import json
def first_byte_is_low(completions, prompts, **kwargs):
    with open({path!r}, "a") as f:
        for prompt in prompts:
            f.write(json.dumps(prompt if isinstance(prompt, str) else prompt[-1]["content"]) + "\\n")
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [1.0 if t[:1] < "P" else 0.4 for t in texts]
def on_eight(completions, prompts, **kwargs):
    return [1.0 if "test 8" in str(p) else 0.9 for p in prompts]
"""


def config(folder: Path, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A run on six training rows and four held-out ones; the reward writes the prompts it sees to seen.jsonl."""
    data = folder / "data"
    if not data.exists():
        data.mkdir()
        (folder / "spy.py").write_text(SPY.format(path=str(folder / "seen.jsonl")))
        for split, numbers in (("train", range(1, 7)), ("test", (7, 8, 9, 10))):
            lines = [json.dumps({"question": f"{split} {n}+{n}=", "answer": str(2 * n)}) for n in numbers]
            (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    base: dict[str, dict[str, Any]] = {
        "model": {"path": str(tiny_model()), "engine": "transformers"},
        "lora": {"r": 0},
        "task": {"name": "dataset", "path": str(data), "max_prompt_length": 40, "shuffle": False},
        "rewards": {"funcs": [f"{folder}/spy.py:first_byte_is_low"], "check": False},
        "rollout": {"num_prompts": 2, "num_generations": 4, "max_completion_length": 6, "temperature": 0.8},
        "optim": {"learning_rate": 5e-2},
        "run": {
            "max_steps": 2, "eval_num_problems": 3, "eval_num_generations": 5, "rollout_steps": 0,
            "report_to": ["none"], "threads": 1,
        },
    }  # fmt: skip
    return {name: {**values, **sections.get(name, {})} for name, values in base.items()}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    prepared = prepare(load_config(config(tmp_path_factory.mktemp("evaluate"))))
    with make_pool(prepared.config, ()) as pool, build(prepared, pool, print) as built:
        yield built


def evaluated(parts: Parts, **run: Any) -> tuple[EvalSummary, list[Rollout]]:
    """Evaluate with other settings of `run`; also the completions, in (problem, sample) order."""
    changed = load_config(parts.config, [f"run.{key}={value}" for key, value in run.items()])
    finished: list[Rollout] = []
    result = evaluate(replace(parts, config=changed), finished.append)
    assert result is not None
    return result, sorted(finished, key=lambda r: (r.problem.id, r.sample_index))


def tokens(rollouts: list[Rollout]) -> list[tuple[int, ...]]:
    return [r.completion_token_ids for r in rollouts]


def test_greedy_evaluation_is_one_completion_per_problem_whatever_the_seed(parts: Parts) -> None:
    first, a = evaluated(parts, eval_temperature=0, seed=1)
    second, b = evaluated(parts, eval_temperature=0, seed=2)
    assert first.k == second.k == 1
    assert [r.sample_index for r in a] == [0, 0, 0]
    assert tokens(a) == tokens(b)
    for r in a:  # and it is the model's most probable token each time
        ids = torch.tensor([r.problem.prompt_token_ids + r.completion_token_ids])
        with torch.no_grad():
            best = parts.policy.model(input_ids=ids).logits[0, :-1].argmax(-1)
        assert tuple(best[-r.num_completion_tokens :].tolist()) == r.completion_token_ids


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_completions_are_drawn_at_the_evaluations_own_temperature(parts: Parts, temperature: float) -> None:
    _, rollouts = evaluated(parts, eval_temperature=temperature)
    samples = [Sample(ScoredRollout(r, 1.0, {"f": 1.0}), 1.0, 1.0) for r in rollouts]
    sampler = torch.tensor([x for r in rollouts for x in r.segments[1].logprobs or ()])
    gap = {}
    for t in (temperature, parts.config.rollout.temperature):
        with torch.no_grad():
            own = torch.cat([Policy(parts.policy.model, t).forward(b)[0] for b in pack(samples, 10_000)])
        gap[t] = float((own - sampler).abs().max())
    assert gap[temperature] < 1e-4
    assert gap[0.8] > 0.1


def test_evaluation_has_its_own_seeds_which_the_weights_version_does_not_change(parts: Parts) -> None:
    result, rollouts = evaluated(parts, seed=4)
    assert (result.k, result.problems, len(rollouts)) == (5, 3, 15)
    assert [r.seed for r in rollouts] == [derive_seed("eval", 4, 0, r.problem.id, r.sample_index) for r in rollouts]
    parts.weights.publish()
    assert tokens(evaluated(parts, seed=4)[1]) == tokens(rollouts)
    assert tokens(evaluated(parts, seed=5)[1]) != tokens(rollouts)


def test_problems_are_the_held_out_ones_and_the_numbers_follow_from_the_texts(parts: Parts) -> None:
    result, rollouts = evaluated(parts)
    held_out = parts.task.held_out(3)
    assert {r.problem.id for r in rollouts} == {p.id for p in held_out}
    assert {p.id for p in held_out}.isdisjoint(p.id for step in range(3) for p in parts.task.batch(step, 2))
    right = [[r.text[:1] < "P" for r in rollouts if r.problem.id == p.id] for p in held_out]
    assert 0 < sum(map(sum, right)) < 15
    assert result.pass_at_1 == pytest.approx(sum(map(sum, right)) / 15)
    assert result.pass_at_k == pytest.approx(sum(map(any, right)) / 3)


def test_evaluation_can_be_off(parts: Parts) -> None:
    off = load_config(parts.config, ["run.eval_num_problems=0"])
    assert evaluate(replace(parts, config=off)) is None


def test_what_came_back_in_any_order_is_put_into_the_order_it_was_asked_for() -> None:
    problems = [Problem(name, "question", (1, 2)) for name in ("b", "a", "c", "d")]  # not in the order of their names
    requests = [Request(p, g, 10 * i + g) for i, p in enumerate(problems) for g in range(3)]
    items = [
        ScoredRollout(
            replace(rollout((1, 2), (3,)), problem=r.problem, sample_index=r.sample_index, seed=r.seed), 0.0, {}
        )
        for r in requests
    ]
    for seed in range(5):
        shuffled = random.Random(seed).sample(items, len(items))
        assert shuffled != items
        assert [s.rollout.seed for s in in_order(shuffled, requests)] == [r.seed for r in requests]


def scores(*values: float | None) -> list[ScoredRollout]:
    return [combine(rollout((1,), (2,)), ("f",), (1.0,), {"f": Outcome(v)}) for v in values]


def test_only_the_full_mark_is_right() -> None:
    for value in (0.0, 0.3, 0.5, 0.9, 0.999):
        assert summarise(scores(value, value), 1).pass_at_1 == 0
    for value in (1.0, 1.5, 0.1 * 3 + 0.7):
        assert summarise(scores(value, value), 1).pass_at_1 == 1


def test_the_correctness_function_decides_wherever_it_stands_and_at_its_own_largest_value() -> None:
    names, declared = (
        ("style", "answer"),
        {"style": Declaration("format"), "answer": Declaration("correctness", high=2)},
    )
    rules = make_rules(names, (1.0, 1.0), declared)
    marks = [(1.0, 2.0), (1.0, 1.0), (0.0, 2.0), (1.0, None)]
    items = [
        combine(rollout((1,), (2,)), names, (1.0, 1.0), dict(zip(names, map(Outcome, pair), strict=True)), rules)
        for pair in marks
    ]
    assert summarise(items, 1) == EvalSummary(pass_at_1=2 / 3, pass_at_k=2 / 3, k=1, problems=3)


def test_pass_at_k_takes_one_right_completion_of_a_problem() -> None:
    result = summarise(scores(1, 0, 0, 0, 0, 0, 1, 1, 1), 3)
    assert result == EvalSummary(pass_at_1=4 / 9, pass_at_k=2 / 3, k=3, problems=3)
    assert summarise(scores(1, 0, 0, 1), 1) == EvalSummary(0.5, 0.5, 1, 4)


def test_what_is_unscored_counts_neither_way() -> None:
    assert summarise(scores(1, None, None, None, 0, None), 2) == EvalSummary(0.5, 0.5, 2, 2)
    with pytest.raises(RewardError) as error:
        summarise(scores(None, None), 2)
    assert error.value.hint


def seen(folder: Path) -> list[str]:
    return [json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines()]


def test_a_run_evaluates_before_and_after_on_held_out_problems_alone(tmp_path: Path) -> None:
    summary = train(config(tmp_path), out=tmp_path / "run")
    prompts = seen(tmp_path)
    before, steps, after = prompts[:15], prompts[15:31], prompts[31:]
    assert len(after) == 15
    assert all(p.startswith("test ") for p in before + after)
    assert sorted(before) == sorted(after)
    assert all(p.startswith("train ") for p in steps)
    assert summary["eval_before"]["k"] == summary["eval_after"]["k"] == 5
    assert summary["eval_after"] != summary["eval_before"]


def test_evaluations_in_between_are_in_the_metrics(tmp_path: Path) -> None:
    given = config(
        tmp_path,
        rewards={"funcs": [f"{tmp_path}/spy.py:on_eight"]},
        run={"max_steps": 5, "eval_steps": 2, "eval_num_problems": 4, "eval_num_generations": 3},
    )
    summary = train(given, out=tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row.get("eval_pass@1") for row in rows] == [None, 0.25, None, 0.25, None]
    assert [row.get("eval_pass@3") for row in rows] == [None, 0.25, None, 0.25, None]
    assert summary["eval_after"]["pass@1"] == 0.25
    for row in rows:  # a step's time is what training took
        parts = [v or 0.0 for k, v in row.items() if k.startswith("time/") and k != "time/evaluate_s"]
        assert row["step_time"] == pytest.approx(sum(parts))
        assert ((row.get("time/evaluate_s") or 0.0) > 0) == (row["step"] in (1, 3)), row["step"]


@pytest.mark.parametrize("rank", [0, 4])
def test_strop_eval_measures_a_config_as_it_is_and_a_run_as_it_was_trained(rank: int, tmp_path: Path) -> None:
    given = config(tmp_path, lora={"r": rank, "alpha": 64.0}, run={"max_steps": 4})
    summary = train(given, out=tmp_path / "run")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(given))
    untrained, trained = evaluate_target(path, []), evaluate_target(tmp_path / "run", [])
    assert untrained.to_dict() == summary["eval_before"]
    assert trained.to_dict() == summary["eval_after"]
    assert trained != untrained
    greedy = evaluate_target(tmp_path / "run", ["run.eval_temperature=0", "run.eval_num_problems=2"])
    assert (greedy.k, greedy.problems) == (1, 2)


def test_strop_eval_says_what_it_cannot_measure(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config(tmp_path)))
    for target, overrides in ((tmp_path / "empty", []), (path, ["run.eval_num_problems=0"])):
        with pytest.raises(StropError) as error:
            evaluate_target(target, overrides)
        assert error.value.hint
