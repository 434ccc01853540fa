"""Every setting of a run: frozen sections, each field with its meaning under it.

An unknown key is an error that offers the nearest name (`config_load.py`). A config is never changed after loading;
numbers that follow from it and from the machine live in the `Plan`.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _as_tuple(value: Any) -> Any:
    """A list as YAML and JSON know it."""
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


def _names_as_tuple(value: Any) -> Any:
    """One name may stand for a list of one."""
    return (value,) if isinstance(value, str) else _as_tuple(value)


StrList = Annotated[tuple[str, ...], BeforeValidator(_names_as_tuple)]
FloatList = Annotated[tuple[float, ...], BeforeValidator(_as_tuple)]

MonitorAction = Literal["warn", "pause", "stop"]
DiagnosisName = Literal[
    "budget_too_small", "truncated", "reward_length_correlation", "wrong_answers_grow", "wrong_right_length_ratio",
    "no_signal", "all_right", "repetition", "shaping_sign_flips", "unscored", "format_share", "answer_collapse",
    "held_out_flat", "accuracy_falls", "entropy_collapse", "entropy_rise", "gradient_spike", "logprob_mismatch",
]  # fmt: skip
"""What a run can be diagnosed with; measured and explained in `monitor.diagnoses`."""


def _off_as_text(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


def _known_diagnoses(value: Any) -> Any:
    """Refuse a name that is no diagnosis, with the nearest one."""
    known = get_args(DiagnosisName)
    for name in cast("dict[Any, Any]", value) if isinstance(value, dict) else ():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
            nearest = f"did you mean `{close[0]}`?" if close else f"there are: {', '.join(known)}"
            raise ValueError(f"`{name}` is not a diagnosis; {nearest}")
    return cast("Any", value)


def _warn_and_act(value: tuple[float, ...]) -> tuple[float, ...]:
    if len(value) != 2 or value[0] > value[1]:
        raise ValueError("two numbers are needed, [warn, act], the first no larger than the second")
    return value


MonitorChoice = Literal["warn", "pause", "stop", "off"]
ActionByName = Annotated[
    dict[DiagnosisName, Annotated[MonitorChoice, BeforeValidator(_off_as_text)]], BeforeValidator(_known_diagnoses)
]
ThresholdsByName = Annotated[
    dict[DiagnosisName, Annotated[FloatList, AfterValidator(_warn_and_act)]], BeforeValidator(_known_diagnoses)
]


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no conversion, except of whole numbers where fractions may stand.

    Text is no number, true and false are none either, and 2.0 is no count.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


HeadFormat = Literal["16bit", "int8"]
EmbeddingPlace = Literal["card", "host", "int8", "nf4"]


class ModelConfig(Section):
    """Which model is trained, and what generates."""

    path: str = "demo"
    """A model folder, a Hugging Face id, or `demo`: the small reasoning model that ships with Strop."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights and activations. `auto`: float32 on a CPU, bfloat16 on a CUDA card that has it."""
    quantization: Literal["none", "nf4"] = "none"
    """`nf4`: the linear layers' weights in 4 bits, for engine and trainer both (QLoRA); needs adapters."""
    head: Literal["auto", "16bit", "int8"] = "auto"
    """Output head: `int8` halves its memory, with less effect than rounding to bf16; of a tied model the embedding is
    held like it. `auto`: int8 where the run would not fit otherwise."""
    embedding: Literal["auto", "card", "host", "int8", "nf4"] = "auto"
    """Input embedding: on the card, in pinned host memory (none of the card's), in 8 bits or in 4; a tied model's only
    like its head. `auto`: on the card where it fits, else in host memory, or in few bits where none can be pinned."""
    share_weights: Literal["require", "copy"] = "require"
    """`copy`: with vLLM the trainer holds the weights a second time, for a model whose weights cannot be shared."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """What generates completions. `auto`: vLLM where it is installed, else transformers."""


class LoraConfig(Section):
    """Low-rank adapters. With `r: 0` all weights are trained (full fine-tuning)."""

    r: int = Field(default=16, ge=0, le=512)
    """Rank of the adapters; 0 trains all weights."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapter's product is scaled by alpha / r."""
    target_modules: StrList = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    """Names of the linear layers that get an adapter."""
    init_from: str | None = None
    """A folder with a PEFT adapter to start from; with beta > 0 it is also the reference."""


class TaskConfig(Section):
    """Problems, prompts and reference answers."""

    name: Literal["arithmetic", "gsm8k", "countdown", "dataset", "gym"] = "arithmetic"
    """`arithmetic` and `countdown` are generated; `gsm8k` and `dataset` read rows; `gym`: reasoning-gym."""
    path: str | None = None
    """File (.jsonl, .json, .parquet, .csv), folder of such files, or Hugging Face dataset id; for `gym` its name."""
    dataset_config: str | None = None
    """Configuration of a Hugging Face dataset, e.g. `main`."""
    train_split: str = "train"
    """Split, or file stem in a folder, that is trained on."""
    eval_split: str | None = "test"
    """Split, or file stem, that is held out. null: `eval_size` rows are taken off the training rows."""
    eval_size: int = Field(default=200, ge=1)
    """How many problems an evaluation uses at most (`run.eval_num_problems` may ask for fewer)."""
    prompt_column: str = "prompt"
    """Column with the prompt: text, or a list of messages."""
    question_column: str = "question"
    """Column that `template` is filled with when there is no prompt column."""
    answer_column: str | None = "answer"
    """Column with the reference answer; null where the reward functions need none."""
    template: str | None = None
    """Prompt made of a row's columns, e.g. `{question} Answer with a number.`; null: the bare question."""
    system_prompt: str | None = None
    """Put before the question as a system message; the prompt is then conversational."""
    conversational: bool = True
    """Send a plain-text question through the model's chat template as a user message, where it has one."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the chat template, e.g. `enable_thinking: false`."""
    max_prompt_length: int = Field(default=512, ge=1)
    """Rows with more prompt tokens are dropped and counted."""
    difficulty: int = Field(default=2, ge=1, le=9)
    """For `arithmetic` and `countdown`: how hard, roughly the number of digits."""
    families: StrList = ()
    """For `arithmetic`: which kinds of problem; empty for all."""
    shuffle: bool = True
    """Visit the rows of an epoch in an order drawn from (seed, epoch)."""


class RewardsConfig(Section):
    """Functions that score completions."""

    funcs: StrList = ()
    """Built-in names, `path.py:function`, `package.module:function`; see docs/rewards.md. Empty: the task's own."""
    weights: FloatList = ()
    """One per function; 0 means logged only. Empty: all 1."""
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Parameters of a function by its name, e.g. `soft_overlong: {cache: 64}`; docs/rewards.md."""
    gated: Annotated[tuple[str, ...] | None, BeforeValidator(_names_as_tuple)] = None
    """Functions that count only where the answer is right. null: those declared `format`; []: none."""
    length_shaping: Literal["polarity_bonus", "none"] = "polarity_bonus"
    """What favours short right answers, without a length reward: a bonus on their advantages; see docs/length.md."""
    length_shaping_weight: float = Field(default=0.1, gt=0, le=1)
    """Largest growth of an advantage by the bonus, as a part of it."""
    length_shaping_from: float = Field(default=0.3, ge=0, le=1)
    """The bonus acts in steps in which at least this share of the completions is right."""
    check: bool = True
    """Try a few completions of known worth before step 0 and stop on what cannot be meant; docs/audit.md."""
    allow: StrList = ()
    """Findings of the check of reward functions that are not to stop a run, by their names; docs/length.md."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Limit per function call; past it the completion (of a group function: the group) is unscored, never 0."""
    memory_gib: float = Field(default=4.0, gt=0)
    """Address space of a worker beyond what it has once the functions are loaded; past it a call fails."""
    workers: int = Field(default=1, ge=1, le=64)
    """Processes that score while others still decode."""


class RolloutConfig(Section):
    """How completions are sampled."""

    num_prompts: int = Field(default=8, ge=1)
    """P: problems per optimizer step."""
    num_generations: int = Field(default=8, ge=2)
    """G: completions per problem; the group that advantages are relative to."""
    max_completion_length: int = Field(default=512, ge=1)
    """Most tokens of a completion, the stop token included."""
    max_num_seqs: int | None = Field(default=None, ge=1)
    """Completions decoded at a time; null: planned. The others of a step wait for a place."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; the trainer divides its logits by it as well."""
    top_p: float = 1.0
    """Only 1 is allowed: a truncated distribution would bias the probability ratios."""
    top_k: int = 0
    """Only 0 (off) is allowed, for the same reason."""
    min_p: float = 0.0
    """Only 0 (off) is allowed, for the same reason."""
    repetition_penalty: float = 1.0
    """Only 1 (off) is allowed, for the same reason."""

    @model_validator(mode="after")
    def _temperature_only(self) -> RolloutConfig:
        neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        for key, value in neutral.items():
            given = getattr(self, key)
            if given != value and not (key == "top_k" and given == -1):
                raise ValueError(
                    f"{key}: {given} given, {value} is needed: the log-probabilities of a truncated or penalised "
                    "distribution are not those the trainer computes, so every ratio would be biased"
                )
        return self


class ObjectiveConfig(Section):
    """The loss. Names and meanings are TRL's."""

    loss_type: Literal["grpo", "dr_grpo", "dapo"] = "dapo"
    """What the sum over tokens is divided by; see docs/concepts.md."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Standard deviation that advantages are divided by."""
    epsilon: float = Field(default=0.2, gt=0, lt=1)
    """Lower clip bound of the probability ratio is 1 - epsilon."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """Upper clip bound is 1 + epsilon_high; null: epsilon."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL term against the policy at step 0."""
    mask_truncated_completions: bool = False
    """Leave completions that ran into the token limit out of the loss and of the denominators."""
    importance_sampling_mode: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "token_truncate"
    )
    """Correction for engine and trainer disagreeing on a log-probability (TRL: vllm_importance_sampling_mode)."""
    importance_sampling_clip_max: float = Field(default=2.0, ge=1)
    """Cap of the correction (TRL: vllm_importance_sampling_clip_max)."""


class OptimConfig(Section):
    """AdamW with fp32 masters; the learning rate is a function of the step alone."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps both moments in 8 bits: 2 bytes instead of 8 per trained weight."""
    master: Literal["fp32", "kahan"] = "fp32"
    """With `lora.r: 0` in 16 bits: an fp32 copy of each weight, or (`kahan`) its rounding error in 16 bits."""
    learning_rate: float = Field(default=5e-5, gt=0)
    """Peak learning rate."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """What happens after the warm-up, until run.max_steps."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens per forward and backward pass; null: planned. Changes no gradient beyond float order."""
    checkpoint_layers: int | None = Field(default=None, ge=0)
    """Layers that keep only their input for backward and run again there; null: as few as the memory allows."""
    share_prompt: bool = True
    """Pass a group's prompt through the layers once instead of once per completion."""


class RunConfig(Section):
    """Where, how long, how often."""

    out: str | None = None
    """Run folder; null: runs/NAME of the config file."""
    max_steps: int = Field(default=100, ge=1)
    """Optimizer steps."""
    seed: int = Field(default=0, ge=0)
    """Every draw of the run follows from it."""
    save_steps: int = Field(default=20, ge=1)
    """Steps between checkpoints."""
    save_total_limit: int = Field(default=2, ge=1)
    """Newest checkpoints kept; older ones are removed."""
    save_best: bool = True
    """Keep the checkpoint with the best accuracy (else reward) over the last `monitor.window` steps as well."""
    eval_steps: int = Field(default=0, ge=0)
    """Steps between evaluations; 0: only before and after."""
    eval_num_problems: int = Field(default=100, ge=0)
    """Held-out problems per evaluation; 0 turns evaluation off."""
    eval_num_generations: int = Field(default=4, ge=1)
    """k: completions per held-out problem, for pass@1 and pass@k."""
    eval_temperature: float = Field(default=1.0, ge=0)
    """Temperature of evaluation; 0 is greedy (then k is 1)."""
    rollout_steps: int = Field(default=10, ge=0)
    """Steps between stored rollout files; 0: none."""
    threads: int = Field(default=0, ge=0)
    """CPU threads for torch and vLLM; 0: planned. Part of the promise of bit-equal resume."""
    vram_gib: float | None = Field(default=None, gt=0)
    """The one memory dial: GPU memory that the process may use; null: what is free. Unused on a CPU."""
    deterministic: bool = False
    """On a card: only kernels that give the same bits each time, so that a resumed run ends with the same bytes. Costs
    step time; on a CPU it is always so."""
    report_to: Annotated[tuple[Literal["tensorboard", "none"], ...], BeforeValidator(_names_as_tuple)] = (
        "tensorboard",
    )
    """Trackers: `tensorboard`, or `none`."""
    stall_warning_s: float = Field(default=60.0, gt=0)
    """Say so when no completion finished for this long."""

    @model_validator(mode="after")
    def _none_stands_alone(self) -> RunConfig:
        others = [name for name in self.report_to if name != "none"]
        if others and len(others) < len(self.report_to):
            raise ValueError(
                f"report_to: `none` stands beside {', '.join(others)}; trackers, or none alone, are needed"
            )
        return self


class MonitorConfig(Section):
    """What is watched while a run trains, and what happens when something is found; see docs/monitors.md."""

    action: MonitorAction = "warn"
    """What happens when a diagnosis reaches its act threshold: `warn` says so, `pause` writes a checkpoint and ends the
    run so that it can be resumed, `stop` does the same with an error."""
    actions: ActionByName = Field(default_factory=dict[DiagnosisName, MonitorChoice])
    """The same for single diagnoses, e.g. `truncated: pause`; `off` never mentions one."""
    thresholds: ThresholdsByName = Field(default_factory=dict[DiagnosisName, tuple[float, ...]])
    """Thresholds of single diagnoses as `[warn, act]`, e.g. `truncated: [0.2, 0.5]`."""
    window: int = Field(default=20, ge=2, le=1000)
    """Steps that are averaged; trends are taken over two and a half and five times as many."""
    canary_steps: int = Field(default=100, ge=0)
    """Steps between two checks that the reward functions still give sixteen stored completions the same verdicts; 0:
    never."""


class Config(Section):
    """A whole run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    rewards: RewardsConfig = Field(default_factory=RewardsConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    run: RunConfig = Field(default_factory=RunConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.rewards.weights and not self.rewards.funcs:
            raise ValueError(
                "rewards.weights is given while rewards.funcs is empty; the functions that the weights belong to have "
                "to be named in rewards.funcs, the task's own as well"
            )
        if self.rewards.weights and len(self.rewards.weights) != len(self.rewards.funcs):
            raise ValueError(
                f"rewards.weights has {len(self.rewards.weights)} values for {len(self.rewards.funcs)} functions; "
                "one weight per function is needed"
            )
        if self.rewards.weights and not any(w != 0 for w in self.rewards.weights):
            raise ValueError("every value of rewards.weights is 0, so nothing would be learned")
        if self.lora.r > 0 and not self.lora.target_modules:
            raise ValueError(
                f"lora.target_modules is empty while lora.r is {self.lora.r}; adapters need at least one layer's name "
                "(lora.r 0 trains all weights)"
            )
        if self.lora.init_from is not None and self.lora.r == 0:
            raise ValueError(
                "lora.init_from is set while lora.r is 0; an adapter to start from needs its rank in lora.r"
            )
        plain = {"none", "16bit", "card", "require", "auto"}
        for key in ("quantization", "head", "embedding", "share_weights") if self.lora.r == 0 else ():
            given = getattr(self.model, key)
            if given not in plain:
                raise ValueError(
                    f"model.{key} is {given} while lora.r is 0, which trains all weights; packed or copied weights "
                    "cannot be trained themselves, so adapters are needed (lora.r 16)"
                )
        if self.optim.master == "kahan" and self.lora.r > 0:
            raise ValueError(
                f"optim.master is kahan while lora.r is {self.lora.r}; adapters are fp32 and their own masters, so "
                "fp32 is needed (kahan is for lora.r 0)"
            )
        if self.objective.mask_truncated_completions and self.rollout.max_completion_length < 2:
            raise ValueError("with max_completion_length 1 every completion is truncated and would be masked")
        return self
