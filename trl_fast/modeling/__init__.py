"""Runs a Hugging Face model on a token batch: its layout, attention, head, checkpointing and reference policy."""
