"""What can go wrong through no fault of ours: each is one sentence with the field, the value and the remedy."""

from __future__ import annotations


class HeadwaterError(Exception):
    """An error a user can mend. A job that meets one exits with code 2 and is not retried."""


class SpecError(HeadwaterError):
    """The description of a dataset contradicts itself."""


class DataError(HeadwaterError):
    """The source's data is not what the spec says."""


class MissingPartitionError(HeadwaterError):
    """A job needs a partition that no job has written."""


class StalePartitionError(HeadwaterError):
    """A partition was made from sources, or under a spec, that are not those of now."""


class ContractError(HeadwaterError):
    """A frame about to be written does not have its table's columns, types or partition."""


class QualityError(HeadwaterError):
    """A Great Expectations suite refused a partition before it was published."""


class TransientError(Exception):
    """What a job needs gave way; nothing is wrong with the data or the spec.

    One sentence as well. A job that meets one exits with code 1 and is tried again.
    """
