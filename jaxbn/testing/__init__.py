"""Checks of your own model: batch splits, replicas, collectives, accuracy."""

from jaxbn.testing._collectives import KINDS, Collectives, Traffic, collectives
from jaxbn.testing._cost import SyncCost, group_costs, sync_cost
from jaxbn.testing._cost_model import LINKS, Cost
from jaxbn.testing._reference import Float64Reference, float64_reference
from jaxbn.testing._replicas import assert_synchronized
from jaxbn.testing._splits import assert_shard_invariant

__all__ = [
    "KINDS",
    "LINKS",
    "Collectives",
    "Cost",
    "Float64Reference",
    "SyncCost",
    "Traffic",
    "assert_shard_invariant",
    "assert_synchronized",
    "collectives",
    "float64_reference",
    "group_costs",
    "sync_cost",
]
