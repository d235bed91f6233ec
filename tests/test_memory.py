"""The memory table: counted allocations, and that the formed delta is the same computation."""

from __future__ import annotations

import torch

from npt.memory import (
    AllocationCounter,
    materialized_delta_bytes,
    measure_component,
    measure_materialized,
    memory_table,
)


def test_counter_sees_the_peak_of_live_storage() -> None:
    with AllocationCounter() as counter:
        a = torch.ones(1000)  # 4,000 bytes
        b = a + 1  # 8,000 alive
        del a
        c = b.view(10, 100) * 2  # 8,000 alive, the view is no storage of its own
        del b, c
        torch.ones(10)
    assert counter.peak == 8000


def test_formed_deltas_cost_hundreds_of_gigabytes_at_7b_shapes() -> None:
    one_block = materialized_delta_bytes(4096, 11008, batch=4, tokens=512)
    assert one_block == 4096 * 11008 * 3 * 4 * 512 * 4 > 500 * 2**30


def test_ours_stays_under_a_gigabyte_at_7b_shapes() -> None:
    """Measured on one block at the real shape: values of different blocks are never alive together."""
    assert measure_component(4096, 11008, tokens=4 * 512) < 2**30


def test_forming_the_delta_is_the_same_computation_and_much_larger() -> None:
    formed, difference = measure_materialized(128, 344, tokens=32)
    assert difference < 1e-4
    assert formed > 20 * measure_component(128, 344, tokens=32)


def test_the_table_has_both_sides() -> None:
    rows = {row.what: row for row in memory_table()}
    assert {row.how for row in rows.values()} == {"computed", "measured"}
    assert any("formed dW, 16 converted blocks" in what for what in rows)
