from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig, KTOTrainer

model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
dataset = load_dataset("trl-lib/kto-mix-14k", split="train")

training_args = KTOConfig(output_dir="Qwen2-0.5B-KTO", desirable_weight=1.0, undesirable_weight=1.0, beta=0.1)
trainer = KTOTrainer(model=model, args=training_args, processing_class=tokenizer, train_dataset=dataset)
trainer.train()
trainer.save_model("result")
