"""One exception hierarchy. The command line prints the message of an `R1Error` on one line and exits with `exit_code`."""


def one_line(error: BaseException, longest: int = 300) -> str:
    """The message of another library's error on one line; the name of its class if it has none."""
    text = " ".join(str(error).split())
    return (text if len(text) <= longest else f"{text[: longest - 3]}...") or type(error).__name__


class R1Error(Exception):
    """Base of every error a user can cause or fix. The message names the file, key or tensor and what to do."""

    exit_code = 2


class ConfigError(R1Error):
    """A config key, value or parallel layout that cannot work."""


class FolderBusy(ConfigError):
    """A run folder that another process writes into, as one of a lost node may for a while."""


class DataError(R1Error):
    """A prompt, corpus or tokenizer file that is missing, empty or malformed."""


class CheckpointError(R1Error):
    """A checkpoint or model folder that is missing, incomplete or corrupt."""


class ConversionError(R1Error):
    """A tensor without a counterpart, with a wrong shape, or used more than once."""


class RewardError(R1Error):
    """A reward that could not be computed (not a wrong answer: a broken grader)."""


class RolloutError(R1Error):
    """The rollout engine failed to start, died or answered nonsense."""

    exit_code = 1


class EngineLost(RolloutError):
    """The rollout engine's process is gone or answers no more. Another one can take its place."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.finished: dict = {}  #: index of a prompt -> its group, of those that were sampled before


class WeightSyncError(R1Error):
    """The rollout engine does not hold the trainer's weights, or does not reproduce its log-probabilities."""

    exit_code = 1


class NonFiniteUpdate(R1Error):
    """An update whose loss, gradient or weights are NaN or infinite. It was not made."""

    exit_code = 1


class ReplicasDiffer(R1Error):
    """Ranks that must hold the same weights hold different ones. Nothing was trained."""

    exit_code = 1


class StopRequested(R1Error):
    """A signal asked the run to stop, and it has saved: the same command goes on from there."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


class DeviceError(R1Error):
    """The chosen device cannot run here."""

    exit_code = 1
