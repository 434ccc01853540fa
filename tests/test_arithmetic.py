"""The arithmetic task: right answers, a split that holds for every seed, and batches that follow from (seed, step)."""

from __future__ import annotations

import re
from random import Random

import pytest

from strop.config import TaskConfig
from strop.demo.tokenizer import build_tokenizer
from strop.errors import ConfigError
from strop.rewards.library import exact
from strop.tasks import Renderer, build_task
from strop.tasks.arithmetic import FAMILIES, ArithmeticTask, Puzzle


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(build_tokenizer())


def make_task(renderer: Renderer, seed: int = 0, **settings: object) -> ArithmeticTask:
    return ArithmeticTask(TaskConfig.model_validate(settings), renderer, seed=seed)


def reference_answer(text: str) -> int:
    """Read a question back and answer it with Python alone."""
    if terms := re.fullmatch(r"(-?\d+),(-?\d+),(-?\d+),(-?\d+),\?", text):
        a, b, c, d = map(int, terms.groups())
        assert b - a == c - b == d - c != 0
        return d + (d - c)
    question = re.fullmatch(r"([max()\d+*%,-]+)=", text)
    assert question, text
    return eval(question[1], {"__builtins__": {}, "max": max})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("difficulty", range(1, 10))
def test_answers_are_what_python_computes(family: str, difficulty: int) -> None:
    rng = Random(difficulty)
    puzzles = [FAMILIES[family](rng, difficulty) for _ in range(200)]
    assert [int(p.answer) for p in puzzles] == [reference_answer(p.text) for p in puzzles]
    assert all(p.answer == str(int(p.answer)) and p.family == family for p in puzzles)
    assert all(10 ** (difficulty - 1) <= max(p.numbers) for p in puzzles)


def test_families_meet_the_cases_that_make_them_hard() -> None:
    rng = Random(0)
    drawn = {family: [draw(rng, 2) for _ in range(300)] for family, draw in FAMILIES.items()}
    assert 0.3 < sum(p.answer.startswith("-") for p in drawn["sub"]) / 300 < 0.7
    assert 0.3 < sum(p.numbers[0] > p.numbers[1] for p in drawn["next"]) / 300 < 0.7
    assert 0.3 < sum(p.numbers[0] % 10 + p.numbers[1] % 10 > 9 for p in drawn["add"]) / 300 < 0.7
    assert {p.numbers.index(max(p.numbers)) for p in drawn["max"]} == {0, 1, 2}
    assert {int(p.answer) for p in drawn["mod"]} == set(range(9))


def test_a_row_is_scored_by_the_task_s_own_reward(renderer: Renderer) -> None:
    task = build_task(TaskConfig(), renderer, seed=0, eval_size=10)
    assert (task.name, task.default_rewards, task.num_problems, dict(task.dropped)) == (
        "arithmetic",
        ("exact",),
        None,
        {},
    )
    (problem,) = task.batch(0, 1)
    assert set(problem.row) == {"answer", "family"}
    assert problem.is_conversational
    assert problem.prefill == ""
    question = problem.prompt[0]["content"]
    assert int(problem.row["answer"]) == reference_answer(question)
    right = [{"role": "assistant", "content": f"<think>1+1=3</think>{problem.row['answer']}"}]
    wrong = [{"role": "assistant", "content": f"<think>{problem.row['answer']}</think>7{problem.row['answer']}"}]
    assert exact([right, wrong], [problem.row["answer"]] * 2) == [1.0, 0.0]


def test_a_batch_is_a_pure_function_of_seed_and_step(renderer: Renderer) -> None:
    task, again = make_task(renderer, seed=3), make_task(renderer, seed=3)
    late_first = [again.batch(step, 8) for step in (7, 2, 0)]
    assert [task.batch(step, 8) for step in (0, 2, 7)] == late_first[::-1]
    assert task.batch(2, 8) != make_task(renderer, seed=4).batch(2, 8)
    ids = [problem.id for step in range(20) for problem in task.batch(step, 8)]
    assert len(set(ids)) == len(ids)


def test_every_family_appears_and_a_subset_is_kept(renderer: Renderer) -> None:
    everything = make_task(renderer).batch(0, 120)
    assert {problem.row["family"] for problem in everything} == set(FAMILIES)
    some = make_task(renderer, families=["mod", "max"]).batch(0, 40)
    assert {problem.row["family"] for problem in some} == {"mod", "max"}


@pytest.mark.parametrize("difficulty", [1, 2, 4])
def test_held_out_and_training_problems_are_disjoint_for_every_seed(renderer: Renderer, difficulty: int) -> None:
    held_out = make_task(renderer, difficulty=difficulty, eval_size=150).held_out(150)
    questions = {problem.prompt[0]["content"] for problem in held_out}
    assert len(questions) == len(held_out) > 50
    for seed in range(3):
        task = make_task(renderer, seed=seed, difficulty=difficulty, eval_size=150)
        assert task.held_out(150) == held_out
        assert task.held_out(20) == held_out[:20]
        trained = {problem.prompt[0]["content"] for step in range(30) for problem in task.batch(step, 8)}
        assert trained.isdisjoint(questions)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_alone_has_both_sides_even_at_difficulty_one(renderer: Renderer, family: str) -> None:
    task = make_task(renderer, difficulty=1, families=family, eval_size=5)
    assert 1 <= len(task.held_out(5)) <= 5
    assert len(task.batch(0, 16)) == 16


def test_one_problem_in_eight_is_held_out_and_order_does_not_matter() -> None:
    rng = Random(0)
    puzzles = [draw(rng, 3) for draw in FAMILIES.values() for _ in range(600)]
    assert sum(puzzle.is_held_out for puzzle in puzzles) / len(puzzles) == pytest.approx(1 / 8, abs=0.02)
    for a, b in [(47, 85), (12, 90), (33, 34), (71, 18)]:
        assert Puzzle("add", f"{a}+{b}=", (a, b), "").key == Puzzle("add", f"{b}+{a}=", (b, a), "").key
        assert Puzzle("sub", f"{a}-{b}=", (a, b), "").key != Puzzle("sub", f"{b}-{a}=", (b, a), "").key
        assert Puzzle("chain", "", (a, b, 5), "").key == Puzzle("chain", "", (b, a, 5), "").key
        assert Puzzle("chain", "", (a, b, 5), "").key != Puzzle("chain", "", (a, 5, b), "").key


def test_an_unknown_family_is_refused_with_the_nearest_name(renderer: Renderer) -> None:
    with pytest.raises(ConfigError, match=r"'chian'.*did you mean 'chain'") as caught:
        make_task(renderer, families=["add", "chian"])
    assert "add, sub, mul" in caught.value.hint
    with pytest.raises(ConfigError, match=r"'zzzz' is no family of the arithmetic task\n"):
        make_task(renderer, families="zzzz")
