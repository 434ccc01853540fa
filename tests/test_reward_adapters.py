"""Reward functions of other trainers, written as their documentation writes them, scored as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from strop.config import RewardsConfig
from strop.errors import RewardError
from strop.rewards.load import read_entries
from strop.rewards.pool import RewardPool
from strop.types import Message, Problem, Rollout, ScoredRollout, Segment

VERL = """
import re
import numpy as np

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    found = re.search(r"#### (\\-?[0-9\\.\\,]+)", solution_str)
    if found is None:
        return 0
    return 1.0 if found.group(1) == ground_truth else 0.1

def detailed(data_source, solution_str, ground_truth, extra_info, method="strict"):
    if data_source != "openai/gsm8k":
        raise NotImplementedError(f"Reward function is not implemented for {data_source=}")
    right = solution_str.endswith(ground_truth)
    return {"score": np.float32(right), "acc": right, "pred": solution_str[-2:], "index": extra_info["index"],
            "method": method}

async def asynchronous(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    import asyncio
    await asyncio.sleep(0)
    return float(len(solution_str))

def no_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"reward": 1.0}
"""

OPENRLHF = """
import torch

def reward_func(queries, prompts, labels, **kwargs):
    # queries is prompts + responses, labels is answers
    rewards = []
    for query, prompt, label in zip(queries, prompts, labels):
        assert query.startswith(prompt)
        rewards.append(float(query[len(prompt):].strip().endswith(label)))
    reward = torch.tensor(rewards)
    return {"rewards": reward * 2, "scores": reward, "extra_logs": {"dummy_scores": reward}}

def plain(queries, prompts, labels):
    return torch.tensor([len(q) - len(p) for q, p in zip(queries, prompts)])
"""

NO_REWARDS = """
def nothing(queries, prompts, labels):
    return {"scores": [0.0 for _ in queries]}
"""

SWIFT = """
import asyncio
from typing import List
from swift.plugin import ORM, AsyncORM, orms

class CountdownORM(ORM):
    def __call__(self, completions, target, nums, **kwargs) -> List[float]:
        return [float(eval(c) == int(t)) for c, t in zip(completions, target)]

class SoftOverlong(ORM):
    def __init__(self, args=None, **kwargs):
        super().__init__(args)
        assert args.soft_cache_length < args.soft_max_length
        self.soft_max_length = args.soft_max_length
        self.soft_cache_length = args.soft_cache_length

    def __call__(self, completions, **kwargs) -> List[float]:
        rewards = []
        for ids in kwargs.get("response_token_ids"):
            exceed_len = len(ids) - (self.soft_max_length - self.soft_cache_length)
            rewards.append(min(-exceed_len / self.soft_cache_length, 0))
        return rewards

class AsyncReward(AsyncORM):
    async def __call__(self, completions, trainer_state, messages, **kwargs):
        async def score_single(text):
            await asyncio.sleep(0)
            return float(len(text) + trainer_state.global_step + trainer_state.max_steps + len(messages[0]))
        return list(await asyncio.gather(*[score_single(c) for c in completions]))

orms["countdown"] = CountdownORM
"""

VERIFIERS = """
async def correct_answer(completion, answer) -> float:
    response = completion[-1]["content"]
    return 1.0 if answer in response else 0.0

def exact_match(prompt, completion, answer, state, **kwargs) -> float:
    assert state["prompt"] == prompt and state["answer"] == answer
    return float(completion[-1]["content"] == answer)

def parsed(parser, completion, answer, info, task):
    return 1.0 if parser.parse_answer(completion) == answer and info == {"level": 3} and task == "default" else 0.0

def diversity(completions, states) -> list[float]:
    texts = [c[-1]["content"] for c in completions]
    assert [s["completion"] for s in states] == completions
    return [1.0 / texts.count(t) for t in texts]

def raises(completion, answer):
    raise KeyError("verifiers would say 0.0")
"""

TRL = '''
import numpy as np

class LengthReward:
    """A callable class with settings."""
    def __init__(self, target: int = 4):
        self.target = target
        self.__name__ = "length_reward"
    def __call__(self, completions, **kwargs):
        return [1.0 if len(c) == self.target else 0.0 for c in completions]

def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int):
    def soft_overlong_punishment_reward(completion_ids, **kwargs):
        return [float(len(ids) - max_completion_len + soft_punish_cache) for ids in completion_ids]
    return soft_overlong_punishment_reward

def with_option(completions, answer, *, bonus: float = 0.0, **kwargs):
    return [bonus + float(c == a) for c, a in zip(completions, answer)]

def arrays(completions, **kwargs):
    return np.array([float(len(c)) for c in completions], dtype=np.float32)

class NotCallable:
    pass

class Breaks:
    def __init__(self):
        raise ValueError("no weights here")
    def __call__(self, completions):
        return [0.0]
'''

CHAT: tuple[Message, ...] = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+2?"})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    files = {"verl": VERL, "openrlhf": OPENRLHF, "bad": NO_REWARDS, "swift": SWIFT, "verifiers": VERIFIERS, "trl": TRL}
    for name, text in files.items():
        (tmp_path / f"{name}_file.py").write_text(text)
    return tmp_path


def rollout(text: str, index: int = 0, prompt: str | tuple[Message, ...] = "1+2?", **row: object) -> Rollout:
    segments = (Segment("prompt", (1, 2), (False,) * 2), Segment("sampled", (3, 4, 5), (True,) * 3, (-1.0,) * 3))
    return Rollout(Problem("t/0", prompt, (1, 2), {"answer": "3"} | row), index, segments, text, "stop", 4, index)


def pool_of(*funcs: str, **options: dict[str, Any]) -> RewardPool:
    return RewardPool(RewardsConfig(funcs=funcs, options=options), default_funcs=(), max_steps=100)


def test_verl_functions() -> None:
    funcs = [f"verl:verl_file.py:{name}" for name in ("compute_score", "detailed", "asynchronous")]
    with pool_of(*funcs, detailed={"method": "flexible"}) as pool:
        assert pool.names == ("compute_score", "detailed", "asynchronous")
        own = rollout("It is #### 3", data_source="openai/gsm8k", extra_info={"index": 7})
        theirs = rollout(
            "#### 4", 1, data_source="openai/gsm8k", reward_model={"style": "rule", "ground_truth": "4"},
            extra_info={"index": 8},
        )  # fmt: skip
        other = rollout("none", 2, CHAT, data_source="elsewhere")
        first, second, third = pool.score([own, theirs, other])
        extras = pool.take_extras()
    assert first.scores == {"compute_score": 1.0, "detailed": 1.0, "asynchronous": 12.0}
    assert second.scores == {"compute_score": 1.0, "detailed": 1.0, "asynchronous": 6.0}
    assert third.scores == {"compute_score": 0.0, "detailed": None, "asynchronous": 4.0}
    assert third.reward is None
    assert third.failures["detailed"].startswith("raised NotImplementedError")
    assert extras == {
        "detailed/acc": [True, True, None], "detailed/pred": [" 3", " 4", None], "detailed/index": [7, 8, None],
        "detailed/method": ["flexible", "flexible", None],
    }  # fmt: skip


def test_openrlhf_functions() -> None:
    notes: list[str] = []
    config = RewardsConfig(funcs=tuple(f"openrlhf:openrlhf_file.py:{name}" for name in ("reward_func", "plain")))
    with RewardPool(config, default_funcs=(), note=notes.append) as pool:
        scored = pool.score([rollout("so 3"), rollout("so 4", 1, CHAT), rollout("5", 2, label="5")])
        assert [s.scores for s in scored] == [
            {"reward_func": 2.0, "plain": 4.0}, {"reward_func": 0.0, "plain": 4.0}, {"reward_func": 2.0, "plain": 1.0},
        ]  # fmt: skip
        assert pool.take_metrics() == {"reward_func/dummy_scores": [1.0, 0.0, 1.0]}
        assert pool.take_extras() == {"reward_func/scores": [1.0, 0.0, 1.0]}
    assert notes == []  # a module that imports torch is forked like any other


def test_swift_classes_without_swift_installed() -> None:
    funcs = [f"swift:swift_file.py:{name}" for name in ("CountdownORM", "SoftOverlong", "AsyncReward")]
    with pool_of(*funcs, SoftOverlong={"soft_max_length": 4, "soft_cache_length": 2}) as pool:
        (scored,) = pool.score([rollout("1+2", prompt=CHAT, target="3", nums=[1, 2])])
    assert scored.scores == {"CountdownORM": 1.0, "SoftOverlong": -0.5, "AsyncReward": 3.0 + 4 + 100 + 3}


def test_verifiers_functions() -> None:
    names = ("correct_answer", "exact_match", "parsed", "diversity")
    with pool_of(*[f"verifiers:verifiers_file.py:{name}" for name in names]) as pool:
        assert pool.declarations()["diversity"].scope == "group"
        group = [rollout(text, i, CHAT, info='{"level": 3}') for i, text in enumerate(["3", "it is 3", "3"])]
        scored = pool.score(group, group_size=3)
    assert [list(s.scores.values()) for s in scored] == [[1, 1, 1, 0.5], [1, 0, 0, 1.0], [1, 1, 1, 0.5]]


def test_what_other_trainers_count_as_zero_is_unscored() -> None:
    with pool_of("verifiers:verifiers_file.py:raises") as pool:
        (scored,) = pool.score([rollout("3")])
    assert scored.reward is None
    assert "KeyError" in scored.failures["raises"]


def test_trl_classes_factories_arrays_and_options() -> None:
    funcs = [f"trl_file.py:{n}" for n in ("LengthReward", "get_soft_overlong_punishment", "with_option", "arrays")]
    options = {
        "LengthReward": {"target": 2},
        "get_soft_overlong_punishment": {"max_completion_len": 8, "soft_punish_cache": 6},
        "with_option": {"bonus": 0.5},
    }
    with pool_of(*funcs, **options) as pool:
        (scored,) = pool.score([rollout("33")])
        assert list(scored.scores.values()) == [1.0, 1.0, 0.5, 2.0]
        with pytest.raises(RewardError, match=r"has a column `bonus`, and rewards.options.with_option sets `bonus`"):
            pool.submit(rollout("3", bonus=1.0))


def test_the_package_of_the_same_name_is_still_a_module() -> None:
    (spec,) = read_entries(["verl:compute_score"])
    assert (spec.form, spec.kind, spec.target) == ("trl", "module", "verl")
    (spec,) = read_entries(["verifiers:pkg.mod:f"])
    assert (spec.form, spec.kind, spec.target, spec.name) == ("verifiers", "module", "pkg.mod", "f")


def test_prefixed_files_become_absolute_and_keep_their_form(folder: Path) -> None:
    from strop.config_load import load_config, with_absolute_paths
    from strop.trainer.runfolder import _same_place

    funcs = ("verl:verl_file.py:compute_score", "swift:pkg.mod:C", "verl:compute_score")
    config = with_absolute_paths(load_config({"rewards": {"funcs": funcs}}))
    assert config.rewards.funcs == (f"verl:{folder}/verl_file.py:compute_score", *funcs[1:])
    assert _same_place("verl:/gone/f.py:f", "verl:/moved/f.py:f")
    assert not _same_place("verl:/gone/f.py:f", "/gone/f.py:f")
    assert not _same_place("verl:/gone/f.py:f", "swift:/gone/f.py:f")


def first_error(pool: RewardPool, *rollouts: Rollout) -> RewardError:
    def run() -> list[ScoredRollout]:
        with pool:
            return pool.score(rollouts)

    with pytest.raises(RewardError) as caught:
        run()
    return caught.value


@pytest.mark.parametrize(
    ("func", "options", "message", "hint"),
    [
        ("verl:verl_file.py:no_score", {}, "a dict without `score`; it has reward", "whose `score` is the reward"),
        ("verl:verl_file.py:detailed", {"metod": 1}, "no option `metod`", "did you mean `method`?"),
        ("verl:verl_file.py:detailed", {"ground_truth": 1}, "no option `ground_truth`", "`detailed` has method"),
        ("openrlhf:bad_file.py:nothing", {}, "a dict without `rewards`", "whose `rewards`"),
        ("swift:swift_file.py:CountdownORM", {}, "needs the columns target, nums", "rename the column"),
        ("verifiers:trl_file.py:LengthReward", {}, "which is a type; a function is needed", "name the function"),
        ("trl_file.py:get_soft_overlong_punishment", {}, "it needs max_completion_len, soft_punish", "rewards.options"),
        ("trl_file.py:LengthReward", {"goal": 1}, "no option `goal`", "`LengthReward` has target"),
        ("trl_file.py:with_option", {"bonsu": 1}, "no option `bonsu`", "did you mean `bonus`?"),
        ("trl_file.py:with_option", {"completions": 1}, "no option `completions`", "`with_option` has bonus"),
        ("trl_file.py:NotCallable", {}, "makes a NotCallable, which cannot be called", "__call__"),
        ("trl_file.py:Breaks", {}, "did not make a reward function: ValueError: no weights here", "rewards.options"),
    ],
)
def test_mistakes_are_named(func: str, options: dict[str, Any], message: str, hint: str) -> None:
    name = func.rpartition(":")[2]
    error = first_error(pool_of(func, **({name: options} if options else {})), rollout("3"))
    assert message in error.message
    assert hint in error.hint


def test_a_missing_reference_answer_is_named() -> None:
    bare = rollout("3")
    problem = Problem("t/1", "q", (1,), {"question": "?"})
    error = first_error(
        pool_of("verl:verl_file.py:compute_score"), Rollout(problem, 0, bare.segments, "3", "stop", 0, 1)
    )
    assert "needs a reference answer; the row has question" in error.message
