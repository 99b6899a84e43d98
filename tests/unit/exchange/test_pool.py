"""The slot pool across Python threads; tests/c/test_pool.c goes into detail."""

from __future__ import annotations

import threading

from zmoe.native import Status, ffi, lib


def test_a_slot_released_by_another_thread_ends_a_wait() -> None:
    classes = ffi.new("zmoe_pool_class[]", [(64, 1)])
    out = ffi.new("zmoe_pool **")
    assert lib.zmoe_pool_create(classes, 1, 64, out) == Status.OK
    pool, slots = out[0], ffi.new("zmoe_slot *[]", 2)
    assert lib.zmoe_pool_acquire(pool, 64, 0, slots) == Status.OK
    assert lib.zmoe_pool_acquire(pool, 64, 0, slots + 1) == Status.POOL
    first = slots[0]
    # The wait below releases the GIL: otherwise the thread could never run.
    thread = threading.Thread(target=lib.zmoe_slot_release, args=(first,))
    thread.start()
    assert lib.zmoe_pool_acquire(pool, 64, 20_000_000, slots + 1) == Status.OK
    thread.join()
    assert slots[1] == first
    lib.zmoe_slot_release(slots[1])
    stats = ffi.new("zmoe_pool_stats *")
    lib.zmoe_pool_stats_get(pool, stats)
    assert (stats.acquired, stats.released, stats.exhausted) == (2, 2, 1)
    lib.zmoe_pool_destroy(pool)
