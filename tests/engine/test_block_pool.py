"""The block pool: both implementations, the same behaviour to the order of blocks and the text of errors."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from kvkeye import _host_py

try:
    from kvkeye import _host
except ImportError:
    _host = None

IMPLEMENTATIONS = [
    pytest.param("cpp", marks=pytest.mark.skipif(_host is None, reason="kvkeye._host was not built (no C++ compiler)")),
    "python",
]


@pytest.fixture(params=IMPLEMENTATIONS)
def pool_class(request):
    return _host.BlockPool if request.param == "cpp" else _host_py.BlockPool


def test_blocks_come_in_order_and_the_last_released_first(pool_class):
    pool = pool_class(4)
    assert pool.allocate(3) == [0, 1, 2]
    pool.release(0)
    pool.release(2)
    assert pool.allocate(2) == [2, 0]
    assert (pool.num_used, pool.num_free, pool.num_cached, pool.num_available) == (3, 1, 0, 1)
    pool.check()


def test_published_content_outlives_its_owner_and_is_found_again(pool_class):
    pool = pool_class(2)
    (block,) = pool.allocate(1)
    assert pool.publish(block, b"a")
    pool.release(block)
    assert (pool.num_cached, pool.num_free, pool.ref_count(block), pool.key_of(block)) == (1, 1, 0, b"a")
    assert pool.match([b"a", b"b"]) == [block]
    assert pool.ref_count(block) == 1 and pool.num_cached == 0
    assert pool.match([b"b", b"a"]) == []
    pool.check()


def test_eviction_takes_the_least_recently_used_and_forgets_it(pool_class):
    pool = pool_class(3)
    for block, key in zip(pool.allocate(3), (b"a", b"b", b"c")):
        pool.publish(block, key)
        pool.release(block)
    pool.release(pool.match([b"a"])[0])  # a is now the newest
    assert pool.allocate(2) == [2, 1]  # b and c were evicted, in that order
    assert pool.match([b"b"]) == [] and pool.match([b"c"]) == []
    assert pool.match([b"a"]) == [0]
    pool.check()


def test_free_blocks_are_used_before_anything_is_evicted(pool_class):
    pool = pool_class(3)
    (block,) = pool.allocate(1)
    pool.publish(block, b"a")
    pool.release(block)
    pool.allocate(2)
    assert pool.num_cached == 1 and pool.match([b"a"]) == [block]


def test_keys_are_bytes_not_text(pool_class):
    pool = pool_class(3)
    blocks = pool.allocate(3)
    for block, key in zip(blocks, (b"\x00", b"\x00\x00", b"\xff\xfe")):
        assert pool.publish(block, key)
        assert pool.key_of(block) == key
    assert pool.match([b"\x00\x00", b"\xff\xfe", b"\x00"]) == [1, 2, 0]


def test_a_second_owner_of_a_name_or_a_second_name_is_refused(pool_class):
    pool = pool_class(2)
    first, second = pool.allocate(2)
    assert pool.publish(first, b"a")
    assert not pool.publish(second, b"a")
    assert not pool.publish(first, b"b")
    assert pool.key_of(first) == b"a" and pool.key_of(second) is None
    pool.check()


def test_clear_forgets_content_but_not_owners(pool_class):
    pool = pool_class(3)
    first, second, _ = pool.allocate(3)
    pool.publish(first, b"a")
    pool.publish(second, b"b")
    pool.release(second)
    pool.clear()
    assert (pool.num_used, pool.num_free, pool.num_cached) == (2, 1, 0)
    assert pool.match([b"a"]) == [] and pool.ref_count(first) == 1
    pool.check()


MISUSE = [
    (lambda pool: pool.release(2), ValueError, "no owner"),
    (lambda pool: pool.retain(2), ValueError, "is free"),
    (lambda pool: pool.publish(2, b"a"), ValueError, "no owner"),
    (lambda pool: pool.allocate(4), RuntimeError, "asked for 4 blocks; 2 are available"),
    (lambda pool: pool.allocate(-1), ValueError, "at least 0"),
    (lambda pool: pool.ref_count(3), IndexError, "outside"),
    (lambda pool: pool.release(-1), IndexError, "outside"),
    (lambda pool: pool.key_of(10**12), IndexError, "outside"),
]


@pytest.mark.parametrize("misuse, error, words", MISUSE)
def test_misuse_raises_and_changes_nothing(pool_class, misuse, error, words):
    pool = pool_class(3)
    pool.allocate(1)
    with pytest.raises(error, match=words):
        misuse(pool)
    assert (pool.num_used, pool.num_free) == (1, 2)
    pool.check()


@pytest.mark.parametrize("num_blocks", [0, -1])
def test_an_empty_pool_is_refused(pool_class, num_blocks):
    with pytest.raises(ValueError, match="at least 1"):
        pool_class(num_blocks)


@pytest.mark.skipif(_host is None, reason="kvkeye._host was not built (no C++ compiler)")
@pytest.mark.parametrize("seed", range(5))
def test_native_and_python_agree_on_every_answer(seed):
    rng = random.Random(seed)
    pools = _host.BlockPool(12), _host_py.BlockPool(12)

    def both(name, *args):
        results = []
        for pool in pools:
            try:
                results.append(getattr(pool, name)(*args))
            except (ValueError, IndexError, RuntimeError) as error:
                results.append((type(error), str(error)))
        assert results[0] == results[1], (name, args)

    for _ in range(2000):
        keys = [rng.randbytes(1) + b"k" for _ in range(3)]
        name, args = rng.choice(
            [
                ("allocate", (rng.randrange(4),)),
                ("release", (rng.randrange(-1, 13),)),
                ("release", (rng.randrange(12),)),
                ("retain", (rng.randrange(12),)),
                ("publish", (rng.randrange(12), rng.choice(keys))),
                ("match", (keys,)),
                ("evict", (rng.randrange(2),)),
                ("key_of", (rng.randrange(13),)),
            ]
        )
        both(name, *args)
        for pool in pools:
            pool.check()
        assert [pools[0].ref_count(b) for b in range(12)] == [pools[1].ref_count(b) for b in range(12)]
        for count in ("num_free", "num_cached", "num_used", "num_available"):
            assert getattr(pools[0], count) == getattr(pools[1], count)
    both("clear")


def test_without_the_native_module_the_twin_takes_over_and_says_why():
    code = (
        "import sys; sys.modules['kvkeye._host'] = None\n"
        "from kvkeye import host, _host_py\n"
        "assert host.IMPLEMENTATION == 'python' and host.BlockPool is _host_py.BlockPool\n"
        "assert 'C++ compiler' in host.REASON"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
