"""Parts that the trainers of all methods share."""
