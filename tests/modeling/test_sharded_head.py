"""A head in parts: two ranks, each with half of the batch, train like one process, whatever engine holds the head."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import clean_tensor_name
from torch.distributed.tensor import DTensor
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
from trl_fast.ops.head import plan, weight_shard

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


class LargestFloats(TorchDispatchMode):
    """Notes the largest number of floats that a tensor made within it has."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((args, kwargs))}
        for tensor in tensors_in(made):
            if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


def tensors_in(values: object) -> list[torch.Tensor]:
    """The tensors among values, but for DTensors, whose local parts are seen on their own."""
    return [each for each in tree_leaves(values) if type(each) in (torch.Tensor, torch.nn.Parameter)]


def largest_gradient(saved: bool, vocabulary: int) -> int:
    """The floats of the largest tensor made from the first score of a token to the end of backward."""
    plan.CPU_TILES = plan.CPU_TILES._replace(tile_bytes=600 * 4 * 32)
    weight_shard.PIECE_BYTES = 500 * 4 * 32
    model = tiny_model(vocab_size=vocabulary)
    attach_scoring(model)
    use_segment_attention(model)
    model.get_input_embeddings().requires_grad_(False)
    if saved:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    model, _ = Accelerator(cpu=True).prepare(model, optimizer)
    # Its weight, which is as large as the head's, is not needed there.
    model.get_input_embeddings().set_unshard_in_backward(False)
    mode = LargestFloats()

    def token_loss(scores, rows):
        mode.__enter__()
        return -scores.logprobs.sum()

    batch = pack_trees([Tree([5, 6], [[7, 8]])], "packed", 2)
    with torch.no_grad():
        score(model, batch)
    assert all(isinstance(weight, DTensor) for name, weight in model.named_parameters() if "lm_head" in name)
    score(model, batch, token_loss=token_loss).loss.backward()
    mode.__exit__(None, None, None)
    trained = [p for name, p in model.named_parameters() if "lm_head" in name and p.requires_grad]
    assert [p.grad.to_local().shape for p in trained] == [(vocabulary // RANKS, 32)]
    return mode.largest


@pytest.mark.parametrize("saved", [pytest.param(False, marks=pytest.mark.slow), True])
def test_no_rank_of_fsdp2_holds_the_whole_gradient_of_a_head(saved):
    vocabulary = 4096
    for largest in run_on_ranks(largest_gradient, saved, vocabulary, engine="fsdp2"):
        assert largest == vocabulary // RANKS * 32


def float32_head(frozen: bool) -> None:
    """Trains a step with a float32 head in bfloat16, and compares what reaches the head with its weight."""
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
        seen.append(given[:2])
        return original(*given)

    scoring.token_logprobs = token_logprobs
    score(model, pack_trees([Tree([5, 6], [[7, 8]])], "packed", 2)).tokens.logprobs.sum().backward()
    [(hidden, weight)] = seen
    assert hidden.dtype == weight.dtype == torch.float32
    assert torch.equal(weight, head)
    assert not torch.equal(weight, head.bfloat16().float())
    gradient = model.lm_head.weight.grad
    assert gradient is None if frozen else gradient.dtype == torch.float32 and gradient.full_tensor().norm() > 0


@pytest.mark.parametrize("frozen", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_float32_head_stays_float32_under_fsdp2_in_bfloat16(frozen):
    run_on_ranks(float32_head, frozen, engine="fsdp2", mixed_precision="bf16")


def test_an_engine_that_casts_a_float32_head_is_refused():
    with pytest.raises(RankError, match="cast_lm_head_to_fp32=True: the engine has made the head's weight torch.bf"):
        run_on_ranks(float32_head, False, engine="fsdp1", mixed_precision="bf16")
