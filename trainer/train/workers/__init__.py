"""What worker processes do beside training: prepare a data set, measure, judge weights."""
