"""From rows in the store to exactly ordered batches: buckets, sampler, reader processes, loader."""
