"""From WebDataset shards to the tensors of one global step; order depends only on (seed, epoch, global index)."""
