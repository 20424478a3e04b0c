import pytest

from sfumato.attack.base import Outcome
from sfumato.auditing.verdict import Verdict, limits_of, verdict, worst
from sfumato.core.errors import RequestError

FLAT, RISING = [0.6] * 8, [0.5, 0.51, 0.52, 0.53, 0.54, 0.55, 0.56, 0.57]


def linkage(auc: float, tar: float = 0.01, curve: list[float] = FLAT, caught: str | None = None) -> Outcome:
    return Outcome(
        "identity linkage", "sfumato", 0.8, {"auc": auc, "tar at far 1e-2": tar}, {"auc": 0.5}, curve, caught
    )


def decoder(psnr: float, identity: float = 0.5) -> Outcome:
    return Outcome("decoder", "sfumato", 0.8, {"psnr": psnr, "identity auc": identity}, {"psnr": 12.0}, FLAT)


@pytest.mark.parametrize(
    ("outcomes", "wanted"),
    [
        ([linkage(0.51), decoder(12.1)], Verdict.NOTHING_FOUND),
        ([linkage(0.60), decoder(12.1)], Verdict.RESIDUAL),
        ([linkage(0.51), decoder(14.0)], Verdict.RESIDUAL),
        ([linkage(0.71), decoder(12.1)], Verdict.LEAKS),
        ([linkage(0.51, tar=0.06), decoder(12.1)], Verdict.LEAKS),
        ([linkage(0.51), decoder(15.1)], Verdict.LEAKS),
        ([linkage(0.51), decoder(12.1, identity=0.8)], Verdict.LEAKS),
        ([linkage(0.51, curve=RISING)], Verdict.INCONCLUSIVE),
        ([linkage(0.90, curve=RISING)], Verdict.LEAKS),
        ([linkage(0.51), Outcome("attributes", "sfumato", 0.8, {"sex": 0.9}, {"sex": 0.5})], Verdict.RESIDUAL),
        (
            [linkage(0.51), Outcome("averaging", "sfumato", 0.8, {"psnr of 64": 18}, {"psnr of 64": 12})],
            Verdict.RESIDUAL,
        ),
        (
            [linkage(0.51), Outcome("noise reuse", "sfumato", 0.8, {"slope": 1.2}, {"slope": 1.0})],
            Verdict.NOTHING_FOUND,
        ),
        ([linkage(0.51), linkage(0.51, caught="the noise repeats")], Verdict.BROKEN),
    ],
)
def test_the_best_attacker_decides(outcomes: list[Outcome], wanted: Verdict) -> None:
    assert verdict(outcomes) is wanted
    assert str(wanted).split(":")[0].lower() in ("broken", "leaks", "inconclusive", "residual", "nothing found")


def test_attackers_that_fail_on_clean_outputs_prove_nothing() -> None:
    weak_eyes = Outcome("decoder", "clean head output", None, {"psnr": 20.0}, {"psnr": 12.0}, FLAT)
    strong_eyes = Outcome("decoder", "clean head output", None, {"psnr": 25.0}, {"psnr": 12.0}, FLAT)
    assert verdict([decoder(12.1)], [weak_eyes]) is Verdict.INCONCLUSIVE
    assert verdict([decoder(12.1)], [strong_eyes, linkage(0.6)]) is Verdict.INCONCLUSIVE
    assert verdict([decoder(12.1)], [strong_eyes, linkage(0.95)]) is Verdict.NOTHING_FOUND
    assert verdict([decoder(16.0)], [weak_eyes]) is Verdict.LEAKS, "what weak attackers get, strong ones get too"


def test_nothing_is_said_of_what_was_not_audited() -> None:
    with pytest.raises(RequestError, match="not audited"):
        verdict([])


def test_own_limits() -> None:
    assert verdict([linkage(0.6)], limits={"auc": 0.55}) is Verdict.LEAKS
    assert worst([linkage(0.6), linkage(0.55, tar=0.04), decoder(13.0, 0.7)]) == {"auc": 0.7, "tar": 0.04, "psnr": 1.0}


def test_limits_are_read() -> None:
    assert limits_of(["tar=0.05", "psnr=2"]) == {"tar": 0.05, "psnr": 2.0}


@pytest.mark.parametrize("text", ["tar", "tar=", "far=0.1", "tar=low", "=1", "tar=nan"])
def test_other_limits_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="limit"):
        limits_of([text])
