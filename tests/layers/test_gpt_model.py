"""The Megatron-core model: packed documents, causality, layer kinds, weights, sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dash_megatron.config import Config, config_from_dict, load_config
from dash_megatron.config.flops import parameter_count
from dash_megatron.data.batches import pack_samples
from dash_megatron.layers import (
    DashCoreAttention,
    FullCoreAttention,
    build_model,
    init_weights,
    routing_means,
    self_attention,
)
from dash_megatron.layers import model as model_module
from dash_megatron.layers.core_attention import MAX_LOG_FACTOR
from dash_megatron.ops import dash_attention
from dash_megatron.ops.full import causal_attention
from dash_megatron.ops.rotary import split_and_rotate
from dash_megatron.training.adamw import parameter_groups
from dash_megatron.training.loss import token_losses

CONFIGS = Path(__file__).parents[2] / "configs"
VOCABULARY = 96

pytestmark = pytest.mark.usefixtures("single_process")

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def config_of(**sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "run_dir": "unused",
        "model": {"layers": 2, "hidden_size": 64, "heads": 4, "kv_heads": 2, "ffn_hidden_size": 96},
        "attention": {"chunk_size": 16},
        "data": {"seq_length": 128},
        "training": {"steps": 1, "global_batch": 1},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return config_from_dict(tree)


def model_of(config: Config, seed: int = 0) -> torch.nn.Module:
    model = build_model(config, VOCABULARY)
    init_weights(model, seed, config.model.init_std)
    with torch.no_grad():  # a router with something to say
        for module in model.modules():
            if isinstance(module, DashCoreAttention):
                module.summary_query.normal_()
    return model


def tokens_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def positions_of(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def cu_seqlens_of(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


@pytest.mark.parametrize("kind", ["dash", "full"])
def test_packed_documents_get_the_logits_they_would_get_alone(kind: str) -> None:
    model = model_of(config_of(attention={"kind": kind}))
    lengths = (37, 1, 70, 20)
    tokens = tokens_of(sum(lengths))
    packed = model(tokens, positions_of(*lengths), cu_seqlens=cu_seqlens_of(*lengths))
    documents = tokens.split(lengths, dim=1)
    alone = torch.cat([model(document, positions_of(document.shape[1])) for document in documents], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dash", "full"])
def test_changing_future_tokens_leaves_past_logits_alone(kind: str) -> None:
    model = model_of(config_of(attention={"kind": kind}))
    tokens, changed = tokens_of(100), tokens_of(100, seed=1)
    changed[:, :61] = tokens[:, :61]
    first, second = (model(x, positions_of(100)) for x in (tokens, changed))
    assert torch.equal(first[:, :61], second[:, :61])
    assert not torch.equal(first[:, 61:], second[:, 61:])


def test_megatron_warns_of_nothing_when_a_model_is_built(caplog: pytest.LogCaptureFixture) -> None:
    model_of(config_of())
    assert not caplog.records


def test_full_layers_choose_the_core_attention_of_each_layer() -> None:
    model = build_model(config_of(model={"layers": 4}, attention={"full_layers": [0, 2]}), VOCABULARY)
    kinds = [type(layer.self_attention.core_attention) for layer in model.decoder.layers]
    assert kinds == [FullCoreAttention, DashCoreAttention, FullCoreAttention, DashCoreAttention]


def test_the_dense_twin_has_no_summary_query_and_no_routing() -> None:
    model = model_of(config_of(attention={"kind": "full"}))
    model(tokens_of(50), positions_of(50))
    assert not [name for name, _ in model.named_parameters() if "summary_query" in name]
    assert routing_means(model) == {}


def test_summary_query_starts_at_zero_and_is_sharded_by_kv_head() -> None:
    config = config_of()
    model = build_model(config, VOCABULARY)
    init_weights(model, 0, 0.02)
    query = model.decoder.layers[0].self_attention.core_attention.summary_query
    assert query.shape == (2, 16)
    assert not query.any()
    assert (query.tensor_model_parallel, query.partition_dim) == (True, 0)


def test_learned_factors_stay_bounded_however_long_a_gradient_pulls() -> None:
    config = config_of(attention={"learned_scaling": 20.0})
    model = model_of(config)
    core = model.decoder.layers[1].self_attention.core_attention
    adam = torch.optim.AdamW(parameter_groups(model, config), lr=0.01)
    for _ in range(200):
        core.log_scaling.grad = torch.tensor([-1.0, 1e-3])
        adam.step()
    bound = MAX_LOG_FACTOR
    assert core.router.scaling_factor.log().tolist() == pytest.approx([bound, -bound], rel=1e-3)
    assert [group["weight_decay"] for group in parameter_groups(model_of(config_of()), config_of())] == [
        0.1,
        0.0,
    ]


def test_learned_scaling_starts_at_one_and_is_split_by_kv_head() -> None:
    constants = {"local_chunks": 1, "query_pool": 3}
    config = config_of(attention={"learned_scaling": 20.0, "scaling_factor": 3.0, **constants})
    model = model_of(config)
    assert sum(p.numel() for p in model.parameters()) == parameter_count(config, VOCABULARY)
    module = model.decoder.layers[1].self_attention.core_attention
    log = module.log_scaling
    assert (log.tensor_model_parallel, log.partition_dim) == (True, 0)
    assert log.tolist() == [0, 0]
    assert (
        build_model(config_of(), VOCABULARY).decoder.layers[1].self_attention.core_attention.log_scaling
        is None
    )
    with torch.no_grad():
        log.copy_(torch.tensor([0.025, -0.05]))
    q, k, v = torch.randn(90, 1, 4, 16), torch.randn(90, 1, 2, 16), torch.randn(90, 1, 2, 16)
    expected = dash_attention(
        *(x.transpose(0, 1) for x in (q, k, v)),
        module.summary_query,
        16,
        3 * (20 * log).exp(),
        **constants,
    )
    assert torch.equal(module(q, k, v, None), expected.transpose(0, 1).flatten(2))


def test_core_attention_is_the_public_op_with_the_configs_values() -> None:
    constants = {
        "chunk_size": 16,
        "scaling_factor": 3.0,
        "sigma": 1.5,
        "estimate_diagonal": False,
        "alpha": 1.7,
    }
    module = model_of(config_of(attention=constants)).decoder.layers[1].self_attention.core_attention
    q, k, v = torch.randn(90, 1, 4, 16), torch.randn(90, 1, 2, 16), torch.randn(90, 1, 2, 16)
    expected, routing = dash_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), module.summary_query, **constants, return_routing=True
    )
    found = module(q, k, v, None)
    assert torch.equal(found, expected.transpose(0, 1).flatten(2))
    assert module.routing.chunks_available == routing.chunks_available
    assert module.routing.chunks_selected == routing.chunks_selected.float().mean()


def test_full_attention_is_softmax_over_past_keys() -> None:
    module = model_of(config_of(attention={"kind": "full"})).decoder.layers[0].self_attention.core_attention
    q, k, v = torch.randn(40, 1, 4, 16), torch.randn(40, 1, 2, 16), torch.randn(40, 1, 2, 16)
    k_all, v_all = (x.repeat_interleave(2, dim=2) for x in (k, v))
    scores = torch.einsum("ibhd,jbhd->bhij", q, k_all) / 4
    weights = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).softmax(-1)
    expected = torch.einsum("bhij,jbhd->ibhd", weights, v_all).flatten(2)
    torch.testing.assert_close(module(q, k, v, None), expected)


def test_rope_turns_pairs_by_position_times_frequency() -> None:
    rotary = model_module.PackedRotaryEmbedding(head_dim=4, theta=100.0)
    turns = rotary(torch.tensor([[0, 1, 2, 0, 7]]))
    angles = torch.tensor([[p, p / 10] for p in (0, 1, 2, 0, 7)])[:, None]
    torch.testing.assert_close(turns, torch.stack([angles.cos(), angles.sin()]))


def test_only_relative_positions_matter_to_full_attention() -> None:
    model = model_of(config_of(attention={"kind": "full"}))
    tokens = tokens_of(60)
    torch.testing.assert_close(
        model(tokens, positions_of(60)), model(tokens, positions_of(60) + 1000), rtol=1e-3, atol=1e-4
    )
    assert not torch.allclose(model(tokens, positions_of(60)), model(tokens, positions_of(60) * 2), atol=1e-3)


def test_weights_depend_on_seed_and_name_only() -> None:
    small, large = model_of(config_of()), model_of(config_of(model={"layers": 3}))
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    assert torch.equal(small.get_parameter(name), large.get_parameter(name))
    other_layer = small.get_parameter(name.replace("1", "0"))
    assert not torch.equal(small.get_parameter(name), other_layer)
    assert not torch.equal(small.get_parameter(name), model_of(config_of(), seed=1).get_parameter(name))
    assert small.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.05)
    projection = small.get_parameter("decoder.layers.1.mlp.linear_fc2.weight")
    assert projection.std().item() == pytest.approx(0.02 / 2, rel=0.05)


def test_wide_heads_with_qk_norm_and_biases_build_and_run() -> None:
    config = config_of(model={"head_dim": 32, "qk_norm": True, "qkv_bias": True})
    model = model_of(config)
    assert model(tokens_of(40), positions_of(40)).shape == (1, 40, VOCABULARY)
    assert sum(p.numel() for p in model.parameters()) == parameter_count(config, VOCABULARY)
    biases = [value for name, value in model.named_parameters() if name.endswith("bias")]
    assert len(biases) == config.model.layers
    assert not any(bias.any() for bias in biases)


@pytest.mark.parametrize("projections", [False, True])
def test_heads_are_split_and_rotated_in_one_pass_unless_they_are_normed(
    projections: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(attention={"router_projections": projections, "pool_heads": True})
    model, tokens, positions = model_of(config), tokens_of(40), positions_of(40)
    in_one_pass = []
    monkeypatch.setattr(
        self_attention, "split_and_rotate", lambda *args: in_one_pass.append(1) or split_and_rotate(*args)
    )
    logits = model(tokens, positions)
    assert len(in_one_pass) == config.model.layers
    for module in model.modules():
        if isinstance(module, self_attention.SelfAttention):
            module.q_layernorm = module.k_layernorm = torch.nn.Identity()
    torch.testing.assert_close(model(tokens, positions), logits)
    assert len(in_one_pass) == config.model.layers


# Llama 3.2 1B and 3B and Llama 3.1 8B by their published counts, plus layers x kv heads x head dim of summary queries,
# and where a dense model goes on layers x kv heads of learned factors and layers x hidden size of rows of the router's projections
PARAMETERS = {
    "quickstart": 918_528,
    "60m_16k": 61_358_400,
    "125m_16k": 121_919_232,
    "350m_16k": 360_766_464,
    "1b_16k": 1_235_814_400 + 16 * 8 * 64,
    "continued_1b_64k": 1_235_814_400 + 16 * 8 * (64 + 1) + 16 * 2048 * (2 * 8 * 64),
    "3b_16k": 3_212_749_824 + 28 * 8 * 128,
    "8b_16k": 8_030_261_248 + 32 * 8 * 128,
    "8b_64k": 8_030_261_248 + 32 * 8 * 128,
    "8b_128k": 8_030_261_248 + 32 * 8 * 128,
    "8b_512k": 8_030_261_248 + 32 * 8 * 128,
    "finetune_quickstart": 918_528,
    "finetune_8b_16k": 8_030_261_248 + 32 * 8 * 128,
}


def test_every_config_has_its_size_listed_here() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(PARAMETERS)


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_configs_build_with_their_parameter_count(name: str, parameters: int) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    vocab_size = config.model.vocab_size or 4096
    model = build_model(config, vocab_size, "meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert parameter_count(config, vocab_size) == parameters
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("told", [True, False], ids=["told", "not-told"])
def test_attention_gets_the_longest_document_of_the_batch(
    told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = []
    attend = FullCoreAttention._attend_here

    def spy(self: Any, q: Any, k: Any, v: Any, packed: Any) -> Any:
        bounds.append((packed.max_seqlen_q, packed.max_seqlen_kv))
        return attend(self, q, k, v, packed)

    monkeypatch.setattr(FullCoreAttention, "_attend_here", spy)
    model = model_of(config_of(attention={"kind": "full"}))
    eod = VOCABULARY - 1
    rows = [tokens_of(65, seed).clamp_max(eod - 1)[0] for seed in range(2)]
    rows[0][40] = eod
    batch = pack_samples([{"tokens": row[:-1], "labels": row[1:]} for row in rows], eod)
    for _ in range(2):
        if told:
            token_losses(model, batch.to("cpu"))
        else:
            model(batch.tokens, batch.position_ids, batch.labels, batch.cu_seqlens)
    assert bounds == [(64, 64) if told else (128, 128)] * 4


@pytest.mark.parametrize(("ends_at", "packed"), [(None, False), (40, True)], ids=["whole", "cut"])
def test_full_attention_takes_rows_that_are_whole_documents_as_a_batch_of_rows(
    ends_at: int | None, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []

    def spy(q: torch.Tensor, *others: Any) -> torch.Tensor:
        shapes.append(q.shape[:2])
        return causal_attention(q, *others)

    monkeypatch.setattr("dash_megatron.layers.core_attention.causal_attention", spy)
    model = model_of(config_of(attention={"kind": "full"}))
    eod = VOCABULARY - 1
    rows = [tokens_of(65, seed).clamp_max(eod - 1)[0] for seed in range(2)]
    if ends_at is not None:
        rows[0][ends_at] = eod
    batch = pack_samples([{"tokens": row[:-1], "labels": row[1:]} for row in rows], eod)
    losses = token_losses(model, batch.to("cpu"))
    # where only a bound is known, all documents go through the packed implementation
    by_document = model(batch.tokens, batch.position_ids, batch.labels, batch.cu_seqlens)
    torch.testing.assert_close(losses, by_document)
    assert shapes == ([] if packed else [(2, 64)] * len(model.decoder.layers))


@NEEDS_CUDA
@pytest.mark.parametrize("kind", ["dash", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_gives_the_losses_and_gradients_of_the_cpu(kind: str, dtype: torch.dtype) -> None:
    model = model_of(config_of(model={"head_dim": 64}, attention={"kind": kind}))
    lengths = (37, 1, 70, 20)
    inputs = tokens_of(128), positions_of(*lengths), tokens_of(128, seed=1), cu_seqlens_of(*lengths)
    weight = torch.rand(1, 128, generator=torch.Generator().manual_seed(0))
    loss = model(*inputs, loss_weight=weight)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    # float32 sums in another order (and tf32 is off); bf16 has 8 bits of mantissa
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    model = model.to("cuda", dtype)
    cuda_loss = model(*(tensor.cuda() for tensor in inputs), loss_weight=weight.cuda())
    assert cuda_loss.item() == pytest.approx(loss.item(), rel=tolerance)
    found = torch.autograd.grad(cuda_loss, list(model.parameters()))
    for (name, _), one, other in zip(model.named_parameters(), gradients, found, strict=True):
        assert (other.cpu().float() - one).norm() <= tolerance * one.norm(), name


@NEEDS_CUDA
def test_a_cuda_graph_of_training_steps_learns_as_eager_steps_do() -> None:
    """Forward, backward and update are captured on one batch and replayed on others, with other documents."""
    config = config_of(model={"head_dim": 64})
    steps = [(lengths, *(tokens_of(512, seed=s + 10 * i) for s in (0, 1)))
             for i, lengths in enumerate([(37, 1, 400, 74), (512 - 3, 1, 1, 1), (128, 128, 128, 128)])]  # fmt: skip

    def inputs_of(
        lengths: tuple[int, ...], tokens: torch.Tensor, targets: torch.Tensor
    ) -> list[torch.Tensor]:
        return [x.cuda() for x in (tokens, positions_of(*lengths), targets, cu_seqlens_of(*lengths))]

    def train(graph: bool) -> list[torch.Tensor]:
        model = model_of(config).to("cuda", torch.bfloat16)
        parameters = list(model.parameters())
        static = inputs_of(*steps[0])
        weight = torch.full((1, 512), 1 / 512, device="cuda")

        def step() -> torch.Tensor:
            loss = model(*static, loss_weight=weight)
            with torch.no_grad():
                torch._foreach_add_(parameters, torch.autograd.grad(loss, parameters), alpha=-0.5)
            return loss.detach()

        weights = [x.detach().clone() for x in parameters]
        with torch.cuda.stream(torch.cuda.Stream()):
            step()  # compiles, and lets libraries make what they keep
        torch.cuda.synchronize()
        with torch.no_grad():
            torch._foreach_copy_(parameters, weights)
        replayed = torch.cuda.CUDAGraph()
        if graph:
            with torch.cuda.graph(replayed):
                loss = step()
        losses = []
        for values in steps * 4:
            torch._foreach_copy_(static, inputs_of(*values))
            if graph:
                replayed.replay()
            else:
                loss = step()
            losses.append(loss.clone())
        return losses

    eager, captured = train(graph=False), train(graph=True)
    assert eager[-1] < eager[0]
    for one, other in zip(eager, captured, strict=True):
        # sums through atomics differ in their order
        assert other.item() == pytest.approx(one.item(), rel=1e-2)
