from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import PPOConfig, PPOTrainer

tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct", padding_side="left")
value_model = AutoModelForSequenceClassification.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct", num_labels=1)
reward_model = AutoModelForSequenceClassification.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct", num_labels=1)
policy = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
ref_policy = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
dataset = load_dataset("trl-lib/ultrafeedback-prompt", split="train")


def tokenize(row):
    ids = tokenizer.apply_chat_template(row["prompt"], return_dict=True, add_generation_prompt=True)["input_ids"]
    return {"input_ids": ids, "lengths": len(ids)}


dataset = dataset.map(tokenize, remove_columns=dataset.column_names)
trainer = PPOTrainer(
    args=PPOConfig("ppo", stop_token="eos", missing_eos_penalty=1.0, num_ppo_epochs=1, response_length=5),
    processing_class=tokenizer,
    model=policy,
    ref_model=ref_policy,
    reward_model=reward_model,
    value_model=value_model,
    train_dataset=dataset,
    eval_dataset=dataset.select(range(4)),
)
trainer.train()
trainer.save_model("result")
trainer.generate_completions()
