"""Which rank holds what, how ranks are grouped, and how tensors travel between two of them."""
