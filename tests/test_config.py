"""Settings: what is refused and with which words, where TRL's names land, what survives a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from strop.config import Config
from strop.config_load import NOT_OURS, TRL_NAMES, differences, dump_config, load_config, with_absolute_paths
from strop.errors import ConfigError, RunError, StropError
from strop.trainer.runfolder import open_run_folder


def refused(source: Any = None, overrides: tuple[str, ...] = ()) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    assert caught.value.hint, f"no hint: {caught.value.message}"
    assert "Traceback" not in str(caught.value)
    return caught.value


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


BAD = {
    # unknown names: the nearest one is offered
    "misspelt section": ("rollot: {num_prompts: 2}", "rollot", "rollout"),
    "misspelt key": ("rollout: {num_generation: 4}", "num_generation", "rollout.num_generations"),
    "misspelt flat name": ("learning_rat: 1e-5", "learning_rat", "learning_rate"),
    "key in the wrong section": ("optim: {beta: 0.1}", "optim.beta", "beta"),
    "name far from all": ("zzzqqq: 1", "zzzqqq", ""),
    "a number as a key": ("7: 1", "7", ""),
    # wrong types
    "text for a number": ("run: {max_steps: many}", "run.max_steps", "Optimizer steps"),
    "a fraction for a count": ("run: {max_steps: 1.5}", "run.max_steps", "Optimizer steps"),
    "a list for a number": ("optim: {learning_rate: [1, 2]}", "optim.learning_rate", "learning rate"),
    "null for a number": ("run: {max_steps: null}", "run.max_steps", ""),
    "a number for a choice": ("objective: {loss_type: 3}", "objective.loss_type", ""),
    "a section that is a list": ("rollout: [1]", "rollout", ""),
    "a section that is text": ("rollout: eight", "rollout", ""),
    "an empty section": ("rollout:", "rollout", ""),
    "numbers for names": ("rewards: {funcs: [1, 2]}", "rewards.funcs", ""),
    "text among weights": ("rewards: {funcs: [a, b], weights: [1, x]}", "rewards.weights", ""),
    "text for a mapping": ("task: {chat_template_kwargs: yes please}", "task.chat_template_kwargs", "mapping"),
    # nothing is converted
    "a count in quotes": ("run: {max_steps: '20'}", "run.max_steps", '"20" given; a whole number is needed'),
    "a count with a point": ("run: {max_steps: 20.0}", "run.max_steps", "20.0 given; a whole number is needed"),
    "true for a count": ("run: {max_steps: true}", "run.max_steps", "true given; a whole number is needed"),
    "true for a rank": ("lora: {r: true}", "lora.r", "true given; a whole number is needed"),
    "no for an optional count": ("optim: {micro_batch_tokens: no}", "micro_batch_tokens", "false given; a whole"),
    "a number in quotes": ("beta: '0.1'", "objective.beta", '"0.1" given; a number is needed'),
    "true for a number": ("beta: true", "objective.beta", "true given; a number is needed"),
    "true for an optional number": ("vram_gib: true", "run.vram_gib", "true given; a number is needed"),
    "true among weights": ("rewards: {funcs: [a], weights: [true]}", "rewards.weights", "true given; a number"),
    "a bare weight": ("rewards: {funcs: [a], weights: 1}", "rewards.weights", "1 given; a list is needed"),
    "text for a switch": ("optim: {share_prompt: 'no'}", "optim.share_prompt", '"no" given; true or false is needed'),
    "a number for a switch": ("task: {shuffle: 1}", "task.shuffle", "1 given; true or false is needed"),
    "a number for text": ("model: {path: 7}", "model.path", "7 given; text is needed"),
    "a date for text": ("run: {out: 2024-01-01}", "run.out", '"2024-01-01" given; text is needed'),
    "a mapping for a list": ("lora: {target_modules: {a: 1}}", "lora.target_modules", "a list is needed"),
    # out of range
    "a group of one": ("rollout: {num_generations: 1}", "rollout.num_generations", ""),
    "negative steps": ("run: {max_steps: -3}", "run.max_steps", "-3"),
    "no prompts": ("rollout: {num_prompts: 0}", "rollout.num_prompts", ""),
    "no learning": ("learning_rate: 0", "optim.learning_rate", ""),
    "learning backwards": ("learning_rate: -1e-5", "optim.learning_rate", ""),
    "temperature 0": ("temperature: 0", "rollout.temperature", ""),
    "negative beta": ("beta: -0.1", "objective.beta", ""),
    "epsilon of 1": ("epsilon: 1", "objective.epsilon", ""),
    "a cap below 1": ("vllm_importance_sampling_clip_max: 0.5", "importance_sampling_clip_max", ""),
    "negative rank": ("lora: {r: -1}", "lora.r", ""),
    "adam_beta2 of 1": ("adam_beta2: 1.0", "optim.adam_beta2", ""),
    "negative seed": ("seed: -1", "run.seed", ""),
    "too many workers": ("rewards: {workers: 65}", "rewards.workers", ""),
    "no VRAM": ("vram_gib: 0", "run.vram_gib", ""),
    "not a number": ("learning_rate: .nan", "optim.learning_rate", ""),
    "infinity": ("rewards: {timeout_s: .inf}", "rewards.timeout_s", ""),
    "infinity in a list": ("rewards: {funcs: [a], weights: [.inf]}", "rewards.weights", ""),
    # choices
    "unknown loss": ("loss_type: gspo", "objective.loss_type", "dapo"),
    "unknown scaling": ("scale_rewards: std", "objective.scale_rewards", "group"),
    "unknown dtype": ("dtype: fp16", "model.dtype", "float16"),
    "unknown task": ("task: {name: gsm8000}", "task.name", "gsm8k"),
    "truncated sampling": ("top_p: 0.9", "top_p", "ratio"),
    "top_k": ("top_k: 50", "top_k", "ratio"),
    "min_p": ("min_p: 0.1", "min_p", "ratio"),
    "repetition penalty": ("repetition_penalty: 1.1", "repetition_penalty", "ratio"),
    # settings that contradict each other
    "weights for other functions": ("reward_funcs: [a, b]\nreward_weights: [1]", "rewards.weights", "one weight"),
    "all weights 0": ("reward_funcs: [a]\nreward_weights: [0]", "rewards.weights", "nothing would be learned"),
    "adapter without rank": ("lora: {r: 0, init_from: adapter}", "lora.init_from", "lora.r"),
    "weights for the task's own": ("reward_weights: [1]", "rewards.weights", "named in rewards.funcs"),
    "adapters for no layer": ("lora: {target_modules: []}", "lora.target_modules", "at least one layer's name"),
    "an unknown tracker": ("report_to: wandb", "run.report_to", "'tensorboard' or 'none'"),
    "TRL's all trackers": ("report_to: [all]", "run.report_to", "'tensorboard' or 'none'"),
    "a tracker and none": ("report_to: [tensorboard, none]", "run", "`none` stands beside tensorboard"),
    "a name given twice": ("beta: 0.1\nobjective: {beta: 0.2}", "`beta` and `objective.beta`", "keep"),
    "flat name beside a bad section": ("beta: 0.1\nobjective: 3", "objective", ""),
    # not a config at all
    "python tag": ("run: !!python/object/apply:os.system ['true']", "config.yaml:1", ""),
    "python name tag": ("a: 1\nb: !!python/name:os.system", "config.yaml:2", ""),
    "a list": ("- 1\n- 2", "list", "mapping"),
    "bare text": ("hello", "str", "mapping"),
    "broken YAML": ("run:\n  max_steps: [1", "config.yaml", "YAML"),
    "a tab": ("run:\n\tmax_steps: 1", "config.yaml:2", "YAML"),
    "bytes that are not UTF-8": (b"run: {out: '\xff\xfe'}", "config.yaml", "UTF-8"),
}


@pytest.mark.parametrize(("text", "names", "says"), BAD.values(), ids=BAD.keys())
def test_bad_file_is_refused(tmp_path: Path, text: str | bytes, names: str, says: str) -> None:
    error = refused(write(tmp_path, text))
    assert "config.yaml" in error.message, "which file is wrong has to be said"
    assert names in error.message
    assert says in str(error)


BAD_OVERRIDES = {
    "no value": ("run.max_steps", "section.key=value"),
    "no key": ("=3", "section.key=value"),
    "empty": ("", "section.key=value"),
    "misspelt": ("run.max_step=3", "did you mean `run.max_steps`?"),
    "misspelt flat name": ("num_generatons=4", "did you mean `num_generations`?"),
    "misspelt section": ("rum.max_steps=3", "did you mean `run`?"),
    "no section": ("max_stepz=3", "max_steps"),
    "a whole section": ("run=3", "run"),
    "too deep": ("run.max_steps.x=3", "a whole number is needed"),
    "deep below an unknown name": ("run.max_step.x=3", "did you mean `run.max_steps`?"),
    "an empty part": ("run.=3", "run"),
    "wrong type": ("run.max_steps=many", "Optimizer steps"),
    "an empty value": ("run.max_steps=", "Optimizer steps"),
    "broken value": ("run.out=[1", "YAML"),
    "python tag": ("run.out=!!python/object/apply:os.system ['true']", "YAML"),
    "not ours": ("use_vllm=true", "model.engine"),
    "text": ("run.max_steps='20'", '"20" given; a whole number is needed'),
    "flat name with a wrong value": ("beta=-1", "-1 given"),
}


@pytest.mark.parametrize(("item", "says"), BAD_OVERRIDES.values(), ids=BAD_OVERRIDES.keys())
def test_bad_override_is_refused(item: str, says: str) -> None:
    error = refused({}, (item,))
    assert says in str(error)
    assert error.message.startswith(f"--set {item}: "), "which option is wrong has to be said"


def test_the_wrong_one_of_file_and_options_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "rollout: {num_prompts: x}")
    assert refused(path, ("rollout.num_generations=4",)).message.startswith(f"{path}: ")
    assert refused(path, ("rollout.num_prompts=y",)).message.startswith("--set rollout.num_prompts=y: ")
    assert load_config(path, ["rollout.num_prompts=y", "rollout.num_prompts=2"]).rollout.num_prompts == 2


@pytest.mark.parametrize("name", NOT_OURS)
def test_trl_names_without_counterpart_say_what_to_do(name: str) -> None:
    error = refused({name: 1})
    assert name in error.message
    assert error.hint == NOT_OURS[name]


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    assert "cannot be read" in refused(tmp_path / name).message


def test_error_is_also_a_value_error() -> None:
    error = refused({"rollout": {"num_generations": 1}})
    assert isinstance(error, StropError)
    assert isinstance(error, ValueError)
    assert "1 given" in error.message
    assert "greater than or equal to 2" in error.message
    assert error.hint.startswith("rollout.num_generations: ")
    assert str(error) == f"{error.message}\nhint: {error.hint}"


def test_no_config_is_all_defaults(tmp_path: Path) -> None:
    assert load_config() == load_config({}) == load_config(write(tmp_path, "# nothing\n")) == Config()


TRL_VALUES = {
    "model_name_or_path": "some/model",
    "dtype": "bfloat16",
    "lora_r": 8,
    "lora_alpha": 4.0,
    "lora_target_modules": ["q_proj"],
    "dataset_name": "openai/gsm8k",
    "dataset_config": "main",
    "dataset_train_split": "validation",
    "dataset_test_split": "validation",
    "max_prompt_length": 77,
    "chat_template_kwargs": {"enable_thinking": False},
    "reward_funcs": ["numeric"],
    "reward_weights": [0.5],
    "num_generations": 6,
    "max_completion_length": 99,
    "temperature": 0.7,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "loss_type": "dr_grpo",
    "scale_rewards": "batch",
    "epsilon": 0.1,
    "epsilon_high": 0.28,
    "beta": 0.04,
    "mask_truncated_completions": True,
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_max": 3.0,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.2,
    "output_dir": "out",
    "max_steps": 12,
    "seed": 3,
    "save_steps": 7,
    "save_total_limit": 4,
    "eval_steps": 9,
    "num_generations_eval": 2,
    "report_to": ["none"],
    "engine": "transformers",
    "vram_gib": 12.0,
}


def setting(config: Config, dotted: str) -> Any:
    section, name = dotted.split(".")
    return getattr(getattr(config, section), name)


def test_every_flat_name_is_tried() -> None:
    assert set(TRL_VALUES) == set(TRL_NAMES)


def test_flat_names_land_in_their_sections(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, yaml.safe_dump(TRL_VALUES)))
    for name, value in TRL_VALUES.items():
        landed = setting(config, TRL_NAMES[name])
        assert landed == (tuple(value) if isinstance(value, list) else value), name


@pytest.mark.parametrize("name", sorted(set(TRL_NAMES) - {"reward_weights"}))
def test_flat_name_as_an_override(name: str) -> None:
    config = load_config(
        {}, [f"{name}={yaml.safe_dump(TRL_VALUES[name], default_flow_style=True).split('...')[0].strip()}"]
    )
    assert config == load_config({name: TRL_VALUES[name]})


@pytest.mark.parametrize(("given", "meant"), [(True, "group"), (False, "none"), ("batch", "batch")])
def test_scale_rewards_as_trl_spells_it(given: Any, meant: str) -> None:
    assert load_config({"scale_rewards": given}).objective.scale_rewards == meant
    assert load_config({}, [f"scale_rewards={str(given).lower()}"]).objective.scale_rewards == meant


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001", "1E-5", ".1e-4", "1.e-5"])
def test_learning_rate_as_people_write_it(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path, f"learning_rate: {text}")).optim.learning_rate == pytest.approx(1e-5)
    assert load_config({}, [f"optim.learning_rate={text}"]).optim.learning_rate == pytest.approx(1e-5)


def test_a_version_like_text_stays_text() -> None:
    assert load_config({}, ["run.out='1e5'"]).run.out == "1e5"
    assert load_config({}, ["task.path=e5-small"]).task.path == "e5-small"


def test_one_name_for_a_list() -> None:
    config = load_config({"rewards": {"funcs": "numeric"}, "run": {"report_to": "none"}})
    assert config.rewards.funcs == ("numeric",)
    assert config.run.report_to == ("none",)


def test_overrides_go_in_order_and_win(tmp_path: Path) -> None:
    path = write(tmp_path, "run: {max_steps: 5, seed: 1}")
    config = load_config(path, ["run.max_steps=6", "seed=2", "run.max_steps=7", "run.out=a=b"])
    assert (config.run.max_steps, config.run.seed, config.run.out) == (7, 2, "a=b")


def test_whole_numbers_may_stand_for_fractions() -> None:
    config = load_config({"beta": 1, "lora_alpha": 16, "reward_funcs": ["a", "b"], "reward_weights": [1, 0.5]})
    assert (config.objective.beta, config.lora.alpha, config.rewards.weights) == (1.0, 16.0, (1.0, 0.5))
    assert [type(x) for x in (config.objective.beta, *config.rewards.weights)] == [float] * 3


def test_full_training_needs_no_layers() -> None:
    assert load_config({"lora": {"r": 0, "target_modules": []}}).lora.target_modules == ()


def test_override_of_a_nested_mapping_and_null() -> None:
    config = load_config(
        {}, ["task.chat_template_kwargs.enable_thinking=false", "task.eval_split=null", "task.template="]
    )
    assert config.task.chat_template_kwargs == {"enable_thinking": False}
    assert config.task.eval_split is None
    assert config.task.template is None


def test_top_k_off_is_spelt_two_ways() -> None:
    assert load_config({"top_k": -1}).rollout.top_k == -1


def test_round_trip(tmp_path: Path) -> None:
    config = load_config(
        {**TRL_VALUES, "task": {"system_prompt": "Dénk: ≥ 2 «steps»\nthen: answer", "families": ["a", "b"]}}
    )
    text = dump_config(config)
    assert load_config(write(tmp_path, text)) == config
    assert dump_config(load_config(write(tmp_path, text))) == text
    assert load_config(config) == config


def test_json_round_trip_of_every_setting() -> None:
    for config in (Config(), load_config(TRL_VALUES)):
        assert load_config(config.model_dump(mode="json")) == config


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("models/tiny", "adapter", "demo", "chain_sum"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("data.jsonl", "score.py"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_local_paths_become_absolute(project: Path) -> None:
    written = load_config(
        {
            "model": {"path": "models/../models/tiny"},
            "lora": {"init_from": "~/adapter"},
            "task": {"name": "dataset", "path": "./data.jsonl"},
            "rewards": {"funcs": ["numeric", "score.py:f", "~/score.py:a.b", "package.module:f"]},
            "run": {"out": "runs/x"},
        }
    )
    config = with_absolute_paths(written)
    assert config.model.path == f"{project}/models/tiny"
    assert config.lora.init_from == f"{project}/adapter"
    assert config.task.path == f"{project}/data.jsonl"
    absolute = ("numeric", f"{project}/score.py:f", f"{project}/score.py:a.b", "package.module:f")
    assert config.rewards.funcs == absolute
    assert {key for key, _, _ in differences(written, config)} == {
        "model.path", "lora.init_from", "task.path", "rewards.funcs",
    }  # fmt: skip
    assert with_absolute_paths(config) == config == load_config(config)


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"path": "demo"}},
        {"model": {"path": "Qwen/Qwen3-0.6B"}, "task": {"name": "gsm8k", "path": "openai/gsm8k"}},
        {"task": {"name": "gym", "path": "chain_sum"}},
        {"model": {"path": "models/none"}, "lora": {"init_from": "a\0b"}, "rewards": {"funcs": "none.py:f"}},
    ],
)
def test_names_that_are_no_local_paths_stay(sections: dict[str, Any]) -> None:
    config = load_config(sections)
    assert with_absolute_paths(config) == config


def test_a_run_folder_can_be_used_from_elsewhere(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings() -> Config:
        task = {"name": "dataset", "path": "data.jsonl"}
        return load_config({"model": {"path": "models/tiny"}, "task": task, "rewards": {"funcs": [" score.py:f"]}})

    with open_run_folder(Path("runs/x"), settings(), resume=False) as folder:
        folder.metrics_path.write_text('{"step": 1}\n')
        stored = load_config(folder.path / "config.resolved.yaml")
    with open_run_folder(Path("runs/x"), settings(), resume=True) as folder:
        assert [text for text in folder.notices if "moved" in text] == []
    monkeypatch.chdir("/")
    with open_run_folder(project / "runs" / "x", stored, resume=True) as folder:
        assert [text for text in folder.notices if "moved" in text] == []
    assert (stored.model.path, stored.task.path) == (f"{project}/models/tiny", f"{project}/data.jsonl")


def test_a_run_folder_of_relative_paths_is_still_taken(project: Path) -> None:
    config = load_config({"model": {"path": "models/tiny"}, "rewards": {"funcs": ["score.py:f"]}})
    with open_run_folder(Path("runs/x"), config, resume=False) as folder:
        folder.metrics_path.write_text('{"step": 1}\n')
        (folder.path / "config.resolved.yaml").write_text(dump_config(config))
    with open_run_folder(project / "runs" / "x", config, resume=True) as folder:
        assert [text for text in folder.notices if "moved" in text] == []


@pytest.mark.parametrize("out", ["data.jsonl", "data.jsonl/x"])
def test_a_file_is_no_run_folder(project: Path, out: str) -> None:
    with pytest.raises(RunError) as caught:
        open_run_folder(Path(out), Config(), resume=False)
    assert f"{project}/data.jsonl is a file, a folder is needed" in caught.value.message
    assert "--out" in caught.value.hint
    assert "space" not in str(caught.value)


def test_loading_writes_to_nothing_it_was_given() -> None:
    source: dict[str, Any] = {"beta": 0.1, "rollout": {"num_prompts": 3}}
    load_config(source, ["rollout.num_prompts=4", "objective.beta=0.2"])
    assert source == {"beta": 0.1, "rollout": {"num_prompts": 3}}


def test_a_config_is_frozen() -> None:
    config = load_config()
    with pytest.raises(ValidationError):
        config.run.max_steps = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_differences_name_each_setting() -> None:
    old = load_config({"seed": 1})
    new = load_config({"seed": 2, "chat_template_kwargs": {"x": 1}})
    assert differences(old, new) == [("run.seed", 1, 2), ("task.chat_template_kwargs", {}, {"x": 1})]
    assert differences(old, old) == []


def test_every_setting_is_described() -> None:
    missing = [
        f"{name}.{key}"
        for name, section in Config.model_fields.items()
        for key, field in getattr(section.annotation, "model_fields", {}).items()
        if not field.description
    ]
    assert missing == []
