"""Noise is fresh per record, call and process, standard normal, and exactly what the docstring derives."""

import copy
import inspect
import math
import os
import pickle
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from sfumato.trusted import stream
from sfumato.trusted.noise import Fresh

LIMIT = math.sqrt(66 * math.log(2))
KNOWN = (-0.81060648, -0.34141815)  # the first pair of the zero key
# RFC 8439, appendix A.1, test vector 1: key, counter and nonce all zero
RFC_BLOCK = (
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
)


def drawn(key: int, count: int) -> NDArray[np.float32]:
    """Noise of a known key, so that a statistic is the same on every run."""
    out = np.empty(count, np.float32)
    stream.fill(out, bytes([key]) * 32)
    return out


def box_muller(a: int, b: int) -> tuple[float, float]:
    """Slow and obvious."""
    r = math.sqrt(-2 * math.log((a + 0.5) / 2**32))
    t = 2 * math.pi * b / 2**32
    return r * math.cos(t), r * math.sin(t)


def test_keystream_is_chacha20_of_the_rfc() -> None:
    assert stream._keystream(bytes(32), 64).hex() == RFC_BLOCK


@pytest.mark.parametrize("a", [0, 1, 12345, 2**31, 2**32 - 1])
@pytest.mark.parametrize("b", [0, 2**30, 2**31 + 7, 2**32 - 1])
def test_transform_is_box_muller(a: int, b: int) -> None:
    r, t = stream._polar(np.array([a], np.uint32), np.array([b], np.uint32))
    got = [float(r[0] * np.cos(t[0])), float(r[0] * np.sin(t[0]))]
    np.testing.assert_allclose(got, box_muller(a, b), rtol=1e-6, atol=1e-5)
    assert np.abs(got).max() <= LIMIT * (1 + 1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 1000, 32771])
def test_a_key_gives_the_known_stream(count: int) -> None:
    pairs = -(-count // 2)
    words = np.frombuffer(stream._keystream(bytes([7]) * 32, 8 * pairs), "<u4").tolist()
    cosines, sines = zip(*(box_muller(words[i], words[pairs + i]) for i in range(pairs)), strict=True)
    np.testing.assert_allclose(drawn(7, count), [*cosines, *sines][:count], rtol=1e-6, atol=1e-5)


def test_known_answer_of_the_zero_key() -> None:
    a, b = (int.from_bytes(bytes.fromhex(RFC_BLOCK)[i : i + 4], "little") for i in (0, 4))
    np.testing.assert_allclose(drawn(0, 2), box_muller(a, b), rtol=1e-5)
    np.testing.assert_allclose(drawn(0, 2), KNOWN, rtol=1e-5)


def test_shapes() -> None:
    fresh = Fresh()
    for records, shape in ((1, (64, 32, 32)), (3, (5,)), (2, ()), (0, (4, 4)), (2, (0, 3)), (1, (8, 0, 0))):
        got = fresh.normals(records, shape)
        assert got.shape == (records, *shape) and got.dtype == torch.float32 and got.device.type == "cpu"
        assert bool(torch.isfinite(got).all())


def test_two_records_of_a_batch_share_nothing() -> None:
    batch = Fresh().normals(64, (50,)).numpy()
    assert len(np.unique(batch)) > 0.999 * batch.size
    assert len({row.tobytes() for row in batch}) == 64


def test_two_calls_share_nothing_whatever_the_seeds() -> None:
    seen = set()
    for fresh in (Fresh(), Fresh()):
        for _ in range(20):
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002 - the global one on purpose
            seen.add(fresh.normals(1, (16,)).numpy().tobytes())
    assert len(seen) == 40


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_processes_repeat_nothing() -> None:
    fresh = Fresh()
    seen = {fresh.normals(1, (16,)).numpy().tobytes()}
    for _ in range(4):
        out, into = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(into, fresh.normals(1, (16,)).numpy().tobytes())
            finally:
                os._exit(0)
        os.close(into)
        with os.fdopen(out, "rb") as pipe:
            seen.add(pipe.read())
        os.waitpid(child, 0)
        seen.add(fresh.normals(1, (16,)).numpy().tobytes())
    assert len(seen) == 9 and {len(block) for block in seen} == {64}


def test_threads_processes_and_pickled_copies_repeat_nothing() -> None:
    fresh = Fresh()
    with ThreadPoolExecutor(8) as pool:
        seen = {block.numpy().tobytes() for block in pool.map(lambda _: fresh.normals(1, (16,)), range(200))}
    copies = [pickle.loads(pickle.dumps(fresh)) for _ in range(3)] + [copy.deepcopy(fresh) for _ in range(3)]
    seen |= {one.normals(1, (16,)).numpy().tobytes() for one in copies}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        seen |= set(pool.map(_block, range(4)))
    assert len(seen) == 210


def _block(_: int) -> bytes:
    return Fresh().normals(1, (16,)).numpy().tobytes()


def test_nothing_lets_a_caller_choose_the_noise() -> None:
    assert not inspect.signature(Fresh).parameters
    assert list(inspect.signature(Fresh.normals).parameters) == ["self", "records", "shape"]


def test_normal_by_moments_and_kolmogorov_smirnov() -> None:
    x = drawn(1, 400_000).astype(float)
    n = x.size
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - moment) < 4 * math.sqrt(variance / n), power
    assert stats.kstest(x, "norm").pvalue > 1e-3


def test_fresh_noise_is_normal_too() -> None:
    x = Fresh().normals(4, (50_000,)).double().numpy().ravel()
    assert abs(x.mean()) < 7 / math.sqrt(x.size) and abs(x.var() - 1) < 7 * math.sqrt(2 / x.size)
    assert stats.kstest(x, "norm").pvalue > 1e-9


def test_tails_are_those_of_a_normal_and_end_at_the_limit() -> None:
    x = np.abs(drawn(2, 4_000_000))
    for sigma in (3.0, 4.0, 4.5):
        want = 2 * stats.norm.sf(sigma) * x.size
        assert abs((x > sigma).sum() - want) < 4 * math.sqrt(want), sigma
    assert x.max() <= LIMIT


def independent(x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
    """p of the chi-square test of independence on an 8 x 8 table of equally likely cells."""
    cells = [np.digitize(values, np.quantile(values, np.arange(1, 8) / 8)) for values in (x, y)]
    table = np.zeros((8, 8))
    np.add.at(table, tuple(cells), 1)
    return float(stats.chi2_contingency(table).pvalue)


def test_elements_are_independent() -> None:
    x, other = drawn(3, 200_000), drawn(4, 200_000)
    half = x.size // 2
    assert independent(x[:half], x[half:]) > 1e-3  # the two of a pair
    assert independent(np.abs(x[:half]), x[half:]) > 1e-3  # and their magnitudes
    assert independent(x[0::2], x[1::2]) > 1e-3  # neighbours
    assert independent(x[: half - 1], x[half + 1 :]) > 1e-3  # of two pairs
    assert independent(x, other) > 1e-3  # two records
    assert independent(x, x) < 1e-9  # the test itself can fail


def test_fast_enough_for_a_frame() -> None:
    fresh, spent = Fresh(), []
    for _ in range(7):
        start = time.perf_counter()
        fresh.normals(1, (64, 32, 32))
        spent.append(time.perf_counter() - start)
    assert min(spent) < 0.02  # .3 ms on one core of 2024; a busy one takes many times that
