"""Tasks: pure batches, disjoint held-out problems, prompts through chat templates, GSM8K, Countdown, reasoning-gym."""

from __future__ import annotations

import json
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import (
    BOS_CHAT,
    CHATML,
    DATED,
    GEMMA,
    QWEN3,
    QWEN3_THINKING,
    R1_DISTILL,
    char_tokenizer,
)

from strop.config import TaskConfig
from strop.errors import ConfigError, DataError, StropError
from strop.tasks import Renderer, Task, build_task
from strop.tasks.countdown import draw_countdown
from strop.tasks.gsm8k import final_number
from strop.tasks.gym import ALLOWED
from strop.tasks.order import EpochOrder
from strop.types import Problem

QUESTION = ({"role": "user", "content": "2+2?"},)


def renderer(template: str | None = CHATML, **kwargs: object) -> Renderer:
    return Renderer(char_tokenizer(template), chat_template_kwargs=kwargs)


def shown(problem: Problem) -> str:
    return char_tokenizer().decode(problem.prompt_token_ids)


def number_rows(count: int) -> list[dict]:
    return [{"question": f"What is {i}+{i}?", "answer": str(2 * i)} for i in range(count)]


def dataset(
    folder: Path,
    rows: list[dict],
    test: list[dict] | None = None,
    *,
    chat: str | None = CHATML,
    seed: int = 0,
    **options: object,
) -> Task:
    for name, part in (("train", rows), ("test", test)):
        if part is not None:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    options = {"eval_split": None if test is None else "test", "eval_size": 4, "max_prompt_length": 120, **options}
    config = TaskConfig(name="dataset", path=str(folder), **options)
    return build_task(config, renderer(chat), seed=seed, eval_size=config.eval_size)


def ids(problems: tuple[Problem, ...]) -> list[str]:
    return [problem.id for problem in problems]


# --- rendering -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "kwargs", "prefill"),
    [
        (CHATML, {}, ""),
        (BOS_CHAT, {}, ""),
        (GEMMA, {}, ""),
        (R1_DISTILL, {}, "<think>\n"),
        (QWEN3, {}, ""),
        (QWEN3, {"enable_thinking": True}, ""),
        (QWEN3, {"enable_thinking": False}, "<think>\n\n</think>\n\n"),
        (QWEN3_THINKING, {}, "<think>\n"),
        (CHATML.replace("assistant\n{% endif %}", "assistant\nSure: {% endif %}"), {}, "Sure: "),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", {}, ""),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}<think>\n\n", {}, "<think>\n"),
    ],
)
def test_prefill_is_what_the_template_wrote_of_the_completion(template: str, kwargs: dict, prefill: str) -> None:
    tokenizer = char_tokenizer(template)
    token_ids, found = Renderer(tokenizer, chat_template_kwargs=kwargs).render(QUESTION)
    assert found == prefill
    expected = tokenizer.apply_chat_template(list(QUESTION), add_generation_prompt=True, return_dict=False, **kwargs)
    assert list(token_ids) == expected
    assert tokenizer.decode(token_ids).endswith(prefill)


def test_thoughts_in_the_question_are_no_prefill() -> None:
    asked = ({"role": "user", "content": "What does <think> mean?"},)
    assert renderer(CHATML).render(asked)[1] == ""
    assert renderer(R1_DISTILL).render(asked)[1] == "<think>\n"


def test_plain_text_prefill() -> None:
    assert renderer(None).render("Assistant: <think>\n")[1] == "<think>\n"
    assert renderer(None).render("What is <think> for?")[1] == ""


@pytest.mark.parametrize(
    ("template", "prompt", "count"),
    [
        (BOS_CHAT, QUESTION, 1),
        (R1_DISTILL, QUESTION, 1),
        (CHATML, QUESTION, 0),
        (None, "2+2?", 1),
        (None, "<s>2+2?", 1),
        (BOS_CHAT, "2+2?", 1),
    ],
)
def test_one_bos_at_most(template: str | None, prompt: object, count: int) -> None:
    tokenizer = char_tokenizer(template)
    token_ids, _ = Renderer(tokenizer).render(prompt)
    assert token_ids.count(tokenizer.bos_token_id) == count
    assert count == 0 or token_ids[0] == tokenizer.bos_token_id


def test_no_eos_is_put_behind_plain_text() -> None:
    from tokenizers import processors

    tokenizer = char_tokenizer()
    specials = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=specials
    )
    assert tokenizer("1")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(Renderer(tokenizer).render("2+2=")[0]) == "<s>2+2="


@pytest.mark.parametrize("plain", [True, False])
def test_fits_agrees_with_the_number_of_tokens(plain: bool) -> None:
    one = renderer(BOS_CHAT)
    texts = [*("a" * n for n in range(20)), *("é" * n for n in range(20)), "<|im_start|>" * 9, "<s>" + "a" * 8]
    for limit in (1, 9, 10, 12):
        expected = [len(token_ids) <= limit for token_ids in one.token_ids(texts, plain=plain)]
        assert one.fits(texts, limit, plain=plain) == expected
        assert True in expected
        assert False in expected


def test_messages_without_a_chat_template_are_refused() -> None:
    with pytest.raises(DataError, match="no chat template") as caught:
        renderer(None).render(QUESTION)
    assert "task.conversational: false" in caught.value.hint


def test_messages_a_template_refuses_are_a_data_error() -> None:
    with pytest.raises(DataError, match="refuses a conversation of system, user: System role not supported"):
        renderer(GEMMA).render(({"role": "system", "content": "x"}, *QUESTION))
    assert not renderer(GEMMA).takes_system
    assert renderer(CHATML).takes_system


@pytest.mark.parametrize(
    ("kwargs", "message", "hint"),
    [
        ({"enable_thinkin": False}, "never reads `enable_thinkin`", "did you mean `enable_thinking`"),
        ({"tokenize": True}, "`tokenize` is set by Strop", "remove `tokenize`"),
        ({"chat_template": "x"}, "`chat_template` is set by Strop", "remove"),
    ],
)
def test_template_arguments_that_would_be_ignored_are_refused(kwargs: dict, message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        renderer(QWEN3, **kwargs)
    assert hint in caught.value.hint
    with pytest.raises(ConfigError):
        renderer(None, enable_thinking=False)


def test_a_template_that_writes_the_date_gives_the_same_prompt_every_day() -> None:
    text = renderer(DATED).text(QUESTION)
    assert text.startswith("26 Jul 2024\n")


# --- order -----------------------------------------------------------------------------------------------


@given(size=st.integers(1, 40), length=st.integers(1, 40), seed=st.integers(0, 5), shuffle=st.booleans())
@settings(max_examples=150, deadline=None)
def test_windows_cover_each_epoch_once_and_hold_no_index_twice(
    size: int, length: int, seed: int, shuffle: bool
) -> None:
    length = min(length, size)
    order = EpochOrder(size, seed=seed, shuffle=shuffle)
    windows = [order.window(number, length) for number in range(3 * size // length + 1)]
    assert all(len(set(window)) == length for window in windows)
    flat = [index for window in windows for index in window]
    for epoch in range(len(flat) // size):
        assert sorted(flat[epoch * size : (epoch + 1) * size]) == list(range(size))
    again = EpochOrder(size, seed=seed, shuffle=shuffle)
    assert [again.window(number, length) for number in reversed(range(len(windows)))] == windows[::-1]


def test_order_depends_on_seed_and_epoch() -> None:
    order = EpochOrder(100, seed=0, shuffle=True)
    first, second = order.window(0, 100), EpochOrder(300, seed=0, shuffle=True)
    assert first != EpochOrder(100, seed=1, shuffle=True).window(0, 100)
    assert first != list(range(100))
    assert second.window(0, 100) != second.window(3, 100)
    assert EpochOrder(100, seed=0, shuffle=False).window(1, 30) == list(range(30, 60))


# --- rows ------------------------------------------------------------------------------------------------


def test_batches_are_pure_cover_an_epoch_and_keep_ids(tmp_path: Path) -> None:
    task = dataset(tmp_path, number_rows(24), seed=3)
    assert task.num_problems == 20
    batches = {step: task.batch(step, 6) for step in range(10)}
    fresh = dataset(tmp_path, number_rows(24), seed=3)
    for step in random.Random(0).sample(range(10), 10):
        assert fresh.batch(step, 6) == batches[step]
    visited = [problem.id for step in range(10) for problem in batches[step]]
    assert Counter(visited) == dict.fromkeys(visited, 3)
    assert len(set(visited)) == 20
    assert visited[:20] != visited[20:40]
    assert dataset(tmp_path, number_rows(24), seed=4).batch(0, 6) != batches[0]
    unshuffled = dataset(tmp_path, number_rows(3), number_rows(9)[5:], shuffle=False)
    assert ids(unshuffled.batch(0, 2)) == [f"{tmp_path.name}/train/{i}" for i in (0, 1)]


def test_held_out_rows_are_taken_off_the_training_rows(tmp_path: Path) -> None:
    task = dataset(tmp_path, number_rows(24), seed=3, eval_size=5)
    held = task.held_out(5)
    assert len(held) == 5
    assert task.held_out(2) == held[:2]
    assert task.held_out(99) == held
    trained = {problem.id for step in range(19) for problem in task.batch(step, 1)}
    assert trained.isdisjoint(ids(held))
    assert len(trained) == 19
    assert dataset(tmp_path, number_rows(24), seed=3, eval_size=5).held_out(5) == held
    assert dataset(tmp_path, number_rows(24), seed=4, eval_size=5).held_out(5) != held


def test_held_out_split_does_not_depend_on_the_seed(tmp_path: Path) -> None:
    test = [{"question": f"Q{i}", "answer": "1"} for i in range(30)]
    held = dataset(tmp_path, number_rows(4), test, seed=0).held_out(10)
    assert held == dataset(tmp_path, number_rows(4), test, seed=1).held_out(10)
    assert len(held) == 4
    assert ids(held) != [f"{tmp_path.name}/test/{i}" for i in range(4)]
    plain = dataset(tmp_path, number_rows(4), test, shuffle=False).held_out(10)
    assert ids(plain) == [f"{tmp_path.name}/test/{i}" for i in range(4)]


def test_training_rows_with_a_held_out_prompt_are_dropped(tmp_path: Path) -> None:
    rows = number_rows(10)
    task = dataset(tmp_path, rows, [rows[2], rows[7], {"question": "new", "answer": "1"}])
    assert task.num_problems == 8
    assert task.dropped == {"prompt is held out": 2}
    carved = dataset(tmp_path, number_rows(4) * 3, None, eval_size=1)
    assert carved.num_problems == 9
    assert carved.dropped == {"prompt is held out": 2}
    with pytest.raises(DataError, match="every training prompt is held out as well"):
        dataset(tmp_path, rows, rows, eval_size=10)


def test_long_prompts_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = number_rows(6) + [{"question": "long " * 30, "answer": "1"}] * 3
    test = [{"question": "short", "answer": "1"}, {"question": "long " * 40, "answer": "1"}]
    task = dataset(tmp_path, rows, test)
    assert task.num_problems == 6
    assert task.dropped == {"prompt too long": 3, "held-out prompt too long": 1}
    lengths = [len(problem.prompt_token_ids) for problem in task.batch(0, 6)]
    exact = dataset(tmp_path, rows, test, max_prompt_length=max(lengths))
    assert exact.num_problems == 6
    with pytest.raises(DataError, match="all 9 prompts have more than 5 tokens") as caught:
        dataset(tmp_path, rows, test, max_prompt_length=5)
    assert "task.max_prompt_length" in caught.value.hint


def test_sizes_that_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 4 usable rows; with 4 held out none is left"):
        dataset(tmp_path, number_rows(4), eval_size=4)
    task = dataset(tmp_path, number_rows(8), eval_size=4)
    with pytest.raises(DataError, match=r"a step asks for 5 different problems, .* has 4") as caught:
        task.batch(0, 5)
    assert "rollout.num_prompts" in caught.value.hint
    with pytest.raises(ConfigError, match=r"train_split and task\.eval_split are both `train`"):
        dataset(tmp_path, number_rows(8), train_split="train", eval_split="train")


def test_no_evaluation_holds_nothing_out(tmp_path: Path) -> None:
    dataset(tmp_path, number_rows(5))
    config = TaskConfig(name="dataset", path=str(tmp_path), eval_split=None)
    task = build_task(config, renderer(), seed=0, eval_size=0)
    assert (task.num_problems, task.held_out(10)) == (5, ())


def test_prompt_forms(tmp_path: Path) -> None:
    rows = [{"question": "1+1?", "answer": 2, "unit": "apples", "prompt_id": 7}] * 2

    def first(chat: str | None = CHATML, **options: object) -> Problem:
        return dataset(tmp_path, rows, [{"question": "x", "answer": 1, "unit": "u"}], chat=chat, **options).batch(0, 1)[
            0
        ]

    chat = first()
    assert chat.prompt == ({"role": "user", "content": "1+1?"},)
    assert shown(chat) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.row == rows[0]
    assert first(None).prompt == "1+1?"
    assert shown(first(None)) == "<s>1+1?"
    assert first(conversational=False).prompt == "1+1?"
    filled = first(None, template=r"{question} In {unit}, \boxed{{}}: {answer:.1f}")
    assert filled.prompt == r"1+1? In apples, \boxed{}: 2.0"
    system = first(system_prompt="Be brief.")
    assert system.prompt == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"})
    assert "system\nBe brief." in shown(system)
    for chat_template, options in ((None, {}), (GEMMA, {}), (CHATML, {"conversational": False})):
        with pytest.raises(ConfigError, match=r"task\.system_prompt is set, but"):
            first(chat_template, system_prompt="Be brief.", **options)


def test_prompt_column_of_messages(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi", "name": None}, {"role": "assistant", "content": "Yes?"}]
    rows = [
        {"prompt": [*talk, {"role": "user", "content": f"{i}?"}], "gold": str(i), "answer": "other"} for i in range(3)
    ]
    task = dataset(tmp_path, rows, eval_size=1, answer_column="gold", shuffle=False, system_prompt="S")
    problem = task.batch(0, 1)[0]
    assert [message["role"] for message in problem.prompt] == ["system", "user", "assistant", "user"]
    assert "name" not in problem.prompt[1]
    assert set(problem.row) == {"gold", "answer"}
    assert problem.row["answer"] == problem.row["gold"]
    assert problem.is_conversational
    own = [{"prompt": [{"role": "system", "content": "own"}, *QUESTION], "answer": "1"}] * 2
    with pytest.raises(DataError, match=r"train.jsonl:1: the row has a system message of its own"):
        dataset(tmp_path, own, eval_size=1, system_prompt="S")
    with pytest.raises(DataError, match=r"train.jsonl:1: the model's chat template refuses"):
        dataset(tmp_path, own, eval_size=1, chat=GEMMA)
    with pytest.raises(DataError, match=r"train.jsonl:1: the prompt is a conversation, and this model"):
        dataset(tmp_path, own, eval_size=1, chat=None)


def test_a_data_set_without_answers(tmp_path: Path) -> None:
    task = dataset(tmp_path, [{"prompt": f"Tell {i}"} for i in range(8)], answer_column="")
    assert task.default_rewards == ()
    assert task.batch(0, 1)[0].row == {}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{qestion}", r"train.jsonl:1: task.template names `{qestion}`; the columns are question, answer"),
        (r"{question} \boxed{}", r"task.template: `{}` names no column"),
        ("{question} {0}", r"task.template: `{0}` names no column"),
        ("{question} }", r"task.template: Single '}'"),
        ("{question", r"task.template: expected '}'"),
        ("no column", r"holds no placeholder"),
        ("{question.__class__}", r"task.template names `{question.__class__}`"),
        ("{question:.2f}", r"train.jsonl:1: column `question` is 'What is 0+0?', which does not take the format"),
        ("{question:{answer}}", r"the format `{answer}` has braces"),
    ],
)
def test_bad_templates(tmp_path: Path, template: str, message: str) -> None:
    rows = number_rows(8)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TaskConfig(name="dataset", path=str(tmp_path), eval_split=None, eval_size=2, template=template)
    with pytest.raises(StropError) as caught:
        build_task(config, renderer(None), seed=0, eval_size=2)
    assert message in str(caught.value)
    assert caught.value.hint


def test_settings_a_task_would_ignore_are_refused() -> None:
    for settings_, name in (
        ({"name": "countdown", "path": "x"}, "path"),
        ({"name": "gsm8k", "difficulty": 3}, "difficulty"),
    ):
        with pytest.raises(ConfigError, match=f"task.{name}: .* given, which the task"):
            build_task(TaskConfig(**settings_), renderer(), seed=0, eval_size=1)


# --- GSM8K -----------------------------------------------------------------------------------------------


def gsm8k(folder: Path, chat: str | None = CHATML, **options: object) -> Task:
    config = TaskConfig(name="gsm8k", path=str(folder), **options)
    return build_task(config, renderer(chat), seed=0, eval_size=config.eval_size)


def write_gsm8k(folder: Path) -> Path:
    for split, count in (("train", 5), ("test", 3)):
        rows = [{"question": f"{split} {i}?", "answer": f"Think <<1+1=2>>.\n#### {i},000"} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_gsm8k_rows_and_default_prompt(tmp_path: Path) -> None:
    task = gsm8k(write_gsm8k(tmp_path), shuffle=False)
    assert (task.name, task.default_rewards, task.num_problems) == ("gsm8k", ("numeric",), 5)
    problem = task.batch(0, 2)[1]
    assert problem.id == "gsm8k/train/1"
    assert problem.row == {"question": "train 1?", "answer": "1000", "solution": "Think <<1+1=2>>.\n#### 1,000"}
    instruction = r"Reason step by step, then put the final answer in \boxed{}."
    assert problem.prompt[0] == {"role": "system", "content": instruction}
    assert gsm8k(tmp_path, None).batch(0, 1)[0].prompt.endswith(f"?\n{instruction}\n")
    assert gsm8k(tmp_path, GEMMA).batch(0, 1)[0].prompt[0]["content"].endswith(f"?\n\n{instruction}")
    assert gsm8k(tmp_path, system_prompt="Mine.").batch(0, 1)[0].prompt[0]["content"] == "Mine."
    assert len(gsm8k(tmp_path, template="Q: {question}").batch(0, 1)[0].prompt) == 1
    assert len(gsm8k(tmp_path, system_prompt="").batch(0, 1)[0].prompt) == 1


@pytest.mark.parametrize(
    ("solution", "number"), [("#### 1,234", "1234"), ("a #### 1\n#### -0.5 ", "-0.5"), ("x\n####$18", "18")]
)
def test_final_number(solution: str, number: str) -> None:
    assert final_number(solution) == number


@pytest.mark.parametrize("answer", ["no mark", "#### many", "#### 5 apples", 7, "#### "])
def test_gsm8k_row_without_a_final_number_is_named(tmp_path: Path, answer: object) -> None:
    with (write_gsm8k(tmp_path) / "train.jsonl").open("a") as file:
        file.write(json.dumps({"question": "a", "answer": answer}) + "\n")
    with pytest.raises(DataError, match=r"train\.jsonl:6: the answer .*`#### 42` is needed"):
        gsm8k(tmp_path)


def test_real_gsm8k(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "gsm8k"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    task = gsm8k(folder, max_prompt_length=700)
    assert task.num_problems == 7473 - sum(task.dropped.values())
    assert 0 < task.dropped["prompt too long"] < 100
    held = task.held_out(1000)
    assert len(held) == 200
    batch = task.batch(123, 16)
    assert all(problem.row["answer"].lstrip("-").replace(".", "").isdigit() for problem in (*held, *batch))
    assert {p.row["question"] for p in held}.isdisjoint(p.row["question"] for p in batch)


# --- generated -------------------------------------------------------------------------------------------


def countdown(seed: int = 0, eval_size: int = 50, **options: object) -> Task:
    config = TaskConfig(name="countdown", **{"max_prompt_length": 400, **options})
    return build_task(config, renderer(None), seed=seed, eval_size=eval_size)


@pytest.mark.parametrize("difficulty", [1, 2, 5, 9])
def test_countdown_instances_have_a_solution(difficulty: int) -> None:
    for seed in range(40):
        draw = draw_countdown(seed, difficulty)
        numbers, solution = draw.row["numbers"], draw.row["solution"]
        used = [int(text) for text in solution.translate(str.maketrans("+-*/()", "      ")).split()]
        assert sorted(used) == sorted(numbers)
        assert len(numbers) == difficulty + 1
        exact = eval(solution.replace(" ", ""), {}, {}) if "/" not in solution else _exact_value(solution)
        assert exact == draw.row["target"]
        assert draw.row["target"] not in numbers
        assert str(draw.row["target"]) in draw.question
        assert all(str(number) in draw.question for number in numbers)


def _exact_value(expression: str) -> Fraction:
    spaced = expression.replace("(", " ( ").replace(")", " ) ")
    return eval(" ".join(f"Fraction({t})" if t.isdigit() else t for t in spaced.split()), {"Fraction": Fraction})


def test_countdown_is_pure_and_held_out_is_disjoint() -> None:
    task, other = countdown(), countdown(seed=1)
    batches = {step: task.batch(step, 8) for step in range(12)}
    fresh = countdown()
    for step in random.Random(1).sample(range(12), 12):
        assert fresh.batch(step, 8) == batches[step]
    held = task.held_out(50)
    assert len(held) == 50
    assert other.held_out(50) == held
    assert other.held_out(7) == held[:7]
    assert other.batch(0, 8) != batches[0]

    def instance(problem: Problem) -> tuple:
        return (*sorted(problem.row["numbers"]), problem.row["target"])

    keys = {instance(problem) for problem in held}
    assert len(keys) == 50
    trained = {instance(p) for t in (task, other) for step in range(100) for p in t.batch(step, 8)}
    assert keys.isdisjoint(trained)
    assert len(trained) > 800
    assert task.num_problems is None
    assert task.default_rewards == ("countdown",)


def test_countdown_solution_earns_the_reward() -> None:
    from strop.rewards.library import LIBRARY

    problem = countdown().batch(0, 1)[0]
    answer = f"<answer>{problem.row['solution']}</answer>"
    row = {name: [value, value] for name, value in problem.row.items()}
    assert LIBRARY["countdown"](completions=[answer, "<answer>1</answer>"], **row) == [1.0, 0.0]


def test_generated_prompts_over_the_limit_are_replaced_and_counted() -> None:
    lengths = [len(problem.prompt_token_ids) for problem in countdown().batch(0, 30)]
    limit = sorted(lengths)[10]
    task = countdown(max_prompt_length=limit)
    assert max(len(problem.prompt_token_ids) for problem in task.batch(0, 30)) == limit
    dropped = task.dropped["prompt too long"]
    assert dropped > 0
    task.batch(0, 30)
    assert task.dropped["prompt too long"] == dropped
    with pytest.raises(DataError, match="at most 10 prompt tokens"):
        countdown(max_prompt_length=10).batch(0, 1)
    assert countdown(max_prompt_length=10).held_out(3) == ()


def gym(name: str | None, eval_size: int = 20, **options: object) -> Task:
    pytest.importorskip("reasoning_gym", reason="the extra `gym` is not installed")
    config = TaskConfig(name="gym", path=name, **{"max_prompt_length": 4000, **options})
    return build_task(config, renderer(), seed=0, eval_size=eval_size)


@pytest.mark.parametrize("name", ["chain_sum", "spell_backward", "syllogism"])
def test_gym_is_pure_disjoint_and_scored_by_exact(name: str) -> None:
    from strop.rewards.library import LIBRARY

    task = gym(name)
    state = random.getstate()
    batch, held = task.batch(5, 8), task.held_out(20)
    assert random.getstate() == state
    assert gym(name).batch(5, 8) == batch
    assert gym(name).held_out(20) == held
    questions = {problem.row["question"] for problem in held}
    assert len(questions) == 20
    assert questions.isdisjoint(p.row["question"] for step in range(50) for p in task.batch(step, 8))
    assert batch[0].id.startswith(f"gym/{name}/train/")
    answer = batch[0].row["answer"]
    assert answer
    given = [f"So it is \\boxed{{{answer}}}.", "\\boxed{no}"]
    assert LIBRARY[task.default_rewards[0]](completions=given, answer=[answer] * 2) == [1.0, 0.0]


def test_every_allowed_gym_data_set_gives_short_exact_answers() -> None:
    pytest.importorskip("reasoning_gym", reason="the extra `gym` is not installed")
    from strop.tasks.gym import _items

    for name in ALLOWED:
        first, second = _items(name), _items(name)
        state = random.getstate()
        for index in (0, 12345, 2**30):
            item = first[index]
            assert item["question"] == second[index]["question"]
            assert item["answer"] == second[index]["answer"]
            assert item["question"].strip()
            assert item["answer"].replace("-", "").isalnum()
            assert len(item["answer"]) <= 30
        assert random.getstate() == state


def test_gym_names_off_the_list_are_refused() -> None:
    for name, hint in (("chain_sums", "did you mean `chain_sum`?"), ("countdown", ""), (None, "no data set is named")):
        with pytest.raises(ConfigError) as caught:
            gym(name)
        assert hint in caught.value.message
        assert "chain_sum" in caught.value.hint


def test_gym_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    config = TaskConfig(name="gym", path="chain_sum")
    with pytest.raises(DataError) as caught:
        build_task(config, renderer(), seed=0, eval_size=1)
    assert caught.value.hint == "pip install 'strop[gym]'"
