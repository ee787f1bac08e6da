"""What can be told of a prepared set: captions, tags, sizes, weights."""
