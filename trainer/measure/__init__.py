"""What a run costs and how it goes: the plan before it starts, the records while it runs."""
