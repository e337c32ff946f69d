"""Drafts in the form that serving engines load."""

from eagle_rpc.serving.export import ExportedDraft, export_draft, load_export
from eagle_rpc.serving.stored_draft import StoredDraft

__all__ = ["ExportedDraft", "StoredDraft", "export_draft", "load_export"]
