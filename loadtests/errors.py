"""What can go wrong outside the requests themselves."""


class LoadTestError(Exception):
    """An experiment cannot run; the message says why."""


class ConfigError(LoadTestError):
    """A configuration is refused; the message names file and key."""
