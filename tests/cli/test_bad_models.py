"""Model folders that are missing, broken, foreign or dangerous: one line with folder, file or weight and remedy."""

import pytest

WEIGHT = "model.layers.1.mlp.up_proj.weight"
FOLDERS = {
    "nothing": ["there is no such folder"],
    "file.txt": ["it is a file; give the folder"],
    "empty": ["has no config.json", "save_pretrained"],
    "no_config": ["has no config.json", "save_pretrained"],
    "no_weights": ["model.safetensors"],
    "empty_config": ["config.json is empty"],
    "cut_config": ["config.json is no valid JSON, line 1"],
    "no_type": ["config.json has no model_type"],
    "unknown_type": ["`lama`"],
    "other_type": ["lack", "parameters", "random", "config.json"],
    "wider": ["has the shape", "by its config.json"],
    "heads": ["hidden size (32)", "attention heads (5)"],
    "smaller_vocabulary": ["has the shape [331, 32] in its files and [100, 32] by its config.json"],
    "deeper": ["lack", "parameters, first 'model.layers.2", "random"],
    "activation": ["swiish"],
    "remote": ["trust_remote_code=True"],
    "cut_weights": ["model.safetensors is no whole safetensors file", "copy it again"],
    "empty_weights": ["model.safetensors is empty"],
    "pointer": ["model.safetensors is a pointer of Git LFS", "git lfs pull"],
    "zero_weights": ["model.safetensors is no whole safetensors file"],
    "missing_weight": [f"lack 1 parameters, first '{WEIGHT}'", "random"],
    "shape": [f"{WEIGHT} has the shape [64, 16] in its files and [64, 32] by its config.json"],
    "nan": [f"1 parameters hold NaN or infinity, first '{WEIGHT}'", "checkpoint from before"],
    "infinite": [f"1 parameters hold NaN or infinity, first '{WEIGHT}'"],
    "foreign": ["lack 21 parameters"],
    "pickle": ["Python objects", "could run code", "save it as safetensors"],
    "cut_pickle": ["cannot be loaded", "corrupted"],
    "shards": ["model-00001-of-00002.safetensors"],
    "cut_index": ["model.safetensors.index.json is no valid JSON, line 1"],
    "no_tokenizer": ["no tokenizer can be loaded from"],
    "cut_tokenizer": ["tokenizer.json is no valid JSON, line 1"],
    "adapter": ["it is an adapter of '/no/such/base'", "AutoPeftModelForCausalLM"],
    "adapter_without_base": ["it is an adapter of None", "AutoPeftModelForCausalLM"],
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_bad_folder(name, refused):
    flags = "--dataset_name {data}/pairs.jsonl RUN"
    refused(f"dpo --model_name_or_path {{models}}/{name} {flags}", f"{{models}}/{name}", *FOLDERS[name])


OTHER_PLACES = [
    ("reward --model_name_or_path {models}/cut_weights --dataset_name {data}/pairs.jsonl RUN", "no whole safetensors"),
    ("reward --model_name_or_path {models}/deeper --dataset_name {data}/pairs.jsonl RUN", "lack"),
    ("reward --model_name_or_path {models}/nan --dataset_name {data}/pairs.jsonl RUN", "NaN or infinity"),
    (
        "sft --model_name_or_path {models}/bad_template --dataset_name {data}/chats.jsonl RUN",
        "row 0: the chat template",
    ),
    ("sft --model_name_or_path no/such-model --dataset_name {data}/texts.jsonl RUN", "'no/such-model'"),
    ("sft --model_name_or_path '' --dataset_name {data}/texts.jsonl RUN", "model_name_or_path is missing"),
    ("sft --dataset_name {data}/texts.jsonl RUN", "model_name_or_path is missing; give a hub name or a folder"),
    ("plan dpo --model_name_or_path {models}/cut_config RUN", "config.json"),
    ("plan dpo --model_name_or_path no-such-shape RUN", "no-such-shape"),
]
GRPO = "grpo --model_name_or_path {model} --dataset_name {data}/prompts.jsonl RUN --num_generations 2 "
PPO = "ppo --model_name_or_path {model} --dataset_name {data}/prompts.jsonl RUN "
OTHER_PLACES += [
    (f"{GRPO} --max_completion_length 9 --reward_model_name_or_path {{models}}/{name}", text)
    for name, text in {"nothing": "there is no such folder", "cut_weights": "no whole safetensors"}.items()
]
OTHER_PLACES += [
    (f"{PPO} --reward_model_path {{models}}/nothing", "there is no such folder"),
    (f"{PPO} --reward_model_path {{models}}/nan", "NaN or infinity"),
    (f"{PPO} --reward_model_path {{reward}} --sft_model_path {{models}}/nothing", "there is no such folder"),
    (f"{PPO} --reward_model_path {{reward}} --sft_model_path {{models}}/shape", "has the shape"),
]


@pytest.mark.parametrize("line, named", OTHER_PLACES, ids=[line for line, _ in OTHER_PLACES])
def test_other_places_of_models(line, named, refused):
    refused(line, named)
