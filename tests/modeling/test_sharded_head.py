"""A head in parts: two ranks, each with half of the batch, train like one process, whatever engine holds the head."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import clean_tensor_name
from torch.nn.functional import logsigmoid

from support.allocations import LargeTensors, unseen_gathers
from support.models import tiny_classifier, tiny_model
from support.ranks import RankError, run_on_ranks
from trl_fast.data import pack_trees
from trl_fast.data.reward_modeling import reward_batch
from trl_fast.data.token_trees import Tree
from trl_fast.modeling import scoring
from trl_fast.modeling.classifier_head import attach_classifier_head, rewards
from trl_fast.modeling.lm_head import use_float32_head
from trl_fast.modeling.scoring import attach_scoring, score
from trl_fast.modeling.segment_attention import use_segment_attention
from trl_fast.ops.head import plan, transient_weight

RANKS, STEPS, ACCUMULATION = 2, 2, 2
# Divides the losses of a step, whatever its real number of tokens.
TOKENS = 40


def adapted(family: str = "llama", **config: object) -> torch.nn.Module:
    config = {"target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    model = tiny_model(family)
    attach_scoring(model)
    use_segment_attention(model)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**config))


def whole(family: str) -> torch.nn.Module:
    model = tiny_model(family)
    attach_scoring(model)
    use_segment_attention(model)
    return model


def classifier(saved: bool) -> torch.nn.Module:
    model = tiny_classifier()
    attach_classifier_head(model)
    use_segment_attention(model)
    if not saved:
        return model
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_CLS"))


HEADS: dict[str, Callable[[], torch.nn.Module]] = {
    "untied": lambda: whole("llama"),
    "tied": lambda: whole("qwen2"),
    "LoRA": adapted,
    "LoRA, tied": lambda: adapted("qwen2"),
    "saved head": lambda: adapted(modules_to_save=["lm_head"]),
    "LoRA on the head": lambda: adapted(target_modules=["q_proj", "lm_head"]),
    "reward": lambda: classifier(saved=False),
    "saved reward": lambda: classifier(saved=True),
}


def micro_batches(ranks: int, rank: int) -> Iterator[list[Tree]]:
    """The trees of each micro-batch: those of one rank, or of all."""
    rng = random.Random(0)
    for _ in range(STEPS * ACCUMULATION):
        parts = [
            [Tree(ids(rng, n), [ids(rng, n % 3 + 1), ids(rng, 4)]) for n in lengths] for lengths in ((3, 6), (2, 5))
        ]
        yield parts[rank] if ranks > 1 else [tree for part in parts for tree in part]


def ids(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, 340) for _ in range(length)]


def loss_of(model: torch.nn.Module, trees: list[Tree], head: str, kind: int) -> torch.Tensor:
    """A sum over the trees: by the gradient in forward, by that in backward, by groups; or of rewards."""
    if "reward" in head:
        pairs = [(tree.prompt_ids + tree.branches[0], tree.prompt_ids + tree.branches[1]) for tree in trees]
        chosen, rejected = rewards(model, reward_batch(pairs, "packed", 2)).view(-1, 2).unbind(1)
        return -logsigmoid(chosen - rejected).sum()
    batch = pack_trees(trees, "packed", 2)
    if kind == 0:
        found = score(model, batch, token_loss=lambda scores, rows: -scores.logprobs.sum()).loss
    elif kind == 1:
        tokens = score(model, batch, outputs=("logprobs", "entropy")).tokens
        found = -(tokens.logprobs + 0.1 * tokens.entropy).sum()
    else:
        sizes = tuple(batch.branch_lengths.tolist())
        groups = tuple(sum(pair) for pair in zip(sizes[::2], sizes[1::2], strict=True))
        found = score(
            model, batch, token_loss=lambda scores, rows: logsigmoid(-scores.logprobs).sum(), group_sizes=groups
        ).loss
    assert found is not None
    return found


def train(head: str) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Trains a model in the engine of the environment; loss and gradient norm of each step, and the weights."""
    AcceleratorState._reset_state(reset_partial_state=True)
    # Before DeepSpeed is there, which would share out weights as they are drawn: other ones in each process.
    model = HEADS[head]()
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION, cpu=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": ACCUMULATION,
            "gradient_clipping": 1e6,
            "zero_allow_untested_optimizer": True,
        }
    model, optimizer = accelerator.prepare(model, optimizer)
    ranks, steps, total = accelerator.num_processes, [], 0.0
    for number, trees in enumerate(micro_batches(ranks, accelerator.process_index)):
        with accelerator.accumulate(model):
            loss = loss_of(model, trees, head, number % 3) / TOKENS * ranks
            accelerator.backward(loss)
            total += float(accelerator.reduce(loss.detach(), "mean"))
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), 1e6)
                optimizer.step()
                optimizer.zero_grad()
                if plugin is not None:
                    norm = model.get_global_grad_norm()
                steps.append((total, float(norm)))
                total = 0.0
    return steps, weights_of(accelerator, model)


def weights_of(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole weights, on the first rank."""
    if isinstance(model, FullyShardedDataParallel):
        # Its state dict crashes on a CPU.
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {
                clean_tensor_name(name): weight.detach().clone()
                for name, weight in model.named_parameters(remove_duplicate=False)
            }
    weights = accelerator.get_state_dict(model) or {}
    return {name: weights[name].clone() for name in weights}


def train_all(heads: tuple[str, ...]) -> dict[str, tuple]:
    return {head: train(head) for head in heads}


@pytest.fixture(scope="module")
def one_process() -> dict[str, tuple]:
    return run_on_ranks(train_all, tuple(HEADS), ranks=1)[0]


QUICK = {
    "fsdp2": ("untied", "saved head", "LoRA on the head"),
    "fsdp1": ("untied", "saved head"),
}


@pytest.mark.parametrize("engine", QUICK)
def test_two_ranks_train_a_head_like_one_process(engine, one_process):
    assert_as_one_process(engine, QUICK[engine], one_process)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero3", "fsdp1", "ddp", "zero2"])
def test_two_ranks_train_every_head_like_one_process(engine, one_process):
    assert_as_one_process(engine, tuple(HEADS), one_process)


def assert_as_one_process(engine: str, heads: tuple[str, ...], one_process: dict[str, tuple]) -> None:
    """The loss and the gradient norm of every step, and the weights after the last, are those of one process."""
    ranks = run_on_ranks(train_all, heads, engine=engine)
    for head in heads:
        steps, weights = one_process[head]
        for rank in ranks:
            for found, expected in zip(rank[head][0], steps, strict=True):
                assert found == pytest.approx(expected, rel=5e-7), head
        assert ranks[0][head][1].keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(
                ranks[0][head][1][name],
                weight,
                rtol=0,
                atol=1e-6,
                msg=lambda m, case=f"{head}: {name}": f"{case}: {m}",
            )


MEASURED_VOCABULARY, WIDTH = 4096, 32


def measured_model(head: str) -> torch.nn.Module:
    """A model of a vocabulary whose head is by far the largest tensor; `whole` as above for other heads."""
    model = tiny_model("qwen2" if head == "tied" else "llama", vocab_size=MEASURED_VOCABULARY)
    attach_scoring(model)
    use_segment_attention(model)
    if head != "tied":
        model.get_input_embeddings().requires_grad_(False)
    if head == "saved head":
        return get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    if head == "LoRA on the head":
        return get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    if head == "frozen":
        return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    return model


def memory_of_head(head: str, keeps: bool = False) -> list[tuple[int, int]]:
    """Of each micro-batch: large tensors that are alive from forward to backward, and that the head makes in backward.

    keeps: whether the engine is to keep weights from forward to backward.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    plan.CPU_TILES = plan.CPU_TILES._replace(weight_bytes=600 * 4 * WIDTH)
    transient_weight.PIECE_BYTES = 500 * 4 * WIDTH
    model = measured_model(head)
    accelerator = Accelerator(cpu=True)
    if accelerator.state.deepspeed_plugin is not None:
        # Else it keeps what is used again soon, and weights of a hundred thousand numbers.
        distance = 10**9 if keeps else 0
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
        }
        accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"] |= {
            "stage3_max_reuse_distance": distance,
            "stage3_prefetch_bucket_size": distance,
            "stage3_param_persistence_threshold": 0,
        }
    else:
        accelerator.state.fsdp_plugin.reshard_after_forward = not keeps
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    model, _ = accelerator.prepare(model, optimizer)
    batch = pack_trees([Tree([5, 6], [[7, 8]])], "packed", 2)
    forward, found = LargeTensors(MEASURED_VOCABULARY * WIDTH), []
    for _ in range(3):
        with forward:
            loss = score(model, batch, token_loss=lambda scores, rows: -scores.logprobs.sum()).loss
        gc.collect()  # what is garbage is not kept
        alive, backward = forward.alive(), LargeTensors(MEASURED_VOCABULARY * WIDTH)
        with unseen_gathers(), backward:
            accelerator.backward(loss)
        found.append((alive, backward.made))
    return found


def memory_of_heads(heads: tuple[str, ...], keeps: bool = False) -> dict[str, list[tuple[int, int]]]:
    return {head: memory_of_head(head, keeps) for head in heads}


# What a head makes in backward that is as large as its weight: its sum with an adapter, once. That of a tied head, as
# the embeddings' gradient is, is not counted.
MADE = {"untied": 0, "LoRA on the head": 1, "saved head": 0, "frozen": 0, "tied": None}


@pytest.mark.parametrize(
    ("engine", "heads"),
    [
        ("fsdp2", ("untied", "LoRA on the head")),
        ("zero3", ("untied",)),
        pytest.param("fsdp2", ("saved head", "frozen", "tied"), marks=pytest.mark.slow),
        pytest.param("zero3", ("LoRA on the head", "saved head", "frozen", "tied"), marks=pytest.mark.slow),
    ],
)
def test_a_head_and_its_gradient_are_whole_in_no_rank_from_forward_to_backward(engine, heads):
    for found in run_on_ranks(memory_of_heads, heads, engine=engine):
        for head in heads:
            assert [alive for alive, _ in found[head]] == [0, 0, 0], head
            assert MADE[head] is None or [each for _, each in found[head]] == [MADE[head]] * 3, head


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_head_is_kept_for_backward_where_the_engine_is_told_to(engine):
    for found in run_on_ranks(memory_of_heads, ("untied",), True, engine=engine):
        assert found["untied"][-1][0] > 0


def float32_head(frozen: bool) -> None:
    """Trains a step with a float32 head in bfloat16, and compares what reaches the head with its weight.

    Nothing that is as large as the weight is left between forward and backward.
    """
    model = tiny_model()
    attach_scoring(model)
    use_float32_head(model)
    use_segment_attention(model)
    head = model.lm_head.weight.detach().clone()
    model.lm_head.requires_grad_(not frozen)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    model, _ = Accelerator(cpu=True).prepare(model, optimizer)
    seen = []
    original = scoring.token_logprobs

    def token_logprobs(*given):
        hidden, weight = given[:2]
        seen.append((hidden.dtype, weight.dtype, torch.equal(weight, head)))
        return original(*given)

    scoring.token_logprobs = token_logprobs
    with LargeTensors(head.numel()) as forward:
        tokens = score(
            model, pack_trees([Tree([5, 6], [[7, 8]])], "packed", 2), outputs=("logprobs", "entropy")
        ).tokens
    gc.collect()
    assert forward.made > forward.alive() == 0
    (tokens.logprobs.sum() + 0.1 * tokens.entropy.sum()).backward()
    assert seen == [(torch.float32, torch.float32, True)]
    assert not torch.equal(head, head.bfloat16().float())
    gradient = model.lm_head.weight.grad
    assert gradient is None if frozen else gradient.dtype == torch.float32 and gradient.full_tensor().norm() > 0


@pytest.mark.parametrize("frozen", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_float32_head_stays_float32_under_fsdp2_in_bfloat16(frozen):
    run_on_ranks(float32_head, frozen, engine="fsdp2", mixed_precision="bf16")


def test_an_engine_that_casts_a_float32_head_is_refused():
    with pytest.raises(RankError, match="cast_lm_head_to_fp32=True: the engine has made the head's weight torch.bf"):
        run_on_ranks(float32_head, False, engine="fsdp1", mixed_precision="bf16")
