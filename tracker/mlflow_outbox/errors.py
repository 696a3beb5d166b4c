"""Every error of mlflow-outbox: one tree, and each class says what the caller may do next."""

from __future__ import annotations


class OutboxError(Exception):
    """Raised when mlflow-outbox cannot do what it was asked; the base of all its errors."""


class InvalidSettings(OutboxError, ValueError):
    """Raised when an option or an environment variable has a value outside its range; correct it and start again."""


class DestinationError(OutboxError, ValueError):
    """Raised when a tracking URI has no form that MLflow knows; correct the URI."""


class OutboxUnusable(OutboxError, OSError):
    """Raised when an outbox directory cannot be made, or is not safe to use; the message says which check failed."""


class OutboxMismatch(OutboxUnusable):
    """Raised when a directory holds an outbox of another destination or of a newer format; it is left untouched."""


class EventRefused(OutboxError):
    """Raised when a logging call refuses its input under ``strict=True``; nothing was written and nothing else is lost.

    Attributes:
        reason: the counter under which the refusal is counted, for instance ``"bad_key"``.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class InvalidEvent(EventRefused, ValueError):
    """Raised when a key, value, step, time or path is not one that MLflow can hold; correct it and log again."""


class InvalidEventType(InvalidEvent, TypeError):
    """Raised when an argument has a type that cannot be logged; convert it and log again."""


class ArtifactRefused(EventRefused, OSError):
    """Raised when a file cannot be copied into the outbox: missing, unreadable, not a regular file, or too large."""


class OutboxFull(EventRefused):
    """Raised when the disk or the outbox is full and the memory kept for that case is full too; free some space."""


class CorruptSegment(OutboxError):
    """Raised when the header of a segment cannot be read; its bytes are kept and the other segments are delivered."""


class NewerFormat(OutboxError):
    """Raised when a file was written by a newer version; it is left on disk untouched, upgrade to deliver it."""


class TrackingUnavailable(OutboxError, ConnectionError):
    """Raised when a call needs an answer of MLflow and MLflow cannot be reached; ask again later."""


class LedgerUnavailable(OutboxError):
    """Raised when the ledger cannot be read or written now, for instance because it is locked; try again."""


class OutOfTime(OutboxError):
    """Raised when a time-out came before the work was done; nothing is lost, ask again with a longer one."""


class LeaseHeld(OutboxError):
    """Raised when another worker delivers this outbox; the message names it."""
