"""The sampler: exact filters, right frequencies, same draws for the same seed, errors for what has no answer."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from woolly.errors import WoollyError
from woolly.sampling import Sampler, SamplingParams

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
VOCAB_SIZES = (1, 2, 31, 4096, 4097, 20_000)

finite_logits = hnp.arrays(
    np.float32,
    st.integers(1, 40),
    elements=st.one_of(st.floats(-50, 50, width=32), st.sampled_from([0.0, 1.0, -math.inf])),
).filter(lambda logits: bool(np.isfinite(logits).any()))


def sampler(**params):
    return Sampler(SamplingParams(**({"seed": 1} | params)))


def gaussian_logits(n, seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, n).astype(np.float32)


def reference_probabilities(logits, *, temperature, top_k, top_p, min_p):
    """The distribution that the chain draws from, step by step, in float64."""
    logits = logits.astype(np.float64)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k:
        order = order[:top_k]

    def softmax(kept, divisor=1.0):
        weights = np.exp((logits[kept] - logits[kept[0]]) / divisor)
        return weights / weights.sum()

    if top_p < 1:
        n_kept = int(np.searchsorted(np.cumsum(softmax(order)), top_p)) + 1
        order = order[:n_kept]
    if min_p > 0:
        relative = np.exp(logits[order] - logits[order[0]])
        order = [i for i, ratio in zip(order, relative, strict=True) if ratio >= min_p]
    probabilities = np.zeros(len(logits))
    probabilities[order] = softmax(order, temperature)
    return probabilities


# --- the distribution ---


@pytest.mark.parametrize(
    "params",
    [
        PLAIN,
        PLAIN | {"temperature": 0.5},
        PLAIN | {"temperature": 3.0},
        PLAIN | {"top_k": 5},
        PLAIN | {"top_p": 0.7},
        PLAIN | {"min_p": 0.2},
        PLAIN | {"temperature": 0.8, "top_k": 12, "top_p": 0.95, "min_p": 0.05},
    ],
)
def test_frequencies_are_the_probabilities(params):
    logits = gaussian_logits(20, scale=1.5)
    probabilities = reference_probabilities(logits, **params)
    n_draws = 8_000
    draws = sampler(**params)
    counts = np.bincount([draws.sample(logits) for _ in range(n_draws)], minlength=20)
    assert counts[probabilities == 0].sum() == 0
    possible = probabilities > 0
    expected = n_draws * probabilities[possible]
    chi_squared = float(((counts[possible] - expected) ** 2 / expected).sum())
    degrees = int(possible.sum()) - 1
    # Five standard deviations of the chi-squared distribution above its mean: the seed is fixed, so it never flakes.
    assert chi_squared <= degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("scale", [0.01, 3.0])
@pytest.mark.parametrize(
    "params", [{}, {"top_k": 1}, {"top_k": 100_000}, {"top_k": 0}, {"top_k": 0, "top_p": 0.3}, {"top_p": 0.0}]
)
def test_draws_come_from_the_support(vocab_size, scale, params):
    logits = gaussian_logits(vocab_size, scale=scale)
    all_params = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05} | params
    support = set(np.flatnonzero(reference_probabilities(logits, **all_params)))
    draws = sampler(**all_params)
    drawn = {draws.sample(logits) for _ in range(5)}
    assert drawn <= support
    if len(support) == 1:
        assert drawn == support


@given(logits=finite_logits, k=st.integers(0, 50), p=st.floats(0, 1), min_p=st.floats(0, 1), t=st.floats(0, 1e9))
@settings(max_examples=300, deadline=None)
def test_any_logits_give_a_possible_id(logits, k, p, min_p, t):
    before = logits.copy()
    token = sampler(top_k=k, top_p=p, min_p=min_p, temperature=t, repeat_penalty=1.3).sample(logits, [0])
    assert 0 <= token < len(logits)
    assert logits[token] > -math.inf
    np.testing.assert_array_equal(logits, before)


@given(logits=finite_logits)
@settings(max_examples=100, deadline=None)
def test_top_k_1_is_greedy(logits):
    assert sampler(top_k=1).sample(logits) == sampler(temperature=0).sample(logits) == int(np.argmax(logits))


def test_ties_go_to_the_lowest_id():
    logits = np.zeros(20_000, np.float32)
    assert sampler(temperature=0).sample(logits) == 0
    draws = sampler(top_k=3, top_p=1.0)
    assert {draws.sample(logits) for _ in range(100)} == {0, 1, 2}
    logits[[77, 19_999]] = 1
    assert sampler(temperature=0).sample(logits) == 77


def test_top_k_spans_groups():
    """The largest may all lie in one column of the table of maxima, or in the tail that has no row."""
    for largest in (np.arange(10) * 2048, np.arange(20_490, 20_500)):
        logits = gaussian_logits(20_500, scale=0.1)
        logits[largest] = 5
        draws = sampler(top_k=10, top_p=1.0, min_p=0)
        assert {draws.sample(logits) for _ in range(200)} == set(largest.tolist())


# --- seeds ---


def test_same_seed_same_draws():
    logits = gaussian_logits(1000)
    first, again, other = (sampler(seed=seed) for seed in (7, 7, 8))
    draws = [first.sample(logits) for _ in range(50)]
    assert draws == [again.sample(logits) for _ in range(50)]
    assert draws != [other.sample(logits) for _ in range(50)]


def test_draws_are_philox():
    """Pinned: a release that draws other tokens from the same seed breaks its users' records."""
    logits = np.zeros(1000, np.float32)
    draws = sampler(seed=0, **PLAIN)
    uniform = np.random.Generator(np.random.Philox(0))
    assert [draws.sample(logits) for _ in range(20)] == [int(uniform.random() * 1000) for _ in range(20)]


def test_without_a_seed_one_is_taken_and_told():
    first, second = sampler(seed=None), sampler(seed=None)
    assert first.seed != second.seed
    logits = gaussian_logits(1000)
    repeated = sampler(seed=first.seed)
    assert [first.sample(logits) for _ in range(20)] == [repeated.sample(logits) for _ in range(20)]


# --- repetition penalty ---


def test_repeat_penalty():
    logits = np.array([2.0, 1.5, -1.0, -1.2], np.float32)
    greedy = sampler(temperature=0, repeat_penalty=2.0)
    assert greedy.sample(logits) == 0
    assert greedy.sample(logits, []) == 0
    assert greedy.sample(logits, [0]) == 1  # 2 / 2 < 1.5
    assert greedy.sample(logits, [0, 0, 1]) == 0  # once however often it stands there
    assert greedy.sample(np.array([-1.0, -1.5], np.float32), [0]) == 1  # -1 × 2
    np.testing.assert_array_equal(logits, np.array([2.0, 1.5, -1.0, -1.2], np.float32))


@pytest.mark.parametrize(("last_n", "expected"), [(1, 0), (2, 1), (0, 0), (-1, 1)])
def test_repeat_last_n(last_n, expected):
    logits = np.array([2.0, 1.5, 0.0], np.float32)
    assert sampler(temperature=0, repeat_penalty=2.0, repeat_last_n=last_n).sample(logits, [0, 2]) == expected


def test_extreme_penalties_stay_finite():
    logits = np.array([-3e38, -1.0, -math.inf], np.float32)
    assert sampler(repeat_penalty=1e30, temperature=0).sample(logits, [0, 1, 2]) in (0, 1)
    assert sampler(repeat_penalty=1e-300).sample(np.array([1.0, 2.0], np.float32), [0, 1]) in (0, 1)


@pytest.mark.parametrize("token", [-1, 4])
def test_history_beyond_the_vocabulary(token):
    with pytest.raises(ValueError, match=f"^history has token {token}, the vocabulary ends at 4$"):
        sampler(repeat_penalty=1.1).sample(np.zeros(4, np.float32), [token])


# --- edges ---


def test_temperature_extremes():
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    flat = sampler(**PLAIN | {"temperature": 1e9})
    counts = np.bincount([flat.sample(logits) for _ in range(3000)], minlength=3)
    assert counts.min() > 900
    for tiny in (1e-9, 1e-300, 5e-324):
        assert sampler(temperature=tiny).sample(logits) == 1


def test_huge_logits():
    logits = np.array([3.4e38, -3.4e38, 3.4e38], np.float32)
    draws = sampler(**PLAIN)
    assert {draws.sample(logits) for _ in range(50)} == {0, 2}


def test_minus_infinity_is_never_drawn():
    logits = np.full(30_000, -math.inf, np.float32)
    logits[[5, 29_999]] = 0
    for params in ({}, PLAIN, {"top_k": 0}, {"temperature": 1e9}):
        draws = sampler(**params)
        assert {draws.sample(logits) for _ in range(50)} == {5, 29_999}


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, math.nan, 1], r"^logits hold NaN \(first at token 1\)$"),
        ([math.inf, math.nan], r"^logits hold NaN"),
        ([0, math.inf], r"^logits hold \+inf \(first at token 1\)$"),
        ([-math.inf] * 3, r"^all logits are -inf: no token can be chosen$"),
    ],
)
def test_logits_without_an_answer(values, message, temperature):
    with pytest.raises(WoollyError, match=message):
        sampler(temperature=temperature).sample(np.array(values, np.float32))


@pytest.mark.parametrize(
    ("logits", "got"),
    [
        (np.zeros(3), r"float64 \(3,\)"),
        (np.zeros((1, 3), np.float32), r"float32 \(1, 3\)"),
        (np.zeros(0, np.float32), r"float32 \(0,\)"),
        ([0.0], "list"),
        (None, "NoneType"),
    ],
)
def test_logits_are_checked(logits, got):
    with pytest.raises(ValueError, match=rf"^logits must be a float32 array of shape \(vocab_size,\), got {got}$"):
        sampler().sample(logits)


# --- parameters ---


def test_defaults():
    assert SamplingParams() == SamplingParams(0.8, 40, 0.95, 0.05, 1.0, 64, None)
    with pytest.raises(AttributeError):
        SamplingParams().top_k = 1


@pytest.mark.parametrize(
    ("params", "kind", "message"),
    [
        ({"temperature": -0.1}, ValueError, r"^temperature must be finite and at least 0, got -0.1$"),
        ({"temperature": math.nan}, ValueError, r"^temperature must be finite and at least 0, got nan$"),
        ({"temperature": math.inf}, ValueError, r"^temperature must be finite and at least 0, got inf$"),
        ({"temperature": "hot"}, TypeError, r"^temperature must be a number, got 'hot'$"),
        ({"top_k": -1}, ValueError, r"^top_k must be at least 0 \(0 is off\), got -1$"),
        ({"top_k": 1.5}, TypeError, r"^top_k must be an integer, got 1.5$"),
        ({"top_k": True}, TypeError, r"^top_k must be an integer, got True$"),
        ({"top_p": 1.01}, ValueError, r"^top_p must be between 0 and 1 \(1 is off\), got 1.01$"),
        ({"min_p": -0.01}, ValueError, r"^min_p must be between 0 and 1 \(0 is off\), got -0.01$"),
        ({"repeat_penalty": 0}, ValueError, r"^repeat_penalty must be finite and above 0 \(1 is off\), got 0$"),
        ({"repeat_last_n": -2}, ValueError, r"^repeat_last_n must be at least -1 \(-1 is all, 0 is off\), got -2$"),
        ({"seed": -1}, ValueError, r"^seed must be between 0 and 2\*\*64 - 1, got -1$"),
        ({"seed": 2**64}, ValueError, r"^seed must be between 0 and"),
        ({"seed": 0.5}, TypeError, r"^seed must be an integer, got 0.5$"),
    ],
)
def test_parameters_are_checked(params, kind, message):
    with pytest.raises(kind, match=message):
        SamplingParams(**params)


def test_numpy_numbers_are_fine():
    assert Sampler(SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint64(2**64 - 1)))


@pytest.mark.parametrize("values", ["zeros", "one", "minus infinity but one", "huge", "random"])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 1e9},
        {"temperature": 1e-300},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"top_k": 1},
        {"top_k": 2**40},
        {"top_p": 0.0},
        {"min_p": 1.0},
        {"repeat_penalty": 1.5},
        {"repeat_penalty": 1e-30, "repeat_last_n": -1},
    ],
    ids=str,
)
def test_edges_give_a_possible_id(values: str, params: dict[str, object]) -> None:
    """Also with penalties and no history."""
    logits = {
        "zeros": np.zeros(50, np.float32),
        "one": np.zeros(1, np.float32),
        "minus infinity but one": np.where(np.arange(50) == 7, 0, -np.inf).astype(np.float32),
        "huge": np.linspace(-3e38, 3e38, 50, dtype=np.float32),
        "random": np.random.default_rng(0).standard_normal(50).astype(np.float32),
    }[values]
    for history in ([], [0], list(range(len(logits)))):
        token = Sampler(SamplingParams(seed=0, **params)).sample(logits, history)
        assert 0 <= token < len(logits)
        assert np.isfinite(logits[token])
