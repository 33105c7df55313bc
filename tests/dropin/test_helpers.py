"""Holds the helpers that scripts import to the answers of TRL's."""

import asyncio
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trl.data_utils as their_data
import trl.import_utils as their_packages
import trl.trainer.utils as theirs
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import Qwen2Config, Qwen3MoeConfig, TrainingArguments

from support.models import tiny_model
from support.ranks import run_on_ranks
from support.tokenizer import build_tokenizer
from trl_fast.data.images import prepare_multimodal_messages, strip_images_from_messages
from trl_fast.dropin.helpers import callables, chat, formatting, models, packages, profiling, tensors, throughput
from trl_fast.dropin.helpers.completion_only import DataCollatorForCompletionOnlyLM
from trl_fast.dropin.helpers.trackers import generate_model_card
from trl_fast.lazy_imports import import_place

NAN = float("nan")
RAGGED = [torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([[7, 8]])]
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
VALUES = torch.tensor([[1.0, NAN, 3.0], [NAN, NAN, 5.0], [2.0, 4.0, NAN]])
BATCH = {"a": torch.arange(12).reshape(6, 2), "b": list("uvwxyz"), "none": None, "number": torch.tensor(3.0)}


def same(ours, expected):
    """Says whether two nested results are equal, tensors by value (NaN is NaN) and dtype."""
    if isinstance(expected, torch.Tensor):
        assert ours.dtype == expected.dtype
        return torch.equal(ours.nan_to_num(7.25), expected.nan_to_num(7.25)) and ours.shape == expected.shape
    if isinstance(expected, dict):
        return list(ours) == list(expected) and all(same(ours[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(ours) == len(expected) and all(map(same, ours, expected))
    return ours == expected


@pytest.mark.parametrize(
    "name, arguments, options",
    [
        ("pad", ([torch.tensor([1, 2, 3]), torch.tensor([4])],), {"padding_value": -1}),
        ("pad", (RAGGED,), {"padding_side": "left", "pad_to_multiple_of": 4}),
        ("pad", (RAGGED,), {"padding_side": "right", "pad_to_multiple_of": 3}),
        ("flush_left", (MASK,), {}),
        ("flush_left", (MASK, MASK + 5, MASK.float()), {}),
        ("nanstd", (VALUES,), {}),
        ("nanstd", (VALUES,), {"dim": 0}),
        ("nanstd", (VALUES,), {"dim": (0, 1), "keepdim": True}),
        ("nanstd", (VALUES,), {"dim": -1}),
        ("nanmin", (VALUES.flatten(),), {}),
        ("nanmax", (VALUES.flatten(),), {}),
        ("nanmax", (torch.tensor([NAN]),), {}),
        ("split_tensor_dict", (BATCH, 3), {}),
    ],
)
def test_tensors(name, arguments, options):
    assert same(getattr(tensors, name)(*arguments, **options), getattr(theirs, name)(*arguments, **options))


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_tensors_that_older_versions_had():
    from trl.experimental.utils import first_true_indices, pad_to_length, truncate_right

    assert same(tensors.pad_to_length(RAGGED[0], 5, -1, dim=0), pad_to_length(RAGGED[0], 5, -1, dim=0))
    assert same(tensors.pad_to_length(RAGGED[0], 2, -1, dim=0), RAGGED[0])
    bools = torch.tensor([[False, True, True], [False, False, False]])
    assert same(tensors.first_true_indices(bools), first_true_indices(bools))
    ids = torch.tensor([[5, 9, 6, 9], [5, 6, 7, 8]])
    assert same(tensors.truncate_right(ids, [9, 7], 0), truncate_right(ids, [9, 7], 0))
    assert tensors.truncate_response(9, 0, ids).tolist() == [[5, 9, 0, 0], [5, 6, 7, 8]]
    assert tensors.flush_right(MASK)[1].tolist() == [0, 1, 1]
    assert tensors.flatten_dict({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert tensors.exact_div(6, 3) == 2
    with pytest.raises(ValueError, match="batch, inexact division: 7 / 3"):
        tensors.exact_div(7, 3, "batch")


def test_masked_statistics():
    values, mask = torch.tensor([[1.0, 2.0, 50.0], [4.0, 9.0, 50.0]]), torch.tensor([[1, 1, 0], [1, 1, 0]])
    kept = values[mask.bool()]
    assert tensors.masked_mean(values, mask) == kept.mean()
    assert tensors.masked_mean(values, mask, 1).tolist() == [1.5, 6.5]
    assert torch.isclose(tensors.masked_var(values, mask), kept.var())
    whitened = tensors.masked_whiten(values, mask)[mask.bool()]
    assert torch.allclose(whitened, (kept - kept.mean()) / kept.std())
    shifted = tensors.masked_whiten(values, mask, shift_mean=False)[mask.bool()]
    assert torch.allclose(shifted, whitened + kept.mean())
    with pytest.raises(ValueError, match="the mask has no 1"):
        tensors.masked_var(values, mask * 0)


def test_a_shuffled_batch():
    torch.manual_seed(3)
    expected = theirs.shuffle_sequence_dict(BATCH)
    torch.manual_seed(3)
    assert same(tensors.shuffle_sequence_dict(BATCH), expected)


def test_entropies():
    logits = torch.randn(3, 50, 11)
    assert torch.equal(tensors.entropy_from_logits(logits, 7), theirs.entropy_from_logits(logits, 7))
    ours, expected = (
        import_place(f"{place}:entropy_from_logits")(logits.bfloat16())
        for place in ("trl_fast.dropin.helpers.tensors", "trl.trainer.utils")
    )
    assert same(ours, expected)


class Reward:
    async def __call__(self):
        return 1.0


def test_callables():
    for function in (len, functools.partial(functools.partial(sorted)), Reward(), asyncio.sleep):
        assert callables.get_callable_name(function) == theirs.get_callable_name(function)
        assert callables.is_async_callable(function) == theirs.is_async_callable(function)
    nested = [{"a": {"b": None, "c": [{"d": None, "e": 1}, 2]}, "f": None}]
    assert callables.remove_none_values(nested) == theirs.remove_none_values(nested)
    with pytest.raises(TypeError, match="got int"):
        callables.remove_none_values(3)
    thread, loop, ready = callables.start_event_loop_in_daemon("loop")
    assert ready.wait(5) and thread.name == "loop" and thread.daemon
    assert asyncio.run_coroutine_threadsafe(Reward()(), loop).result(5) == 1.0
    callables.shutdown_event_loop_in_daemon(thread, loop)
    assert not thread.is_alive()


def test_packages(monkeypatch):
    for name in vars(their_packages):
        if name.startswith("is_") and name.endswith("_available"):
            assert getattr(packages, name)() == getattr(their_packages, name)(), name
    assert packages.LIGER_KERNEL_MIN_VERSION == their_packages.LIGER_KERNEL_MIN_VERSION
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(packages, "version", lambda name: {"liger-kernel": "0.9.1"}[name])
    assert packages.is_liger_kernel_available()
    assert not packages.is_liger_kernel_available("0.10")


def test_models(monkeypatch):
    model = tiny_model()
    assert models.hash_module(model) == theirs.hash_module(model)
    assert models.hash_module(model.bfloat16()) == theirs.hash_module(model)
    assert models.get_config_model_id(model.config) == theirs.get_config_model_id(model.config)
    model.gradient_checkpointing_enable()
    with models.unwrap_model_for_generation(model, Accelerator(cpu=True)) as inner:
        assert inner is model and not model.is_gradient_checkpointing
    assert model.is_gradient_checkpointing
    for present, port in [("", 1234), ("4321", None), ("auto", 77), ("0", None)]:
        found = []
        for function in (models.ensure_master_addr_port, theirs.ensure_master_addr_port):
            monkeypatch.setenv("MASTER_PORT", present)
            monkeypatch.delenv("MASTER_ADDR", raising=False)
            function(port=port)
            found.append((models.os.environ["MASTER_ADDR"], models.os.environ["MASTER_PORT"]))
        assert found[0] == found[1]


def test_adapters_and_checkpointing(tmp_path):
    options = {"use_cpu": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(str(tmp_path), gradient_checkpointing=True, **options)
    model = models.prepare_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]), arguments)
    assert isinstance(model, PeftModel) and model.is_gradient_checkpointing
    plain = tiny_model()
    assert models.prepare_peft_model(plain, None, TrainingArguments(str(tmp_path), use_cpu=True)) is plain
    assert not plain.is_gradient_checkpointing


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_models_that_an_engine_shards(engine):
    """Frozen ones score as before, and one that trains is whole for a generation."""
    ids = torch.tensor([[5, 6, 7]])

    def two():
        model, frozen = tiny_model(), tiny_model()
        accelerator = Accelerator(cpu=True)
        if accelerator.state.deepspeed_plugin is not None:
            accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
        prepare = models.prepare_fsdp if engine == "fsdp2" else models.prepare_deepspeed
        policy, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
        with torch.no_grad():
            logits = prepare(frozen, accelerator)(ids).logits
        with models.unwrap_model_for_generation(policy, accelerator) as inner:
            # As many tokens as the process's number tells: no forward waits for the other process.
            made = inner.generate(ids, max_new_tokens=4 + accelerator.process_index, do_sample=False)
        return logits, made

    for rank, (logits, made) in enumerate(run_on_ranks(two, engine=engine)):
        torch.testing.assert_close(logits, tiny_model()(ids).logits.detach())
        assert torch.equal(made, tiny_model().generate(ids, max_new_tokens=4 + rank, do_sample=False))


def test_a_model_by_its_path(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    ours, expected = models.create_model_from_path(str(tmp_path)), theirs.create_model_from_path(str(tmp_path))
    assert type(ours) is type(expected) and ours.dtype == expected.dtype == torch.float32
    assert models.create_model_from_path(str(tmp_path), dtype="bfloat16").dtype == torch.bfloat16


def test_accuracy():
    predictions, labels = np.array([[2.0, 1.0], [0.0, 1.0], [1.0, 1.0]]), np.zeros(3, int)
    assert models.compute_accuracy((predictions, labels)) == {"accuracy": 0.5}


DENSE = Qwen2Config(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=99,
)
SPARSE = Qwen3MoeConfig(
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=99,
    decoder_sparse_step=2,
    num_experts=8,
    num_experts_per_tok=2,
)


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "experts"])
def test_throughput(config):
    assert throughput.compute_flops_per_token(config, 128) == theirs.compute_flops_per_token(config, 128)
    assert throughput.adjusted_mfu(40.0, config, 128) == theirs.adjusted_mfu(40.0, config, 128)


def test_peaks():
    assert throughput.compute_mfu(1000, 5e3, 2, 1e9) == theirs.compute_mfu(1000, 5e3, 2, 1e9)
    devices = [
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H100 NVL",
        "NVIDIA A10G",
        "Tesla T4",
        "AMD MI300X",
        "NVIDIA B2000",
        "x",
    ]
    for device in devices:
        for dtype in ("bfloat16", "float16", "float32"):
            assert throughput.get_peak_flops(device, dtype) == theirs.get_peak_flops(device, dtype), device


IMAGE = SimpleNamespace(size=(1, 1))
MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": None, "tool_calls": []},
    {"role": "user", "content": "v"},
]
PLACED = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]


@pytest.mark.parametrize("messages, images", [(MESSAGES, []), (MESSAGES, [IMAGE, IMAGE]), (PLACED, [IMAGE])])
def test_messages_of_parts(messages, images):
    expected = their_data.prepare_multimodal_messages(messages, images)
    assert prepare_multimodal_messages(messages, images) == expected
    assert strip_images_from_messages(expected) == theirs.strip_images_from_messages(expected)
    assert strip_images_from_messages("text") == "text"
    for ours, theirs_ in zip(chat.prepare_multimodal_messages_vllm(expected), expected, strict=True):
        kinds = [part["type"] for part in theirs_.get("content") or []]
        assert [part["type"] for part in ours.get("content") or []] == [
            {"image": "image_pil"}.get(k, k) for k in kinds
        ]
        assert all(part["image_pil"] is IMAGE for part in ours.get("content") or [] if part["type"] == "image_pil")


@pytest.mark.parametrize("messages, images", [(PLACED, []), ([{"role": "critic", "content": "c"}], [])])
def test_messages_of_parts_that_do_not_fit(messages, images):
    with pytest.raises(ValueError) as expected:
        their_data.prepare_multimodal_messages(messages, images)
    with pytest.raises(ValueError) as ours:
        prepare_multimodal_messages(messages, images)
    assert str(ours.value) == str(expected.value)


def test_a_table_of_completions(capsys):
    prompts = ["[bold]one", [{"role": "user", "content": "two"}]]
    completions = ["three", [{"role": "assistant", "content": [{"type": "text", "text": "four"}, {"type": "image"}]}]]
    chat.print_prompt_completions_sample(
        prompts, completions, {"len": [1.0, 2.0]}, [0.5, -0.5], 42, extra={"x": [7, 8]}
    )
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("Step 42", "[bold]one", "USER", "two", "four[IMAGE]", "-0.50", "2.00", "8"))
    chat.print_prompt_completions_sample(prompts, completions, {}, None, 1, num_samples=0)
    assert capsys.readouterr().out == ""


def test_profiling(monkeypatch):
    reported = []
    monkeypatch.setattr(profiling.ProfilingContext, "_report", lambda self, metrics: reported.append(metrics))

    class Trainer:
        state, args = SimpleNamespace(global_step=3), SimpleNamespace(report_to=["wandb"])
        accelerator = SimpleNamespace(is_main_process=True)

        @profiling.profiling_decorator
        def work(self, value):
            return value + 1

    assert Trainer().work(1) == 2
    with profiling.profiling_context(Trainer(), "block"):
        pass
    assert [list(metrics) for metrics in reported] == [
        ["profiling/Time taken: Trainer.work"],
        ["profiling/Time taken: Trainer.block"],
    ]


def test_formatting_functions():
    tokenizer = build_tokenizer()
    chats = Dataset.from_list([{"messages": [{"role": "user", "content": "a"}]}] * 2)
    render = formatting.get_formatting_func_from_dataset(chats, tokenizer)
    text = tokenizer.apply_chat_template(chats[0]["messages"], tokenize=False)
    assert render(chats[0]) == text and render(chats[:]) == [text, text]
    pairs = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    render = formatting.get_formatting_func_from_dataset(pairs, tokenizer)
    assert render(pairs[:]) == [render(pairs[0])] and "b" in render(pairs[0])
    assert formatting.get_formatting_func_from_dataset(Dataset.from_list([{"text": "a"}]), tokenizer) is None


@pytest.mark.filterwarnings("ignore:`DataCollatorForCompletionOnlyLM`")
@pytest.mark.parametrize(
    "text, instruction, learned",
    [
        ("Q: a A: b c", None, " b c"),
        ("Q: a A: b Q: c A: d", None, " d"),
        ("Q: a A: b Q: c A: d", "Q:", " b  d"),
        ("Q: a A: b Q: c", "Q:", " b "),
    ],
)
def test_completions_by_the_words_before_them(text, instruction, learned):
    tokenizer = build_tokenizer()
    collator = DataCollatorForCompletionOnlyLM("A:", instruction, tokenizer=tokenizer)
    rows = [{"input_ids": tokenizer(text)["input_ids"]}, {"input_ids": tokenizer("Q: A: x")["input_ids"]}]
    batch = collator(rows)
    labels = batch["labels"][0]
    assert tokenizer.decode(batch["input_ids"][0][labels != -100]) == learned
    assert torch.equal(labels[labels != -100], batch["input_ids"][0][labels != -100])


@pytest.mark.filterwarnings("ignore:`DataCollatorForCompletionOnlyLM`")
def test_a_row_without_an_answer_teaches_nothing():
    tokenizer = build_tokenizer()
    collator = DataCollatorForCompletionOnlyLM("A:", tokenizer=tokenizer)
    with pytest.warns(UserWarning, match="no response template 'A:' and teaches nothing: 'Q: a'"):
        batch = collator([{"input_ids": tokenizer("Q: a")["input_ids"]}])
    assert (batch["labels"] == -100).all()


def test_a_model_card():
    card = generate_model_card("base", "mine", "me/mine", "data", ["dpo"], "https://w", None, "DPO", comet_url=None)
    assert card.data.model_name == "mine" and "dpo" in card.data.tags and card.data.datasets == "data"
    assert "https://w" in card.text and "Comet" not in card.text


def test_configs_of_methods_that_are_gone():
    prm = import_place("trl_fast.dropin.helpers.older_arguments:PRMConfig")

    class Mine(prm):
        pass

    with pytest.raises(NotImplementedError, match="Mine: trl_fast does not have this method"):
        Mine(output_dir="x")
