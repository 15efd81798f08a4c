"""The health of a model's batch norm layers, as a table and in words."""

from jaxbn.doctor._report import Report, examine
from jaxbn.doctor._symptoms import Health

__all__ = ["Health", "Report", "examine"]
