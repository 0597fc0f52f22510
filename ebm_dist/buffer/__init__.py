"""Shards of persistent chains: slots, leases, and the rules for starting and ageing chains."""
