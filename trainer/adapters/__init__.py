"""LoRA and its kin: where they lie in the model, what they start from, what they change, and how files hold them."""
