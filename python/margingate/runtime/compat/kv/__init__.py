"""A request's K/V columns, the radix tree and the pools of slots that they are in."""
