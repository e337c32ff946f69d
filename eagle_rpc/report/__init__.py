"""What a run tells people: figures, progress, log lines, plots."""

from eagle_rpc.report.logs import setup_logging

__all__ = ["setup_logging"]
