"""The kinds of optimizers beside AdamW: the arithmetic of each as a rule, and the one engine that applies them."""
