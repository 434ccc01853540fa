"""The packed policy against transformers' own forward pass, adapters against peft, AdamW against torch."""

from __future__ import annotations

import random
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from records import random_samples, rollout, sample
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from strop.errors import ModelError
from strop.objective.packing import MICRO_BATCH_TOKENS, pack
from strop.policy import lora
from strop.policy.logprobs import token_logprobs
from strop.policy.optim import MasterAdamW
from strop.policy.policy import Policy, check_packed_forward
from strop.types import MicroBatch, Sample

VOCAB = 61
SIZE = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "eos_token_id": 1, "pad_token_id": 0,
    "bos_token_id": None,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZE),
    "qwen2": lambda: Qwen2Config(**{k: v for k, v in SIZE.items() if k != "head_dim"}),
    "qwen3": lambda: Qwen3Config(**SIZE, tie_word_embeddings=True),
    "mistral-window": lambda: MistralConfig(**SIZE, sliding_window=7),
    "gemma": lambda: GemmaConfig(**SIZE),
    "gemma3-window": lambda: Gemma3TextConfig(
        **SIZE, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
}
SHAPES = {"prompts": [9, 4, 13], "lengths": [[6, 1, 8], [5, 12], [3, 7, 2]]}


def model(kind: str = "llama", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(3)
    config: PretrainedConfig = CONFIGS[kind]()
    built = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    with torch.no_grad():  # so that attention and norms matter
        for p in built.parameters():
            p.add_(0.15 * torch.randn_like(p))
    return built


def samples(seed: int = 0) -> list[Sample]:
    return random_samples(seed, vocab=VOCAB, **SHAPES)


def plain_logprobs(net: torch.nn.Module, items: list[Sample], temperature: float) -> list[torch.Tensor]:
    """One full, unpadded sequence at a time through transformers' ordinary causal forward pass."""
    result = []
    for s in items:
        r = s.scored.rollout
        ids = torch.tensor([r.problem.prompt_token_ids + r.completion_token_ids])
        logits = net(input_ids=ids).logits[0].float() / temperature
        logp = torch.log_softmax(logits[:-1], -1).gather(1, ids[0, 1:, None]).squeeze(1)
        result.append(logp[len(r.problem.prompt_token_ids) - 1 :])
    return result


def gradients(policy: Policy, batches: list[MicroBatch]) -> dict[str, torch.Tensor]:
    policy.model.zero_grad()
    for b in batches:
        logp, _ = policy.forward(b)
        (logp * b.advantages_K * b.weights_K).sum().backward()
    return {n: p.grad.clone() for n, p in policy.trainable.items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 2e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= tolerance * (a[name].norm() + 1e-6), name


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("share", [True, False])
def test_packed_logprobs_and_gradients_equal_one_plain_pass_per_sequence(kind: str, share: bool) -> None:
    net, items = model(kind), samples()
    expected = plain_logprobs(net, items, 0.7)
    weighted = sum((logp * s.advantage * s.token_weight).sum() for logp, s in zip(expected, items, strict=True))
    weighted.backward()
    expected_grads = {n: p.grad.clone() for n, p in net.named_parameters()}
    policy = Policy(net, 0.7)
    batches = pack(items, 1000, share_prompt=share)
    assert len(batches) == 1
    torch.testing.assert_close(policy.forward(batches[0])[0], torch.cat(expected).detach(), rtol=1e-5, atol=2e-5)
    assert_same(gradients(policy, batches), expected_grads)


@pytest.mark.parametrize("budget", [14, 30, 45])
@pytest.mark.parametrize("share", [True, False])
def test_splitting_into_micro_batches_changes_no_gradient(budget: int, share: bool) -> None:
    policy, items = Policy(model(), 1.0), samples(1)
    whole = gradients(policy, pack(items, 10_000))
    batches = pack(items, budget, share_prompt=share)
    assert len(batches) > 1
    assert_same(gradients(policy, batches), whole)


def test_packing_counts_a_shared_prompt_once_and_keeps_the_budget() -> None:
    items = samples()
    shared, repeated = pack(items, 1000), pack(items, 1000, share_prompt=False)
    completion_tokens = sum(s.scored.rollout.num_completion_tokens - 1 for s in items)
    assert shared[0].num_tokens == sum(SHAPES["prompts"]) + completion_tokens
    assert repeated[0].num_tokens == sum(p * len(g) for p, g in zip(*SHAPES.values(), strict=True)) + completion_tokens
    split = pack(items, 20)
    assert all(b.num_tokens <= 20 for b in split)
    trained = torch.cat([b.target_ids_K for b in split])
    assert trained.tolist() == [t for s in items for t in s.scored.rollout.completion_token_ids]


def cost(batches: list[MicroBatch]) -> int:
    return sum(b.num_tokens + MICRO_BATCH_TOKENS for b in batches)


def cut_at(items: list[Sample], cuts: tuple[int, ...]) -> list[MicroBatch]:
    """Return the micro-batches of items cut at these places, whatever their size."""
    return [pack(items[a:b], 10**6)[0] for a, b in pairwise((0, *cuts, len(items)))]


@pytest.mark.parametrize("seed", range(3))
def test_no_other_cut_makes_fewer_tokens_and_micro_batches(seed: int) -> None:
    draw = random.Random(seed)
    prompts = [draw.choice([3, 200, 900]) for _ in range(3)]
    items = random_samples(
        seed, vocab=50, prompts=prompts, lengths=[[draw.randrange(100, 800) for _ in range(3)] for _ in prompts]
    )
    places = range(1, len(items))
    every = [cut_at(items, cuts) for n in range(len(items)) for cuts in combinations(places, n)]
    for budget in (1_700, 2_500, 4_000):
        fitting = [cost(batches) for batches in every if all(b.num_tokens <= budget for b in batches)]
        assert fitting
        assert cost(pack(items, budget)) == min(fitting)


def test_a_group_with_a_long_prompt_is_not_split_for_a_fuller_micro_batch() -> None:
    items = random_samples(0, vocab=50, prompts=[400] * 4, lengths=[[101] * 8] * 4)
    assert [b.num_tokens for b in pack(items, 2_300)] == [1_200] * 4
    assert [b.num_tokens for b in pack(items, 2_400)] == [2_400] * 2


def test_tokens_outside_the_loss_mask_are_context_but_not_trained() -> None:
    policy = Policy(model(), 1.0)
    full = rollout([5, 6, 7], [8, 9, 10, 11])
    masked = rollout([5, 6, 7], [8, 9, 10, 11], loss_mask=[True, False, False, True])
    (a,), (b,) = pack([sample(full)], 100), pack([sample(masked)], 100)
    assert b.target_ids_K.tolist() == [8, 11]
    torch.testing.assert_close(policy.forward(b)[0], policy.forward(a)[0][[0, 3]])


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunked_logprobs_equal_log_softmax_with_gradients(rows: int, temperature: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(11, 7, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(31, 7).requires_grad_()
    targets = torch.randint(0, 31, (11,))
    mix = torch.randn(11)
    logits = hidden @ weight.t() / temperature
    reference = torch.log_softmax(logits, -1)
    entropy = -(reference.exp() * reference).sum(-1)
    (reference.gather(1, targets[:, None]).squeeze(1) * mix).sum().backward()
    expected = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    logp, ours_entropy = token_logprobs(hidden, weight, targets, temperature=temperature, rows=rows)
    (logp * mix).sum().backward()
    torch.testing.assert_close(logp, reference.gather(1, targets[:, None]).squeeze(1))
    torch.testing.assert_close(ours_entropy, entropy, rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(hidden.grad, expected[0])
    torch.testing.assert_close(weight.grad, expected[1])


def test_a_frozen_head_gets_no_gradient_and_bf16_stays_close() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(9, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(40, 16, dtype=torch.bfloat16)
    targets = torch.randint(0, 40, (9,))
    logp, _ = token_logprobs(hidden, weight, targets, rows=4)
    logp.sum().backward()
    exact = torch.log_softmax(hidden.detach().double() @ weight.double().t(), -1).gather(1, targets[:, None]).squeeze(1)
    assert logp.dtype == torch.float32
    assert (logp - exact).abs().max() < 0.05
    assert weight.grad is None
    assert hidden.grad.dtype == torch.bfloat16


TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def with_lora(net: torch.nn.Module, *, r: int = 4, alpha: float = 12.0, seed: int = 0) -> Policy:
    return Policy(net, 1.0, lora.inject(net, r=r, alpha=alpha, target_modules=TARGETS, seed=seed))


def shake(policy: Policy) -> None:
    torch.manual_seed(9)
    with torch.no_grad():
        for a in policy.adapters.values():
            a.lora_B.add_(0.1 * torch.randn_like(a.lora_B))


def test_the_saved_adapter_means_the_same_to_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    net = model("qwen3")
    policy = with_lora(net)
    shake(policy)
    ids = torch.randint(2, VOCAB, (2, 12))
    ours = net(input_ids=ids).logits
    lora.save_adapter(policy.adapters, tmp_path, base_model="somewhere")
    theirs = PeftModel.from_pretrained(model("qwen3"), str(tmp_path))(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    again = with_lora(model("qwen3"), seed=5)
    lora.load_adapter(again.adapters, tmp_path)
    torch.testing.assert_close(again.model(input_ids=ids).logits, ours, rtol=0, atol=0)


def test_loading_an_adapter_of_another_rank_or_scale_is_refused(tmp_path: Path) -> None:
    policy = with_lora(model())
    lora.save_adapter(policy.adapters, tmp_path, base_model="somewhere")
    with pytest.raises(ModelError, match="scaled by 3"):
        lora.load_adapter(with_lora(model(), r=4, alpha=4.0).adapters, tmp_path)
    with pytest.raises(ModelError, match=r"lora_A of shape \(4, 48\)"):
        lora.load_adapter(with_lora(model(), r=8, alpha=24.0).adapters, tmp_path)
    with pytest.raises(ModelError, match="does not have"):
        lora.inject(model(), r=4, alpha=1.0, target_modules=("q_porj",), seed=0)


def test_adapters_start_from_the_seed_and_the_name_and_change_nothing() -> None:
    a, b, c = (with_lora(model(), seed=s) for s in (0, 0, 1))
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(a.adapters[name].lora_A, b.adapters[name].lora_A)
    assert not torch.equal(a.adapters[name].lora_A, c.adapters[name].lora_A)
    assert not torch.equal(a.adapters[name].lora_A, a.adapters["model.layers.0.mlp.up_proj"].lora_A)
    ids = torch.randint(2, VOCAB, (1, 9))
    assert torch.equal(a.model(input_ids=ids).logits, model()(input_ids=ids).logits)
    assert set(a.trainable) == {f"{n}.lora_{x}" for n in a.adapters for x in "AB"}


def test_the_reference_is_the_policy_at_step_0() -> None:
    (batch,) = pack(samples(), 1000)
    zero_start = with_lora(model())
    before = zero_start.forward(batch)[0].detach()
    shake(zero_start)
    assert not torch.allclose(zero_start.forward(batch)[0], before)
    torch.testing.assert_close(zero_start.reference_logprobs(batch), before)

    warm_start = with_lora(model())
    shake(warm_start)
    warm_start.freeze_reference()
    before = warm_start.forward(batch)[0].detach()
    shake(warm_start)
    torch.testing.assert_close(warm_start.reference_logprobs(batch), before, rtol=0, atol=0)

    full = Policy(model(), 1.0)
    full.freeze_reference()
    before = full.forward(batch)[0].detach()
    storage = {n: p.data_ptr() for n, p in full.trainable.items()}
    with torch.no_grad():
        for p in full.trainable.values():
            p.mul_(1.1)
    torch.testing.assert_close(full.reference_logprobs(batch), before, rtol=0, atol=0)
    assert storage == {n: p.data_ptr() for n, p in full.trainable.items()}


def adamw(parameters: dict[str, torch.nn.Parameter], weight_decay: float = 0.1) -> MasterAdamW:
    return MasterAdamW(parameters, betas=(0.9, 0.99), eps=1e-8, weight_decay=weight_decay)


def test_adamw_equals_the_formula_and_spares_norms_from_decay() -> None:
    torch.manual_seed(0)
    parameters = {"w": torch.nn.Parameter(torch.randn(3, 4)), "norm": torch.nn.Parameter(torch.randn(4))}
    expected = {n: p.detach().double().clone() for n, p in parameters.items()}
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in expected.items()}
    optimizer = adamw(parameters)
    for t in range(1, 6):
        for name, p in parameters.items():
            p.grad = torch.randn_like(p)
            g = p.grad.double() * 0.5
            m, v = moments[name]
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.99).add_(0.01 * g * g)
            decay = 0.1 if name == "w" else 0.0
            expected[name] *= 1 - 0.02 * decay
            expected[name] -= 0.02 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
        optimizer.step(learning_rate=0.02, gradient_scale=0.5)
    for name, p in parameters.items():
        torch.testing.assert_close(p.detach(), expected[name].float(), rtol=1e-5, atol=1e-6)


def test_fp32_masters_keep_updates_that_bf16_would_lose() -> None:
    p = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = adamw({"w": p}, 0.0)
    for _ in range(400):
        p.grad = torch.ones_like(p)
        optimizer.step(learning_rate=1e-4, gradient_scale=1.0)
    assert torch.allclose(p.float(), torch.full((8,), 0.96), atol=4e-3)  # 400 x 1e-4; one bf16 step at 1 is 4e-3


def test_optimizer_state_survives_a_round_trip_bit_for_bit() -> None:
    torch.manual_seed(0)
    grads = [torch.randn(5, 3) for _ in range(6)]

    def run(stop: int | None) -> torch.Tensor:
        p = torch.nn.Parameter(torch.linspace(-1, 1, 15).view(5, 3))
        optimizer = adamw({"w": p})
        for t, g in enumerate(grads):
            if t == stop:
                state = {k: v.clone() for k, v in optimizer.state_dict().items()}
                p = torch.nn.Parameter(torch.zeros(5, 3))
                optimizer = adamw({"w": p})
                optimizer.load_state_dict(state)
            p.grad = g.clone()
            optimizer.step(learning_rate=0.01, gradient_scale=0.9)
        return p.detach()

    assert torch.equal(run(None), run(3))
    assert torch.equal(run(None), run(0))


def test_a_model_whose_logits_the_packed_pass_does_not_follow_is_refused() -> None:
    for kind in CONFIGS:
        check_packed_forward(Policy(model(kind), 0.7))
    granite = GraniteConfig(**SIZE, logits_scaling=4.0)
    odd = AutoModelForCausalLM.from_config(granite, dtype=torch.float32, attn_implementation="sdpa").eval()
    with pytest.raises(ModelError, match="type `granite`"):
        check_packed_forward(Policy(odd, 1.0))
    capped = Gemma2Config(**SIZE, final_logit_softcapping=None, attn_logit_softcapping=20.0)
    odd = AutoModelForCausalLM.from_config(capped, dtype=torch.float32, attn_implementation="sdpa").eval()
    with pytest.raises(ModelError, match="softcap"):
        check_packed_forward(Policy(odd, 1.0))
