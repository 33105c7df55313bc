"""Flags with bad values, missing packages and wrong commands: one line with field, value and remedy, and status 2."""

import dataclasses
import shlex
import typing

import pytest

from support.missing_packages import hide_packages
from trl_fast.cli.main import main
from trl_fast.settings.ranges import range_of
from trl_fast.trainers.methods import METHODS

DPO = "dpo --model_name_or_path {model} --dataset_name {data}/pairs.jsonl RUN "
SFT = "sft --model_name_or_path {model} --dataset_name {data}/texts.jsonl RUN "
GRPO = (
    "grpo --model_name_or_path {model} --dataset_name {data}/prompts.jsonl RUN --num_generations 2 "
    "--max_completion_length 9 "
)
PPO = "ppo --model_name_or_path {model} --reward_model_path {reward} --dataset_name {data}/prompts.jsonl RUN "

VALUES = [
    (DPO + "--betta 0.1", ["unknown argument --betta; did you mean 'beta'?"]),
    (DPO + "--model m", ["unknown argument --model; did you mean 'model_name_or_path'?"]),
    (DPO + "--batch-size 2", ["unknown argument --batch-size; did you mean 'per_device_train_batch_size'?"]),
    (DPO + "--beta", ["--beta", "expected one argument"]),
    (DPO + "--beta abc", ["--beta", "'abc'"]),
    (DPO + "--beta 0.1 0.2", ["unexpected arguments 0.2"]),
    (DPO + "--beta=", ["--beta", "''"]),
    (DPO + "--learning_rate 1e", ["--learning_rate", "'1e'"]),
    (DPO + "--max_length 1.5", ["--max_length", "'1.5'"]),
    (DPO + "--data_seed x", ["--data_seed", "'x'"]),
    (DPO + "--bf16 maybe", ["--bf16", "maybe", "true/false"]),
    (DPO + "--fp16 --bf16 true", ["fp16 and bf16"]),
    (DPO + "--tf32 true", ["tf32"]),
    (DPO + "extra words", ["unexpected arguments extra"]),
    (DPO + "-x", ["unknown argument -x"]),
    (DPO + "--config", ["--config", "expected one argument"]),
    (DPO + "--loss_type sigmoyd", ["loss_type=['sigmoyd']", "did you mean 'sigmoid'?"]),
    (DPO + "--f_divergence_type js", ["f_divergence_type='js' is unknown", "js_divergence"]),
    (DPO + "--loss_type sigmoid ipo --loss_weights 1", ["loss_weights=[1.0] has 1 values for the 2 losses"]),
    (DPO + "--lr_scheduler_type cosin", ["--lr_scheduler_type", "'cosin'", "did you mean 'cosine'?"]),
    (DPO + "--optim adamw_torhc", ["--optim", "'adamw_torhc'", "did you mean 'adamw_torch'?"]),
    (DPO + "--save_strategy step", ["--save_strategy", "did you mean 'steps'?"]),
    (DPO + "--eval_strategy step", ["--eval_strategy", "did you mean 'steps'?"]),
    (DPO + "--logging_strategy step", ["--logging_strategy", "did you mean 'steps'?"]),
    (DPO + "--batch_layout packt", ["--batch_layout", "did you mean 'packed'?"]),
    (DPO + "--head_grad spars", ["--head_grad", "did you mean 'sparse'?"]),
    (DPO + "--head_backend cudaa", ["--head_backend", "did you mean 'cuda'?"]),
    (DPO + "--head_backend cuda", ["head_backend='cuda' cannot serve", "GPU", "leave it out"]),
    (DPO + "--head_backend triton", ["head_backend='triton' cannot serve", "leave it out"]),
    (DPO + "--dtype bf16", ["--dtype", "'bf16'", "did you mean 'bfloat16'?"]),
    (DPO + "--torch_dtype half", ["--torch_dtype", "'half'", "float16"]),
    (DPO + "--hub_strategy everytime", ["--hub_strategy", "did you mean 'every_save'?"]),
    (DPO + "--log_level loud", ["--log_level", "'loud'", "warning"]),
    (DPO + "--train_sampling_strategy x", ["--train_sampling_strategy", "'x'", "random"]),
    (DPO + "--truncation_mode keep_middle", ["--truncation_mode", "did you mean 'keep_end'?"]),
    (DPO + "--ddp_backend x", ["--ddp_backend", "'x'", "nccl"]),
    (DPO + "--torch_compile_backend inducter", ["torch_compile_backend='inducter'", "did you mean 'inductor'?"]),
    (DPO + "--parallelism_config x", ["--parallelism_config", "'x'"]),
    (DPO + "--fsdp full_shardd", ["fsdp", "full_shardd"]),
    (DPO + "--optim_args nonsense", ["optim_args: 'nonsense'", "name=value"]),
    (DPO + "--lr_scheduler_kwargs '{{\"num_cycle\": 1}}'", ["lr_scheduler_kwargs={{'num_cycle': 1}}", "'linear'"]),
    (DPO + "--lr_scheduler_kwargs x", ["lr_scheduler_kwargs: expected a map in JSON", "'x'"]),
    (DPO + "--lr_scheduler_kwargs '{{a: 1}}'", ["lr_scheduler_kwargs: no valid JSON at column 2", "double quotes"]),
    (DPO + "--gradient_checkpointing_kwargs nonsense", ["gradient_checkpointing_kwargs: expected a map in JSON"]),
    (DPO + "--model_init_kwargs nonsense", ["model_init_kwargs: expected a map in JSON", "'nonsense'"]),
    (DPO + "--model_init_kwargs [1]", ["model_init_kwargs: expected a map in JSON", "'[1]'"]),
    (DPO + "--accelerator_config x", ["accelerator_config: expected a map in JSON", "'x'"]),
    (DPO + "--accelerator_config {data}/words.json", ["accelerator_config: {data}/words.json, line 1: no valid JSON"]),
    (DPO + "--load_best_model_at_end", ["load_best_model_at_end", "strategy"]),
    (DPO + "--dataloader_prefetch_factor 2", ["dataloader_prefetch_factor", "dataloader_num_workers"]),
    (DPO + "--precompute_ref_log_probs --dataset_streaming", ["precompute_ref_log_probs=True", "stream"]),
    (DPO + "--sync_ref_model --precompute_ref_log_probs", ["sync_ref_model=True", "precompute_ref_log_probs=True"]),
    (DPO + "--use_peft --lora_target_modules no_proj", ["peft_config", "'no_proj'", "not found"]),
    (
        DPO + "--use_peft --lora_modules_to_save lm_heat",
        ["modules_to_save names 'lm_heat'", "'lm_head'?"],
    ),
    (DPO + "--use_peft --lora_task_type CAUSAL", ["'CAUSAL'", "CAUSAL_LM"]),
    (DPO + "--use_peft --lora_r 0", ["lora_r: expected an integer >= 1, got 0"]),
    (DPO + "--use_peft --lora_dropout 2", ["lora_dropout: expected a finite number in [0, 1], got 2.0"]),
    (DPO + "--load_in_8bit --load_in_4bit", ["load_in_8bit and load_in_4bit exclude each other"]),
    (DPO + "--load_in_4bit --bnb_4bit_quant_type nf5", ["--bnb_4bit_quant_type", "did you mean 'nf4'?"]),
    (DPO + "--output_dir {data}/pairs.jsonl", ["output_dir='{data}/pairs.jsonl' cannot be written to", "another"]),
    (DPO + "--output_dir /proc/x", ["output_dir='/proc/x' cannot be written to"]),
    (DPO + "--output_dir ''", ["output_dir='' cannot be written to"]),
    (DPO + "--resume_from_checkpoint true --output_dir {out}/new", ["resume_from_checkpoint", "{out}/new"]),
    (DPO + "--resume_from_checkpoint {out}/nothing", ["resume_from_checkpoint='{out}/nothing'", "no such folder"]),
    (DPO + "--resume_from_checkpoint {models}/empty", ["resume_from_checkpoint='{models}/empty'", "missing"]),
    (DPO + "--resume_from_checkpoint {data}/pairs.jsonl", ["resume_from_checkpoint='{data}/pairs.jsonl'", "True"]),
    (DPO + "--num_processes x", ["--num_processes", "'x'"]),
    (DPO + "--num_processes 0", ["--num_processes: expected an integer >= 1, got 0"]),
    (DPO + "--num_processes -1", ["--num_processes: expected an integer >= 1, got -1"]),
    (DPO + "--num_procesess 2", ["--num_procesess", "did you mean 'num_processes'?"]),
    (DPO + "--accelerate_config zero9", ["--accelerate_config zero9: expected a file or one of fsdp1"]),
    (DPO + "--accelerate_config {data}/pairs.jsonl", ["--accelerate_config {data}/pairs.jsonl", "accelerate config"]),
    (SFT + "--packing_strategy bfdd --packing", ["--packing_strategy", "did you mean 'bfd'?"]),
    (SFT + "--loss_type nl", ["--loss_type", "did you mean 'nll'?"]),
    (SFT + "--assistant_only_loss", ["assistant_only_loss=True needs conversations", "['text']"]),
    (SFT + "--completion_only_loss true", ["completion_only_loss=True", "'completion'", "['text']"]),
    (SFT + "--dataset_text_field content", ["['text']", "'content'"]),
    (SFT + "--eos_token <none>", ["eos_token='<none>'"]),
    (SFT + "--pad_token <none>", ["pad_token='<none>'"]),
    (SFT + "--chat_template_path {data}/nothing", ["chat_template_path='{data}/nothing'"]),
    (SFT + "--dataset_kwargs x", ["dataset_kwargs: expected a map in JSON"]),
    (SFT + "--pad_to_multiple_of x", ["pad_to_multiple_of: expected an integer >= 1", "'x'", "'auto'"]),
    (SFT + "--tiled_mlp x", ["tiled_mlp: expected an integer >= 1", "'x'"]),
    (GRPO, ["reward_funcs is missing", "reward_model_name_or_path"]),
    (GRPO + "--reward_funcs acuracy_reward", ["'acuracy_reward'", "did you mean 'accuracy_reward'?"]),
    (GRPO + "--reward_funcs no_such.function", ["'no_such.function'", "cannot be imported", "No module named"]),
    (GRPO + "--reward_funcs json.nothing", ["'json.nothing'", "cannot be imported", "no attribute 'nothing'"]),
    (GRPO + "--reward_funcs sys.path", ["'sys.path' is list and no function"]),
    (GRPO + "--reward_funcs .f", ["'.f'", "module.function"]),
    (GRPO + "--reward_funcs think_format_reward --num_generations 3", ["num_generations=3 does not divide"]),
    (GRPO + "--reward_funcs think_format_reward --num_generations 1", ["num_generations: expected an integer >= 2"]),
    (
        GRPO + "--reward_funcs think_format_reward --reward_weights 1 2",
        ["reward_weights", "got 2"],
    ),
    (GRPO + "--reward_funcs think_format_reward --loss_type gpro", ["--loss_type", "did you mean 'grpo'?"]),
    (GRPO + "--reward_funcs think_format_reward --vllm_mode servr", ["--vllm_mode", "did you mean 'server'?"]),
    (GRPO + "--reward_funcs think_format_reward --scale_rewards grop", ["--scale_rewards", "did you mean 'group'?"]),
    (GRPO + "--reward_funcs think_format_reward --generation_kwargs x", ["generation_kwargs: expected a map in JSON"]),
    (
        GRPO + "--reward_funcs think_format_reward --generation_kwargs '{{\"temprature\": 1}}'",
        ["generation_kwargs", "temprature"],
    ),
    (
        GRPO + "--reward_funcs think_format_reward --steps_per_generation 2 --generation_batch_size 2",
        ["generation_batch_size=2", "steps_per_generation=2"],
    ),
    ("rloo --model_name_or_path {model} --dataset_name {data}/prompts.jsonl RUN", ["reward_funcs is missing"]),
    (PPO + "--stop_token x", ["stop_token='x' is unknown; expected 'eos'"]),
    (PPO + "--kl_estimator k9", ["--kl_estimator", "'k9'", "k1"]),
]

PACKAGES = [
    ("--load_in_4bit", ["load_in_4bit=True needs bitsandbytes: `pip install 'trl-fast[qlora]'`"]),
    ("--load_in_8bit", ["load_in_8bit=True needs bitsandbytes: `pip install 'trl-fast[qlora]'`"]),
    ("--optim adamw_8bit", ["optim='adamw_8bit'", "pip install -U bitsandbytes"]),
    ("--optim paged_adamw_8bit", ["optim='paged_adamw_8bit'", "pip install -U bitsandbytes"]),
    ("--optim lion_32bit", ["optim='lion_32bit'", "pip install -U bitsandbytes"]),
    ("--optim galore_adamw --optim_target_modules q_proj", ["optim='galore_adamw'", "pip install"]),
    ("--optim lomo", ["optim='lomo'", "pip install lomo-optim"]),
    ("--optim grokadamw", ["optim='grokadamw'", "pip install grokadamw"]),
    ("--optim schedule_free_adamw", ["optim='schedule_free_adamw'", "pip install schedulefree"]),
    ("--optim adamw_torch_8bit", ["optim='adamw_torch_8bit'", "pip install torchao"]),
    ("--optim stable_adamw", ["optim='stable_adamw'", "pip install torch-optimi"]),
    ("--optim apollo_adamw --optim_target_modules q_proj", ["optim='apollo_adamw'", "pip install"]),
    ("--report_to wandb", ["report_to=['wandb']", "pip install wandb"]),
    ("--report_to tensorboard", ["report_to=['tensorboard']", "tensorboard to be installed"]),
    ("--report_to mlflow", ["report_to=['mlflow']", "pip install mlflow"]),
    ("--report_to wandbb", ["report_to='wandbb' is unknown", "did you mean 'wandb'?"]),
    ("--use_liger_kernel", ["use_liger_kernel=True needs liger-kernel: `pip install liger-kernel`"]),
    ("--deepspeed {data}/pairs.jsonl", ["deepspeed"]),
    ("--deepspeed '{{\"train_batch_size\": 2}}'", ["deepspeed=", "`pip install 'trl-fast[deepspeed]'`"]),
    ("--accelerate_config zero2", ["zero2.yaml needs deepspeed: `pip install 'trl-fast[deepspeed]'`"]),
    ("--attn_implementation kernels-community/x", ["pip install kernels"]),
    ("--attn_implementation xformers", ["xformers"]),
]

COMMANDS = [
    ("run", ["no script is named"]),
    ("run -m", ["no script is named"]),
    ("run {out}/nothing.py", ["there is no script '{out}/nothing.py'"]),
    ("run {data}/empty_folder", ["there is no script"]),
    ("run -m no_such_module", ["there is no module 'no_such_module'"]),
    ("run --num_processes x {out}/nothing.py", ["--num_processes", "'x'"]),
    ("run --num_procesess 2 {out}/nothing.py", ["--num_procesess", "did you mean 'num_processes'?"]),
    ("run --num_processes 2", ["no script is named after the launcher flags"]),
    ("env extra", ["takes no arguments, got extra"]),
    ("bench nothing", ["there is no benchmark 'nothing'"]),
    ("plan dpo RUN", ["model_name_or_path is missing"]),
    ("plan dopo RUN", ["'dopo'", "did you mean 'dpo'?"]),
    ("plan --betta 1", ["method '--betta' is unknown"]),
    ("plan dpo --model_name_or_path {model} RUN --max_length 1", ["max_length=1: expected at least 2"]),
    ("plan dpo --model_name_or_path {model} RUN --max_length x", ["--max_length", "'x'"]),
    ("plan dpo --model_name_or_path {model} RUN --gpu h100-79", ["'h100-79'", "did you mean 'h100-80'?"]),
    ("plan dpo --model_name_or_path {model} RUN --gpu_memory lots", ["'lots'"]),
    ("plan dpo --model_name_or_path {model} RUN --gpu_memory 80GBB", ["'80GBB'"]),
    ("plan dpo --model_name_or_path {model} RUN --gpu_memory=-1GiB", ["-1GiB"]),
    ("plan dpo --model_name_or_path {model} RUN --num_gpus 0", ["num_gpus"]),
    ("plan dpo --model_name_or_path {model} RUN --betta 1", ["--betta", "did you mean 'beta'?"]),
    ("plan dpo --model_name_or_path {model} RUN --tiled_mlp x", ["tiled_mlp", "'x'"]),
    ("plan dpo --model_name_or_path {model} RUN --prompt_tokens 2000", ["prompt_tokens=2000", "max_length=64"]),
    ("plan dpo --model_name_or_path {model} RUN --prompt_tokens=-1", ["prompt_tokens: expected an integer >= 0"]),
    ("plan dpo --model_name_or_path {model} RUN --use_peft --lora_r 0", ["lora_r: expected an integer >= 1"]),
    (
        "plan dpo --model_name_or_path {model} RUN --head_workspace_bytes 0",
        ["head_workspace_bytes: expected an integer >= 1"],
    ),
    (
        "plan dpo --model_name_or_path {model} RUN --plot {out}/nothing/plot.png",
        ["plot='{out}/nothing/plot.png'", "no such folder"],
    ),
]


@pytest.mark.parametrize(
    "line, named", VALUES, ids=[f"{line.split()[0]} {line.split(' RUN ')[-1]}" for line, _ in VALUES]
)
def test_a_bad_value(line, named, refused):
    refused(line, *named)


@pytest.mark.parametrize("flags, named", PACKAGES, ids=[flags for flags, _ in PACKAGES])
def test_a_missing_package(flags, named, refused, monkeypatch):
    hide_packages(monkeypatch, "deepspeed", "bitsandbytes")
    refused(DPO.replace("--report_to none", "") + flags, *named)


@pytest.mark.parametrize("line, named", COMMANDS, ids=[line for line, _ in COMMANDS])
def test_other_commands(line, named, refused):
    refused(line, *named)


@pytest.mark.parametrize("word, meant", [("dance", None), ("validat", "validate"), ("plann", "plan"), ("dopo", "dpo")])
def test_an_unknown_command(word, meant, capsys):
    assert main([word]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    hint = f"; did you mean {meant!r}?" if meant else "; trl-fast --help lists the commands"
    assert line.startswith(f"trl-fast: unknown command {word!r}{hint}")


def test_of_the_processes_of_a_machine_the_first_one_says_what_is_wrong(monkeypatch, capsys):
    for local_rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert main(["dpo", "--betta", "0.1"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == lines


def numbers(owner):
    """The fields of a config that a flag gives one number to, with their types."""
    hints = typing.get_type_hints(owner)
    for item in dataclasses.fields(owner):
        parts = {*typing.get_args(hints[item.name]), hints[item.name]}
        if parts & {int, float} and not parts & {str} and item.init and not range_of(owner, item.name).many:
            yield item.name, float if float in parts else int


def numbers_by_command():
    """The numbers of each command, with types and ranges, that no command before it has: others read them alike."""
    first = {}
    for method in METHODS.values():
        for name, kind in numbers(method.config_class()):
            first.setdefault((name, kind, range_of(method.config_class(), name)), method.name)
    return {command: [number for number, owner in first.items() if owner == command] for command in first.values()}


NUMBERS = numbers_by_command()


NO_NUMBERS = ("nan", "inf", "-1", "0")


@pytest.mark.parametrize("command", NUMBERS)
def test_every_number_of_every_command(command, refused):
    """A word, and one of nan, inf, -1 and 0 in turn, for each numeric flag: refused in one line that names the flag.

    Those of the four that are in the flag's range are passed over; tests/settings/test_ranges.py has all of them.
    """
    seen = 0
    for place, (name, kind, allowed) in enumerate(NUMBERS[command]):
        turn = place % len(NO_NUMBERS)
        bad = [value for value in NO_NUMBERS[turn:] + NO_NUMBERS[:turn] if not is_in(value, kind, allowed)]
        for value in (*bad[:1], "many"):
            refused(f"{command} --output_dir {{out}} --use_cpu --{name}={value}", name, value)
            seen += 1
    assert seen > (70 if command == "sft" else 0)


def is_in(value, kind, allowed):
    """Says whether a command line's word is in a flag's range."""
    if value in ("nan", "inf"):
        return kind is float and float(value) in allowed
    return kind(value) in allowed


def test_debug_shows_the_traceback_of_bad_input(places, monkeypatch, tmp_path):
    monkeypatch.delenv("TRL_FAST_DEBUG", raising=False)
    line = shlex.split(f"dpo --dataset_name {places['data']}/comma.jsonl --use_cpu --bf16 false")
    line += ["--model_name_or_path", places["model"]]
    line += ["--output_dir", str(tmp_path)]
    for words in ([*line, "--debug"], ["--debug", *line], [*line[:1], "--debug", *line[1:]]):
        with monkeypatch.context() as patch:
            patch.setenv("TRL_FAST_DEBUG", "")
            with pytest.raises(ValueError, match="line 4, column 16") as error:
                main(words)
        assert error.value.__cause__ is not None
    assert main(line) == 2
    monkeypatch.setenv("TRL_FAST_DEBUG", "1")
    with pytest.raises(ValueError, match="line 4"):
        main(line)


def test_transformers_own_debug_flag_is_training_s(refused):
    refused(f"{DPO} --debug underflow_overflow --beta nan", "beta: expected")


def test_a_fault_of_the_program_keeps_its_traceback(places, monkeypatch, tmp_path):
    line = shlex.split(f"dpo --dataset_name {places['data']}/pairs.jsonl --use_cpu --bf16 false")
    for fault in (lambda: [].wrong, lambda: 1 + "a", lambda: int("x"), lambda: {}["a"]):
        monkeypatch.setattr("trl_fast.cli.training.make_trainer", lambda *rest, fault=fault: fault())
        with pytest.raises((AttributeError, TypeError, ValueError, KeyError)):
            main([*line, "--output_dir", str(tmp_path)])
