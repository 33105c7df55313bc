"""How a Hugging Face model runs on a token batch: attention over packed sequences, the head, the reference policy."""
