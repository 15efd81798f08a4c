"""The health of a model's batch norm layers, as a table and in words."""

from jaxbn.doctor._health import Health
from jaxbn.doctor._report import Report, examine

__all__ = ["Health", "Report", "examine"]
