"""What a validation says beside its mean: intervals, groups, the generalization gap, what it costs."""
