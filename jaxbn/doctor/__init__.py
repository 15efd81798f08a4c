"""Diagnoses the batch norm layers of a model."""

from jaxbn.doctor._health import Health
from jaxbn.doctor._report import Report, examine

__all__ = ["Health", "Report", "examine"]
