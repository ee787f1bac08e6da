"""The training loop and the state it owns. Read `loop.py` first, then `step.py`."""
