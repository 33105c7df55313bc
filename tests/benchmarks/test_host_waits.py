"""Host waits: what counts as one and whose it is, and that a micro-batch of ours makes none.

With a GPU the same tests run on it; without one they run on the roofline's fake GPU.
"""

from __future__ import annotations

import pytest
import torch
from accelerate.utils import send_to_device
from peft import LoraConfig

import trl_fast
import trl_fast.data.packing as packing
from benchmarks.host_waits import AUTOGRAD, host_waits
from support.models import tiny_classifier, tiny_model
from support.tokenizer import build_tokenizer
from support.training import color_labels, color_pairs, make_trainer
from trl_fast.modeling.scoring import _token_counts
from trl_fast.modeling.segment_attention import LENGTHS_KEYWORD
from trl_fast.ops import linear_cross_entropy
from trl_fast.planning.fake_models import give_fake_memory

pytestmark = pytest.mark.gpu_code

CUDA = torch.device("cuda", 0)
ONES = [1, 2, 0]

# Waits of ours that have to be, by file and function, with the reason: none.
ALLOWED: dict[str, str] = {}


@pytest.fixture
def waits():
    with host_waits() as found:
        yield found


WAITING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "if": lambda x: 1 if x.max() > 0 else 0,
    "int": lambda x: int(x[0]),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "put by a mask": lambda x: torch.zeros_like(x).index_put_((x >= 0,), x),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(x),
    "tensor": lambda x: torch.tensor(3.0, device=x.device),
    "as_tensor": lambda x: torch.as_tensor([3], device=x.device),
    "new_tensor": lambda x: x.new_tensor([3]),
    "pageable": lambda x: torch.arange(3).to(x.device),
    "blocking from pinned": lambda x: torch.arange(3).pin_memory().to(x.device),
    "index from the CPU": lambda x: x[torch.tensor([0, 1])],
    "copy_": lambda x: x.copy_(torch.arange(3)),
}
FREE = {
    "arithmetic": lambda x: (x * 2 + 1).clamp(min=1).sum() / 3,
    "full": lambda x: torch.full((), 3.0, device=x.device),
    "new_full": lambda x: x.new_full((), 3),
    "where": lambda x: torch.where(x > 0, x, 0),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0),
    "a number put by a mask": lambda x: x.__setitem__(x > 0, 1),
    "a number put": lambda x: x.__setitem__(0, 1),
    "indices": lambda x: x[x],
    "repeats": lambda x: x.repeat_interleave(2),
    "repeat_interleave": lambda x: x.repeat_interleave(x, output_size=3),
    "pinned": lambda x: torch.arange(3).pin_memory().to(x.device, non_blocking=True),
    "on the CPU": lambda x: torch.arange(3).nonzero().sum().item(),
}


def numbers() -> torch.Tensor:
    """(3,) int64 on the GPU."""
    return torch.tensor(ONES).pin_memory().to(CUDA, non_blocking=True)


@pytest.mark.parametrize("call", WAITING.values(), ids=WAITING.keys())
def test_what_waits(waits, call):
    x = numbers()
    waits.clear()
    call(x)
    assert waits.waits
    place = f"{__file__.rpartition('/tests/')[2]}:{call.__code__.co_firstlineno} <lambda>"
    assert {wait.place.rpartition("tests/")[2] for wait in waits.waits} == {place}


@pytest.mark.parametrize("call", FREE.values(), ids=FREE.keys())
def test_what_does_not(waits, call):
    x = numbers()
    waits.clear()
    call(x)
    assert not waits.report()


def test_a_wait_is_of_whoever_asked(waits):
    """accelerate reads a number of ours: its wait. The line of ours that calls it has none."""
    x = numbers()
    waits.clear()
    send_to_device(x, "cpu")
    assert [wait.owner for wait in waits.waits] == ["accelerate"]


def test_a_backward_pass_has_an_owner_too(waits):
    """Of torch's own operators autograd, of a Function whoever wrote it."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            grad.sum().item()
            return 2 * grad

    x = numbers().float().requires_grad_()
    mask = x > 0
    rows = torch.where(mask, x, 0)[mask]
    waits.clear()
    rows.sum().backward()
    assert {wait.owner for wait in waits.waits} == {AUTOGRAD}
    waits.clear()
    Doubled.apply(x).sum().backward()
    if not torch.cuda.is_available():
        assert [wait.place.split()[-1] for wait in waits.waits] == ["backward"]
    assert len(waits.waits) == 1


# ---- our trainers


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def to_gpu(model: torch.nn.Module) -> None:
    """Moves a model to the GPU; to the fake one its shapes only."""
    if torch.cuda.is_available():
        model.to(CUDA)
    else:
        give_fake_memory(model.to("meta"), CUDA)


def trainer_of(method, tokenizer, folder, peft_config=None, **settings):
    rows = color_labels(8) if method == "KTO" else color_pairs(8)
    if method == "SFT":
        rows = rows.map(lambda row: {"text": row["prompt"] + row["chosen"]}, remove_columns=rows.column_names)
    arguments = {
        "model": (tiny_classifier if method == "Reward" else tiny_model)(vocab_size=len(tokenizer)).bfloat16(),
        "processing_class": tokenizer,
        "train_dataset": rows,
        "peft_config": peft_config,
    }
    if method != "Reward":
        settings = {"head_workspace_bytes": 1 << 20, **settings}
    trainer = make_trainer(trl_fast, folder, method=method, arguments=arguments, **settings)
    trainer.current_gradient_accumulation_steps = 2
    return trainer


def batches_of(trainer) -> list:
    """Two micro-batches, of different lengths, as a data loader's workers make them."""
    rows = [trainer.train_dataset[index] for index in range(8)]
    return [trainer.data_collator(part) for part in (rows[:3], rows[3:])]


def second_micro_batch(trainer, batches, waits) -> list[str]:
    """Places of our waits in the second of two micro-batches, on its way to the GPU and there."""
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None:
            to_gpu(model)
    for batch in batches:
        batch = batch.pin_memory()
        waits.clear()
        batch = send_to_device(batch, CUDA)
        loss = trainer.training_step(trainer.model, batch, trainer._get_num_items_in_batch([batch], CUDA))
    assert loss.device == CUDA
    found = waits.of("trl_fast", AUTOGRAD)
    return [wait.place for wait in found if _function(wait.place) not in ALLOWED]


def _function(place: str) -> str:
    """A place without its line's number."""
    file, _, rest = place.partition(":")
    return f"{file[file.find('trl_fast/') :]} {rest.split()[-1]}"


LORA = LoraConfig(target_modules="all-linear")
CASES = {
    "SFT packed": ("SFT", {"batch_layout": "packed"}),
    "SFT padded": ("SFT", {"batch_layout": "padded"}),
    "SFT dft": ("SFT", {"loss_type": "dft", "gradient_checkpointing": False}),
    "DPO shared_prefix": ("DPO", {"batch_layout": "shared_prefix"}),
    "DPO packed": ("DPO", {"batch_layout": "packed", "loss_type": ["ipo", "sft"], "gradient_checkpointing": False}),
    "DPO padded": ("DPO", {"batch_layout": "padded", "use_weighting": True, "ld_alpha": 0.5}),
    "DPO with an adapter": ("DPO", {"peft_config": LORA}),
    "DPO precomputed": ("DPO", {"precompute_ref_log_probs": True}),
    "DPO of a whole batch": ("DPO", {"loss_type": "aot"}),
    "KTO": ("KTO", {}),
    "Reward": ("Reward", {}),
}


@pytest.mark.parametrize(("method", "settings"), CASES.values(), ids=CASES.keys())
def test_a_micro_batch_waits_for_nothing_of_ours(method, settings, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    trainer = trainer_of(method, tokenizer, tmp_path, **settings)
    batches = batches_of(trainer)
    with host_waits() as waits:
        assert second_micro_batch(trainer, batches, waits) == []


def test_a_batch_that_is_not_pinned_is_sent_all_the_same(waits):
    tree = packing.Tree(list(range(3, 30)), [[1, 2], [3]])
    batch = packing.pack_trees([tree], "shared_prefix", 0)
    batch.to(CUDA)
    assert not waits.report()


def test_counts_of_a_routers_tokens_are_sent(waits):
    lengths, mask = ((18, 3, 5), (4,)), torch.zeros(1, 1, 1, 1, device=CUDA)
    waits.clear()
    counts = _token_counts({LENGTHS_KEYWORD: lengths, "attention_mask": mask})
    assert counts.shape == (1, 30) and counts.device == CUDA
    assert not waits.report()


@pytest.mark.parametrize("ignored", [0, 2])
def test_cross_entropy_counts_its_rows_once(ignored, waits):
    hidden, weight = (torch.ones(rows, 8, device=CUDA, requires_grad=True) for rows in (6, 11))
    targets = torch.full((6,), 3, device=CUDA)
    targets[:ignored] = -100
    waits.clear()
    linear_cross_entropy(hidden, weight, targets, backend="torch").backward()
    assert len(waits.waits) == 1
    assert waits.waits[0].place.endswith("linear_cross_entropy")
