"""From image folders to exactly ordered batches: prepare -> shards -> sampler -> loader."""
