"""Why a request gets no answer: a status of HTTP, the same as one of gRPC, a reason for the metrics, a sentence.

    400 INVALID_ARGUMENT    input       not a request of the protocol, not a picture, an alpha that is none
    400 INVALID_ARGUMENT    gone        a client that went away before it had sent all of it
    401 UNAUTHENTICATED     key         no key, or another one
    403 PERMISSION_DENIED   policy      past the ledger's policy: alpha, bits or releases
    404 NOT_FOUND           name        another model, another version, another path
    408 DEADLINE_EXCEEDED   slow-body   a request that did not arrive in time
    413 RESOURCE_EXHAUSTED  too-large   a body past the limit
    429 RESOURCE_EXHAUSTED  busy        as many under way and waiting as may be; Retry-After says when
    500 UNKNOWN             internal    a fault of ours
    502 INTERNAL            wrong       the server outside refused the release, or answered what no such model answers
    503 UNAVAILABLE         down        the server outside cannot be reached or is not ready
    503 UNAVAILABLE         ledger      the ledger cannot be written, so nothing may leave
    503 UNAVAILABLE         stopping    this gateway is about to end
    504 DEADLINE_EXCEEDED   slow        the server outside, or the whole request, took too long

No sentence holds content: neither of the request, nor what the server outside said.
"""

from sfumato.core.errors import LedgerError, PolicyError, RequestError, ServerError

AGAIN = 1  # seconds after which a request that was refused for want of room may be tried again

GRPC = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED",
    500: "UNKNOWN",
    502: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_OUTSIDE = {
    "down": (503, "down", "the server outside cannot be reached"),
    "busy": (503, "down", "the server outside is not ready"),
    "slow": (504, "slow", "the server outside did not answer in time"),
    "refused": (502, "wrong", "the server outside refused the release: it may serve another model"),
    "wrong": (502, "wrong", "the server outside answered what no such model answers"),
}


class RefusedError(Exception):
    """What the client is told. `again`: seconds after which another try makes sense."""

    def __init__(self, status: int, reason: str, text: str, *, again: int | None = None) -> None:
        super().__init__(text)
        self.status, self.reason, self.text, self.again = status, reason, text, again

    @property
    def grpc(self) -> str:
        """The status of gRPC, by name."""
        return GRPC[self.status]


def refusal(error: BaseException) -> RefusedError:
    """What an error is to the client."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, PolicyError):
        return RefusedError(403, "policy", f"{error.got}; wanted: {error.wanted}")
    if isinstance(error, LedgerError):
        return RefusedError(503, "ledger", "the ledger cannot be written, so nothing may leave", again=AGAIN)
    if isinstance(error, ServerError):
        status, reason, text = _OUTSIDE[error.status]
        return RefusedError(status, reason, text, again=AGAIN if status == 503 else None)
    if isinstance(error, RequestError):
        return RefusedError(400, "input", "; ".join(str(error).split("\n  ")))
    if isinstance(error, TimeoutError):
        return RefusedError(504, "slow", "the request took too long")
    return RefusedError(500, "internal", "a fault of this gateway")
