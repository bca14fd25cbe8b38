"""What every family shares: launching, row views, refusals, fixed-order sums. Knows no op."""
