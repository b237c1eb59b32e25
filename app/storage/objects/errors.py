"""What goes wrong with object storage."""


class StorageAway(OSError):
    """Object storage does not answer, or refuses; the message names the bucket and says why."""


class Forbidden(StorageAway):
    """The service's keys may not do this."""


class NoBucket(StorageAway):
    """There is no such bucket."""


class ObjectChanged(Exception):
    """An object is not the one that was listed; the message names its key."""
