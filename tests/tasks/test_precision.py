"""Average precision against hand-made figures and against an oracle written in the most obvious way."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.core.errors import RequestError
from sfumato.tasks.detection import precision
from sfumato.tasks.detection.precision import Boxed, Convention, average_precision, cross_fit, fold_precision, match

FACE, OTHER, AWAY = (0, 0, 10, 10), (20, 0, 30, 10), (50, 50, 60, 60)
Row = tuple[float, float, float, float]
Scored = list[tuple[Row, float]]


def found(*pairs: tuple[Sequence[float], float]) -> Boxed:
    """Detections of one image from (box, score) pairs."""
    boxes = np.array([box for box, _ in pairs], np.float32).reshape(-1, 4)
    return Boxed(boxes, np.array([score for _, score in pairs], np.float32))


def truth(*boxes: Sequence[float]) -> np.ndarray:
    return np.array(boxes, np.float64).reshape(-1, 4)


# --- the oracle: thresholds, loops, lists -------------------------------------------------------------------------


def oracle_iou(a: Row, b: Row) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area_a = max(0.0, a[2] - a[0]) * max(0.0, a[3] - a[1])
    area_b = max(0.0, b[2] - b[0]) * max(0.0, b[3] - b[1])
    union = area_a + area_b - width * height
    return width * height / union if union > 0 else 0.0


def oracle_hits(scored: Scored, truths: list[Row], iou: float) -> list[tuple[float, bool]]:
    """(score, hit) of one image: best score first, each looks for its best truth, the first to claim it has it."""
    taken: set[int] = set()
    out = []
    for box, score in sorted(scored, key=lambda pair: -pair[1]):
        best, where = -1.0, -1
        for number, true in enumerate(truths):
            if oracle_iou(box, true) > best:
                best, where = oracle_iou(box, true), number
        hit = best >= iou and where not in taken
        if hit:
            taken.add(where)
        out.append((score, hit))
    return out


def oracle_ap(images: list[tuple[Scored, list[Row]]], iou: float = 0.5) -> float:
    """For every threshold a point (recall, precision); for every recall reached the best precision from there on."""
    everything = [pair for scored, truths in images for pair in oracle_hits(scored, truths, iou)]
    total = sum(len(truths) for _, truths in images)
    curve = []
    for threshold in sorted({score for score, _ in everything}, reverse=True):
        shown = [hit for score, hit in everything if score >= threshold]
        curve.append((sum(shown) / total, sum(shown) / len(shown)))
    area, before = 0.0, 0.0
    for recall in sorted({r for r, _ in curve}):
        area += (recall - before) * max(p for r, p in curve if r >= recall)
        before = recall
    return area


def as_arrays(images: list[tuple[Scored, list[Row]]]) -> tuple[list[Boxed], list[np.ndarray]]:
    boxed = [
        Boxed(np.array([b for b, _ in scored], float).reshape(-1, 4), np.array([s for _, s in scored], float))
        for scored, _ in images
    ]
    return boxed, [np.array(truths, float).reshape(-1, 4) for _, truths in images]


corner, side = st.integers(0, 6), st.integers(0, 5)
rows = st.builds(lambda x, y, w, h: (float(x), float(y), float(x + w), float(y + h)), corner, corner, side, side)
scored_rows = st.tuples(rows, st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9, 1.0]))
pictures = st.tuples(st.lists(scored_rows, max_size=6), st.lists(rows, max_size=4))
sets = st.lists(pictures, min_size=1, max_size=5).filter(lambda images: any(truths for _, truths in images))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(images=sets, iou=st.sampled_from([0.3, 0.5, 0.75]))
def test_ap_is_the_oracles(images: list[tuple[Scored, list[Row]]], iou: float) -> None:
    detections, truths = as_arrays(images)
    ap = average_precision(detections, truths, iou=iou)
    assert ap == pytest.approx(oracle_ap(images, iou), abs=1e-12)
    backwards = average_precision(detections[::-1], truths[::-1], iou=iou)
    assert backwards == pytest.approx(ap, abs=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(images=sets, seed=st.integers(0, 9))
def test_a_resample_is_the_ap_of_the_images_drawn(images: list[tuple[Scored, list[Row]]], seed: int) -> None:
    images = [image for image in images if image[1]]  # so that no resample is without truths
    detections, truths = as_arrays(images)
    n = len(images)
    samples = fold_precision([detections], [truths], resamples=4, seed=seed).samples
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=4)
    expected = [oracle_ap([im for im, times in zip(images, row, strict=True) for _ in range(times)]) for row in drawn]
    np.testing.assert_allclose(samples, expected, atol=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(rows, max_size=5), st.lists(rows, max_size=5))
def test_overlap_is_the_oracles(a: list[Row], b: list[Row]) -> None:
    got = precision.overlap(np.array(a, float).reshape(-1, 4), np.array(b, float).reshape(-1, 4))
    assert got.shape == (len(a), len(b))
    np.testing.assert_allclose(got, np.array([[oracle_iou(x, y) for y in b] for x in a]).reshape(got.shape))


# --- by hand ----------------------------------------------------------------------------------------------------


def test_all_found_is_one_and_nothing_found_is_zero() -> None:
    assert average_precision([found((FACE, 0.9))], [truth(FACE)]) == 1.0
    assert average_precision([found((FACE, 0.9), (AWAY, 0.1))], [truth(FACE)]) == 1.0  # the miss comes after the hit
    assert average_precision([found((AWAY, 0.9))], [truth(FACE)]) == 0.0
    assert average_precision([found()], [truth(FACE)]) == 0.0


def test_a_miss_before_and_between_by_hand() -> None:
    # Scores falling: miss, hit, miss, hit; 2 truths. Points (recall, precision): (0, 0) (1/2, 1/2) (1/2, 1/3) (1, 2/4).
    # Interpolated: 1/2 up to recall 1/2, and 1/2 from there to 1. Area 1/2.
    row = found((AWAY, 0.9), (FACE, 0.8), (AWAY, 0.7), (OTHER, 0.6))
    assert average_precision([row], [truth(FACE, OTHER)]) == pytest.approx(1 / 2)
    # Hit, miss, hit of 3 truths: (1/3, 1) (1/3, 1/2) (2/3, 2/3), the third never found. Area 1/3 + 1/3 * 2/3 = 5/9.
    row = found((FACE, 0.9), (AWAY, 0.8), (OTHER, 0.7))
    assert average_precision([row], [truth(FACE, OTHER, [80, 80, 90, 90])]) == pytest.approx(5 / 9)
    # Miss, hit, hit of 2 truths: (1/2, 1/2) (1, 2/3). Recall 1/2 counts at the better precision beyond it: area 2/3.
    row = found((AWAY, 0.9), (FACE, 0.8), (OTHER, 0.7))
    assert average_precision([row], [truth(FACE, OTHER)]) == pytest.approx(2 / 3)
    # Over two images: hit .9 in one, miss .8 and hit .7 in the other, 2 truths. Area 1/2 * 1 + 1/2 * 2/3 = 5/6.
    two = [found((FACE, 0.9)), found((AWAY, 0.8), (FACE, 0.7))]
    assert average_precision(two, [truth(FACE), truth(FACE)]) == pytest.approx(5 / 6)


def test_equal_scores_enter_together() -> None:
    # One hit and one miss at the same score: the only point is recall 1, precision 1/2, whichever is listed first.
    assert average_precision([found((AWAY, 0.5), (FACE, 0.5))], [truth(FACE)]) == 0.5
    assert average_precision([found((FACE, 0.5), (AWAY, 0.5))], [truth(FACE)]) == 0.5


def test_half_an_overlap_is_enough_and_less_is_not() -> None:
    # A box of 10 x 5 inside one of 10 x 10: IoU 50 / 100 = 1/2. Of 10 x 4.9: .49.
    assert match(truth([0, 0, 10, 5]), np.array([1.0]), truth(FACE)).tolist() == [True]
    assert match(truth([0, 0, 10, 4.9]), np.array([1.0]), truth(FACE)).tolist() == [False]
    assert match(truth([0, 0, 10, 4.9]), np.array([1.0]), truth(FACE), 0.4).tolist() == [True]


def test_a_truth_is_claimed_once_by_the_best_score_in_any_order() -> None:
    boxes = truth(FACE, [1, 0, 11, 10], FACE)
    assert match(boxes, np.array([0.3, 0.9, 0.5]), truth(FACE)).tolist() == [False, True, False]


def test_who_finds_its_best_truth_taken_does_not_get_the_second_best() -> None:
    # VOC's rule. Truths A = [0, 10] and B = [2, 12] across (both 10 high). Both detections equal A: IoU with A is 1,
    # with B 80 / 120 = .67. The second could have had B, but its best is A, and A is taken.
    assert match(truth(FACE, FACE), np.array([0.9, 0.8]), truth(FACE, [2, 0, 12, 10])).tolist() == [True, False]


def test_no_truths_no_detections_no_matches() -> None:
    assert match(truth(), np.array([]), truth(FACE)).shape == (0,)
    assert match(truth(FACE), np.array([0.5]), truth()).tolist() == [False]
    assert precision.overlap(truth(), truth(FACE)).shape == (0, 1)


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(RequestError, match="no truth to find"):
        average_precision([found((FACE, 0.9))], [truth()])
    with pytest.raises(RequestError, match="1 and 2 images"):
        average_precision([found()], [truth(FACE), truth(FACE)])
    with pytest.raises(RequestError, match=r"boxes of shape \[1, 5\]"):
        average_precision([Boxed(np.zeros((1, 5)), np.zeros(1))], [truth(FACE)])
    with pytest.raises(RequestError, match=r"scores of shape \[2\] for 1 boxes"):
        average_precision([Boxed(truth(FACE), np.zeros(2))], [truth(FACE)])
    with pytest.raises(RequestError, match="not finite"):
        average_precision([Boxed(truth(FACE), np.array([np.nan]))], [truth(FACE)])
    with pytest.raises(RequestError, match="2 and 1 folds"):
        fold_precision([[found()], [found()]], [[truth(FACE)]])
    with pytest.raises(RequestError, match="1 and 2 conventions and folds"):
        fold_precision([[found()]] * 2, [[truth(FACE)]] * 2, conventions=[Convention()])
    with pytest.raises(RequestError, match="no interval"):
        fold_precision([[found()]], [[truth(FACE)]], resamples=0)


# --- folds and intervals ------------------------------------------------------------------------------------------


def synthetic(images: int, skill: float, seed: int, shift: float = 0.0) -> tuple[list[Boxed], list[np.ndarray]]:
    """Images of one to three truths; each is found with probability `skill`, `shift` heights lower; and some misses."""
    rng = np.random.default_rng(seed)
    detections, truths = [], []
    for _ in range(images):
        n = rng.integers(1, 4)
        corners = rng.uniform(0, 200, (n, 2)) + np.arange(n)[:, None] * 300
        boxes = np.concatenate([corners, corners + rng.uniform(40, 90, (n, 2))], axis=1)
        seen = boxes[rng.random(n) < skill]
        height = seen[:, 3:] - seen[:, 1:2]
        seen = seen + rng.normal(0, 1, seen.shape) + height * np.array([0, shift, 0, shift])
        wrong = rng.uniform(1000, 1100, (rng.integers(0, 2), 4)) + np.array([0, 0, 150, 150])
        scores = np.concatenate([rng.beta(6, 1, len(seen)), rng.beta(2, 3, len(wrong))])
        detections.append(Boxed(np.concatenate([seen, wrong]), scores))
        truths.append(boxes)
    return detections, truths


def ten(skill: float = 0.85, size: int = 12, shift: float = 0.0) -> tuple[list[list[Boxed]], list[list[np.ndarray]]]:
    folds = [synthetic(size, skill, seed, shift) for seed in range(10)]
    return [d for d, _ in folds], [t for _, t in folds]


def test_folds_are_averaged_and_counted() -> None:
    detections, truths = ten()
    result = fold_precision(detections, truths)
    alone = [average_precision(d, t) for d, t in zip(detections, truths, strict=True)]
    np.testing.assert_allclose(result.folds, alone, atol=1e-12)
    assert result.mean == pytest.approx(np.mean(alone))
    assert result.images == 120
    assert result.faces == sum(len(t) for fold in truths for t in fold)
    assert (result.iou, result.level, result.resamples, result.seed) == (0.5, 0.95, 1000, 0)
    assert result.low < result.mean < result.high


def test_the_interval_is_that_of_the_level_and_repeats_with_the_seed() -> None:
    detections, truths = ten()
    result = fold_precision(detections, truths, level=0.8, seed=5)
    again = fold_precision(detections, truths, level=0.8, seed=5)
    assert result == again
    np.testing.assert_array_equal(result.samples, again.samples)
    assert ((result.samples >= result.low) & (result.samples <= result.high)).mean() == pytest.approx(0.8, abs=0.01)
    assert fold_precision(detections, truths, seed=6).low != fold_precision(detections, truths, seed=5).low


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    # Found or not, with no misses among the detections: AP is the share found, so the expected AP is .7 (times 1).
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(100):
        seen = rng.random(80) < 0.7
        detections = [found((FACE, 0.9)) if hit else found() for hit in seen]
        result = fold_precision([detections], [[truth(FACE)] * 80], resamples=200)
        inside += result.low <= 0.7 <= result.high
    assert 87 <= inside <= 99


def test_a_fold_without_truths_in_a_resample_is_left_out_of_that_mean() -> None:
    # Fold one: an image with its face found and one without faces; a quarter of resamples draw the second twice.
    detections = [[found((FACE, 0.9)), found()], [found((FACE, 0.9))]]
    truths = [[truth(FACE), truth()], [truth(FACE)]]
    result = fold_precision(detections, truths)
    assert (result.low, result.high) == (1.0, 1.0)
    with pytest.raises(RequestError, match="no truth"):
        fold_precision([[found()], [found((FACE, 0.9))]], [[truth()], [truth(FACE)]])


def test_drops_are_resampled_in_pairs() -> None:
    detections, truths = ten()
    clean = fold_precision(detections, truths)
    assert clean.drop(clean) == (0.0, 0.0, 0.0)
    fewer = [[Boxed(d.boxes[1:], d.scores[1:]) if i % 6 == 0 else d for i, d in enumerate(f)] for f in detections]
    arm = fold_precision(fewer, truths)
    mean, low, high = arm.drop(clean)
    assert mean == pytest.approx(clean.mean - arm.mean)
    assert 0 < low < mean < high
    assert high - low < (clean.high - clean.low) * 1.2
    with pytest.raises(RequestError, match="do not pair"):
        arm.drop(fold_precision(detections, truths, seed=1))


# --- the box convention -------------------------------------------------------------------------------------------


def test_a_convention_moves_and_scales_by_hand() -> None:
    # [10, 20, 30, 60] is 20 wide and 40 high round (20, 40). Moved by .1 * 20 = 2 and -.25 * 40 = -10 to (22, 30), and
    # scaled to 1.5 * 20 = 30 by .5 * 40 = 20: [7, 20, 37, 40].
    moved = Convention(0.1, -0.25, 1.5, 0.5).apply(np.array([[10, 20, 30, 60]], np.float32))
    np.testing.assert_allclose(moved, [[7, 20, 37, 40]])
    assert Convention().apply(truth()).shape == (0, 4)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.tuples(*[st.floats(-0.1, 0.1)] * 2, *[st.floats(0.85, 1.25)] * 2))
def test_a_planted_convention_is_found_exactly(numbers: tuple[float, float, float, float]) -> None:
    planted = Convention(*numbers)
    _, truths = synthetic(20, 1.0, 3)
    detections = [Boxed(t, np.full(len(t), 0.9)) for t in truths]
    fitted = Convention.fit(detections, [planted.apply(t) for t in truths])
    np.testing.assert_allclose([fitted.dx, fitted.dy, fitted.sx, fitted.sy], numbers, atol=1e-9)


def test_unsure_and_stray_detections_do_not_sway_a_convention() -> None:
    _, truths = synthetic(30, 1.0, 4)
    planted = Convention(0.0, 0.1, 1.0, 1.2)
    targets = [planted.apply(t) for t in truths]
    rng = np.random.default_rng(0)
    detections = []
    for t in truths:
        stray = np.concatenate([t + rng.normal(0, 40, t.shape) * [1, 1, 0, 0], t + 500])
        unsure = t + np.array([0, 12, 0, 12])
        scores = np.concatenate([np.full(len(t), 0.9), np.full(len(stray), 0.6), np.full(len(t), 0.49)])
        detections.append(Boxed(np.concatenate([t, stray, unsure]), scores))
    fitted = Convention.fit(detections, targets)
    np.testing.assert_allclose([fitted.dx, fitted.dy, fitted.sx, fitted.sy], [0, 0.1, 1.0, 1.2], atol=0.005)
    unsure_only = [Boxed(t, np.full(len(t), 0.5)) for t in truths]
    assert Convention.fit(unsure_only, targets) == Convention()
    assert Convention.fit([], []) == Convention()


def test_cross_fitting_never_looks_at_the_fold_it_is_for() -> None:
    detections, truths = ten(shift=0.2)
    rules = cross_fit(detections, truths)
    others = cross_fit(detections, [truths[0], *[[t + 5 for t in fold] for fold in truths[1:]]])
    changed = cross_fit(detections, [[t + 5 for t in truths[0]], *truths[1:]])
    assert len(rules) == 10
    assert changed[0] == rules[0]
    assert all(a != b for a, b in zip(changed[1:], rules[1:], strict=True))
    assert others[0] != rules[0]
    expected = Convention.fit([d for f in detections[1:] for d in f], [t for f in truths[1:] for t in f])
    assert rules[0] == expected
    assert rules[0].dy == pytest.approx(-0.2, abs=0.02)


def test_a_convention_repairs_boxes_that_are_drawn_another_way() -> None:
    detections, truths = ten(shift=0.3)  # IoU .7 / 1.3 = .54 before noise: many fall below one half
    as_detected = fold_precision(detections, truths)
    by_convention = fold_precision(detections, truths, conventions=cross_fit(detections, truths))
    assert by_convention.mean > as_detected.mean + 0.02
    assert by_convention.mean == pytest.approx(0.85, abs=0.05)  # all that was found at all
