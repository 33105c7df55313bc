from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer


def reward_function(completions, **kwargs):
    return [len(completion[0]["content"].split()) for completion in completions]


training_args = GRPOConfig(output_dir="grpo", max_new_tokens=5, num_generations=4, num_train_epochs=1)
trainer = GRPOTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    reward_funcs=reward_function,
    args=training_args,
    train_dataset=load_dataset("trl-lib/ultrafeedback-prompt", split="train"),
)
trainer.train()
trainer.save_model("result")
