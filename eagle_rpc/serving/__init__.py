"""Drafts in the form that serving engines load."""

from eagle_rpc.serving.engines import ServedForm, check_form, warn_of_engines
from eagle_rpc.serving.export import ExportedDraft, export_draft, load_export
from eagle_rpc.serving.stored_draft import StoredDraft

__all__ = [
    "ExportedDraft",
    "ServedForm",
    "StoredDraft",
    "check_form",
    "export_draft",
    "load_export",
    "warn_of_engines",
]
