"""What can be wrong with a run that trains without an error: how it is measured, when it is said, why, and what helps.

A diagnosis is a number taken from the history of the last steps and two thresholds. Above `warn` it is said; above
`act` the user's choice of action follows (`MonitorConfig`). All are pure functions of the history, so a resumed run
comes to the same findings. The thresholds are proposals of this project; docs/monitors.md says where they come from
and where they differ from a first guess that was wrong about a healthy run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..config import DiagnosisName
from .history import History

SOLVED = 0.9
"""Accuracy above which a fall of the entropy is what learning looks like."""
LEAST_EVALUATIONS = 4
"""Evaluations that a trend of pass@1 needs."""
LEAST_DEVIATIONS = 5.0
"""Standard errors that a fall of the accuracy has to have: prompts of other steps are harder or easier by chance, and
the best of hundreds of windows is one that was lucky. With 3, a third of all simulated runs without a fall had one."""
LEAST_LOGP_GAP = 0.01
"""A mean disagreement of engine and trainer below this many nats is taken for rounding."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One entry of the catalogue."""

    warn: float
    act: float
    measure: Callable[[History], float | None]
    """The monitored number; None while the history does not tell."""
    says: Callable[[History, float], str]
    """The finding in one sentence with its numbers."""
    cause: str
    hint: str
    windows: float = 1.0
    """How many windows of steps have to be there before it is said."""


def _mean_of(column: str) -> Callable[[History], float | None]:
    return lambda h: h.mean(column)


def _at_start(h: History) -> float | None:
    return h.last("clipped") if h.steps == 1 else None


def _wrong_answers_grow(h: History) -> float | None:
    return h.rise("log_length_gap")


def _length_ratio(h: History) -> float | None:
    gap = h.mean("log_length_gap")
    return None if gap is None else math.exp(gap)


def _no_signal(h: History) -> float | None:
    """Groups without signal that are not simply solved."""
    tied, right = h.mean("zero_std"), h.mean("all_right")
    return None if tied is None else tied - (right or 0.0)


def _above_first(column: str) -> Callable[[History], float | None]:
    def measure(h: History) -> float | None:
        now = h.mean(column)
        return None if now is None else now - h.first[column]

    return measure


def _held_out_flat(h: History) -> float | None:
    """How much more the reward rose than pass@1 did between the first and the last kept evaluation; at least 0."""
    rises = _rises(h)
    return None if rises is None else max(0.0, rises[0] - max(0.0, rises[1]))


def _rises(h: History) -> tuple[float, float] | None:
    """Return the rise of the reward and of pass@1, both over the steps that evaluations cover."""
    held_out, reward = h.slope("eval", LEAST_EVALUATIONS), h.slope("reward", LEAST_EVALUATIONS)
    span = h.span("eval")
    return None if held_out is None or reward is None else (reward * span, held_out * span)


def _says_held_out(h: History, value: float) -> str:
    reward, held_out = _rises(h) or (math.nan, math.nan)
    return (
        f"over {h.span('eval')} steps the reward per unit of weight rose by {reward:.2f}, "
        f"pass@1 on held-out problems by {held_out:.2f}"
    )


def _accuracy_fall(h: History) -> float | None:
    """Share of its best accuracy that the policy lost."""
    found = h.fall("accuracy", LEAST_DEVIATIONS)
    return None if found is None else (found[1] - found[0]) / max(found[1], 1e-9)


def _says_accuracy_fall(h: History, value: float) -> str:
    now, best = h.fall("accuracy", LEAST_DEVIATIONS) or (math.nan, math.nan)
    return f"{now:.0%} of completions are right, {best:.0%} were in the best {h.window} steps"


def _entropy_fall(h: History) -> float | None:
    now, accuracy = h.mean("entropy"), h.mean("accuracy")
    if now is None or (accuracy is not None and accuracy >= SOLVED):
        return None
    return min(1e6, h.first["entropy"] / max(now, 1e-12))


def _entropy_rise(h: History) -> float | None:
    now = h.mean("entropy")
    return None if now is None else min(1e6, now / max(h.first["entropy"], 1e-3))


def _mismatch(h: History) -> float | None:
    now = h.mean("logp_gap")
    return None if now is None else now / max(h.first["logp_gap"], LEAST_LOGP_GAP)


def _length_trend(h: History) -> str:
    now = h.mean("length")
    return "" if now is None else f"; mean length {h.first['length']:.0f} -> {now:.0f} tokens"


def _share(column: str, h: History) -> str:
    value = h.mean(column)
    return "unknown" if value is None else f"{value:.0%}"


CATALOGUE: Mapping[DiagnosisName, Diagnosis] = {
    "budget_too_small": Diagnosis(
        0.25, 0.25, _at_start,
        lambda h, v: f"{v:.0%} of the untrained model's completions ran into the token limit",
        "the model needs more tokens than it is given, so it is taught to be short before it is taught to be right",
        "rollout.max_completion_length: raise it, or ask for short answers in task.system_prompt",
        windows=0,
    ),
    "truncated": Diagnosis(
        0.10, 0.40, _mean_of("clipped"),
        lambda h, v: f"{v:.0%} of completions ran into the token limit{_length_trend(h)}",
        "completions without an end are scored as wrong, or paid for running on",
        "rollout.max_completion_length: raise it; or add a reward that charges for length",
    ),
    "reward_length_correlation": Diagnosis(
        0.30, 0.50, _mean_of("length_correlation"),
        lambda h, v: "among completions of one prompt that are equally right or wrong, reward and length go together "
        f"(r = {v:.2f}){_length_trend(h)}",
        "a reward function pays for tokens, so the policy learns to write more of them",
        "rewards.funcs: drop or cap what pays for length, or give it a smaller value in rewards.weights",
    ),
    "wrong_answers_grow": Diagnosis(
        0.15, 0.30, _wrong_answers_grow,
        lambda h, v: f"wrong completions became {math.expm1(v):.0%} longer than right ones of the same prompt"
        f"{_length_trend(h)}",
        "what is wrong gets off more lightly when it is long: a loss that divides by length, or pay for length",
        "objective.loss_type: dapo or dr_grpo; rewards.funcs: nothing that pays a wrong answer for its length",
        windows=2,
    ),
    "wrong_right_length_ratio": Diagnosis(
        1.5, 2.5, _length_ratio,
        lambda h, v: f"wrong completions are {v:.2f} times as long as right ones of the same prompt{_length_trend(h)}",
        "long completions fail more often: they ramble, or lack the tokens to finish",
        "rollout.max_completion_length: look at wrong completions in rollouts/; raise it only if they are cut off",
    ),
    "no_signal": Diagnosis(
        0.50, 0.85, _no_signal,
        lambda h, v: f"{v:.0%} of groups teach nothing: {_share('all_wrong', h)} are all wrong, "
        f"{_share('zero_std', h)} have equal rewards, solved groups included",
        "the problems are too hard for this model, or the reward cannot tell its completions apart",
        "task.difficulty or task.path: easier problems; rollout.num_generations: more tries per problem",
    ),
    "all_right": Diagnosis(
        0.85, 0.98, _mean_of("all_right"),
        lambda h, v: f"{v:.0%} of groups are all right, so there is hardly anything left to learn from",
        "the model has mastered these problems",
        "task.difficulty or task.path: harder problems; or end the run, run.max_steps",
    ),
    "repetition": Diagnosis(
        0.10, 0.25, _above_first("repetition"),
        lambda h, v: f"{h.first['repetition'] + v:.0%} of a completion's 4-grams are repeats, "
        f"{h.first['repetition']:.0%} at the first step{_length_trend(h)}",
        "the policy fills its answers with copies of itself, because length or a phrase is paid for",
        "rewards.funcs: look for what a copy gains, or add a reward that charges for repetition",
    ),
    "shaping_sign_flips": Diagnosis(
        0.0, 0.01, _mean_of("sign_flips"),
        lambda h, v: f"{v:.2%} of completions in mixed groups are pushed the wrong way: right ones down, wrong ones up",
        "what is paid beside correctness is large enough to turn the sign of an advantage",
        "rewards.weights: let all other rewards together be worth less than a right answer",
    ),
    "unscored": Diagnosis(
        0.005, 0.05, _mean_of("unscored"),
        lambda h, v: f"{v:.1%} of completions have no reward",
        "a reward function raises, runs past rewards.timeout_s, or applies to no completion of some rows",
        "rewards.funcs: the notes of the steps name function and reason; mend it, or raise rewards.timeout_s",
    ),
    "format_share": Diagnosis(
        0.30, 0.50, _mean_of("format_share"),
        lambda h, v: f"{v:.0%} of all reward is paid for form",
        "answers are rarely right, so the format rewards are what is learned",
        "rewards.weights: smaller for format functions; or easier problems, so that right answers are found",
    ),
    "answer_collapse": Diagnosis(
        0.30, 0.90, _mean_of("answer_share"),
        lambda h, v: f"one answer is given to different prompts far more often than it is right (excess {v:.0%})",
        "the policy has found an answer that pays for every prompt, or stopped reading the prompt",
        "rewards.funcs: look at rollouts/ for the answer and find out what pays for it; optim.learning_rate: lower it",
    ),
    "held_out_flat": Diagnosis(
        0.05, 0.10, _held_out_flat,
        _says_held_out,
        "the policy earns reward that does not come from solving problems, or knows the training problems by heart",
        "rewards.funcs: read completions with high rewards in rollouts/; task.path: more or fresh training problems",
    ),
    "accuracy_falls": Diagnosis(
        0.20, 0.40, _accuracy_fall, _says_accuracy_fall,
        "steps are too large, so the policy loses what it could do; or something else is paid for",
        "optim.learning_rate: lower it; lora.init_from (or model.path): the best checkpoint, which summary.json names",
        windows=2,
    ),
    "entropy_collapse": Diagnosis(
        10.0, 50.0, _entropy_fall,
        lambda h, v: f"the entropy is 1/{v:.0f} of what it was at the first step, "
        f"and {_share('accuracy', h)} of completions are right",
        "samples of one prompt hardly differ any more, so nothing new is found",
        "optim.learning_rate: lower it; objective.epsilon_high: above objective.epsilon; rollout.temperature: raise it",
    ),
    "entropy_rise": Diagnosis(
        2.0, 4.0, _entropy_rise,
        lambda h, v: f"the entropy is {v:.1f} times what it was at the first step",
        "the policy drifts towards noise: steps are too large, or advantages are made of noise",
        "optim.learning_rate: lower it; rollout.num_generations: raise it",
    ),
    "gradient_spike": Diagnosis(
        6.0, 20.0, lambda h: h.outlier("grad_norm"),
        lambda h, v: f"the gradient norm {h.last('grad_norm') or 0.0:.3g} is {v:.0f} standard deviations above usual",
        "a few tokens or one odd batch dominate the step; its length is capped by optim.max_grad_norm",
        "optim.max_grad_norm: lower it; optim.learning_rate: lower it if this keeps coming back",
    ),
    "logprob_mismatch": Diagnosis(
        2.0, 5.0, _mismatch,
        lambda h, v: f"engine and trainer differ by {h.mean('logp_gap') or 0.0:.3g} nats on a sampled token, "
        f"{v:.1f} times what counts as usual here",
        "engine and trainer no longer compute the same policy: rounding grows with large weights, or a kernel differs",
        "optim.learning_rate: lower it; model.dtype: float32; objective.importance_sampling_mode: not none",
    ),
}  # fmt: skip
"""Every diagnosis by name, in the order in which findings are told."""
